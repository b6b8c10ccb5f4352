"""The networks of torchvision and timm as model sources."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

from torch import nn

from archsearch.errors import UnknownNameError, UsageError
from archsearch.models.source import ModelSource, named_arguments

# Left unset, these two warn about an initialisation that is to change; True is what they do today.
_TORCHVISION_ARGUMENTS = {"googlenet": {"init_weights": True}, "inception_v3": {"init_weights": True}}


def torchvision_names() -> list[str]:
    """Return the names of torchvision's classifiers, each with ``torchvision/`` in front."""
    from torchvision import models

    return [f"torchvision/{name}" for name in models.list_models(module=models)]


def torchvision_source(name: str) -> ModelSource:
    """Return the torchvision classifier called ``torchvision/NAME``, without trained weights.

    Raises:
        UnknownNameError: If torchvision has no such classifier.
    """
    from torchvision import models

    name = name.lower()
    if name not in (names := torchvision_names()):
        raise UnknownNameError("model", name, names)
    short = name.removeprefix("torchvision/")
    builder = models.get_model_builder(short)
    size = 299 if short == "inception_v3" else 224
    return ModelSource(
        name=name,
        origin="torchvision",
        factory=builder,
        input_shape=(3, size, size),
        num_classes=1000,
        arguments=_TORCHVISION_ARGUMENTS.get(short, {}),
        # A builder hands its **kwargs on to the class that it declares to return.
        takes=named_arguments(inspect.signature(builder).return_annotation),
        classes_argument="num_classes",
        size_argument="image_size" if short.startswith("vit_") else None,
    )


def timm_names(pattern: str = "timm/*") -> list[str]:
    """Return the names of timm's networks that match ``pattern``, each with ``timm/`` in front.

    Raises:
        UsageError: If timm is not installed.
    """
    return [f"timm/{name}" for name in _timm().list_models(pattern.removeprefix("timm/"))]


def timm_source(name: str) -> ModelSource:
    """Return the timm network called ``timm/NAME``, without trained weights.

    Raises:
        UsageError: If timm is not installed.
        UnknownNameError: If timm has no such network.
    """
    timm = _timm()
    short = name.removeprefix("timm/")
    if not timm.is_model(short):
        raise UnknownNameError("model", name, timm_names())
    try:
        config = timm.get_pretrained_cfg(short, allow_unregistered=False)
    except RuntimeError:  # the architecture is known, the tag behind its dot is not
        tagged = timm.list_models(short.partition(".")[0] + ".*", pretrained=True)
        raise UnknownNameError("model", name, [f"timm/{known}" for known in tagged]) from None

    def factory(**arguments: Any) -> nn.Module:
        return timm_model(short, arguments)

    return ModelSource(
        name=name,
        origin="timm",
        factory=factory,
        input_shape=tuple(config.input_size),
        num_classes=config.num_classes or None,  # 0 stands for a network without a classifier
        classes_argument="num_classes",
        channels_argument="in_chans",
        size_argument="img_size" if config.fixed_input_size else None,
    )


def timm_model(name: str, arguments: dict[str, Any], pretrained: bool = False) -> nn.Module:
    """Build timm's network ``name``.

    Raises:
        UsageError: If an argument is one of ``timm.create_model`` itself, which would load files or fetch
            weights, and an architecture file may not ask for that.
    """
    timm = _timm()
    if reserved := [word for word in arguments if word in named_arguments(timm.create_model)]:
        raise UsageError(f"timm/{name} takes no argument {' or '.join(map(repr, reserved))} here")
    model: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
    return model


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise UsageError(
            "models named timm/NAME need timm, which is not installed: pip install 'archsearch[timm]'"
        ) from error
    module: ModuleType = timm
    return module
