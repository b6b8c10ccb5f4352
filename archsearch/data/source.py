"""What the rest of archsearch knows of data: sources with three splits, and the registry of their names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from archsearch.data.order import Pass
from archsearch.errors import UsageError
from archsearch.registry import Registry

Batch = tuple[torch.Tensor, torch.Tensor]


class Split(ABC):
    """Images with labels, delivered in batches; ``len()`` counts the images."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _deliver(self, wanted: Pass) -> Iterator[Batch]:
        """Return the batches of one pass."""

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
        device: torch.device | str = "cpu",
        drop_last: bool = False,
        channels_last: bool = False,
    ) -> Iterator[Batch]:
        """Return the batches of one pass, normalised and on ``device``.

        With ``train`` they are shuffled and augmented as ``(seed, epoch)`` decides; without, they come in a
        fixed order as they are. A pass that begins at ``start`` delivers bit for bit what the full one
        delivers from there.

        Args:
            batch_size: Samples per batch and process; the joint batch has ``batch_size * world_size``.
            seed: Decides order and augmentation together with ``epoch``.
            epoch: Number of the pass, from 0.
            train: Whether to shuffle and augment.
            start: First batch to deliver.
            rank: Which process this is. The ranks' batches, one after the other, are the joint batch. Every
                rank gets as many batches; their sizes differ by at most one, and only in the last.
            world_size: How many processes share each joint batch.
            device: Where the batches are wanted. Small sets are kept there.
            drop_last: Whether to leave out a last joint batch that is not full.
            channels_last: Whether images come in torch's channels-last memory format.

        Returns:
            Pairs of images float32 ``(N, C, H, W)`` and labels int64 ``(N,)``.

        Raises:
            UsageError: If a number is out of its range.
        """
        where = torch.device(device)
        return self._deliver(
            Pass(batch_size, seed, epoch, train, start, rank, world_size, where, drop_last, channels_last)
        )

    def num_batches(self, batch_size: int, *, world_size: int = 1, drop_last: bool = False) -> int:
        """Return how many batches a full pass has; the same on every rank."""
        return Pass(batch_size, world_size=world_size, drop_last=drop_last).num_batches(len(self))


@dataclass(frozen=True)
class DataSource:
    """A data set in three splits that never overlap.

    Args:
        name: Its name in tables and file names.
        input_shape: Channels, height and width of an image.
        num_classes: Labels are in ``[0, num_classes)``.
        announcement: One line that tells the user what this data is.
        train: What weights are fitted to.
        validation: Held out from the training set, for whatever is chosen on the way; may be empty.
        load_test: Loads the test split; called once, when ``test`` is first used.
        digest: Computes ``fingerprint``; called once, when that is first used.
    """

    name: str
    input_shape: tuple[int, int, int]
    num_classes: int
    announcement: str
    train: Split = field(repr=False)
    validation: Split = field(repr=False)
    load_test: Callable[[], Split] = field(repr=False)
    digest: Callable[[], str] = field(repr=False)

    @cached_property
    def test(self) -> Split:
        """What the results are reported on; loaded when first used, so read it once, at the end."""
        return self.load_test()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex of what training sees; two runs may share results only if it is equal."""
        return self.digest()


@dataclass(frozen=True)
class DataRequest:
    """What a user asked of a data set.

    Args:
        data_dir: Where its files are or should go.
        download: Whether to fetch files that are missing.
        seed: Decides which training images are held out for validation.
        validation_share: Share of the training images held out, in ``[0, 1)``.
        workers: Processes that read image files; 0 reads in the training process. Sets in memory need none.
        image_size: Height and width in pixels to bring images to; None keeps the data set's own.
        cutout: Side in pixels of the square that is blanked in each training image; 0 for none.
        train_share: Share of each class's training images that are trained on, in ``(0, 1]``; validation
            and test images are as many with any share.
    """

    data_dir: Path | None = None
    download: bool = False
    seed: int = 0
    validation_share: float = 0.1
    workers: int = 0
    image_size: int | None = None
    cutout: int = 0
    train_share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise UsageError(f"the validation share is {self.validation_share}, but must be in [0, 1)")
        if not 0 < self.train_share <= 1:
            raise UsageError(f"the train share is {self.train_share}, but must be in (0, 1]")
        if self.workers < 0:
            raise UsageError(f"the number of data workers is {self.workers}, but must be at least 0")
        if self.image_size is not None and not 1 <= self.image_size <= 4096:
            raise UsageError(f"the image size is {self.image_size}, but must be in [1, 4096] pixels")
        if self.cutout < 0:
            raise UsageError(f"the cutout is {self.cutout}, but must be at least 0 pixels")

    def directory(self, name: str) -> Path:
        """Return the existing directory that was given for the data set ``name``.

        With ``download``, one that is missing is made.

        Raises:
            UsageError: If none was given, or it is not there.
        """
        if self.data_dir is None:
            raise UsageError(f"{name}: where is it? give --data-dir DIR, and --download to fetch it there")
        if self.download:
            self.data_dir.mkdir(parents=True, exist_ok=True)
        if not self.data_dir.is_dir():
            raise UsageError(
                f"{name}: the data directory {self.data_dir} does not exist; check --data-dir, "
                "or add --download to have it made and filled"
            )
        return self.data_dir


DATASETS: Registry[Callable[[DataRequest], DataSource]] = Registry("data set", "datasets")


def load_data(
    name: str,
    data_dir: Path | str | None = None,
    download: bool = False,
    seed: int = 0,
    validation_share: float = 0.1,
    workers: int = 0,
    image_size: int | None = None,
    cutout: int = 0,
    train_share: float = 1.0,
) -> DataSource:
    """Open the data set called ``name``.

    The arguments are those of ``DataRequest``.

    Raises:
        UnknownNameError: If no data set has that name; says the nearest.
        UsageError: If files are missing or an argument is out of its range.
        IntegrityError: If a file is not what it should be.
        ResourceError: If a download fails.
    """
    open_set = DATASETS[name]
    where = Path(data_dir).expanduser() if data_dir is not None else None
    return open_set(
        DataRequest(where, download, seed, validation_share, workers, image_size, cutout, train_share)
    )
