"""Folders of image files, one folder per class: read, cut and scaled by worker processes.

``DIR/train`` holds the training images. Validation and test are found so:

    ==================================  =====================  ===========
    beside ``train`` there is           validation             test
    ==================================  =====================  ===========
    ``val`` (or ``validation``)         taken out of train     ``val``
    ``test``                            taken out of train     ``test``
    both                                ``val``                ``test``
    ==================================  =====================  ===========
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from archsearch.data.order import Pass, derived_generator, derived_seed, stratified_share, stratified_split
from archsearch.data.source import DATASETS, Batch, DataRequest, DataSource, Split
from archsearch.errors import IntegrityError, ResourceError, UsageError

Sample = tuple[str, int]

_MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as every published network for it expects
_STD = (0.229, 0.224, 0.225)
_IMAGE_SIZE = 224
_RESIZE_SHARE = 256 / 224  # of the shorter side to the centre crop, in evaluation
_WORKER_TIMEOUT_S = 300.0


def _transform(train: bool, size: int) -> Any:
    """Return the transform from a PIL image to uint8 ``(3, size, size)``."""
    from torchvision.transforms import v2  # one second to import, and only wanted here

    if train:
        steps = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    else:
        steps = [v2.Resize(round(size * _RESIZE_SHARE)), v2.CenterCrop(size)]
    return v2.Compose([*steps, v2.PILToTensor()])


class _Images(Dataset["tuple[torch.Tensor, int] | IntegrityError"]):
    """The images of one pass; each is varied as ``(seed, epoch, index)`` decides, in whatever process."""

    def __init__(self, samples: list[Sample], transform: Any, seed: int, epoch: int) -> None:
        self._samples, self._transform = samples, transform
        self._seed, self._epoch = seed, epoch

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int] | IntegrityError:
        from PIL import Image

        path, label = self._samples[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            # Returned, for a raised one would come out of a worker wrapped in its traceback.
            return IntegrityError(f"{path}: not a readable image ({error}); replace it or delete it")
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(derived_seed("image", self._seed, self._epoch, index))
        try:
            return self._transform(image), label
        finally:
            torch.set_rng_state(before)


def _collated(
    items: list[tuple[torch.Tensor, int] | IntegrityError],
) -> tuple[torch.Tensor, torch.Tensor] | IntegrityError:
    pairs = []
    for item in items:
        if isinstance(item, IntegrityError):
            return item
        pairs.append(item)
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


class FolderSplit(Split):
    """Images in files.

    Args:
        samples: Path and class of each.
        image_size: Height and width in pixels of what is delivered.
        workers: Processes that read; 0 reads in the calling one.
    """

    def __init__(self, samples: list[Sample], image_size: int, workers: int) -> None:
        self.samples = samples
        self._image_size, self._workers = image_size, workers

    def __len__(self) -> int:
        return len(self.samples)

    def _deliver(self, wanted: Pass) -> Iterator[Batch]:
        chosen = [rows.tolist() for rows in wanted.indices(len(self))]
        return self._read(wanted, chosen)

    def _read(self, wanted: Pass, chosen: list[list[int]]) -> Iterator[Batch]:
        images = _Images(self.samples, _transform(wanted.train, self._image_size), wanted.seed, wanted.epoch)
        shift = torch.tensor(_MEAN, device=wanted.device).mul(255).view(1, 3, 1, 1)
        scale = torch.tensor(_STD, device=wanted.device).mul(255).reciprocal().view(1, 3, 1, 1)
        layout = torch.channels_last if wanted.channels_last else torch.contiguous_format
        # A rank without a share of the last batch gets an empty one, which no loader would make.
        full = chosen[:-1] if chosen and not chosen[-1] else chosen
        for pixels, labels in self._loaded(images, full, wanted):
            batch = pixels.to(wanted.device, non_blocking=True).float().sub_(shift).mul_(scale)
            yield batch.contiguous(memory_format=layout), labels.to(wanted.device, non_blocking=True)
        if len(full) < len(chosen):
            size = self._image_size
            yield (
                torch.empty((0, 3, size, size), device=wanted.device),
                torch.empty(0, dtype=torch.int64, device=wanted.device),
            )

    def _loaded(self, images: _Images, chosen: list[list[int]], wanted: Pass) -> Iterator[Batch]:
        loader: DataLoader[Any] = DataLoader(
            images,
            batch_sampler=chosen,
            num_workers=self._workers,
            collate_fn=_collated,
            pin_memory=wanted.device.type == "cuda",
            timeout=_WORKER_TIMEOUT_S if self._workers else 0,
            # Without one of its own, every pass would draw from the global generator.
            generator=derived_generator("loader", wanted.seed, wanted.epoch),
        )
        try:
            for loaded in loader:
                if isinstance(loaded, IntegrityError):
                    raise loaded
                yield loaded
        except (RuntimeError, ConnectionError) as error:
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader"):
                raise  # an error of the transform, not of the process
            raise ResourceError(
                f"a data worker died or gave nothing for {_WORKER_TIMEOUT_S:g} s "
                f"({str(error).splitlines()[0]}); use fewer workers, or 0 to read in the training process"
            ) from error


def _listed(directory: Path, classes: dict[str, int]) -> list[Sample]:
    """Return path and class of every image below ``directory``, sorted.

    Raises:
        IntegrityError: If its class folders are not ``classes``, or one of them has no image.
    """
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(directory))
    except OSError as error:
        raise IntegrityError(f"{directory}: {error}") from error
    if found.class_to_idx != classes:
        odd = sorted(found.class_to_idx.keys() ^ classes.keys())
        raise IntegrityError(
            f"{directory}: its class folders are not those of train (only one has {', '.join(odd[:5])})"
        )
    samples: list[Sample] = found.samples
    return samples


def _class_folders(directory: Path) -> dict[str, int]:
    names = sorted(entry.name for entry in directory.iterdir() if entry.is_dir())
    return {name: index for index, name in enumerate(names)}


@DATASETS.register("imagefolder")
def imagefolder(request: DataRequest) -> DataSource:
    """Open folders of images, one per class, with the transforms of ImageNet training.

    Training images are cut at random and scaled (Szegedy et al., CVPR 2015, section 6), and mirrored; others
    are scaled to 8/7 of the image size and cut in the centre.
    """
    root = request.directory("imagefolder")
    if request.cutout:
        raise UsageError("imagefolder: cutout is for the sets in memory; leave it out")
    present = {name: root / name for name in ("train", "val", "validation", "test") if (root / name).is_dir()}
    held = present.get("val", present.get("validation"))
    last = present.get("test", held)
    if "train" not in present or last is None:
        raise UsageError(
            f"imagefolder: {root} must hold train and val (or test), each with one folder per class; "
            f"it has {', '.join(sorted(present)) or 'none of them'}"
        )
    classes = _class_folders(present["train"])
    samples = _listed(present["train"], classes)
    if "test" in present and held is not None:
        kept, validation = samples, _listed(held, classes)
    else:
        labels = torch.tensor([label for _, label in samples])
        stay, out = stratified_split(labels, request.validation_share, request.seed)
        kept, validation = [samples[i] for i in stay.tolist()], [samples[i] for i in out.tolist()]
    used = stratified_share(torch.tensor([label for _, label in kept]), request.train_share, request.seed)
    kept = [kept[i] for i in used.tolist()]
    tested = _listed(last, classes)
    size = request.image_size or _IMAGE_SIZE

    def split(part: list[Sample]) -> FolderSplit:
        return FolderSplit(part, size, request.workers)

    def digest() -> str:
        # Reading all the images would take longer than some trainings; names and sizes tell most changes.
        sha256 = hashlib.sha256(repr(("imagefolder", size)).encode())
        for part in (kept, validation, tested):
            for path, label in part:
                entry = Path(path)
                sha256.update(f"{entry.relative_to(root)}\0{label}\0{entry.stat().st_size}\n".encode())
            sha256.update(b"\n")
        return sha256.hexdigest()

    return DataSource(
        name="imagefolder",
        input_shape=(3, size, size),
        num_classes=len(classes),
        announcement=f"imagefolder: {len(samples):,} training images in {len(classes)} classes from {root}",
        train=split(kept),
        validation=split(validation),
        load_test=lambda: split(tested),
        digest=digest,
    )
