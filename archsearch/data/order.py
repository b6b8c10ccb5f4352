"""Which samples make up which batch: a function of seed, epoch and position, and of nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from archsearch.errors import UsageError


def derived_seed(*parts: int | str) -> int:
    """Return a seed in ``[0, 2**63)`` that is decided by ``parts`` and unrelated to that of other parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def derived_generator(*parts: int | str) -> torch.Generator:
    """Return a new CPU generator that starts at ``derived_seed(*parts)``."""
    return torch.Generator().manual_seed(derived_seed(*parts))


@dataclass(frozen=True)
class Pass:
    """One pass over a split, as one process sees it.

    Args:
        batch_size: Samples per batch and process. The joint batch of all processes has ``batch_size *
            world_size``.
        seed: Decides order and augmentation together with ``epoch``.
        epoch: Number of the pass, from 0.
        train: Whether to shuffle and augment.
        start: First batch to deliver, to go on inside an epoch.
        rank: Which process this is, in ``[0, world_size)``.
        world_size: How many processes share each joint batch.
        device: Where the batches are wanted.
        drop_last: Whether to leave out a last joint batch that is not full.
        channels_last: Whether images come in torch's channels-last memory format.

    Raises:
        UsageError: If a number is out of its range.
    """

    batch_size: int
    seed: int = 0
    epoch: int = 0
    train: bool = False
    start: int = 0
    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009  an immutable value
    drop_last: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        for field, least in (("batch_size", 1), ("world_size", 1), ("epoch", 0), ("start", 0)):
            if (value := getattr(self, field)) < least:
                raise UsageError(f"batches: {field} is {value}, but must be at least {least}")
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"batches: rank is {self.rank}, but must be in [0, {self.world_size})")

    def num_batches(self, samples: int) -> int:
        """Return how many batches a full pass over ``samples`` has; the same on every rank."""
        joint = self.batch_size * self.world_size
        return samples // joint if self.drop_last else -(-samples // joint)

    def indices(self, samples: int) -> Iterator[torch.Tensor]:
        """Yield for each batch from ``start`` on the sample indices of this rank, int64 ``(n,)``.

        The ranks' shares of a batch, one after the other, are the joint batch. In a last batch that is not
        full they differ by at most one sample, and may be empty where there are fewer samples than ranks.

        Raises:
            UsageError: If the pass has fewer than ``start`` batches.
        """
        last = self.num_batches(samples)
        if self.start > last:
            raise UsageError(f"batches: start is {self.start}, but an epoch has only {last} batches")
        if self.train:
            order = torch.randperm(samples, generator=derived_generator("order", self.seed, self.epoch))
        else:
            order = torch.arange(samples)
        return self._shares(order, last)

    def _shares(self, order: torch.Tensor, last: int) -> Iterator[torch.Tensor]:
        joint = self.batch_size * self.world_size
        for batch in range(self.start, last):
            yield order[batch * joint : (batch + 1) * joint].tensor_split(self.world_size)[self.rank]


def stratified_split(labels: torch.Tensor, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split samples in two such that both have the classes in the same proportions.

    The held-out part has ``share`` of all samples, rounded. Each class gives its share rounded down or up, up
    where the fraction is largest, but never its last sample.

    Args:
        labels: Class of each sample, int64 ``(N,)``.
        share: Share to hold out, in ``[0, 1)``; 0 holds out nothing.
        seed: Decides which samples.

    Returns:
        The indices that stay and those held out, each ascending.

    Raises:
        UsageError: If ``share`` is out of range, or above 0 but too small to hold out a single sample.
    """
    if not 0 <= share < 1:
        raise UsageError(f"the validation share is {share}, but must be in [0, 1)")
    classes, sizes = labels.unique(return_counts=True)
    quotas = sizes.double() * share
    counts = quotas.long()
    fractions = torch.where(counts + 1 < sizes, quotas - counts, 0.0)
    missing = round(share * len(labels)) - int(counts.sum())
    for index in fractions.argsort(descending=True, stable=True)[:missing]:
        counts[index] += fractions[index] > 0
    held = torch.zeros(len(labels), dtype=torch.bool)
    generator = derived_generator("split", seed)
    for label, count in zip(classes, counts.tolist(), strict=True):
        members = (labels == label).nonzero()[:, 0]
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    if share > 0 and not held.any():
        raise UsageError(
            f"a validation share of {share} of {len(labels)} images holds out none; "
            "give a larger share, or 0 for no validation images"
        )
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def stratified_share(labels: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """Return the indices, ascending, of a share in ``(0, 1]`` of the samples of each class; at least one."""
    if round((1 - share) * len(labels)) == 0:
        return torch.arange(len(labels))
    return stratified_split(labels, 1 - share, seed)[0]
