"""Proof, not hope: a shrunken network computes what the reference computes without the dropped channels.

``verify`` compares the two numerically. ``rehearse`` finds groups that cannot be removed because the
model's Python code holds a size as a constant, and freezes them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from archsearch.graph import ChannelGraph, Selection
from archsearch.grouping import channel_graph, freeze_groups
from archsearch.labels import DimLabels
from archsearch.rules import Mix, op_name
from archsearch.surgery import mask, shrink
from archsearch.tracing import (
    Op,
    OpMode,
    Site,
    call_model,
    failing_site,
    model_tensors,
    output_tensors,
    untouched,
)

TOLERANCE = 1e-5
"""Largest ``max |a - b| / max |b|`` between a shrunken network and the masked reference, in float32."""


@dataclass(frozen=True)
class Verification:
    """How a shrunken network compares with its masked reference.

    Attributes:
        error: ``max |a - b| / max |b|`` over all outputs; infinite where shapes differ or it does not run.
        problem: What went wrong, or an empty string.
        over_kept: Ops, such as LayerNorm, whose statistics the reference took over the kept channels.
    """

    error: float
    problem: str = ""
    over_kept: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the network is right."""
        return not self.problem


def verify(
    model: nn.Module, graph: ChannelGraph, selection: Selection, example: Any, *, seed: int = 0
) -> Verification:
    """Compare the shrunken network with the reference whose dropped units are zero.

    Both run in eval mode on a copy whose norms, shifts and constant weights are randomised first, so that a
    fresh network (zero shifts, unit scales, a zeroed classifier) hides nothing.

    Args:
        model: The traced model; not changed.
        graph: Its channel groups.
        selection: The kept units of each group.
        example: The example input of the trace.
        seed: Of the random statistics.
    """
    reference = randomised(model, seed)
    large = mask(reference, graph, selection)
    small = shrink(reference, graph, selection)
    with untouched(small, training=False):
        try:
            actual = output_tensors(call_model(small, example))
        except Exception as error:
            return Verification(float("inf"), f"does not run: {type(error).__name__}: {error}")
    replay = _OverKept(graph, selection)
    with untouched(large, training=False), replay:
        expected = output_tensors(call_model(large, example))
    if replay.lost:
        return Verification(float("inf"), "the masked reference ran other ops than the trace")
    if [a.shape for a in actual] != [b.shape for b in expected]:
        return Verification(float("inf"), "has outputs of other shapes than the reference")
    errors = [
        float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
        for a, b in zip(actual, expected, strict=True)
        if a.is_floating_point() and a.numel()
    ]
    worst = max(errors, default=0.0, key=lambda error: (isnan(error), error))
    problem = "" if worst < TOLERANCE else f"differs from the masked reference by {worst:.1e}"
    return Verification(worst, problem, tuple(sorted(replay.over_kept)))


def wrong_groups(model: nn.Module, graph: ChannelGraph, selection: Selection, example: Any) -> set[str]:
    """Return the groups of a selection that fail verification when they alone are pruned.

    None where the whole selection is right; all where it is wrong but no group alone is.
    """
    if verify(model, graph, selection, example).ok:
        return set()
    full = {name: np.arange(group.size) for name, group in graph.groups.items()}
    alone = {name: {**full, name: selection[name]} for name in graph.groups}
    failing = {name for name, only in alone.items() if not verify(model, graph, only, example).ok}
    return failing or set(graph.groups)


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy with random norm scales, shifts and statistics, and no parameter constant."""
    changed = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model_tensors(changed).items():
            if not tensor.is_floating_point() or tensor.numel() < 2:
                continue
            if tensor.dim() == 1 or (isinstance(tensor, nn.Parameter) and tensor.min() == tensor.max()):
                value = torch.rand(tensor.shape, generator=draw)
                centred = name.endswith(("bias", "running_mean"))
                tensor.copy_(value - 0.5 if centred else value + 0.5)
    return changed


class _OverKept(OpMode):
    """Run the masked reference, computing ops that read a whole channel dimension over the kept channels."""

    def __init__(self, graph: ChannelGraph, selection: Selection) -> None:
        super().__init__()
        self._graph = graph
        self._kept = graph.kept_units(selection)
        self._step = 0
        self.over_kept: set[str] = set()
        self.lost = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        trace = self._graph.trace
        try:
            step = _follow(trace.ops, self._step, op_name(func))
        except _WrongOpError:
            self.lost, step = True, None
        if step is not None:
            self._step = step + 1
            if step in trace.mixes:
                return self._run(trace.mixes[step], func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _run(self, mix: Mix, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        narrowed = list(args)
        restored: dict[int, tuple[torch.Tensor, int]] = {}
        for position, dims in mix.dims.items():
            for dim, atoms in dims.items():
                kept = self._kept[self._graph.unit_of_atom[atoms]]
                if kept.all():
                    continue
                if not kept.any():  # the op sees dropped channels alone: what it makes is dropped as well
                    return pytree.tree_map_only(torch.Tensor, torch.zeros_like, func(*args, **kwargs))
                indices = torch.from_numpy(np.flatnonzero(kept)).to(narrowed[position].device)
                full = narrowed[position].shape[dim]
                narrowed[position] = narrowed[position].index_select(dim, indices)
                restored[dim] = indices, full
                _narrow_norm(mix.op, narrowed, indices)
        if not restored:
            return func(*args, **kwargs)
        self.over_kept.add(mix.op)
        result = func(*narrowed, **kwargs)
        first = output_tensors(result)[0]
        for dim, (indices, full) in restored.items() if mix.op in _KEEPS_SHAPE else ():
            shape = list(first.shape)
            shape[dim] = full
            first = first.new_zeros(shape).index_copy(dim, indices, first)
        # In the layout in memory that the op gives, since later ops may depend on it.
        first = torch.empty_like(output_tensors(func(*args, **kwargs))[0]).copy_(first)
        return (first, *result[1:]) if isinstance(result, (tuple, list)) else first


_KEEPS_SHAPE = {
    "aten::native_layer_norm", "aten::native_group_norm", "aten::_fused_rms_norm", "aten::native_batch_norm",
    "aten::_softmax", "aten::_safe_softmax", "aten::_log_softmax", "aten::_weight_norm_interface",
    "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
}  # fmt: skip


def _narrow_norm(op: str, args: list[Any], indices: torch.Tensor) -> None:
    """Fit the other arguments of a norm to its narrowed input; one normalised dimension is labelled."""
    if op in ("aten::native_layer_norm", "aten::_fused_rms_norm"):
        args[1] = [len(indices)]
        args[2:4] = [a[indices] if isinstance(a, torch.Tensor) else a for a in args[2:4]]
    elif op == "aten::native_group_norm":
        args[1:3] = [a[indices] if isinstance(a, torch.Tensor) else a for a in args[1:3]]
        args[4] = len(indices)


def prunable_graph(model: nn.Module, example: Any, *, whole_groups: bool = False) -> ChannelGraph:
    """Find the channel groups of a network that can be removed: those of the trace that pass the rehearsal.

    Args:
        model: Any network, on any device, in any mode; left exactly as it was.
        example: An input ``(N, ...)``, or the positional (tuple) or named (mapping) arguments of the model.
        whole_groups: Whether a convolution's groups go as a whole, and do not get narrower.

    Raises:
        UsageError: If the model fails on the example.
    """
    return rehearse(model, channel_graph(model, example, whole_groups=whole_groups), example)


def rehearse(model: nn.Module, graph: ChannelGraph, example: Any, *, seed: int = 0) -> ChannelGraph:
    """Remove random units of all groups together and run; freeze groups until the network runs.

    The shape of every op's result is compared with what the labels predict. Where one differs, or the model
    raises, the line of model code holds a size as a constant: the groups that reach it, from any of its
    calls, are frozen with that line as the reason.

    Args:
        model: The traced model; not changed.
        graph: Its channel groups.
        example: The example input of the trace.
        seed: Of the random units.

    Returns:
        The graph, with all groups that rehearsal proved wrong frozen.
    """
    while graph.groups:
        selection = random_selection(graph, seed)
        fault = _Rehearsal(graph, selection).fault_of(model, example)
        if fault is None:
            # Code that cuts channels at a fixed index may run on others than it means.
            wrong = wrong_groups(model, graph, selection, example) if graph.trace.labels.told_apart else set()
            if not wrong:
                return graph
            graph = freeze_groups(graph, wrong, "the model's code cuts its channels at a fixed index")
            continue
        guilty = _groups_at(graph, fault.step, fault.site) or set(graph.groups)
        line = fault.site.line
        where = f" at {Path(line[0]).name}:{line[1]}" if line else ""
        graph = freeze_groups(graph, guilty, f"the model's code needs its size{where}: {fault.message}")
    return graph


def random_selection(graph: ChannelGraph, seed: int, keep: float | None = None) -> Selection:
    """Keep random units of each group.

    Args:
        graph: The channel groups.
        seed: Of the choice.
        keep: Share of each group that stays, at least one unit; by default a random one of ``[0.3, 0.7]``,
            and two units where that drops any: torch runs other ops on dimensions of size 1.
    """
    draw = np.random.default_rng(seed)
    selection = {}
    for name, group in graph.groups.items():
        share = draw.uniform(0.3, 0.7) if keep is None else keep
        fewest = 2 if keep is None and group.size > 2 else 1
        width = min(group.size, max(fewest, round(group.size * share)))
        selection[name] = np.sort(draw.choice(group.size, width, replace=False))
    return selection


def _one_line(error: Exception) -> str:
    """Return an error's kind and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


@dataclass
class _Fault:
    """The op at which a rehearsal went wrong, and the place in the code that called it."""

    step: int
    site: Site
    message: str


class _WrongOpError(Exception):
    """A second run does not do what the trace says."""


# A reshape copies only where it has to, which depends on sizes (of 1) and on the layout in memory.
_COPIES = {"aten::clone", "aten::contiguous"}
_RESHAPES = {"aten::_unsafe_view": "aten::view", "aten::_reshape_alias": "aten::view"}


def _follow(ops: list[Op], step: int, name: str) -> int | None:
    """Return which op of the trace, from ``step`` on, an op of another run is.

    Copies that the run spares are passed over; ``None`` is a copy that the trace does not have.

    Raises:
        _WrongOpError: If the run does something else.
    """
    while name not in _COPIES and step < len(ops) and ops[step].name in _COPIES:
        step += 1
    expects = ops[step].name if step < len(ops) else ""
    if name in _COPIES and expects not in _COPIES:
        return None
    if _RESHAPES.get(expects, expects) != _RESHAPES.get(name, name):
        raise _WrongOpError("other ops run")
    return step


class _Rehearsal(OpMode):
    """Run a shrunken network and compare each result's shape with the one that the labels predict."""

    def __init__(self, graph: ChannelGraph, selection: Selection) -> None:
        super().__init__()
        self._graph, self._selection = graph, selection
        self._kept = graph.kept_units(selection)
        self._step = 0

    def fault_of(self, model: nn.Module, example: Any) -> _Fault | None:
        """Return what goes wrong, if anything."""
        small = shrink(model, self._graph, self._selection)
        trace = self._graph.trace
        ops = trace.ops
        with untouched(small, training=False):
            try:
                with self:
                    call_model(small, example)
            except _WrongOpError as error:
                step = min(self._step, len(ops) - 1)
                return _Fault(step, ops[step].site.innermost, str(error))
            except Exception as error:
                step = min(self._step, len(ops) - 1)
                return _Fault(step, failing_site(error), _one_line(error))
        if trace.training_example is not None:  # auxiliary heads, which eval mode passes by
            with untouched(small, training=True):
                try:
                    call_model(small, trace.training_example)
                except Exception as error:
                    return _Fault(len(ops) - 1, failing_site(error), f"in training, {_one_line(error)}")
        return None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        ops = self._graph.trace.ops
        step = _follow(ops, self._step, op_name(func))
        if step is None:
            return result
        self._step = step
        for tensor, (shape, labels) in zip(output_tensors(result), ops[step].outputs, strict=True):
            expected = list(shape)
            for dim, atoms in labels.items():
                expected[dim] = int(self._kept[self._graph.unit_of_atom[atoms]].sum())
            if list(tensor.shape) != expected:
                raise _WrongOpError(f"{op_name(func)} gives {list(tensor.shape)}, not {expected}")
        self._step += 1
        return result


def _groups_at(graph: ChannelGraph, step: int, site: Site) -> set[str]:
    """Return the groups that reach a place in the code, or else the nearest op before each of its calls.

    Where torch's own function failed (an attention layer's check of its sizes, say), only the ops inside that
    function count, not all that the model's line leads to.
    """
    ops = graph.trace.ops
    same_line = [number for number, op in enumerate(ops) if site.line and op.site.line == site.line]
    inside = [number for number in same_line if {*site.functions} & {*ops[number].site.functions}]
    calls = (inside if site.functions else same_line) or same_line or [step]
    found = {group for call in calls for group in _groups_in(graph, ops[call].inputs)}
    if found:
        return found
    for call in calls:
        for earlier in range(call, -1, -1):
            groups = _groups_in(graph, ops[earlier].inputs)
            if groups:
                found |= groups
                break
    return found


def _groups_in(graph: ChannelGraph, labels: Iterable[DimLabels]) -> set[str]:
    return {
        group
        for dims in labels
        for atoms in dims.values()
        for group in graph.groups_of(graph.unit_of_atom[atoms])
    }
