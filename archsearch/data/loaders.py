"""A user's own loaders of ``(images, labels)`` batches, seen as a data source."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from archsearch.data.order import Pass, derived_seed
from archsearch.data.source import Batch, DataSource, Split
from archsearch.errors import UsageError


class LoaderSplit(Split):
    """Batches as a loader makes them, in its own sizes, order and augmentation.

    Args:
        name: Of the split; part of messages.
        loader: A ``torch.utils.data.DataLoader``, or a list of batches.

    Raises:
        UsageError: If the loader cannot tell how much it holds, or its list holds no such batches.
    """

    def __init__(self, name: str, loader: Iterable[Batch]) -> None:
        self._name, self._loader = name, loader
        dataset = getattr(loader, "dataset", None)
        if hasattr(loader, "__len__") and hasattr(dataset, "__len__"):
            self._samples = len(dataset)  # type: ignore[arg-type]
        elif isinstance(loader, Sequence):
            self._samples = sum(len(_pair(name, batch)[1]) for batch in loader)
        else:
            raise UsageError(
                f"the {name} loader does not tell its length; pass a DataLoader over a data set with "
                "a length, or a list of (images, labels)"
            )

    def __len__(self) -> int:
        return self._samples

    def num_batches(self, batch_size: int, *, world_size: int = 1, drop_last: bool = False) -> int:
        """Return how many batches the loader makes, whatever the arguments: it has its own sizes."""
        return len(self._loader)  # type: ignore[arg-type]

    def _deliver(self, wanted: Pass) -> Iterator[Batch]:
        sampler: Any = getattr(self._loader, "sampler", None)
        sharers = getattr(sampler, "num_replicas", 1)
        if sharers != wanted.world_size:
            raise UsageError(
                f"the {self._name} loader shares its images among {sharers} processes, but there are "
                f"{wanted.world_size}; give it a torch.utils.data.DistributedSampler"
            )
        if wanted.start > self.num_batches(wanted.batch_size):
            raise UsageError(
                f"batches: start is {wanted.start}, but the {self._name} loader has fewer batches"
            )
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(wanted.epoch)
        generator = getattr(self._loader, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(derived_seed("loader", wanted.seed, wanted.epoch))
        return self._moved(wanted)

    def _moved(self, wanted: Pass) -> Iterator[Batch]:
        layout = torch.channels_last if wanted.channels_last else torch.contiguous_format
        for batch in islice(iter(self._loader), wanted.start, None):
            images, labels = _pair(self._name, batch)
            images = images.to(wanted.device, non_blocking=True).contiguous(memory_format=layout)
            yield images, labels.to(wanted.device, torch.int64, non_blocking=True)


def _pair(name: str, batch: Any) -> Batch:
    """Return ``batch``, once it is sure to be images and labels."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise UsageError(f"the {name} loader must give pairs (images, labels), not a {type(batch).__name__}")
    images, labels = batch
    if images.dtype != torch.float32 or images.ndim != 4:
        raise UsageError(
            f"the {name} loader must give images float32 (N, C, H, W), not {images.dtype} "
            f"{tuple(images.shape)}"
        )
    return images, labels


def from_loaders(
    train_loader: Iterable[Batch],
    test_loader: Iterable[Batch],
    *,
    input_shape: tuple[int, int, int],
    num_classes: int,
    validation_loader: Iterable[Batch] | None = None,
    name: str = "loaders",
    identity: str = "",
) -> DataSource:
    """Make a data source of loaders.

    Batch sizes, order, augmentation and normalisation are the loaders'; the arguments of ``Split.batches``
    that would decide them do nothing. If the loader has a ``generator``, it is seeded from ``(seed, epoch)``
    before each pass; if its sampler has ``set_epoch``, that is called. A run that is killed inside an epoch
    goes on with the same batches only where the loader makes the same ones again: a shuffling loader needs a
    ``generator``, and one that augments in its own process as well as in workers must not draw from the
    global generators.

    Args:
        train_loader: A ``DataLoader``, or a list of ``(images, labels)``: float32 ``(N, C, H, W)``, int64
            ``(N,)``.
        test_loader: Likewise; not touched before the test split is.
        input_shape: Channels, height and width of an image.
        num_classes: Labels are in ``[0, num_classes)``.
        validation_loader: Likewise; None for no validation images.
        name: Of the source, for tables and file names.
        identity: What the data is, such as a version or a checksum. The fingerprint is made of it, the name,
            the shape and the lengths, since the images themselves are never all at hand.

    Raises:
        UsageError: If a loader does not tell its length.
    """
    train = LoaderSplit("training", train_loader)
    validation = LoaderSplit("validation", [] if validation_loader is None else validation_loader)
    test = LoaderSplit("test", test_loader)
    facts = (name, identity, input_shape, num_classes, len(train), len(validation), len(test))
    return DataSource(
        name=name,
        input_shape=input_shape,
        num_classes=num_classes,
        announcement=f"{name}: {len(train):,} training images from your own loaders",
        train=train,
        validation=validation,
        load_test=lambda: test,
        digest=lambda: hashlib.sha256(repr(facts).encode()).hexdigest(),
    )
