"""Targets: how small a network must become, as a share that stays or as an absolute limit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias

from archsearch.errors import UsageError

Resource: TypeAlias = Literal["flops", "params", "memory", "channels", "latency"]

_MULTIPLES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_NANOSECONDS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}
_TIME = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(%|[num]?s)?", re.IGNORECASE)
_PATTERN = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(%|[KMGT]?B?)", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """A limit on one resource: MACs (``flops``), parameters, bytes of peak activation memory, or channels.

    Channels are those of all prunable groups together: ``channels 0.3`` is a published "70 % of the channels
    pruned by one global threshold". Latency is in nanoseconds.

    Attributes:
        resource: What is limited.
        keep: Share of the reference that may stay, in ``(0, 1]``; ``None`` if the limit is absolute.
        absolute: The limit itself; 0 if it is a share.
    """

    resource: Resource
    keep: Fraction | None = None
    absolute: int = 0

    @classmethod
    def parse(cls, resource: Resource, text: str | float) -> Target:
        """Read ``0.5`` or ``50%`` as a share that stays, ``60M`` or ``60000000`` as an absolute limit.

        A latency is a share likewise, or a time with its unit, such as ``1.2ms``.

        Raises:
            UsageError: If the text is neither, or not above zero.
        """
        if resource == "latency":
            return cls._latency(text)
        match = _PATTERN.fullmatch(str(text).strip())
        if not match:
            raise UsageError(
                f"--{resource} {text}: give the share that stays, such as 0.5 or 50%, or a limit such as 60M"
            )
        number, unit = Fraction(match[1]), match[2].upper().removesuffix("B")
        if number <= 0:
            raise UsageError(f"--{resource} {text}: a target is above zero")
        if unit == "%" or (not unit and number <= 1):
            keep = number / 100 if unit == "%" else number
            if keep > 1:
                raise UsageError(f"--{resource} {text}: at most 100% of the reference can stay")
            return cls(resource, keep=keep)
        if not unit and number.denominator != 1:
            raise UsageError(
                f"--{resource} {text}: a share that stays is at most 1; an absolute limit is a whole number "
                "or has a unit, such as 60M"
            )
        return cls(resource, absolute=int(number * _MULTIPLES[unit]))

    @classmethod
    def _latency(cls, text: str | float) -> Target:
        match = _TIME.fullmatch(str(text).strip())
        if not match:
            raise UsageError(
                f"--latency {text}: give the share that stays, such as 0.6 or 60%, or a time such as 1.2ms"
            )
        number, unit = Fraction(match[1]), (match[2] or "").lower()
        keep = number / 100 if unit == "%" else number
        if number <= 0 or (unit in ("", "%") and keep > 1):
            raise UsageError(f"--latency {text}: a share is in (0, 1], a time has a unit, such as 1.2ms")
        if unit in _NANOSECONDS:
            return cls("latency", absolute=int(number * _NANOSECONDS[unit]))
        return cls("latency", keep=keep)

    def limit(self, reference: int) -> int:
        """Return the largest count that meets the target, given the reference's."""
        if self.keep is not None:
            return int(self.keep * reference)
        return min(self.absolute, reference)

    def scaled(self, factor: float) -> Target:
        """Return a limit that is so many times as large, of a share at most the whole reference."""
        if self.keep is not None:
            return Target(self.resource, keep=min(self.keep * Fraction(factor), Fraction(1)))
        return Target(self.resource, absolute=max(1, int(self.absolute * factor)))

    def part(self, reference: int, step: int, steps: int) -> Target:
        """Return the limit after ``step`` of ``steps`` even steps from the reference to the target."""
        limit = self.limit(reference)
        return Target(self.resource, absolute=reference - (reference - limit) * step // steps)

    def __str__(self) -> str:
        if self.resource == "latency" and self.keep is None:
            return f"latency {self.absolute / 1e6:g} ms"
        amount = self.absolute if self.keep is None else float(self.keep)
        return f"{self.resource} {amount:g}" if isinstance(amount, float) else f"{self.resource} {amount:,}"
