"""Where a network comes from: one shape for the zoo, torchvision, timm and a user's own factory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from archsearch.errors import ArchsearchError, UsageError

Origin = Literal["zoo", "torchvision", "timm", "code"]


@dataclass(frozen=True)
class ModelSource:
    """A factory of networks with what is known about it before anything is built.

    Args:
        name: The canonical spelling, which goes into an architecture file.
        origin: Who wrote the factory; ``"code"`` is the user's own.
        factory: Called with keyword arguments, returns a fresh network.
        input_shape: Native ``(C, H, W)`` of one input; ``None`` where only the user knows.
        num_classes: Native number of outputs; ``None`` where only the user knows.
        arguments: What the factory is given unless ``build`` says otherwise.
        takes: The arguments that the factory accepts; ``None`` where it accepts any.
        classes_argument: The factory's word for the number of classes, if it has one.
        channels_argument: Its word for the channels of the input, if it has one.
        size_argument: Its word for the height and width of the input in pixels. Networks without one run
            at any size.
    """

    name: str
    origin: Origin
    factory: Callable[..., nn.Module] = field(repr=False)
    input_shape: tuple[int, int, int] | None
    num_classes: int | None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    takes: tuple[str, ...] | None = None
    classes_argument: str | None = None
    channels_argument: str | None = None
    size_argument: str | None = None

    def build(self, **arguments: Any) -> nn.Module:
        """Return a fresh network; ``arguments`` go before the source's own.

        Raises:
            UsageError: If the factory does not take an argument, fails, or returns no network.
        """
        given = {**self.arguments, **arguments}
        if self.takes is not None and (unknown := [word for word in given if word not in self.takes]):
            takes = f"it takes {', '.join(self.takes)}" if self.takes else "it takes none"
            raise UsageError(f"{self.name} takes no argument {' or '.join(map(repr, unknown))}: {takes}")
        try:
            model = self.factory(**given)
        except ArchsearchError:
            raise
        except Exception as error:
            what = f"cannot be built with {_spelled(given)}" if given else "cannot be built"
            raise UsageError(f"{self.name} {what}: {one_line(error)}") from error
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"{self.name} returned {type(model).__name__}: a factory must return a torch.nn.Module"
            )
        return model

    def arguments_for(
        self, num_classes: int | None = None, in_channels: int | None = None, input_size: int | None = None
    ) -> dict[str, Any]:
        """Return the factory's arguments for these outputs and inputs; what is ``None`` is left out.

        A user's own factory that has no word for something fixes it itself, and nothing is passed.

        Args:
            num_classes: Outputs wanted.
            in_channels: Channels of the images.
            input_size: Height and width of the images in pixels; ignored by networks without the argument,
                which run at any size.

        Raises:
            UsageError: If a number is not positive, or the network is known to be fixed to another.
        """
        asked = {"num_classes": num_classes, "in_channels": in_channels, "input_size": input_size}
        for what, number in asked.items():
            if number is not None and number < 1:
                raise UsageError(f"{what} is {number}: it must be 1 or more")
        words = (self.classes_argument, self.channels_argument, self.size_argument)
        native_channels = self.input_shape[0] if self.input_shape else None
        self._refuse_fixed("classes", num_classes, self.num_classes, self.classes_argument)
        self._refuse_fixed("input channels", in_channels, native_channels, self.channels_argument)
        return {
            word: number
            for word, number in zip(words, asked.values(), strict=True)
            if word is not None and number is not None
        }

    def _refuse_fixed(self, what: str, asked: int | None, native: int | None, word: str | None) -> None:
        if word is None and None not in (asked, native) and asked != native:
            raise UsageError(
                f"{self.name} is fixed to {native} {what} and cannot have {asked}: use another model, "
                "or write a factory of your own around it (path/file.py:factory)"
            )


def named_arguments(factory: Callable[..., object]) -> tuple[str, ...]:
    """Return the names in ``factory``'s signature that can be given by keyword."""
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(factory).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in by_keyword)


def takes_any(factory: Callable[..., object]) -> bool:
    """Say whether ``factory`` has ``**kwargs``."""
    parameters = inspect.signature(factory).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def default_of(factory: Callable[..., object], argument: str) -> int | None:
    """Return the default of an integer argument of ``factory``; ``None`` if it has none."""
    parameter = inspect.signature(factory).parameters.get(argument)
    return parameter.default if parameter is not None and isinstance(parameter.default, int) else None


def one_line(error: BaseException) -> str:
    """Return the kind of a foreign error and the beginning of its text, without line breaks."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _spelled(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{word}={value!r}" for word, value in arguments.items())
