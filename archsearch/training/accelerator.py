"""Hugging Face Accelerate for one training at a time: device, precision and data-parallel processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import broadcast

from archsearch.errors import UsageError


@contextmanager
def accelerated(device: torch.device, precision: str) -> Iterator[Accelerator]:
    """Yield an accelerator for a device and a precision.

    Accelerate keeps its state for the whole process and refuses to change it. Here each training brings its
    own; what was there before, a caller's own accelerator perhaps, is put back.

    Raises:
        UsageError: If the device cannot compute in this precision.
    """
    if precision == "fp16" and device.type == "cpu":
        raise UsageError("recipe: precision fp16 needs a GPU; use bf16 or fp32 on the CPU")
    shared = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    try:
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        yield Accelerator(
            mixed_precision="no" if precision == "fp32" else precision,
            cpu=device.type == "cpu",
            device_placement=False,
        )
    finally:
        for state, content in zip(shared, before, strict=True):
            state.clear()
            state.update(content)


def as_main_says(answer: bool) -> bool:
    """Return what the main process of a training answers; all its processes ask together."""
    given = torch.tensor(float(answer), device=PartialState().device)
    return bool(broadcast(given).item())
