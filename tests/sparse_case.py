"""A small network with planted useless channels, which tests train with a method's own sparse training.

``torchrun ... sparse_case.py METHOD FILE`` trains in several processes and writes the weights.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from tiny_net import TinyNet
from torch import Tensor, nn
from training_case import RECIPE, source

from archsearch.graph import ChannelGraph
from archsearch.grouping import channel_graph
from archsearch.pruners import PRUNERS, SparseTraining, Sparsifying
from archsearch.tensor_files import write_tensors
from archsearch.training.callbacks import Callback
from archsearch.training.loop import TrainResult, train

EXAMPLE = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(3))
USELESS = {"conv1": [1, 4, 6], "conv2": [0, 7, 11, 15]}


def planted() -> Any:
    """Return a network that ignores some of its channels, and never learns to look at them."""
    torch.manual_seed(0)
    model = TinyNet(3, 2)
    for layer, reader in (("conv1", model.conv2), ("conv2", model.fc)):
        with torch.no_grad():
            reader.weight[:, USELESS[layer]] = 0
            model.get_submodule(layer).weight[USELESS[layer]] *= 0.5  # for methods that look at filters
        seen = (reader.weight.detach() != 0).float()
        reader.weight.register_hook(lambda gradient, seen=seen: gradient * seen)  # type: ignore[misc]
    return model


class Normed(nn.Module):
    """A network whose processes see the same, whatever share of a batch each has: no batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.norm(self.conv(x)))))
        logits: Tensor = self.fc(x.flatten(1))
        return logits


def sparse_training(method: str, model: nn.Module, **options: Any) -> tuple[SparseTraining, ChannelGraph]:
    """Return how a method trains a network, aiming at widths without the useless channels."""
    graph = channel_graph(model, EXAMPLE)
    pruner = PRUNERS[method](**options)
    assert isinstance(pruner, Sparsifying)
    widths = {name: size - len(USELESS.get(name, ())) for name, size in graph.sizes.items()}
    return pruner.sparse_training(model, graph, widths), graph


def run(training: SparseTraining, *, after: tuple[Callback, ...] = (), **options: Any) -> TrainResult:
    """Train it on small images; options as for ``train``."""
    data = source()
    settings: dict[str, Any] = {"recipe": RECIPE, "device": "cpu", **options}
    callbacks = [*training.callbacks, *after]
    return train(training.network, data.train, data.validation, callbacks=callbacks, **settings)


if __name__ == "__main__":
    torch.manual_seed(0)
    training, _ = sparse_training(sys.argv[1], Normed())
    run(training)
    if int(os.environ.get("RANK", "0")) == 0:
        write_tensors(Path(sys.argv[2]), training.network.state_dict())
