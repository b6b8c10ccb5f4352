"""The layers of a network as cells: found in one run, their channels as forms of the widths."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from archsearch.errors import UsageError
from archsearch.graph import STAYS, ChannelGraph
from archsearch.latency.cells import ACTIVATIONS, DEPTHWISE, Form, Layer, Signature
from archsearch.rebuild import Traced
from archsearch.rules import op_name
from archsearch.tracing import OpMode, call_model, untouched


def find_layers(traced: Traced) -> tuple[Layer, ...]:
    """Return the calls of layers with weights in one run of the network, in order of execution.

    A layer whose weight is computed (by a parametrisation, say) is no cell, and neither is what no weight
    takes part in: such parts are for the correction that is fitted on whole networks.

    Raises:
        UsageError: If convolution groups go as a whole: a signature has a fixed number of them.
    """
    if traced.graph.whole_groups:
        raise UsageError(
            "a latency table counts a fixed number of convolution groups: trace without --whole-groups"
        )
    recorder = _Recorder(traced.model)
    with untouched(traced.model, training=False), recorder:
        call_model(traced.model, traced.example)
    layers = []
    for call in recorder.calls:
        name, signature = call.tensor.rpartition(".")[0], call.signature
        reads, makes = (channels(traced.graph, call.tensor, dim) for dim in (call.reads, call.makes))
        if signature.groups == DEPTHWISE:
            reads = Form(constant=1)
        elif signature.kind == "transposed":  # its weight is (in, out / groups, ...)
            reads, makes = reads.scaled(1, signature.groups), makes.scaled(signature.groups)
        layers.append(Layer(name=name, signature=signature, reads=reads, makes=makes))
    return tuple(layers)


def channels(graph: ChannelGraph, tensor: str, dim: int) -> Form:
    """Return the size of a parameter's dimension as a form of the widths."""
    units = graph.units.get((tensor, dim))
    if units is None:
        return Form(constant=1)  # the trace leaves out dimensions of one index
    counts = Counter(graph.group_of_unit[unit] for unit in units if unit != STAYS)
    return Form(
        constant=len(units) - counts.total(),
        groups={name: count // graph.groups[name].size for name, count in counts.items()},
    )


@dataclass
class _Call:
    """A call of a layer: its weight, and the dimensions of this that are read and made."""

    tensor: str
    signature: Signature
    reads: int
    makes: int


class _Recorder(OpMode):
    """Note each call of a layer, and the norm and the activation that follow it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self._names = {
            tensor.untyped_storage()._cdata: name
            for name, tensor in model.named_parameters()
            if tensor.dim() > 1
        }
        self._behind: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []  # so that no other tensor gets the number of one that is gone

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = op_name(func).removeprefix("aten::")
        call = self._layer(name, args)
        out = result[0] if isinstance(result, (tuple, list)) else result
        if call is not None:
            self._follow(out, len(self.calls))
            self.calls.append(call)
        elif args and id(args[0]) in self._behind:
            number = self._behind[id(args[0])]
            change = _following(name, args, self.calls[number].signature)
            if change:
                self.calls[number].signature = self.calls[number].signature.model_copy(update=change)
                self._follow(out, number)
        return result

    def _follow(self, out: torch.Tensor, number: int) -> None:
        self._behind[id(out)] = number
        self._alive.append(out)

    def _layer(self, name: str, args: tuple[Any, ...]) -> _Call | None:
        if name == "convolution":
            return self._convolution(*args)
        if name in ("addmm", "mm"):
            rows, weight = args[-2], args[-1]
            tensor = self._names.get(weight.untyped_storage()._cdata)
            if tensor is None or weight.dim() != 2 or weight.is_contiguous():
                return None  # a product of activations, or with the weight itself and not its transpose
            signature = Signature(kind="linear", size=(rows.shape[0],), bias=name == "addmm")
            return _Call(tensor, signature, 1, 0)
        return None

    def _convolution(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
        stride: list[int], padding: list[int], dilation: list[int],
        transposed: bool, output_padding: list[int], groups: int,
    ) -> _Call | None:  # fmt: skip
        tensor = self._names.get(weight.untyped_storage()._cdata)
        if tensor is None:
            return None
        depthwise = groups == x.shape[1] > 1
        signature = Signature(
            kind="transposed" if transposed else "conv",
            size=tuple(x.shape[2:]),
            kernel=tuple(weight.shape[2:]),
            stride=tuple(stride),
            padding=tuple(padding),
            dilation=tuple(dilation),
            output_padding=tuple(output_padding) if transposed else (),
            groups=DEPTHWISE if depthwise else groups,
            multiplier=(weight.shape[1] if transposed else weight.shape[0] // groups) if depthwise else 1,
            bias=bias is not None,
        )
        reads, makes = (0, 0 if depthwise else 1) if transposed else (1, 0)
        return _Call(tensor, signature, reads, makes)


def _following(name: str, args: tuple[Any, ...], signature: Signature) -> dict[str, Any]:
    """Return what an op on a layer's result adds to its signature; empty if it is none of the cell."""
    if signature.activation:
        return {}
    if "batch_norm" in name:
        return {} if signature.norm or signature.kind == "linear" else {"norm": True}
    if name == "hardtanh" and tuple(args[1:3]) == (0, 6):
        name = "relu6"
    return {"activation": name} if name in ACTIVATIONS else {}
