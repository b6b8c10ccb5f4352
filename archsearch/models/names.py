"""From the name of a model to where it comes from."""

from __future__ import annotations

import fnmatch

from archsearch.errors import UnknownNameError, UsageError
from archsearch.models.factory import factory_source
from archsearch.models.libraries import timm_names, timm_source, torchvision_names, torchvision_source
from archsearch.models.registry import MODELS
from archsearch.models.source import ModelSource, default_of, named_arguments, takes_any

OTHER_NAMES = "(or torchvision/NAME, timm/NAME, package.module:factory, path/file.py:factory)"


def resolve(name: str, *, trust_code: bool = False) -> ModelSource:
    """Return the source of the model called ``name``; nothing is built and nothing is fetched.

    Args:
        name: ``resnet56``, ``torchvision/NAME``, ``timm/NAME``, ``package.module:factory`` or
            ``path/file.py:factory``.
        trust_code: Whether the last two, which import the user's code, are allowed.

    Raises:
        UnknownNameError: If there is no such model; says the nearest.
        UsageError: If code is not trusted or cannot be imported, or timm is not installed.
    """
    if ":" in name:
        if not trust_code:
            raise UsageError(
                f"'{name}' is code that would run here: add --trust-code if you trust it "
                "(from Python: trust_code=True, or pass the network itself)"
            )
        return factory_source(name)
    if name.startswith("torchvision/"):
        return torchvision_source(name)
    if name.startswith("timm/"):
        return timm_source(name)
    if name.endswith(".py"):
        raise UsageError(f"'{name}' is a file: say which function in it builds the network, {name}:factory")
    return _zoo_source(name)


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of the zoo and torchvision that match a shell pattern such as ``"*resnet*"``.

    timm has more than a thousand: they are listed only if the pattern begins with ``timm/``.

    Raises:
        UsageError: If timm is asked for and not installed.
    """
    if pattern.startswith("timm/"):
        return timm_names(pattern)
    return fnmatch.filter([*MODELS, *torchvision_names()], pattern)


def _zoo_source(name: str) -> ModelSource:
    if name not in MODELS:
        elsewhere = f"torchvision/{name.lower()}"
        hint = f"(or {elsewhere})" if elsewhere in torchvision_names() else OTHER_NAMES
        raise UnknownNameError("model", name, MODELS, hint)
    factory = MODELS[name]
    takes = named_arguments(factory)
    # The zoo is written for 32x32 colour images, and a model for others has them as its defaults.
    size = default_of(factory, "input_size") or 32
    return ModelSource(
        name=name,
        origin="zoo",
        factory=factory,
        input_shape=(default_of(factory, "in_channels") or 3, size, size),
        num_classes=default_of(factory, "num_classes"),
        takes=None if takes_any(factory) else takes,
        classes_argument="num_classes",
        channels_argument="in_channels",
        size_argument="input_size" if "input_size" in takes else None,
    )
