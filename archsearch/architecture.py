"""The architecture file: which network, and how wide each of its channel groups is.

One small YAML file is all that a training job needs: model, arguments, input shape and widths, with the cost
and the provenance beside them. A file names its model and never brings code: a name that holds a colon is a
string here like any other.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from archsearch.bounded_yaml import MAX_INT, Place, dotted, shown
from archsearch.errors import SpecError
from archsearch.files import Location, read_yaml, write_yaml

FORMAT: Final = 1
MAX_GROUPS: Final = 4096
MAX_WIDTH: Final = 65_536
MAX_INPUT_SIZE: Final = 4096
MAX_ARGUMENTS: Final = 64
MAX_TEXT: Final = 1024
MAX_LIST: Final = 64
CHANNELS_A_LINE: Final = 24
MAX_PROVENANCE_LEVELS: Final = 4
MAX_PROVENANCE_VALUES: Final = 1024
KEY_DIGITS: Final = 16

# Anything that prints on one line and in one direction: no control, line end, joiner or bidirectional mark.
_UNSEEN = r"\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff"
_NAME_PATTERN = rf"^[^\s{_UNSEEN}]([^{_UNSEEN}]*[^\s{_UNSEEN}])?$"
_WORD_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*$"

Argument = bool | int | float | str | None | list[int]
"""What a model's factory may be given from a file."""


def _argument(value: object) -> object:
    """Check one value of ``arguments``."""
    if isinstance(value, (list, tuple)):
        if len(value) > MAX_LIST or any(type(part) is not int or abs(part) > MAX_INT for part in value):
            raise ValueError(f"a list must hold at most {MAX_LIST} integers")
        return list(value)
    return _scalar(value)


def _scalar(value: object) -> object:
    if value is None or type(value) is bool:
        return value
    if type(value) is int:
        if abs(value) > MAX_INT:
            raise ValueError("an integer must fit into 64 bits")
    elif type(value) is float:
        if not math.isfinite(value):
            raise ValueError("a number must be finite")
    elif type(value) is str:
        if len(value) > MAX_TEXT:
            raise ValueError(f"a text must have at most {MAX_TEXT} characters")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("a text must be valid Unicode")
    else:
        raise ValueError("must be true, false, null, a number or a text")
    return value


def _provenance(value: object) -> object:
    """Check the free-form part: plain values, few and flat enough to stay readable."""
    values = 0

    def plain(value: object, levels: int) -> object:
        nonlocal values
        values += 1
        if values > MAX_PROVENANCE_VALUES:
            raise ValueError(f"must hold at most {MAX_PROVENANCE_VALUES} values")
        if not isinstance(value, (Mapping, list, tuple)):
            return _scalar(value)
        if levels == 0:
            raise ValueError(f"must not be nested deeper than {MAX_PROVENANCE_LEVELS} levels")
        if isinstance(value, Mapping):
            for name in value:
                if type(name) is not str or not 1 <= len(name) <= 64 or not name.isprintable():
                    raise ValueError(f"the name {shown(name)} must be a text of 1 to 64 printable characters")
            return {name: plain(part, levels - 1) for name, part in value.items()}
        return [plain(part, levels - 1) for part in value]

    if not isinstance(value, Mapping):
        raise ValueError("must be a mapping")
    return plain(value, MAX_PROVENANCE_LEVELS)


def _format(value: int) -> int:
    if value != FORMAT:
        raise ValueError(f"is {value}, but this version of archsearch reads format {FORMAT}")
    return value


def _positions(value: object) -> object:
    """Read lines of rising positions and runs, ``["0-3,5", "9"]``, as a tuple of integers."""
    if not isinstance(value, list) or not all(type(line) is str for line in value):
        return value
    if not value:
        return ()
    positions: list[int] = []
    for run in ",".join(value).split(","):
        first, dash, last = run.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(run) > 11:
            raise ValueError(f"{shown(run)} must be a position such as 5, or a run such as 0-3")
        start, end = int(first), int(last or first)
        if start > end or end >= MAX_WIDTH or (positions and start <= positions[-1]):
            raise ValueError(f"{shown(run)}: positions must rise, and stay below {MAX_WIDTH}")
        positions.extend(range(start, end + 1))
    return tuple(positions)


def _runs(positions: Sequence[int]) -> list[str]:
    """Write rising positions as lines of runs."""
    runs = []
    for _, run in itertools.groupby(enumerate(positions), key=lambda pair: pair[1] - pair[0]):
        members = [position for _, position in run]
        runs.append(f"{members[0]}-{members[-1]}" if len(members) > 1 else str(members[0]))
    return [",".join(runs[at : at + CHANNELS_A_LINE]) for at in range(0, len(runs), CHANNELS_A_LINE)]


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


_SCALAR_SCHEMAS: list[dict[str, Any]] = [
    {"type": ["boolean", "number", "null"]},
    {"type": "string", "maxLength": MAX_TEXT},
]
_NO_OTHER: dict[str, Any] = {"additionalProperties": False}  # a name that breaks the pattern is no field
Name = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=_NAME_PATTERN)]
Word = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=_WORD_PATTERN)]
Channels = Annotated[int, Field(ge=1, le=MAX_WIDTH)]
Dimension = Annotated[int, Field(ge=1, le=MAX_INPUT_SIZE)]
CheckedArgument = Annotated[
    Argument,
    PlainValidator(_argument),
    WithJsonSchema(
        {"anyOf": [*_SCALAR_SCHEMAS, {"type": "array", "items": {"type": "integer"}, "maxItems": MAX_LIST}]}
    ),
]
Positions = Annotated[
    tuple[int, ...],
    BeforeValidator(_positions),
    PlainSerializer(_runs),
    WithJsonSchema({"type": "array", "items": {"type": "string", "pattern": "^[0-9,-]+$"}}),
]
Format = Annotated[int, AfterValidator(_format), WithJsonSchema({"type": "integer", "const": FORMAT})]
Provenance = Annotated[dict[str, Any], PlainValidator(_provenance), WithJsonSchema({"type": "object"})]


class _Part(BaseModel):
    """Nothing is converted, nothing is ignored, nothing changes afterwards."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Width(_Part):
    """How many channels of a group are kept."""

    width: Annotated[int, Field(ge=0, le=MAX_WIDTH)] = Field(
        description="Channels kept; 0 for all groups of a residual branch that is gone."
    )
    size: Channels = Field(description="Channels of the reference model.")

    @model_validator(mode="after")
    def _fits(self) -> Width:
        if self.width > self.size:
            raise ValueError(f"width {self.width} is more than the size {self.size} of the reference")
        return self


class Amount(_Part):
    """What the architecture needs of something, beside what the reference model needs."""

    value: Annotated[int, Field(ge=0, le=MAX_INT)]
    reference: Annotated[int, Field(ge=1, le=MAX_INT)]

    @model_validator(mode="after")
    def _is_not_more(self) -> Amount:
        if self.value > self.reference:
            raise ValueError(f"value {self.value} is more than the reference's {self.reference}")
        return self

    @property
    def keep(self) -> float:
        """The share of the reference's that stays, in [0, 1]."""
        return self.value / self.reference


class Cost(_Part):
    """What the architecture costs for one input; each part may be unknown."""

    macs: Amount | None = Field(default=None, description="Multiply-adds.")
    params: Amount | None = Field(default=None, description="Parameters.")
    peak_activation_bytes: Amount | None = Field(default=None, description="Largest sum of live activations.")


class Architecture(_Part):
    """A network by name and widths; ``read`` and ``write`` are its file.

    Two architectures with the same ``key`` are the same network, whatever their cost and provenance say.
    """

    format: Format = Field(description="Version of this layout.")
    model: Name = Field(
        description="resnet56, torchvision/NAME, timm/NAME, package.module:factory, file.py:factory."
    )
    arguments: dict[Word, CheckedArgument] = Field(
        default_factory=dict,
        max_length=MAX_ARGUMENTS,
        description="Keyword arguments of the model's factory.",
        json_schema_extra=_NO_OTHER,
    )
    input_shape: Annotated[tuple[Dimension, ...], BeforeValidator(_tuple)] = Field(
        min_length=1, max_length=5, description="Shape of one input without the batch, such as (C, H, W)."
    )
    widths: dict[Name, Width] = Field(
        max_length=MAX_GROUPS,
        description="By channel group, in the order of use.",
        json_schema_extra=_NO_OTHER,
    )
    gathers: dict[Name, Positions] = Field(
        default_factory=dict,
        max_length=MAX_GROUPS,
        description="The channels of a shared stream that a norm reads, by norm: positions and runs.",
        json_schema_extra=_NO_OTHER,
    )
    whole_groups: bool = Field(
        default=False,
        description="Whether a unit of a grouped convolution is one of its groups, not a channel of each.",
    )
    cost: Cost = Field(default_factory=Cost, description="For one input, beside the reference model's.")
    provenance: Provenance = Field(default_factory=dict, description="Where it comes from; decides nothing.")

    @classmethod
    def create(
        cls,
        *,
        model: str,
        input_shape: Sequence[int],
        widths: Mapping[str, int],
        sizes: Mapping[str, int],
        arguments: Mapping[str, object] | None = None,
        gathers: Mapping[str, Sequence[int]] | None = None,
        whole_groups: bool = False,
        cost: Cost | Mapping[str, object] | None = None,
        provenance: Mapping[str, object] | None = None,
    ) -> Architecture:
        """Build an architecture from what a search found.

        Args:
            model: The model's name.
            input_shape: One input's shape without the batch, such as ``(C, H, W)``.
            widths: Channels kept, for every group of ``sizes``; their order is kept.
            sizes: Channels of the reference model by group.
            arguments: Keyword arguments of the model's factory.
            gathers: The channels that norms read from a shared stream, by norm.
            whole_groups: Whether a unit of a grouped convolution is one of its groups.
            cost: ``Cost``, or the same as a mapping.
            provenance: Free plain values: method, target, data, seed, versions, date, command.

        Raises:
            SpecError: If a value breaks a rule; says which.
        """
        if widths.keys() != sizes.keys():
            alone = sorted(widths.keys() ^ sizes.keys())
            raise SpecError(f"widths: the group {shown(alone[0])} has a width or a size but not both")
        data: dict[str, Any] = {
            "format": FORMAT,
            "model": model,
            "arguments": dict(arguments or {}),
            "input_shape": tuple(input_shape),
            "widths": {name: {"width": width, "size": sizes[name]} for name, width in widths.items()},
            "gathers": {name: tuple(channels) for name, channels in (gathers or {}).items()},
            "whole_groups": whole_groups,
            "cost": cost if cost is not None else {},
            "provenance": dict(provenance or {}),
        }
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            place, reason = _first(error)
            raise SpecError(f"architecture: {dotted(place)}: {reason}") from error

    @classmethod
    def read(cls, path: Location) -> Architecture:
        """Read an architecture file.

        Raises:
            SpecError: As ``file:line: field: reason``, if the file breaks a rule, or was edited without
                removing its key.
        """
        document = read_yaml(path)
        data = dict(document.data)
        key = data.pop("key", None)
        try:
            architecture = cls.model_validate(data)
        except ValidationError as error:
            raise document.error(*_first(error)) from error
        if "key" in document.data and key != architecture.key:
            raise document.error(
                ("key",),
                f"does not belong to this content (which has {architecture.key}): the file was edited;"
                " remove the line 'key' to accept the edit",
            )
        return architecture

    def write(self, path: Location) -> None:
        """Write the file, atomically; the same architecture gives the same bytes.

        Raises:
            ResourceError: If the system refuses.
        """
        write_yaml(path, self._content())

    @property
    def key(self) -> str:
        """The digits that name the network: a hash of what decides it."""
        content = {
            "model": self.model,
            "arguments": self.arguments,
            "input_shape": self.input_shape,
            "widths": {name: group.width for name, group in self.widths.items()},
            **({"gathers": self.gathers} if self.gathers else {}),
            **({"whole_groups": True} if self.whole_groups else {}),
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]

    @property
    def keep(self) -> float | None:
        """The share of the reference's MACs that stays, in [0, 1]; ``None`` where the file has no MACs."""
        return self.cost.macs.keep if self.cost.macs else None

    def check_groups(self, sizes: Mapping[str, int]) -> None:
        """Check that the widths are for the groups of a model as it was traced.

        Args:
            sizes: The traced model's channels by group.

        Raises:
            SpecError: If a group is unknown, missing or of another size; says the first, and how many more.
        """
        problems = [
            f"widths.{name}: {self.model} has no such group{_nearest(name, sizes)}"
            for name in self.widths
            if name not in sizes
        ]
        problems += [f"widths.{name}: is missing" for name in sizes if name not in self.widths]
        problems += [
            f"widths.{name}.size: is {group.size}, but the group of {self.model} has {sizes[name]}"
            for name, group in self.widths.items()
            if sizes.get(name, group.size) != group.size
        ]
        if problems:
            raise SpecError(f"{problems[0]}{_and_more(len(problems))}")

    def _content(self) -> dict[str, Any]:
        """Return what the file holds, in the order of the file."""
        data = self.model_dump(mode="json")
        data["cost"] = {name: amount for name, amount in data["cost"].items() if amount is not None}
        content = {"format": data.pop("format"), "key": self.key, **data}
        return {name: part for name, part in content.items() if part or name == "widths"}


def schema() -> dict[str, Any]:
    """Return the JSON schema of the architecture file, as published in ``architecture.schema.json``."""
    made = Architecture.model_json_schema()
    key = {
        "type": "string",
        "pattern": f"^[0-9a-f]{{{KEY_DIGITS}}}$",
        "description": "Hash of model, arguments, input_shape, widths, gathers and whole_groups; "
        "remove it after an edit.",
    }
    properties = made.pop("properties")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **made,
        "properties": {"format": properties.pop("format"), "key": key, **properties},
    }


_REASONS: dict[str, str] = {
    "missing": "is missing",
    "int_type": "must be an integer",
    "string_type": "must be a text",
    "string_unicode": "must be valid Unicode",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
}
_PATTERNS: dict[str, str] = {
    _NAME_PATTERN: "must be printable, without spaces at its ends",
    _WORD_PATTERN: "must be letters, digits and _ and start with no digit",
}


def _first(error: ValidationError) -> tuple[Place, str]:
    """Return the place and the reason of the first of pydantic's errors, in our words."""
    errors = error.errors(include_url=False, include_context=True)
    # A misspelt field is also a missing one; the misspelling is what helps.
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    place = tuple(part for part in first["loc"] if part != "[key]")
    if first["type"] == "extra_forbidden":
        reason = f"unknown field{_nearest(str(place[-1]), _fields(place[:-1]))}"
    elif first["type"] == "string_pattern_mismatch":
        reason = _PATTERNS[first["ctx"]["pattern"]]
    elif first["type"] == "value_error":
        reason = str(first["ctx"]["error"])
    else:
        reason = first["msg"].replace("Input should be", "must be").replace("should", "must")
        reason = _REASONS.get(first["type"], reason[0].lower() + reason[1:])
        if first["type"] not in ("missing", "too_long", "too_short"):
            reason += f" (got {shown(first['input'])})"
    return place, reason + _and_more(len(errors))


def _fields(place: Place) -> list[str]:
    """Return the fields that may stand at a place of the file."""
    if not place:
        return ["key", *Architecture.model_fields]
    if place[0] == "widths":
        return list(Width.model_fields)
    return list((Cost if len(place) == 1 else Amount).model_fields)


def _nearest(name: str, known: Mapping[str, object] | list[str]) -> str:
    near = difflib.get_close_matches(name[:256], list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _and_more(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""
