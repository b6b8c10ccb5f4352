"""Residual branches that may vanish.

An addition whose two operands come from one fork joins a shortcut and a residual branch: what only one of the
operands depends on. Without the branch the shortcut alone is left (Huang and Wang, ECCV 2018, section 3.2).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from archsearch.dataflow import Call, Dataflow, Nodes, nodes_in
from archsearch.graph import Branch, ChannelGraph, FrozenBranch, GoneModule, Selection, layer_of
from archsearch.labels import Atoms
from archsearch.surgery import mask, shrink
from archsearch.tracing import OpMode, call_model, model_tensors, twice, untouched
from archsearch.vanished import SAME, Resize, fixed, window
from archsearch.verification import random_selection, randomised, verify


def find_branches(model: nn.Module, graph: ChannelGraph, example: Any) -> ChannelGraph:
    """Return the graph with the residual branches that may vanish, and those that may not and why.

    What may vanish is tried: the network runs without it, and gives what the reference gives when all
    parameters of the branch are zero. Branches do not overlap; of nested ones the inner count.

    Args:
        model: The traced model; not changed.
        graph: Its channel groups.
        example: The example input of the trace.
    """
    found: list[Branch] = []
    frozen: list[FrozenBranch] = []
    for part in residual_branches(model, graph, example):
        if isinstance(part, Branch):
            found.append(part)
        else:
            frozen.append(part)
    plain = replace(graph, branches=(), frozen_branches=())
    if _fault(model, plain, found, example):
        tried, found = found, []
        for branch in tried:
            fault = _fault(model, plain, [*found, branch], example)
            if fault:
                frozen.append(FrozenBranch(branch.name, f"without it, the network {fault}"))
            else:
                found.append(branch)
    return replace(graph, branches=tuple(found), frozen_branches=tuple(frozen))


def residual_branches(model: nn.Module, graph: ChannelGraph, example: Any) -> Iterator[Branch | FrozenBranch]:
    """Find the residual branches of a traced network, in order of execution, without trying them.

    Args:
        model: The traced model; not changed.
        graph: Its channel groups.
        example: The example input of the trace.
    """
    flow = Dataflow.of(model, graph.trace, example)
    if flow is None:
        return
    taken: Nodes = 0
    names: set[str] = set()
    for join in flow.joins:
        part = flow.residual_side(join)
        if part is None:
            continue
        side, operand = part
        joined = join.node.bit_length() - 2, operand
        found = _Parts(model, graph, flow, side).branch(names, joined)
        if isinstance(found, Branch):
            if side & taken:
                continue  # it holds other branches, which may vanish one by one
            taken |= side
            names.add(found.name)
        yield found


def _fault(model: nn.Module, graph: ChannelGraph, branches: Iterable[Branch], example: Any) -> str:
    """Say what goes wrong when some branches vanish and other groups shrink, or nothing."""
    trial = replace(graph, branches=tuple(branches))
    empty = {group for branch in trial.branches for group in branch.groups}
    if not empty:
        return ""
    none = np.empty(0, dtype=np.int64)
    selection = {n: none if n in empty else kept for n, kept in random_selection(graph, 0).items()}
    verified = verify(model, trial, selection, example)
    return (
        verified.problem
        or _what_is_left(model, trial, selection, example)
        or _fault_in_training(model, trial, selection, example)
    )


def _what_is_left(model: nn.Module, graph: ChannelGraph, selection: Selection, example: Any) -> str:
    """Say if a branch adds something although all its parameters are zero."""
    masked = mask(randomised(model, 0), graph, selection)
    added = _Added({branch.joined for branch in graph.branches})
    with untouched(masked, training=False), added:
        call_model(masked, example)
    return "" if added.nothing else "still adds what its activations make of zeros"


class _Added(OpMode):
    """See whether operands of additions, given by the number of the op and their place, are zero."""

    def __init__(self, operands: Collection[tuple[int, int]]) -> None:
        super().__init__()
        self.nothing = True
        self._operands, self._number = dict(operands), 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        number = self._number
        self._number += 1
        if number in self._operands:
            self.nothing = self.nothing and not args[self._operands[number]].any()
        return func(*args, **(kwargs or {}))


def _fault_in_training(model: nn.Module, graph: ChannelGraph, selection: Selection, example: Any) -> str:
    batch = twice(example)
    try:
        with untouched(model, training=True):
            call_model(model, batch)
    except Exception:
        return ""  # the reference does not take it either
    small = shrink(model, graph, selection)
    try:
        with untouched(small, training=True):
            call_model(small, batch)
    except Exception as error:
        return f"does not run in training: {type(error).__name__}: {error}".splitlines()[0]
    return ""


class _Parts:
    """What of a network goes with one residual branch."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, flow: Dataflow, side: Nodes) -> None:
        self._graph, self._flow, self._model = graph, flow, model
        self._ops = frozenset(node - 1 for node in nodes_in(side))
        self._read = {name for op in self._ops for name in flow.reads[op]}
        self._modules: list[GoneModule] = []
        self._loose: list[str] = []
        self._gone_ops: set[int] = set()
        self._made_ops: set[int] = set()
        self._held: list[tuple[int, int]] = []
        self._tensors: list[str] = []
        self._seen: set[int] = set()
        self._visit("", model)

    def branch(self, names: set[str], joined: tuple[int, int]) -> Branch | FrozenBranch:
        """Return the branch under a name that is none of ``names``, or why it has to stay."""
        tensors = frozenset(self._tensors)
        layers = tuple(dict.fromkeys(layer_of(name) for name in self._in_order(self._read)))
        name = _prefix(layers)
        if not name or name in names:
            name = layers[0]
        groups = tuple(
            group.name
            for group in self._graph.groups.values()
            if all(member.tensor in tensors for member in group.members)
        )
        reason = self._reason(tensors)
        if not reason and not groups:
            reason = "no channel group lies in it alone, so that no width can say that it is gone"
        if reason:
            return FrozenBranch(name, reason)
        return Branch(
            name=name,
            groups=groups,
            layers=layers,
            modules=tuple(self._modules),
            tensors=tensors,
            loose=frozenset(self._loose),
            ops=frozenset(self._gone_ops),
            unmade=frozenset(self._gone_ops - self._made_ops),
            held=tuple(self._held),
            joined=joined,
        )

    def _reason(self, tensors: frozenset[str]) -> str:
        for op, names in enumerate(self._flow.reads):
            if op not in self._ops and not tensors.isdisjoint(names):
                shared = next(name for name in names if name in tensors)
                return f"its {layer_of(shared)} is also used elsewhere"
        for op in sorted(self._ops - self._gone_ops):
            if self._flow.computes(op):
                line = self._graph.trace.ops[op].site.line
                where = f" at line {line[1]} of {line[0].rpartition('/')[2]}" if line else ""
                return f"its code{where} uses weights without calling their module"
        return ""

    def _in_order(self, names: Iterable[str]) -> list[str]:
        """Return parameters in the order in which they are read."""
        wanted = set(names)
        read = dict.fromkeys(itertools.chain.from_iterable(self._flow.reads[op] for op in sorted(self._ops)))
        return [name for name in read if name in wanted]

    def _visit(self, name: str, module: nn.Module) -> None:
        """Find the outermost modules that run in the branch alone, and parameters of others that it reads."""
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        calls = self._flow.calls.get(id(module), [])
        ops = {op for call in calls for op in range(call.first, call.end)}
        if ops and ops <= self._ops | self._flow.idle and next(module.parameters(), None) is not None:
            sizes = self._sizes(module, calls)
            if sizes is not None:
                self._modules.append(GoneModule(name, sizes))
                self._gone_ops |= ops
                self._made_ops |= {call.allocated for call in calls}
                self._held += [(call.input_from, call.allocated) for call in calls]
                self._tensors += [self._flow.names[id(t)] for t in model_tensors(module).values()]
                return
        for parameter in module.parameters(recurse=False):
            full = self._flow.names[id(parameter)]
            if full in self._read:
                self._loose.append(full)
                self._tensors.append(full)
        for part, child in module.named_children():
            self._visit(f"{name}.{part}" if name else part, child)

    def _sizes(self, module: nn.Module, calls: list[Call]) -> tuple[Resize | Atoms, ...] | None:
        """Return how the module's output size follows, if that can be told, and alike for all calls."""
        every = [self._sizes_of(module, call) for call in calls]
        first = every[0]
        if first is None or any(sizes is None or not _alike(first, sizes) for sizes in every):
            return None
        return first

    def _sizes_of(self, module: nn.Module, call: Call) -> tuple[Resize | Atoms, ...] | None:
        if call.input_shape is None or call.made is None or not call.first <= call.allocated < call.end:
            return None
        op, index = call.made
        shape, labels = self._graph.trace.ops[op].outputs[index]
        found: list[Resize | Atoms] = []
        for dim, size in enumerate(shape):
            before = call.input_shape[dim] if dim < len(call.input_shape) else 0
            if dim in labels:
                found.append(labels[dim])
                continue
            rule = SAME
            if isinstance(module, nn.modules.conv._ConvNd) and dim:
                spatial = dim - (len(shape) - len(module.kernel_size))
                rule = window(module, spatial) if spatial >= 0 else fixed(size)
            if rule(before) != size and size == 1:
                rule = fixed(1)  # pooled
            if rule(before) != size:
                return None
            found.append(rule)
        return tuple(found)


def _alike(left: tuple[Resize | Atoms, ...], right: tuple[Resize | Atoms, ...]) -> bool:
    return len(left) == len(right) and all(
        np.array_equal(a, b) and isinstance(a, Resize) == isinstance(b, Resize)
        for a, b in zip(left, right, strict=True)
    )


def _prefix(layers: Iterable[str]) -> str:
    """Return the innermost module that holds all layers, or the only layer."""
    parts = [layer.split(".") for layer in layers]
    shared = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))
    return ".".join(level[0] for level in shared)
