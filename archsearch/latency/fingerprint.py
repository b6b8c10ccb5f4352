"""What a latency belongs to: change any of it and the number is another."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from archsearch.latency.devices import Device, opened
from archsearch.latency.runtimes import RUNTIMES
from archsearch.tracing import output_tensors


def fingerprint(
    runtime: str,
    device: str | Device = "cpu",
    dtype: str = "float32",
    *,
    example: Any = None,
    channels_last: bool = True,
    threads: int = 1,
) -> dict[str, Any]:
    """Return device, runtime and conditions of a measurement, as plain values.

    Args:
        runtime: What runs the network.
        device: Where.
        dtype: Of weights and inputs.
        example: The input, whose shapes are written down with their batch.
        channels_last: Whether channels are the innermost dimension; a runtime with its own layout says so.
        threads: Of the CPU.

    Raises:
        UsageError: If the runtime or the device is unknown.
    """
    kind = RUNTIMES[runtime]
    layout = "channels_last" if channels_last else "contiguous"
    shapes = [list(tensor.shape) for tensor in output_tensors(example)]
    return {
        **opened(device).facts(),
        "runtime": runtime,
        "runtime_version": {package: installed(package) for package in kind.distributions},
        "torch": torch.__version__,
        "dtype": dtype,
        "layout": "the runtime's own" if kind.own_layout else layout,
        "batch": shapes[0][0] if shapes and shapes[0] else None,
        "input_shapes": shapes,
        "threads": threads,
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return in words where a fingerprint differs from one that was noted; empty where they are the same.

    Args:
        one: The noted one; what an older version did not note is not compared.
        other: That of the device at hand.
    """
    return [
        f"{name}: {value} and {other.get(name)}"
        for name, value in sorted(one.items())
        if value != other.get(name)
    ]


def installed(distribution: str) -> str | None:
    """Return the version of an installed distribution; ``None`` where it is not."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
