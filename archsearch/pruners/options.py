"""A method's hyper-parameters, as they are typed or given, to a pruner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from archsearch.errors import UnknownNameError, UsageError
from archsearch.pruners.pruner import PRUNERS, Pruner


def make_pruner(name: str, options: Mapping[str, Any] | None = None) -> Pruner:
    """Return a pruner with some hyper-parameters changed.

    Args:
        name: The registered method.
        options: Values by hyper-parameter; a text, as a command line gives it, is read as the field's type.

    Raises:
        UsageError: If the method or one of the hyper-parameters is unknown, or a value cannot be.
    """
    kind: Any = PRUNERS[name]
    types, known = get_type_hints(kind), [field.name for field in fields(kind)]
    values = {}
    for option, value in (options or {}).items():
        if option not in known:
            raise UnknownNameError(f"option of {name}", option, known, "" if known else "it has none")
        try:
            values[option] = TypeAdapter(types[option]).validate_python(value)
        except ValidationError as error:
            raise UsageError(f"{name}: {option} is {value!r}: {error.errors()[0]['msg']}") from None
    pruner: Pruner = kind(**values)
    return pruner


def options_of(pruner: Pruner) -> dict[str, Any]:
    """Return all hyper-parameters of a pruner as plain values."""
    described: Any = pruner
    return {field.name: getattr(described, field.name) for field in fields(described)}
