"""The layers of a network whose time depends on the widths, as blocks that can be measured alone.

A *cell* is a convolution or linear layer of given numbers, together with the batch norm and the activation
that directly follow it, which runtimes fuse. Its numbers are its *signature* (kind, kernel, stride, pixels
and so on, whatever the widths) and two channel counts. Layers of one signature share their cells.

A layer counts channels as its weights do: each output channel *reads* some input channels (all of them; those
of its group; one if depthwise), and ``makes`` counts the output channels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from archsearch.errors import UsageError
from archsearch.graph import STAYS, ChannelGraph
from archsearch.rebuild import Traced
from archsearch.rules import op_name
from archsearch.tracing import OpMode, call_model, untouched

MAX_COUNT = 2**16
"""Channels, and pixels along one side, that a file may hold."""

Size: TypeAlias = Annotated[tuple[Annotated[int, Field(ge=0, le=MAX_COUNT)], ...], Field(max_length=3)]

Channels = TypeVar("Channels", int, npt.NDArray[np.int64])

DEPTHWISE = 0
"""As ``groups``: as many as there are input channels, however many are kept."""

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "hardsigmoid": nn.Hardsigmoid,
}
"""Activations that are measured with the layer before them."""

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Frozen(BaseModel):
    """Values that a table file holds: checked strictly, without unknown fields, never changed."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Form(Frozen):
    """A number of channels as a linear form of the widths: a constant and whole multiples of groups."""

    constant: int = Field(ge=0, le=MAX_COUNT)
    groups: dict[str, Annotated[int, Field(ge=0, le=MAX_COUNT)]] = {}

    def scaled(self, times: int, divided_by: int = 1) -> Form:
        """Return a multiple or part of it."""
        return Form(
            constant=self.constant * times // divided_by,
            groups={name: count * times // divided_by for name, count in self.groups.items()},
        )


class Signature(Frozen):
    """All numbers of a layer but its channels.

    Attributes:
        kind: Which layer.
        size: Of its input for one example, in space; the rows of the matrix for a linear layer.
        kernel: In space, as the following ones; all are empty for a linear layer.
        stride: Of a convolution.
        padding: At both ends.
        dilation: Of a convolution.
        output_padding: Of a transposed convolution.
        groups: Of a convolution; 0 if depthwise.
        multiplier: Output channels of each input channel if depthwise.
        bias: Whether there is one.
        norm: Whether a batch norm follows.
        activation: What follows then; empty if nothing that is known.
    """

    kind: Literal["conv", "transposed", "linear"]
    size: Size
    kernel: Size = ()
    stride: Size = ()
    padding: Size = ()
    dilation: Size = ()
    output_padding: Size = ()
    groups: int = Field(default=1, ge=0)
    multiplier: int = Field(default=1, ge=1)
    bias: bool = False
    norm: bool = False
    activation: str = ""

    @property
    def output_pixels(self) -> int:
        """Places of the output for one example."""
        if self.kind == "linear":
            return math.prod(self.size)
        ends = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        if self.kind == "transposed":
            more = self.output_padding
            return math.prod(
                (n - 1) * s - 2 * p + d * (k - 1) + 1 + extra
                for (n, k, s, p, d), extra in zip(ends, more, strict=True)
            )
        return math.prod((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in ends)

    @property
    def macs_a_weight(self) -> int:
        """Multiply-adds of one weight for one example."""
        return math.prod(self.size) if self.kind == "transposed" else self.output_pixels

    @property
    def op(self) -> str:
        """What people call it: ``3x3``, ``3x3 depthwise``, ``linear``."""
        if self.kind == "linear":
            return "linear"
        words = ["x".join(map(str, self.kernel))]
        if self.groups != 1:
            words.append("depthwise" if self.groups == DEPTHWISE else f"in {self.groups} groups")
        return " ".join([*words, "transposed"] if self.kind == "transposed" else words)

    def __str__(self) -> str:
        step = "" if set(self.stride) <= {1} else f" stride {'x'.join(map(str, self.stride))}"
        tail = "".join(f" + {part}" for part in ("norm" * self.norm, self.activation) if part)
        return f"{self.op}{step} at {'x'.join(map(str, self.size))}{tail}"


class Layer(Frozen):
    """One call of a layer: its signature, and its channels as forms of the widths."""

    name: str
    signature: Signature
    reads: Form
    makes: Form


@dataclass(frozen=True, order=True)
class Cell:
    """A layer of given channels; equal cells share a measurement.

    Attributes:
        signature: Position of its signature in a table.
        reads: Input channels that each output channel reads.
        makes: Output channels.
    """

    signature: int
    reads: int
    makes: int


def input_channels(signature: Signature, reads: Channels, makes: Channels) -> Channels:
    """Return how many channels a layer's input has, of one layer or of arrays of them."""
    return makes // signature.multiplier if signature.groups == DEPTHWISE else reads * signature.groups


def build_cell(
    signature: Signature, reads: int, makes: int, *, batch: int = 1, repeat: int = 1
) -> tuple[nn.Module, torch.Tensor]:
    """Return a fresh network of a cell, in eval mode, and an input for it.

    Args:
        signature: Of the cell.
        reads: Input channels that each output channel reads.
        makes: Output channels.
        batch: Examples at once.
        repeat: How often it stands behind itself; its output must be as its input then.
    """
    inputs = input_channels(signature, reads, makes)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            *(part for _ in range(repeat) for part in _parts(signature, inputs, makes))
        ).eval()
    if signature.kind == "linear":
        return network, torch.randn(batch * math.prod(signature.size), inputs, generator=generator)
    return network, torch.randn(batch, inputs, *signature.size, generator=generator)


def _parts(signature: Signature, inputs: int, makes: int) -> list[nn.Module]:
    parts: list[nn.Module] = []
    dims = len(signature.size)
    if signature.kind == "linear":
        parts.append(nn.Linear(inputs, makes, bias=signature.bias))
    else:
        words: dict[str, Any] = {
            "stride": signature.stride,
            "padding": signature.padding,
            "dilation": signature.dilation,
            "groups": signature.groups or inputs,
            "bias": signature.bias,
        }
        kinds: Mapping[int, Any] = _CONVOLUTIONS
        if signature.kind == "transposed":
            kinds, words = _TRANSPOSED, {**words, "output_padding": signature.output_padding}
        parts.append(kinds[dims](inputs, makes, signature.kernel, **words))
    if signature.norm:
        parts.append(_NORMS[dims](makes))
    if signature.activation:
        parts.append(ACTIVATIONS[signature.activation]())
    return parts


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
