"""MNIST and Fashion-MNIST: image sets in the IDX format, plain or gzipped.

The format (LeCun, Cortes & Burges, MNIST's page): two zero bytes, the element type (8 is uint8), the number
of dimensions, each dimension as a big-endian 32-bit integer, then the elements with the last dimension
varying fastest.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import torch

from archsearch.data.augmentation import Augmentation
from archsearch.data.source import DATASETS, DataRequest, DataSource
from archsearch.data.tensors import LabelledImages, in_memory, resized
from archsearch.data.torchvision_set import fetch
from archsearch.errors import IntegrityError, UsageError

_TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
_TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_LARGEST_FILE = 2**31  # bytes of elements; 45 times MNIST, and far from what a small machine chokes on
_UINT8 = 8
_CLASSES = 10
_PAD_SHARE = 2 / 28


@dataclass(frozen=True)
class IdxSet:
    """A data set of four IDX files.

    Args:
        name: Its name here.
        about: What the catalogue says.
        folder: Its folder in torchvision's layout, and the name of torchvision's class.
        mean: Of the training images, in ``[0, 1]``.
        std: Likewise.
        flip: Whether a mirrored image is still one of the same class.
        places: Where else to look when the user names no directory.
        package: How else to get it; part of the message.
    """

    name: str
    about: str
    folder: str
    mean: float
    std: float
    flip: bool
    places: tuple[Path, ...] = ()
    package: str = ""

    def open(self, request: DataRequest) -> DataSource:
        """Open the set in the directory of the request, or where its package puts it."""
        train, test = self._files(request)
        images, labels = read_pair(*train)
        native = images.shape[-1]
        size = request.image_size or native

        def load(pair: LabelledImages) -> LabelledImages:
            return resized(pair[0], size), pair[1]

        images, labels = load((images, labels))
        return in_memory(
            images,
            labels,
            test=lambda: load(read_pair(*test)),
            test_identity=_digest(test),
            validation_share=request.validation_share,
            train_share=request.train_share,
            seed=request.seed,
            num_classes=_CLASSES,
            mean=[self.mean],
            std=[self.std],
            augmentation=Augmentation(round(_PAD_SHARE * size), self.flip, request.cutout),
            name=self.name,
            announcement=(
                f"{self.name}: {len(images):,} training images of {native}x{native} pixels "
                f"from {train[0].parent}"
            ),
        )

    def _files(self, request: DataRequest) -> tuple[list[Path], list[Path]]:
        if request.data_dir is None and not request.download:
            places: Sequence[Path] = self.places
        else:
            directory = request.directory(self.name)
            places = (directory, directory / self.folder / "raw")
        found = self._search(places)
        if found is None and request.download:
            fetch(self.folder, places[0])
            found = self._search(places)
        if found is None:
            looked = " or ".join(str(place) for place in places)
            raise UsageError(
                f"{self.name}: no {_TRAIN[0]}[.gz] {f'in {looked}' if looked else 'without a directory'}; "
                f"give --data-dir DIR, and --download to fetch it there{self.package}"
            )
        return found

    def _search(self, places: Sequence[Path]) -> tuple[list[Path], list[Path]] | None:
        for place in places:
            files = {name: _either(place, name) for name in (*_TRAIN, *_TEST)}
            present = {name: path for name, path in files.items() if path is not None}
            if len(present) == len(files):
                return [present[name] for name in _TRAIN], [present[name] for name in _TEST]
            if present:
                missing = ", ".join(f"{name}[.gz]" for name in files if name not in present)
                raise UsageError(
                    f"{self.name}: {place} lacks {missing}; complete it, or give another --data-dir"
                )
        return None


def _either(place: Path, name: str) -> Path | None:
    """Return the plain file, else the gzipped one, else None."""
    return next((path for path in (place / name, place / f"{name}.gz") if path.is_file()), None)


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return cast("BinaryIO", gzip.open(path, "rb")) if zipped else path.open("rb")


def read_idx(path: Path, dimensions: int) -> torch.Tensor:
    """Read an IDX file of uint8 elements, plain or gzipped.

    Raises:
        IntegrityError: If it is not such a file, has another number of dimensions, or ends too early or too
            late.
        UsageError: If it cannot be opened.
    """
    try:
        with _open(path) as file:
            header = file.read(4 + 4 * dimensions)
            if len(header) < 4 or header[:2] != b"\0\0":
                raise IntegrityError(f"{path}: not an IDX file; fetch it again")
            if header[2:4] != bytes([_UINT8, dimensions]):
                raise IntegrityError(
                    f"{path}: IDX type {header[2]} with {header[3]} dimensions, but type {_UINT8} (uint8) "
                    f"with {dimensions} is wanted; is it the right file?"
                )
            if len(header) < 4 + 4 * dimensions:
                raise IntegrityError(f"{path}: truncated in its header; fetch it again")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            size = math.prod(shape)
            if size > _LARGEST_FILE:
                raise IntegrityError(
                    f"{path}: claims {size:,} bytes, more than the {_LARGEST_FILE:,} allowed"
                )
            content = bytearray(file.read(size + 1))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise IntegrityError(f"{path}: truncated or damaged gzip ({error}); fetch it again") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) != size:
        what = "truncated" if len(content) < size else "longer than its header says"
        raise IntegrityError(f"{path}: {what} ({size:,} bytes expected); fetch it again")
    if size == 0:
        raise IntegrityError(f"{path}: holds nothing; fetch it again")
    return torch.frombuffer(content, dtype=torch.uint8).view(shape)


def read_pair(images_path: Path, labels_path: Path) -> LabelledImages:
    """Read images uint8 ``(N, 1, H, W)`` and labels int64 ``(N,)`` from two IDX files.

    Raises:
        IntegrityError: If a file is not what it should be, or the two do not fit each other.
    """
    images, labels = read_idx(images_path, 3)[:, None], read_idx(labels_path, 1).long()
    if len(images) != len(labels):
        raise IntegrityError(
            f"{images_path}: {len(images):,} images, but {len(labels):,} labels in {labels_path.name}"
        )
    if int(labels.max()) >= _CLASSES:
        raise IntegrityError(f"{labels_path}: label {int(labels.max())}, but there are {_CLASSES} classes")
    return images, labels


def _digest(paths: list[Path]) -> str:
    """Return a SHA-256 of the files' unpacked bytes, so that plain and gzipped copies count as the same."""
    sha256 = hashlib.sha256()
    for path in paths:
        try:
            with _open(path) as file:
                while block := file.read(2**20):
                    sha256.update(block)
        except (EOFError, zlib.error, OSError) as error:
            raise IntegrityError(f"{path}: truncated or damaged ({error}); fetch it again") from error
    return sha256.hexdigest()


MNIST = IdxSet(
    "mnist",
    "70,000 grey images of 28x28 pixels of handwritten digits (LeCun et al., 1998).",
    "MNIST",
    mean=0.1307,
    std=0.3081,
    flip=False,
)
FASHION_MNIST = IdxSet(
    "fashion-mnist",
    "70,000 grey images of 28x28 pixels of clothes in 10 classes (Xiao et al., 2017).",
    "FashionMNIST",
    mean=0.2860,
    std=0.3530,
    flip=True,
    places=(Path("/usr/share/datasets/fashion-mnist"),),
    package=", or install Debian's package dataset-fashion-mnist",
)
for _idx_set in (MNIST, FASHION_MNIST):
    DATASETS.register(_idx_set.name)(_idx_set.open)
