"""What a profile is of: one network under one set of conditions, in any of its widths."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from archsearch.errors import UsageError
from archsearch.latency.bench import settled
from archsearch.latency.content import Conditions
from archsearch.latency.fingerprint import fingerprint
from archsearch.latency.layers import find_layers
from archsearch.latency.meter import Made, Settings
from archsearch.rebuild import Traced
from archsearch.surgery import shrink


class Subject:
    """A network to be measured in many widths.

    Args:
        traced: The reference.
        settings: What runs it, and how.

    Attributes:
        layers: Whose time depends on the widths.
        conditions: As a table names them.
        fingerprint: Of device, runtime and conditions.

    Raises:
        UsageError: If no width of the network could change, or convolution groups go as a whole.
    """

    def __init__(self, traced: Traced, settings: Settings) -> None:
        self.traced, self._batch = traced, settings.batch
        self.layers = find_layers(traced)
        if not self.layers or not traced.graph.groups:
            raise UsageError(
                f"{traced.name}: has no layers whose widths could change: `archsearch show` says why"
            )
        self.fingerprint = fingerprint(
            settings.runtime,
            settings.device,
            settings.dtype,
            example=self.example(),
            channels_last=settings.channels_last,
            threads=settings.threads,
        )
        self.conditions = Conditions(
            model=traced.name,
            arguments=dict(traced.arguments),
            input_shape=traced.input_shape,
            batch=settings.batch,
            runtime=settings.runtime,
            device=settings.device,
            dtype=settings.dtype,
            threads=settings.threads,
            channels_last=settings.channels_last,
        )

    @property
    def key(self) -> str:
        """Hash of everything that a table of it holds for."""
        facts = {
            "fingerprint": self.fingerprint,
            "conditions": self.conditions.model_dump(mode="json"),
            "groups": self.traced.graph.sizes,
            # Code of the user's own may have changed under the same name.
            "layers": [layer.model_dump(mode="json") for layer in self.layers],
        }
        if self.traced.graph.branches:
            facts["branches"] = [branch.name for branch in self.traced.graph.branches]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def network(self, row: Sequence[int]) -> Made:
        """Return the network of some widths, in the order of the groups, and its input."""
        names = self.traced.cost.names
        selection = {name: np.arange(width) for name, width in zip(names, row, strict=True)}
        return shrink(self._settled, self.traced.graph, selection), self.example()

    def example(self) -> Any:
        """Return the input of the trace, as many times as the batch says."""

        def repeated(leaf: Any) -> Any:
            return torch.cat([leaf] * self._batch) if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf

        return pytree.tree_map(repeated, self.traced.example)

    @cached_property
    def _settled(self) -> nn.Module:
        if isinstance(self.traced.example, torch.Tensor):
            return settled(self.traced.model, self.traced.input_shape)
        return self.traced.model
