"""A device that exists on paper: its times are a formula, its clock is virtual."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from archsearch.latency.measure import Protocol
from archsearch.latency.meter import Settings
from archsearch.latency.profile import Profile
from archsearch.latency.table import LatencyTable
from archsearch.models import resolve
from archsearch.rebuild import Traced, trace_source
from archsearch.space import Bounds, SearchSpace


class PaperDevice:
    """Convolutions and linear layers work on blocks of channels; a run has to be started.

    Args:
        block: Channels that are computed at once.
        noise: Standard deviation of the logarithm of a block's time.
        start_ms: Of every run.
        drift: How much slower the device is after each measurement than before, as a factor.
    """

    def __init__(
        self, block: int = 8, noise: float = 0.0, start_ms: float = 0.01, drift: float = 1.0
    ) -> None:
        self.block, self.noise, self.start_ms, self.drift = block, noise, start_ms, drift
        self.now_s, self.prepared, self.measured, self.speed = 0.0, 0, 0, 1.0
        self.flags: Counter[str] = Counter()
        self._generator = np.random.default_rng(0)

    def prepare(self, model: nn.Module, example: Any) -> float:
        self.now_s += 0.01
        self.prepared += 1
        return self.milliseconds(model, example)

    def measure(self, calls: Sequence[float], protocol: Protocol) -> list[tuple[float, ...]]:
        self.measured += len(calls)
        self.now_s += len(calls) * protocol.blocks * protocol.block_s
        self.speed *= self.drift
        scatter = self._generator.normal(0, self.noise, (len(calls), protocol.blocks))
        return [
            tuple((ms * self.speed * np.exp(row)).tolist()) for ms, row in zip(calls, scatter, strict=True)
        ]

    def seconds(self) -> float:
        return self.now_s

    def milliseconds(self, model: nn.Module, example: Any) -> float:
        """Return the time of a network by the formula."""
        times = [self.start_ms]

        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            weight = module.weight
            made, read = (math.ceil(n / self.block) * self.block for n in weight.shape[:2])
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                read = 1
            pixels = output.shape[2:].numel() if output.dim() == 4 else 1
            times.append(0.002 + 1e-8 * made * read * weight[0, 0].numel() * pixels * output.shape[0])

        handles = [
            module.register_forward_hook(hook)
            for module in model.modules()
            if isinstance(module, (nn.Conv2d, nn.Linear))
        ]
        with torch.no_grad():
            model(example)
        for handle in handles:
            handle.remove()
        return sum(times)


def traced(name: str = "resnet20", shape: tuple[int, ...] = (3, 32, 32)) -> Traced:
    return trace_source(resolve(name), {}, shape)


def profiled(network: Traced, device: PaperDevice, **more: Any) -> Profile:
    """Return a profile of a network on a device of paper."""
    settings = {"calibration": 12, "held_out": 10} | {
        name: more.pop(name) for name in tuple(more) if name in Settings.__dataclass_fields__
    }

    def allowed(quantum: int) -> Mapping[str, Any]:
        return SearchSpace(Bounds(round_to=quantum)).allowed(network.graph)

    return Profile(network, allowed, Settings(**settings), meter=device, **more)


@cache
def paper_table() -> LatencyTable:
    return profiled(traced(), PaperDevice(block=4), round_to=4).run()
