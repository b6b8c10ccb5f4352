"""The layers of a network whose time depends on the widths, as blocks that can be measured alone.

A *cell* is a convolution or linear layer of given numbers, together with the batch norm and the activation
that directly follow it, which runtimes fuse. Its numbers are its *signature* (kind, kernel, stride, pixels
and so on, whatever the widths) and two channel counts. Layers of one signature share their cells.

A layer counts channels as its weights do: each output channel *reads* some input channels (all of them; those
of its group; one if depthwise), and ``makes`` counts the output channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

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

    def __str__(self) -> str:
        """Return it as a sum."""
        terms = [f"{count} x {name}" if count != 1 else name for name, count in self.groups.items()]
        return " + ".join([*terms, str(self.constant)] if self.constant or not terms else terms)

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

    @model_validator(mode="after")
    def _consistent(self) -> Signature:
        parts = [self.kernel, self.stride, self.padding, self.dilation]
        parts += [self.output_padding] if self.kind == "transposed" else []
        if self.kind != "linear" and any(len(part) != len(self.size) for part in parts):
            raise ValueError("kernel, stride, padding and dilation must have as many numbers as size")
        if 0 in self.kernel or 0 in self.stride or 0 in self.dilation:
            raise ValueError("kernel, stride and dilation are above zero")
        return self

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
