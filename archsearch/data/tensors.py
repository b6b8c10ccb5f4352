"""Data sets that fit in memory: tensors on the device, cut, mirrored and normalised there in batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

from archsearch.data.augmentation import Augmentation, cut_out, mirrored
from archsearch.data.order import Pass, derived_generator, stratified_share, stratified_split
from archsearch.data.source import Batch, DataSource, Split
from archsearch.errors import UsageError

LabelledImages = tuple[torch.Tensor, torch.Tensor]
_NO_AUGMENTATION = Augmentation()


class TensorSplit(Split):
    """Images held as one tensor.

    They are stored as ``(N, H + 2 * pad, W + 2 * pad, C)`` in their own type, padding included, so that any
    crop of any image is one window of the flat storage at one offset, and a batch of crops one
    ``index_select``.

    Args:
        images: uint8 or float32 ``(N, C, H, W)``.
        labels: int64 ``(N,)``.
        mean: Per channel, in units of the stored values.
        std: Per channel, in the same units.
        augmentation: What happens to the images when they are trained on.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        mean: torch.Tensor,
        std: torch.Tensor,
        augmentation: Augmentation = _NO_AUGMENTATION,
    ) -> None:
        self.augmentation = augmentation
        pad = augmentation.pad
        self._samples, self._channels, self._height, self._width = images.shape
        self._stored = F.pad(images.permute(0, 2, 3, 1), (0, 0, pad, pad, pad, pad)).contiguous()
        self._labels = labels
        # One value per channel, repeated along a row: whole rows normalise as fast as memory allows.
        self._shift = mean.float().repeat(self._width)
        self._scale = std.float().reciprocal().repeat(self._width)
        self._device = torch.device("cpu")
        self._resident = self._constants()

    def __len__(self) -> int:
        return self._samples

    def update_digest(self, digest: hashlib._Hash) -> None:
        """Add all that decides the batches to ``digest``."""
        digest.update(repr((tuple(self._stored.shape), str(self._stored.dtype), self.augmentation)).encode())
        for tensor in self._constants():
            digest.update(tensor.contiguous().numpy().data)

    def _constants(self) -> tuple[torch.Tensor, ...]:
        return self._stored, self._labels, self._shift, self._scale

    def _deliver(self, wanted: Pass) -> Iterator[Batch]:
        indices = wanted.indices(len(self))
        if wanted.device != self._device:
            self._resident = tuple(tensor.to(wanted.device) for tensor in self._constants())
            self._device = wanted.device
        return self._cut(wanted, indices, self._resident)

    def _cut(
        self, wanted: Pass, batches: Iterator[torch.Tensor], resident: tuple[torch.Tensor, ...]
    ) -> Iterator[Batch]:
        stored, labels, shift, scale = resident
        # Drawn on the CPU, whose generator gives the same numbers whatever the device.
        if wanted.train:
            generator = derived_generator("augmentation", wanted.seed, wanted.epoch)
            draws = self.augmentation.draw(len(self), self._height, self._width, generator)
        else:
            draws = self.augmentation.still(len(self))
        draws = draws.to(wanted.device)
        windows, offsets = self._windows(stored)
        for chosen in batches:
            rows = chosen.to(wanted.device, non_blocking=True)
            top, left, mirror, cut_row, cut_column = draws[rows].unbind(1)
            start = rows * offsets[0] + top * offsets[1] + left * offsets[2]
            images = windows.index_select(0, start).view(-1, self._height, self._width, self._channels)
            if wanted.train and self.augmentation.flip:
                images = mirrored(images, mirror)
            lines = images.view(-1, self._height, self._width * self._channels).to(torch.float32)
            images = lines.sub_(shift).mul_(scale).view_as(images)
            if wanted.train and self.augmentation.cutout:
                images = cut_out(images, self.augmentation.cutout, cut_row, cut_column)
            images = images.permute(0, 3, 1, 2)
            yield images if wanted.channels_last else images.contiguous(), labels[rows]

    def _windows(self, stored: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Return the image-sized windows ``(offset, H, W * C)`` of the storage and its strides N, H, W."""
        image, row, pixel = stored.stride()[:3]
        length = self._width * self._channels
        count = stored.numel() - (self._height - 1) * row - length + 1
        windows = stored.view(-1).as_strided((max(count, 0), self._height, length), (1, row, 1))
        return windows, (image, row, pixel)


def channel_statistics(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of each channel of ``(N, C, H, W)`` in float64, both ``(C,)``.

    A channel that never changes gets the deviation 1, since it cannot be scaled to any other.
    """
    if images.dtype == torch.uint8:  # exact, and without a floating-point copy of the images
        counts = torch.stack(
            [channel.reshape(-1).bincount(minlength=256) for channel in images.unbind(1)]
        ).double()
        share, value = counts / counts.sum(1, keepdim=True), torch.arange(256, dtype=torch.float64)
        mean = share @ value
        std = ((value - mean[:, None]).square() * share).sum(1).sqrt()
    else:
        values = images.transpose(0, 1).flatten(1).double()
        mean, std = values.mean(1), values.std(1, correction=0)
    return mean, torch.where(std > 0, std, torch.ones_like(std))


def resized(images: torch.Tensor, size: int) -> torch.Tensor:
    """Return uint8 images ``(N, C, H, W)`` brought to ``size`` pixels square, bilinear with antialiasing."""
    if images.shape[2:] == (size, size):
        return images
    parts = [
        F.interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True)
        .round_()
        .to(torch.uint8)
        for part in images.split(1024)  # the floating-point copy of all of them might not fit
    ]
    return torch.cat(parts)


def in_memory(
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    test: LabelledImages | Callable[[], LabelledImages],
    validation: LabelledImages | None = None,
    validation_share: float = 0.1,
    train_share: float = 1.0,
    seed: int = 0,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augmentation: Augmentation = _NO_AUGMENTATION,
    name: str = "in-memory",
    announcement: str | None = None,
    test_identity: str = "",
) -> DataSource:
    """Make a data source of tensors.

    Args:
        images: Training images, uint8 or float32 ``(N, C, H, W)``; not changed.
        labels: Their classes, integers ``(N,)`` in ``[0, num_classes)``.
        test: Test images and labels, or a function that loads them when they are first used.
        validation: Validation images and labels; None takes them out of the training images.
        validation_share: Share of each class that is taken then, in ``[0, 1)``.
        train_share: Share of each class's other images that are trained on, in ``(0, 1]``.
        seed: Decides which ones are.
        num_classes: One more than the largest training label by default.
        mean: Subtracted per channel; in ``[0, 1]`` for uint8 images, in the images' own units for float32. By
            default that of the training images.
        std: Divided by per channel; likewise.
        augmentation: What happens to training images; none by default.
        name: Of the source, for tables and file names.
        announcement: One line for the user.
        test_identity: Stands for the test set in the fingerprint where ``test`` is a function.

    Raises:
        UsageError: If a tensor has the wrong type or shape, a label is out of range, or a value is not
            finite.
    """
    _check_images(f"{name}: training", images, labels)
    labels = labels.long()
    if len(labels) == 0:
        raise UsageError(f"{name}: there are no training images")
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    _check_labels(f"{name}: training", labels, classes)
    if validation is None:
        stay, held = stratified_split(labels, validation_share, seed)
        validation = images[held], labels[held]
        images, labels = images[stay], labels[stay]
    if train_share < 1:
        used = stratified_share(labels, train_share, seed)
        images, labels = images[used], labels[used]

    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    shift, scale = (
        channel_statistics(images) if mean is None or std is None else (torch.empty(0), torch.empty(0))
    )
    shift = shift if mean is None else _per_channel(f"{name}: mean", mean, images) * unit
    scale = scale if std is None else _per_channel(f"{name}: std", std, images) * unit
    if not bool((scale > 0).all()):
        raise UsageError(f"{name}: std is {list(std or [])}, but must be above 0")

    def split(part: str, pair: LabelledImages, change: Augmentation = _NO_AUGMENTATION) -> TensorSplit:
        _check_images(f"{name}: {part}", *pair, like=images)
        _check_labels(f"{name}: {part}", pair[1], classes)
        return TensorSplit(pair[0], pair[1].long(), shift, scale, change)

    def test_split() -> TensorSplit:
        return split("test", test() if callable(test) else test)

    trained, validated = split("training", (images, labels), augmentation), split("validation", validation)
    present = (
        None if callable(test) else test_split()
    )  # wrong tensors should not wait for the end to be found

    def digest() -> str:
        sha256 = hashlib.sha256(repr((name, classes, test_identity)).encode())
        for part in (trained, validated, present):
            if part is not None:
                part.update_digest(sha256)
        return sha256.hexdigest()

    channels, height, width = images.shape[1:]
    return DataSource(
        name=name,
        input_shape=(channels, height, width),
        num_classes=classes,
        announcement=announcement
        or f"{name}: {len(trained):,} training images of {height}x{width} pixels in memory",
        train=trained,
        validation=validated,
        load_test=test_split if present is None else lambda: present,
        digest=digest,
    )


def _check_images(
    where: str, images: torch.Tensor, labels: torch.Tensor, like: torch.Tensor | None = None
) -> None:
    if images.dtype not in (torch.uint8, torch.float32) or images.ndim != 4:
        raise UsageError(
            f"{where} images must be uint8 or float32 (N, C, H, W), not {images.dtype} {tuple(images.shape)}"
        )
    if 0 in images.shape[1:]:
        raise UsageError(f"{where} images have no pixels: shape {tuple(images.shape)}")
    if like is not None and (images.dtype, images.shape[1:]) != (like.dtype, like.shape[1:]):
        raise UsageError(
            f"{where} images are {images.dtype} of shape {tuple(images.shape[1:])}, "
            f"but the training images {like.dtype} of shape {tuple(like.shape[1:])}"
        )
    if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise UsageError(
            f"{where} labels must be {len(images)} integers, one for each image, "
            f"not {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if images.is_floating_point() and not bool(images.isfinite().all()):
        raise UsageError(f"{where} images have values that are not finite")


def _check_labels(where: str, labels: torch.Tensor, classes: int) -> None:
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UsageError(
            f"{where} labels are in [{int(labels.min())}, {int(labels.max())}], but must be in [0, {classes})"
        )


def _per_channel(where: str, values: Sequence[float], images: torch.Tensor) -> torch.Tensor:
    if len(values) != images.shape[1]:
        raise UsageError(f"{where} has {len(values)} values for {images.shape[1]} channels")
    return torch.tensor(values, dtype=torch.float64)
