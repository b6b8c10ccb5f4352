"""CIFAR-10 and CIFAR-100, read by torchvision, which compares each file's MD5 before it unpickles it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from archsearch.data.augmentation import Augmentation
from archsearch.data.source import DATASETS, DataRequest, DataSource
from archsearch.data.tensors import LabelledImages, in_memory, resized
from archsearch.data.torchvision_set import fetch, open_set, torchvision_class
from archsearch.errors import IntegrityError, UsageError

_PAD_SHARE = 4 / 32


@dataclass(frozen=True)
class CifarSet:
    """One of the two.

    Args:
        name: Its name here.
        torchvision_name: The name of torchvision's class.
        classes: How many.
        mean: Published, of the training images, in ``[0, 1]``.
        std: Likewise.
    """

    name: str
    torchvision_name: str
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def about(self) -> str:
        """What the catalogue says."""
        return f"60,000 colour images of 32x32 pixels in {self.classes} classes (Krizhevsky, 2009)."

    def open(self, request: DataRequest) -> DataSource:
        """Open the set in the directory of the request."""
        directory = request.directory(self.name)
        if request.download:
            fetch(self.torchvision_name, directory)

        def load(train: bool) -> LabelledImages:
            images, labels = self._read(directory, train)
            return resized(images, request.image_size or images.shape[-1]), labels

        images, labels = load(train=True)
        return in_memory(
            images,
            labels,
            test=lambda: load(train=False),
            test_identity=repr(
                torchvision_class(self.torchvision_name).test_list
            ),  # the MD5s that it will be compared with
            validation_share=request.validation_share,
            train_share=request.train_share,
            seed=request.seed,
            num_classes=self.classes,
            mean=self.mean,
            std=self.std,
            augmentation=Augmentation(round(_PAD_SHARE * images.shape[-1]), flip=True, cutout=request.cutout),
            name=self.name,
            announcement=f"{self.name}: {len(images):,} training images of 32x32 pixels from {directory}",
        )

    def _read(self, directory: Path, train: bool) -> LabelledImages:
        """Return images uint8 ``(N, 3, 32, 32)`` and labels int64 ``(N,)``."""
        try:
            read = open_set(self.torchvision_name, directory, train=train)
        except RuntimeError as error:
            raise self._reason(directory) from error
        except OSError as error:
            raise UsageError(f"{self.name}: {directory} cannot be read ({error})") from error
        return torch.from_numpy(read.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(read.targets)

    def _reason(self, directory: Path) -> UsageError | IntegrityError:
        """Say which file made torchvision refuse."""
        from torchvision.datasets.utils import check_integrity

        published = torchvision_class(self.torchvision_name)
        folder = directory / published.base_folder
        md5s = dict(
            [*published.train_list, *published.test_list, (published.meta["filename"], published.meta["md5"])]
        )
        missing = [name for name in md5s if not (folder / name).is_file()]
        if missing:
            return UsageError(
                f"{self.name}: {folder} lacks {', '.join(missing)}; check --data-dir (the directory "
                f"that holds {folder.name}), or add --download"
            )
        wrong = [name for name, md5 in md5s.items() if not check_integrity(folder / name, md5)]
        return IntegrityError(
            f"{self.name}: {folder} has {', '.join(wrong)} with another MD5 than the published file, "
            "and was not read; add --download to replace it"
        )


CIFAR10 = CifarSet("cifar10", "CIFAR10", 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100 = CifarSet("cifar100", "CIFAR100", 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
for _cifar_set in (CIFAR10, CIFAR100):
    DATASETS.register(_cifar_set.name)(_cifar_set.open)
