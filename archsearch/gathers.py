"""Norms that read a part of a shared stream: a gather in front of each.

In a pre-activation network the scale of a block's first norm says which channels of the stream this block
needs, while the stream itself feeds other blocks too. Network Slimming (Liu et al., ICCV 2017) selects there
at the reader. So each such norm gets a buffer ``channels``, the positions in the stream that it reads, and a
hook that gathers them. The buffer is one more dimension that can be pruned: with it go the norm and what the
next layer reads, while the stream keeps its width.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from archsearch.errors import UsageError
from archsearch.rules import op_name
from archsearch.tracing import OpMode, call_model, output_tensors, untouched

BUFFER = "channels"

_NORM = nn.modules.batchnorm._BatchNorm
_JOINS = ("aten::add", "aten::cat")


def shared_stream_norms(model: nn.Module, example: Any) -> list[str]:
    """Return the batch norms whose input others read too, or that read a sum or a concatenation.

    Args:
        model: Any network; left exactly as it was.
        example: As for ``trace_model``.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _NORM)}
    readings = _Readings()
    inputs: dict[str, int] = {}

    def remember(name: str) -> Any:
        return lambda module, args: inputs.update({name: id(args[0])})

    hooks = [module.register_forward_pre_hook(remember(name)) for name, module in norms.items()]
    try:
        with untouched(model, training=False), readings:
            call_model(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        name
        for name, tensor in inputs.items()
        if readings.readers.get(tensor, 0) > 1 or readings.makers.get(tensor) in _JOINS
    ]


def add_gathers(model: nn.Module, norms: Iterable[str]) -> nn.Module:
    """Let batch norms gather the channels that they read, all of them to begin with; return the model.

    Raises:
        UsageError: If the model has no such batch norm.
    """
    modules = dict(model.named_modules())
    for name in norms:
        norm: Any = modules.get(name)
        if not isinstance(norm, _NORM):
            raise UsageError(f"gathers.{name}: the model has no batch norm of this name")
        place = next((tensor.device for tensor in norm.state_dict().values()), None)
        norm.register_buffer(BUFFER, torch.arange(norm.num_features, device=place))
        norm.register_forward_pre_hook(_gather)
    return model


def set_channels(model: nn.Module, channels: Mapping[str, Sequence[int]]) -> None:
    """Say which channels of the stream each gathering norm reads."""
    for name, wanted in channels.items():
        if not wanted:
            continue  # it vanished with its branch
        buffer = model.get_buffer(f"{name}.{BUFFER}")
        buffer.copy_(torch.as_tensor(wanted, dtype=buffer.dtype))


def channels_of(tensors: Mapping[str, torch.Tensor], norms: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the channels that each gathering norm reads, from a network's tensors by name.

    A norm that vanished with its branch reads none.
    """
    buffers = {name: tensors.get(f"{name}.{BUFFER}") for name in norms}
    return {name: () if buffer is None else tuple(buffer.tolist()) for name, buffer in buffers.items()}


def is_gather(model: nn.Module, tensor: str) -> bool:
    """Return whether a tensor of a model, by name, says what a norm reads."""
    owner, _, name = tensor.rpartition(".")
    return name == BUFFER and isinstance(model.get_submodule(owner), _NORM)


def spread(width: int, size: int, name: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return ``width`` of ``size`` channels, sorted: always the same for a name, others for other names.

    Widths alone do not say what a reader reads. Were it the first channels everywhere, nobody would read the
    last ones of the stream.
    """
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    return np.sort(draw.choice(size, width, replace=False)).astype(np.int64)


def _gather(norm: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].index_select(1, norm.channels), *args[1:])


class _Readings(OpMode):
    """How many ops read each tensor, and which made it, by the tensor's id."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: dict[int, int] = {}
        self.makers: dict[int, str] = {}
        self._kept: list[torch.Tensor] = []  # as long as a tensor lives, no other has its id

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in {id(leaf): leaf for leaf in output_tensors(args)}.values():
            self.readers[id(tensor)] = self.readers.get(id(tensor), 0) + 1
        for tensor in output_tensors(result):
            self.makers[id(tensor)] = op_name(func)
            self._kept.append(tensor)
        return result
