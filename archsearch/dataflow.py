"""What each op of a network's run reads, and what runs inside each module.

A trace says which channels belong together, not who reads what. Where that matters, the network runs a
second time on its example.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from archsearch.rules import op_name
from archsearch.tracing import OpMode, Trace, call_model, model_tensors, output_tensors, untouched

Nodes: TypeAlias = int
"""A set of ops as bits: bit 0 is the network's input, bit ``n + 1`` is op ``n``."""

_INPUT = -1


@dataclass
class Call:
    """One call of a module.

    Attributes:
        first: The first op inside; those before ``end`` are inside too.
        end: The first op after it.
        input_shape: Shape of the first argument, if it is a tensor.
        input_from: The op that made the memory in which it lies, -1 for none.
        made: The op that makes the output, and which of its results it is, if it is one tensor.
        allocated: The op that makes the memory in which it lies.
    """

    first: int
    end: int
    input_shape: tuple[int, ...] | None
    input_from: int
    made: tuple[int, int] | None
    allocated: int


@dataclass(frozen=True)
class Join:
    """An addition of two tensors: its node and those that make its operands."""

    node: Nodes
    operands: tuple[Nodes, Nodes]


class Dataflow(OpMode):
    """Record which op reads what another one makes, which parameters it reads, and the calls of modules.

    Attributes:
        names: The name of each parameter and buffer, by its id.
        reads: The parameters and buffers that each op reads.
        calls: Of each module, by its id.
        joins: The additions of two tensors.
        outputs: The ops that make the network's outputs.
    """

    def __init__(self, model: nn.Module, trace: Trace, example: Any) -> None:
        super().__init__()
        self.names = {id(tensor): name for name, tensor in model_tensors(model).items()}
        self.joins: list[Join] = []
        self.calls: dict[int, list[Call]] = {}
        self.reads: list[list[str]] = []
        self.outputs: Nodes = 0
        self._ops = trace.ops
        self._ancestors: list[Nodes] = [1]
        self._sources: list[Nodes] = [0]
        self._readers: list[Nodes] = [0]
        self._made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._written: dict[int, int] = {}
        self._allocated: dict[int, int] = {}
        self._starts: list[tuple[int, tuple[int, ...] | None, int]] = []
        self._writing: set[int] = set()
        for tensor in output_tensors(example):
            self._made[tensor] = (_INPUT, 0)

    @classmethod
    def of(cls, model: nn.Module, trace: Trace, example: Any) -> Dataflow | None:
        """Run the network; return nothing if it does something else than in its trace."""
        flow = cls(model, trace, example)
        handles = []
        try:
            for module in model.modules():
                handles.append(module.register_forward_pre_hook(flow._enter, prepend=True))
                handles.append(module.register_forward_hook(flow._leave))
            with untouched(model, training=False), flow:
                for tensor in output_tensors(call_model(model, example)):
                    flow.outputs |= flow._nodes(tensor)
        finally:
            for handle in handles:
                handle.remove()
        return flow if len(flow.reads) == len(flow._ops) else None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs))
        nodes = [self._nodes(tensor) for tensor in inputs]
        storages = {_storage(tensor) for tensor in inputs}
        result = func(*args, **kwargs)
        number = len(self.reads)
        node: Nodes = 1 << (number + 1)
        sources = 0
        for source in nodes:
            sources |= source
        ancestors = node
        for source in nodes_in(sources):
            ancestors |= self._ancestors[source]
            self._readers[source] |= node
        self._ancestors.append(ancestors)
        self._sources.append(sources)
        self._readers.append(0)
        self.reads.append([self.names[id(tensor)] for tensor in inputs if id(tensor) in self.names])
        for index, tensor in enumerate(_tensors(result)):
            self._made[tensor] = (number, index)
            if _storage(tensor) not in storages:
                self._allocated[_storage(tensor)] = number
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._writing.add(number)
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                for tensor in _tensors(value):
                    self._written[_storage(tensor)] = number
        if op_name(func) == "aten::add" and len(inputs) == 2:
            self.joins.append(Join(node, (nodes[0], nodes[1])))
        return result

    def _nodes(self, tensor: torch.Tensor) -> Nodes:
        """Return the ops that made a tensor's values: its own, and a later one that wrote into its memory."""
        made, _ = self._made.get(tensor, (None, 0))
        written = self._written.get(_storage(tensor), -2)
        nodes: Nodes = 0 if made is None else 1 << (made + 1)
        if made is not None and written > made:
            nodes |= 1 << (written + 1)
        return nodes

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        shape, made_by = None, _INPUT
        if args and isinstance(args[0], torch.Tensor):
            shape = tuple(args[0].shape)
            made_by = self._allocated.get(_storage(args[0]), _INPUT)
        self._starts.append((len(self.reads), shape, made_by))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        (first, shape, made_by), end = self._starts.pop(), len(self.reads)
        made, allocated = None, _INPUT
        if isinstance(output, torch.Tensor):
            made = self._made.get(output)
            allocated = self._allocated.get(_storage(output), _INPUT)
        self.calls.setdefault(id(module), []).append(Call(first, end, shape, made_by, made, allocated))

    @cached_property
    def idle(self) -> frozenset[int]:
        """The ops whose results nothing uses, such as an empty tensor that a norm does not need."""
        unused: Nodes = 0
        for node in range(len(self.reads), 0, -1):
            used = self._readers[node] & ~unused or self.outputs & 1 << node
            if not used and node - 1 not in self._writing:
                unused |= 1 << node
        return frozenset(node - 1 for node in nodes_in(unused))

    def ancestors(self, nodes: Nodes) -> Nodes:
        """Return some nodes and all that they depend on."""
        found: Nodes = 0
        for node in nodes_in(nodes):
            found |= self._ancestors[node]
        return found

    def computes(self, op: int) -> bool:
        """Return whether an op multiplies activations with weights, as convolutions and linear layers do."""
        before = self._ops[op - 1].counted[0] if op else 0
        if self._ops[op].counted[0] == before:
            return False
        of_weights = [not self._ancestors[node] & 1 for node in nodes_in(self._sources[op + 1])]
        return bool(self.reads[op]) or any(of_weights)

    def residual_side(self, join: Join) -> tuple[Nodes, int] | None:
        """Return the ops of the residual branch that an addition adds, and which operand they make.

        Of two branches it is the one of more layers.

        It is what only one operand depends on. ``None`` where the other operand is no shortcut, or where
        leaving out the layers would not leave out all that the operand adds.
        """
        first, second = (self.ancestors(operand) for operand in join.operands)
        if not first & second & 1:  # an operand that no input reaches is no shortcut
            return None
        found, most = None, 0
        for position, side in enumerate((first & ~second, second & ~first)):
            layers = sum(self.computes(node - 1) for node in nodes_in(side))
            if layers > most and self._is_branch(side, join.operands[position], join.node):
                found, most = (side, position), layers
        return found

    def _is_branch(self, side: Nodes, operand: Nodes, join: Nodes) -> bool:
        """Return whether only the addition reads what a side makes, and all of it goes through layers."""
        if side & self.outputs:
            return False
        passed: Nodes = 0  # what other values than the layers' reach
        for node in nodes_in(side):
            if self._readers[node] & ~(side | join):
                return False
            if not self.computes(node - 1):
                sources = self._sources[node]
                from_outside = any(self._ancestors[source] & 1 for source in nodes_in(sources & ~side))
                if from_outside or sources & passed:
                    passed |= 1 << node
        return not operand & (passed | ~side)


def nodes_in(nodes: Nodes) -> Iterator[int]:
    """Return the numbers of the set bits, rising."""
    while nodes:
        lowest = nodes & -nodes
        yield lowest.bit_length() - 1
        nodes ^= lowest


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
