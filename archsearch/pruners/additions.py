"""Where a layer's output is added to something else: the end of a residual branch.

Between the layer and the addition may stand batch norms, which in eval mode scale and shift each channel, and
views that leave the channels alone. What such a layer computes can make up for what the other operand misses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from archsearch.pruners.reading import Reading

_ADD = "aten::add"
_VIEWS = ("aten::view", "aten::_unsafe_view")


@dataclass(frozen=True)
class Part:
    """What a tensor has of a reading: its output, channel by channel times ``scale``, and shifted.

    Attributes:
        reading: The reading.
        scale: ``(C_out,)``.
        version: Of the reading's input when it was read: a later one has been overwritten.
    """

    reading: Reading
    scale: torch.Tensor
    version: int


Meet: TypeAlias = Callable[[Part, torch.Tensor, torch.Tensor], None]
"""Gets a part, the operand that it is, and the other operand of the same shape, before they are added."""


class Additions:
    """Follow the outputs of a run's readings to where they are added to something else.

    If both operands come from readings, the part is that of the later one.

    Args:
        meet: Called at each addition.

    Attributes:
        shared: Numbers of readings whose outputs something beside the addition has read.
    """

    def __init__(self, meet: Meet) -> None:
        self._meet = meet
        self._parts = WeakTensorKeyDictionary()
        self._spent = WeakTensorKeyDictionary()
        self.shared: set[int] = set()

    def begin(self, reading: Reading, out: torch.Tensor) -> None:
        """Follow the output of a reading."""
        ones = torch.ones(len(reading.outputs), dtype=torch.float64, device=out.device)
        self._parts[out] = Part(reading, ones, reading.x._version)

    def follow(self, name: str, args: tuple[Any, ...], run: Callable[[], Any]) -> Any:
        """Run an op; what it reads is an output on its way, or it is no more."""
        read = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        self.shared.update(self._spent[tensor] for tensor in read if tensor in self._spent)
        parts = [(tensor, self._parts.pop(tensor)) for tensor in read if tensor in self._parts]
        if not parts:
            return run()
        if name == _ADD and len(args) == len(read) == 2 and read[0].shape == read[1].shape:
            operand, part = max(parts, key=lambda found: found[1].reading.number)
            if read[0] is not read[1] and part.reading.x._version == part.version:
                self._meet(part, operand, read[1] if operand is read[0] else read[0])
        out = run()
        made = next(leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor))
        for tensor, part in parts:
            if tensor is not made:
                self._spent[tensor] = part.reading.number
        tensor, part = parts[0]
        if (after := _through(name, args, tensor, part, made)) is not None:
            self._parts[made] = after
        return out


def _through(
    name: str, args: tuple[Any, ...], before: torch.Tensor, part: Part, made: torch.Tensor
) -> Part | None:
    """Return what the result of an op has of a reading; ``None`` if the op is no scaling of channels."""
    if not part.reading.stride and made.shape[-1] == before.shape[-1]:
        shifted = name == _ADD and len(args) == 2 and before is args[0] and args[1].dim() == 1  # by a bias
        if shifted or name in _VIEWS:
            return part
    if name.endswith("batch_norm") or "_batch_norm_" in name:
        _, weight, _, _, variance = args[:5]
        if variance is None or before is not args[0]:  # without running statistics it is no scaling
            return None
        scale = (variance.double() + args[-1]).rsqrt()
        return replace(part, scale=part.scale * (scale if weight is None else scale * weight.double()))
    return None


def values_at(reading: Reading, tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the values of an operand at places of the reading's output, ``(R, C_out)``."""
    return reading.results(tensor if reading.stride else tensor.flatten(0, -2), places)


def raise_operand(part: Part, operand: torch.Tensor, change: torch.Tensor) -> None:
    """Make an operand what it were if the reading had put out ``change`` more."""
    by_channel = part.scale.to(change.dtype)
    if part.reading.stride:
        by_channel = by_channel.reshape(-1, *(1,) * (change.dim() - 2))
    operand.add_((change * by_channel).reshape(operand.shape))
