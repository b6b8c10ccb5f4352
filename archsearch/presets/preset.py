"""What a preset is, and where presets are registered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from archsearch.errors import UsageError
from archsearch.registry import Registry

Rule: TypeAlias = Callable[[str, int], int]
"""From the name and the size of a group to its width."""


@dataclass(frozen=True)
class Preset:
    """Widths for one model.

    Attributes:
        name: What they are called.
        model: The model that they are for.
        rule: From a group's name and size to its width.
    """

    name: str
    model: str
    rule: Rule

    def widths(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return the width of each group."""
        return {name: self.rule(name, size) for name, size in sizes.items()}

    def check_model(self, model: str) -> None:
        """Raise UsageError if the preset is for another model."""
        if model != self.model:
            raise UsageError(
                f"--preset {self.name} is for --model {self.model}, not {model}: leave out --model"
            )


PRESETS: Registry[Preset] = Registry("preset")


def register(name: str, model: str, rule: Rule) -> None:
    """Register published widths.

    Raises:
        UsageError: If the name is taken.
    """
    PRESETS.register(name)(Preset(name, model, rule))


def listed(layers: Sequence[str], widths: Sequence[int]) -> Rule:
    """Return the rule of widths that are printed layer by layer; every other group keeps its size."""
    width_of = dict(zip(layers, widths, strict=True))
    return lambda name, size: width_of.get(name, size)
