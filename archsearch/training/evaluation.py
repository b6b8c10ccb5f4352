"""Measure a network on a split of a data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archsearch.errors import UsageError


class Split(Protocol):
    """What training and evaluation ask of data; ``archsearch.data`` has the real ones."""

    def __len__(self) -> int:
        """Return the number of images."""

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        train: bool = False,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        drop_last: bool = False,
        channels_last: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images ``(N, C, H, W)`` and labels ``(N,)``, from batch ``start`` on.

        ``batch_size`` counts the images of one rank; those of all ranks, one after the other, are the joint
        batch. Ranks get equally many batches, the last perhaps of unequal sizes.
        """

    def num_batches(self, batch_size: int, *, world_size: int = 1, drop_last: bool = False) -> int:
        """Return how many batches one pass has."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How well a network does on one split.

    Attributes:
        accuracy: Share of right answers, in percent.
        loss: Mean cross-entropy, in nats.
        images: How many images it was measured on.
    """

    accuracy: float
    loss: float
    images: int


@dataclasses.dataclass
class Totals:
    """Sums over images, from which means follow at the end."""

    loss: float = 0.0
    correct: float = 0.0
    images: float = 0.0

    def add(self, loss: float, correct: float, images: float) -> None:
        """Add the sums of one more batch."""
        self.loss += loss
        self.correct += correct
        self.images += images

    def mean(self) -> Evaluation:
        """Return the means."""
        return Evaluation(100 * self.correct / self.images, self.loss / self.images, int(self.images))


def resolve_device(name: str | torch.device) -> torch.device:
    """Return the device called ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or the best one for ``"auto"``.

    Raises:
        UsageError: If there is no such device here; says which there are. Nothing falls back to the CPU.
    """
    present = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if str(name) == "auto":
        return torch.device("cuda" if len(present) > 1 else "cpu")
    if str(name) in present or (str(name) == "cuda" and len(present) > 1):
        return torch.device(name)
    raise UsageError(f"device: there is no '{name}' here; give auto or one of {', '.join(present)}")


def main_output(outputs: Any) -> Tensor:
    """Return the class scores ``(N, classes)`` of a network that may have auxiliary heads beside them."""
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def batch_totals(outputs: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
    """Return ``(loss, right answers, images)`` of a batch as one tensor: reading it waits only once."""
    correct = (outputs.argmax(1) == labels).sum()
    return torch.stack([loss.double(), correct.double(), correct.new_tensor(labels.numel()).double()])


def sum_over(
    model: nn.Module,
    split: Split,
    batch_size: int,
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
    stopped: Callable[[], object] = lambda: False,
) -> Tensor:
    """Return the sums of ``batch_totals`` over this rank's part of a split, in eval mode, mode restored.

    ``stopped`` is asked before each batch; where it says yes, the sums of the batches so far are returned.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    try:
        with torch.inference_mode():
            for images, labels in split.batches(
                batch_size, rank=rank, world_size=world_size, device=device, channels_last=True
            ):
                if stopped():
                    break
                outputs = main_output(model(images)).float()
                sums += batch_totals(outputs, labels, F.cross_entropy(outputs, labels, reduction="sum"))
    finally:
        for module, training in modes.items():
            module.training = training
    return sums


def evaluate(
    model: nn.Module, split: Split, batch_size: int = 256, device: str | torch.device = "auto"
) -> Evaluation:
    """Return accuracy and loss of a network, which is moved to ``device`` and keeps its mode.

    Raises:
        UsageError: If the split is empty or the device absent.
    """
    if len(split) == 0:
        raise UsageError("evaluation: the split holds no image; give one with data")
    place = resolve_device(device)
    totals = Totals()
    totals.add(*sum_over(model.to(place), split, batch_size, place).tolist())
    return totals.mean()
