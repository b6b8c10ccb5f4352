"""Layers that read channels: what goes into them at random places, and their weights.

A convolution or a linear layer sums over its input channels. Both are seen as one thing here: at each
*place*, an output position of an image or a row of a matrix, a layer multiplies a *patch* of its input with
its weight. Transposed and depthwise convolutions are left out: the first have no patches, the second sum over
no channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from archsearch.errors import ArchsearchError
from archsearch.graph import STAYS, ChannelGraph, Selection, Units
from archsearch.labels import Atoms
from archsearch.rules import op_name
from archsearch.surgery import vanished
from archsearch.tracing import Op, OpMode, call_model, model_tensors, untouched

_CONVOLUTION, _PRODUCT, _PRODUCT_AND_BIAS = "aten::convolution", "aten::mm", "aten::addmm"
CONTRACTIONS = (_CONVOLUTION, _PRODUCT, _PRODUCT_AND_BIAS)
"""The names of convolutions and of products with a matrix."""


@dataclass(frozen=True)
class Reading:
    """One op of a run that contracts channels of prunable groups.

    A linear layer is a convolution without space: ``K`` is 1, and its rows are images of one place each.

    Attributes:
        number: Of the op among all convolutions and products of the run.
        units: The unit of each input channel in the whole graph, or ``STAYS``, ``(C_in,)``.
        outputs: The same of each output channel, ``(C_out,)``.
        x: The input, ``(N, C_in, ...)``.
        argument: The weight as the op gets it.
        bias: The bias, ``(C_out,)``, or ``None``.
        stride: Of each dimension of space, as ``padding`` and ``dilation``.
        groups: Of a grouped convolution.
    """

    number: int
    units: Units
    outputs: Units
    x: torch.Tensor
    argument: torch.Tensor
    bias: torch.Tensor | None
    stride: Sequence[int] = ()
    padding: Sequence[int] = ()
    dilation: Sequence[int] = ()
    groups: int = 1

    @cached_property
    def _out_first(self) -> torch.Tensor:
        return self.argument if self.stride else self.argument.t()

    @cached_property
    def weight(self) -> torch.Tensor:
        """The weight by groups, ``(groups, C_out / groups, C_in / groups, K)``."""
        weight = self._out_first
        return weight.reshape(self.groups, len(weight) // self.groups, weight.shape[1], -1).double()

    def rewrite(self, weight: torch.Tensor) -> None:
        """Give the layer another weight, in the form of ``weight``."""
        with torch.no_grad():
            self._out_first.copy_(weight.reshape(self._out_first.shape))

    @cached_property
    def _space(self) -> tuple[int, ...]:
        """Size of the output's space."""
        return tuple(
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, pad, dilation in zip(
                self.x.shape[2:],
                self.argument.shape[2:],
                self.stride,
                self.padding,
                self.dilation,
                strict=True,
            )
        )

    def places(self, count: int, draw: torch.Generator) -> torch.Tensor:
        """Return the numbers of ``count`` different random places, or of all if there are fewer."""
        return torch.randperm(len(self.x) * math.prod(self._space), generator=draw)[:count]

    def patches(self, places: torch.Tensor) -> torch.Tensor:
        """Return what the layer reads there, ``(R, groups, C_in / groups, K)``."""
        images, position = places // math.prod(self._space), places % math.prod(self._space)
        if not self.stride:
            return self.x[images.to(self.x.device)].double()[:, None, :, None]
        corner = torch.unravel_index(position, self._space)
        offsets = torch.cartesian_prod(*(torch.arange(size) for size in self.argument.shape[2:]))
        index = [
            (at[:, None] * stride + offset * dilation).to(self.x.device)
            for at, offset, stride, dilation in zip(
                corner, offsets.reshape(-1, len(corner)).T, self.stride, self.dilation, strict=True
            )
        ]
        padded = F.pad(self.x, [pad for pad in reversed(self.padding) for _ in range(2)])
        patches = padded[(images.to(self.x.device)[:, None], slice(None), *index)]  # (R, K, C_in)
        return patches.movedim(1, 2).reshape(len(places), self.groups, -1, len(offsets)).double()

    def results(self, out: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Return what the layer put out there, ``(R, C_out)``."""
        rows = out.flatten(2).movedim(1, 2).flatten(0, 1) if self.stride else out
        return rows[places.to(out.device)].double()


Run: TypeAlias = Callable[[], torch.Tensor]
"""Runs an op."""

See: TypeAlias = Callable[[Reading, Run], torch.Tensor]
"""Gets a reading and what runs its op; returns the op's output."""

Follow: TypeAlias = Callable[[str, tuple[Any, ...], Callable[[], Any]], Any]
"""Gets an op's name, its arguments and what runs it; returns what that returns."""


def watch(
    model: nn.Module,
    graph: ChannelGraph,
    images: torch.Tensor,
    see: See,
    selection: Selection | None = None,
    follow: Follow = lambda name, args, run: run(),
) -> set[int]:
    """Run a network in eval mode and show its readings to a function.

    Args:
        model: The reference, or a small network cut from it.
        graph: The channel groups of the reference.
        images: A batch.
        see: Called in place of each op that reads prunable channels.
        selection: What a small network keeps.
        follow: Called in place of every op; runs it, and with it ``see``.

    Returns:
        Numbers of the readings whose weight and bias are parameters that no other op uses.

    Raises:
        ArchsearchError: If the network runs other convolutions and products than it did on its example.
    """
    every = {name: np.arange(group.size) for name, group in graph.groups.items()}
    mode = _Watch(model, graph, see, every if selection is None else selection, follow)
    with untouched(model, training=False), mode:
        call_model(model, images)
    return {number for number, tensors in mode.seen.items() if all(mode.uses[t] == 1 for t in tensors)}


class ContractionMode(OpMode):
    """Know of each convolution and product of a run what the trace tells of it.

    Args:
        graph: The channel groups of the network that runs.
        gone: Numbers of the trace's ops that the network lacks.
    """

    def __init__(self, graph: ChannelGraph, gone: Collection[int] = ()) -> None:
        super().__init__()
        traced = ((step, op) for step, op in enumerate(graph.trace.ops) if op.name in CONTRACTIONS)
        self._expected = iter([(number, op) for number, (step, op) in enumerate(traced) if step not in gone])

    def next_op(self, name: str) -> tuple[int, Op]:
        """Return the next of the trace's convolutions and products, and its number.

        Raises:
            ArchsearchError: If it is not one of that name.
        """
        number, op = next(self._expected, (0, None))
        if op is None or op.name != name:
            raise ArchsearchError(
                f"the network runs {name} on calibration images where it ran another op on its example. "
                "This method cannot follow a network whose ops depend on the batch: take another --method"
            )
        return number, op


class _Watch(ContractionMode):
    def __init__(
        self, model: nn.Module, graph: ChannelGraph, see: See, selection: Selection, follow: Follow
    ) -> None:
        super().__init__(graph, {op for branch in vanished(graph, selection) for op in branch.ops})
        self.seen: dict[int, list[int]] = {}
        self.uses = dict.fromkeys(map(_place_in_memory, model_tensors(model).values()), 0)
        self._graph, self._see, self._kept = graph, see, graph.kept_units(selection)
        self._follow = follow

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def run() -> Any:
            return func(*args, **(kwargs or {}))

        name = op_name(func)
        if not func.is_view:
            for tensor in pytree.tree_leaves(args):
                if isinstance(tensor, torch.Tensor) and (place := _place_in_memory(tensor)) in self.uses:
                    self.uses[place] += 1
        everything = (*args, *(kwargs or {}).values())
        if name not in CONTRACTIONS:
            return self._follow(name, everything, run)
        number, op = self.next_op(name)
        reading = self._reading(number, op, name, args)
        if reading is None:
            return self._follow(name, everything, run)
        tensors = [reading.argument] if reading.bias is None else [reading.argument, reading.bias]
        places = [_place_in_memory(tensor) for tensor in tensors]
        if all(place in self.uses for place in places):
            self.seen[number] = places
        return self._follow(name, everything, lambda: self._see(reading, run))

    def _units(self, atoms: Atoms) -> Units:
        """Return the units of a dimension, without those that the running network has not."""
        units = self._graph.unit_of_atom[atoms]
        return units[self._kept[units]]

    def _reading(self, number: int, op: Op, name: str, args: tuple[Any, ...]) -> Reading | None:
        x, weight = op.inputs[1:3] if name == _PRODUCT_AND_BIAS else op.inputs[:2]
        inner = 1 if name == _CONVOLUTION else 0
        if 1 not in x or inner not in weight:  # a depthwise weight has no inner dimension
            return None
        units = self._units(x[1])
        if (units == STAYS).all():
            return None
        ((shape, labels),) = op.outputs
        outputs = self._units(labels[1]) if 1 in labels else np.full(shape[1], STAYS)
        if name == _CONVOLUTION:
            tensor, argument, bias, stride, padding, dilation, transposed, _, groups = args[:9]
            if transposed or (groups > 1 and self._graph.whole_groups):  # its groups go with what they read
                return None
            each = argument.dim() - 2
            stride, padding, dilation = (g * each if len(g) == 1 else g for g in (stride, padding, dilation))
            return Reading(number, units, outputs, tensor, argument, bias, stride, padding, dilation, groups)
        bias, tensor, argument = args[:3] if name == _PRODUCT_AND_BIAS else (None, *args[:2])
        return Reading(number, units, outputs, tensor, argument, bias)


def _place_in_memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
