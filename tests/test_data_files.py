"""The data sets that are read from files: IDX, CIFAR and folders of images."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file

from archsearch.data import DataSource, imagefolder, load_data
from archsearch.data.idx import FASHION_MNIST, read_idx
from archsearch.errors import ArchsearchError, IntegrityError, ResourceError, UsageError

IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx_bytes(array: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx_set(directory: Path, zipped: bool = False) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for part, samples in (("train", 40), ("t10k", 20)):
        images = random.integers(0, 256, (samples, 28, 28), dtype=np.uint8)
        labels = (np.arange(samples) % 10).astype(np.uint8)
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            content = idx_bytes(array)
            path = directory / (f"{name}.gz" if zipped else name)
            path.write_bytes(gzip.compress(content) if zipped else content)


# IDX


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("place", [".", "FashionMNIST/raw"])
def test_idx_files_are_found_plain_or_zipped_and_in_torchvisions_layout(
    tmp_path: Path, zipped: bool, place: str
) -> None:
    write_idx_set(tmp_path / place, zipped)
    source = load_data("fashion-mnist", data_dir=tmp_path, validation_share=0.25)
    assert (source.name, source.input_shape, source.num_classes) == ("fashion-mnist", (1, 28, 28), 10)
    assert (len(source.train), len(source.validation), len(source.test)) == (30, 10, 20)
    assert source.train.augmentation.flip  # type: ignore[attr-defined]
    assert source.train.augmentation.pad == 2  # type: ignore[attr-defined]


def test_idx_values_equal_those_that_torchvision_reads(tmp_path: Path) -> None:
    write_idx_set(tmp_path)
    source = load_data("mnist", data_dir=tmp_path, validation_share=0)
    images, labels = next(source.train.batches(40))
    expected = (read_image_file(str(tmp_path / IDX_FILES[0]))[:, None].float() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(images, expected)
    assert torch.equal(labels, read_label_file(str(tmp_path / IDX_FILES[1])))


def test_zipped_and_plain_copies_have_the_same_fingerprint_and_another_test_set_has_not(
    tmp_path: Path,
) -> None:
    write_idx_set(tmp_path / "plain")
    write_idx_set(tmp_path / "zipped", zipped=True)
    plain = load_data("mnist", data_dir=tmp_path / "plain").fingerprint
    assert plain == load_data("mnist", data_dir=tmp_path / "zipped").fingerprint
    test_labels = tmp_path / "plain" / IDX_FILES[3]
    test_labels.write_bytes(test_labels.read_bytes()[:-1] + b"\0")
    assert plain != load_data("mnist", data_dir=tmp_path / "plain").fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"PK\3\4 something", "not an IDX file"),
        (struct.pack(">BBBB1I", 0, 0, 8, 1, 4) + b"1234", "type 8 with 1 dimensions"),
        (struct.pack(">BBBB3I", 0, 0, 13, 3, 1, 1, 1) + b"1234", "type 13 with 3 dimensions"),
        (struct.pack(">BBBB2I", 0, 0, 8, 3, 1, 1), "truncated in its header"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, 2, 2, 2) + b"1234567", r"truncated \(8 bytes expected\)"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, 2, 2, 2) + b"123456789", "longer than its header says"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, 2**31, 2**31, 2**31), "claims .* bytes"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, 0, 2, 2), "holds nothing"),
        (gzip.compress(b"\0" * 100)[:-12], "truncated or damaged gzip"),
        (b"\x1f\x8b" + b"x" * 30, "truncated or damaged gzip"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=message) as caught:
        read_idx(path, 3)
    assert str(path) in str(caught.value)


@given(cut=st.integers(0, 200), flips=st.lists(st.integers(0, 10_000), max_size=3), zipped=st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_damage_to_an_idx_file_escapes_as_another_error(
    tmp_path: Path, cut: int, flips: list[int], zipped: bool
) -> None:
    content = idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    damaged = bytearray(gzip.compress(content) if zipped else content)
    for flip in flips:
        damaged[flip // 8 % len(damaged)] ^= 1 << flip % 8
    path = tmp_path / "file"
    path.write_bytes(damaged[:cut])
    try:
        images = read_idx(path, 3)
    except ArchsearchError as error:
        assert str(path) in str(error)
    else:
        assert images.ndim == 3


def test_images_and_labels_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    write_idx_set(tmp_path)
    labels = tmp_path / IDX_FILES[1]
    labels.write_bytes(idx_bytes(np.zeros(39, dtype=np.uint8)))
    with pytest.raises(IntegrityError, match="40 images, but 39 labels"):
        load_data("mnist", data_dir=tmp_path)
    labels.write_bytes(idx_bytes(np.full(40, 10, dtype=np.uint8)))
    with pytest.raises(IntegrityError, match="label 10, but there are 10 classes"):
        load_data("mnist", data_dir=tmp_path)


def test_missing_idx_files_are_named_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no train-images-idx3-ubyte\[.gz\] in .*--download"):
        load_data("fashion-mnist", data_dir=tmp_path)
    write_idx_set(tmp_path)
    (tmp_path / IDX_FILES[3]).unlink()
    with pytest.raises(UsageError, match=r"lacks t10k-labels-idx1-ubyte\[.gz\]"):
        load_data("fashion-mnist", data_dir=tmp_path)


def test_a_download_fills_a_new_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.MNIST, "download", lambda self: write_idx_set(Path(self.raw_folder)))
    source = load_data("mnist", data_dir=tmp_path / "new", download=True)
    assert len(source.train) + len(source.validation) == 40
    monkeypatch.setattr(datasets.MNIST, "download", None)  # what is there is not fetched again
    assert load_data("mnist", data_dir=tmp_path / "new", download=True).fingerprint == source.fingerprint


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_failed_download_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(self: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(getattr(datasets, name.upper()), "download", fail)
    with pytest.raises(ResourceError, match=r"could not be downloaded to .* \(no network\)"):
        load_data(name, data_dir=tmp_path, download=True)


@pytest.mark.data
@pytest.mark.skipif(not FASHION_MNIST.places[0].is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_debians_fashion_mnist_is_found_and_its_statistics_are_the_published() -> None:
    source = load_data("fashion-mnist", validation_share=0)
    assert (len(source.train), source.input_shape) == (60_000, (1, 28, 28))
    images, labels = next(source.train.batches(60_000))
    assert labels.bincount().tolist() == [6000] * 10
    assert images.mean().abs() < 1e-3
    assert abs(images.std() - 1) < 1e-3
    assert len(source.test) == 10_000


# CIFAR


class NumpyOf2009(pickle.Pickler):
    """Write dtypes as the published files hold them: ``align`` as the number 0."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.dtype):
            return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)
        return NotImplemented


def write_cifar(
    root: Path, kind: type[datasets.CIFAR10], monkeypatch: pytest.MonkeyPatch, classes: int
) -> Path:
    """Write a small set in the published format, and make its MD5s the published ones for the test."""
    folder: Path = root / kind.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(1)

    def write(name: str, content: dict[str, Any]) -> str:
        buffer = io.BytesIO()
        NumpyOf2009(buffer, protocol=2).dump(content)
        (folder / name).write_bytes(buffer.getvalue())
        return hashlib.md5(buffer.getvalue()).hexdigest()

    def batch(name: str) -> list[str]:
        labels = [int(label) for label in np.arange(20) % classes]
        data = random.integers(0, 256, (20, 3072), dtype=np.uint8)
        return [name, write(name, {"data": data, "labels" if classes == 10 else "fine_labels": labels})]

    for field in ("train_list", "test_list"):
        monkeypatch.setattr(kind, field, [batch(name) for name, _ in getattr(kind, field)])
    key = kind.meta["key"]
    md5 = write(kind.meta["filename"], {key: [str(label) for label in range(classes)]})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5})
    return folder


@pytest.mark.parametrize(
    ("name", "kind", "classes"), [("cifar10", datasets.CIFAR10, 10), ("cifar100", datasets.CIFAR100, 100)]
)
def test_cifar_in_the_published_format_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: type[datasets.CIFAR10], classes: int
) -> None:
    write_cifar(tmp_path, kind, monkeypatch, classes)
    source = load_data(name, data_dir=tmp_path, validation_share=0)
    assert (source.input_shape, source.num_classes) == ((3, 32, 32), classes)
    images, labels = next(source.train.batches(1000))
    peer = kind(str(tmp_path), train=True)
    mean, std = {
        10: ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    }[classes]
    pixels = torch.stack([images[:, c] * std[c] + mean[c] for c in range(3)], dim=-1) * 255
    assert np.array_equal(pixels.round().to(torch.uint8).numpy(), peer.data)
    assert labels.tolist() == peer.targets
    assert len(source.test) == 20
    assert source.train.augmentation.pad == 4  # type: ignore[attr-defined]


def test_a_cifar_file_that_is_not_the_published_one_is_never_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_cifar(tmp_path, datasets.CIFAR10, monkeypatch, 10)
    (folder / "data_batch_3").write_bytes(b"cbuiltins\nexec\n(S'raise SystemExit(3)'\ntR.")
    with pytest.raises(IntegrityError, match="data_batch_3 with another MD5"):
        load_data("cifar10", data_dir=tmp_path)


def test_a_cifar_file_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_cifar(tmp_path, datasets.CIFAR10, monkeypatch, 10)
    (folder / "test_batch").unlink()
    with pytest.raises(UsageError, match=r"lacks test_batch; check --data-dir .*--download"):
        load_data("cifar10", data_dir=tmp_path)


# Folders of images


def write_images(
    directory: Path, per_class: int, seed: int = 0, classes: tuple[str, ...] = ("ant", "bee")
) -> None:
    random = np.random.default_rng(seed)
    for label in classes:
        (directory / label).mkdir(parents=True)
        for number in range(per_class):
            pixels = random.integers(0, 256, (24 + number, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(directory / label / f"{number}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "train", 10)
    write_images(tmp_path / "val", 3, seed=1)
    return tmp_path


def open_folder(folder: Path, workers: int = 0) -> DataSource:
    return load_data("imagefolder", data_dir=folder, workers=workers, image_size=16, validation_share=0.2)


def drain(batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    return [tensor for batch in batches for tensor in batch]


def test_without_a_test_folder_val_is_the_test_set(folder: Path) -> None:
    source = open_folder(folder)
    assert [len(split) for split in (source.train, source.validation, source.test)] == [16, 4, 6]
    assert (source.input_shape, source.num_classes) == ((3, 16, 16), 2)
    write_images(folder / "test", 2, seed=2)
    source = open_folder(folder)
    assert [len(split) for split in (source.train, source.validation, source.test)] == [20, 6, 4]
    source = load_data("imagefolder", data_dir=folder, image_size=16, train_share=0.5)
    assert [len(split) for split in (source.train, source.validation, source.test)] == [10, 6, 4]


def test_evaluation_resizes_and_crops_as_imagenet_does(folder: Path) -> None:
    images, labels = next(open_folder(folder).test.batches(6))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    with Image.open(folder / "val" / "ant" / "2.png") as file:
        # 30x26: the shorter side becomes 16 * 256 / 224 = 18, the longer 30 * 18 / 26 = 20.
        small = file.resize((20, 18), Image.Resampling.BILINEAR)
    pixels = np.asarray(small)[1:17, 2:18] / 255
    expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    torch.testing.assert_close(
        images[2].permute(1, 2, 0).double(), torch.from_numpy(expected), atol=1e-5, rtol=0
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where there is one core
def test_images_do_not_depend_on_the_number_of_workers_nor_on_the_start(folder: Path) -> None:
    alone, helped = open_folder(folder).train, open_folder(folder, workers=2).train
    options: dict[str, Any] = {"seed": 3, "epoch": 1, "train": True}
    torch.manual_seed(0)
    before = torch.get_rng_state()
    whole = drain(alone.batches(5, **options))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    for other in (
        drain(helped.batches(5, **options)),
        whole[:4] + drain(alone.batches(5, start=2, **options)),
    ):
        assert len(whole) == len(other)
        assert all(torch.equal(a, b) for a, b in zip(whole, other, strict=True))
    assert not torch.equal(whole[0], drain(alone.batches(5, seed=3, epoch=2, train=True))[0])


def test_two_copies_of_an_image_are_varied_differently(folder: Path) -> None:
    for path in folder.glob("train/*/*.png"):
        path.write_bytes((folder / "val" / "ant" / "0.png").read_bytes())
    images, _ = next(open_folder(folder).train.batches(16, train=True))
    assert len({image.numpy().tobytes() for image in images}) > 12


def test_ranks_share_the_joint_batch_of_a_folder_even_when_one_gets_none(folder: Path) -> None:
    split = open_folder(folder).train
    joint = list(split.batches(15, train=True))
    ranks = [list(split.batches(5, train=True, rank=rank, world_size=3)) for rank in range(3)]
    assert [len(labels) for _, labels in ranks[2]] == [5, 0]  # 16 samples: 15, and 1 for the first rank
    assert ranks[2][1][0].shape == (0, 3, 16, 16)
    for batch, parts in zip(joint, zip(*ranks, strict=True), strict=True):
        assert torch.equal(torch.cat([images for images, _ in parts]), batch[0])
        assert torch.equal(torch.cat([labels for _, labels in parts]), batch[1])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["truncated", "no image"])
def test_a_corrupt_image_is_named_in_one_line(folder: Path, workers: int, damage: str) -> None:
    path = folder / "val" / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:400] if damage == "truncated" else b"not an image")
    with pytest.raises(IntegrityError, match="not a readable image") as caught:
        drain(open_folder(folder, workers).test.batches(4))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(lambda path: time.sleep(60), id="hangs", marks=pytest.mark.slow),
        pytest.param(lambda path: os.kill(os.getpid(), signal.SIGKILL), id="dies"),
    ],
)
def test_a_worker_that_fails_is_given_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failure: Callable[[str], None]
) -> None:
    split = open_folder(folder, workers=1).test
    monkeypatch.setattr(imagefolder, "_WORKER_TIMEOUT_S", 0.5)
    monkeypatch.setattr(Image, "open", failure)
    with pytest.raises(ResourceError, match=r"died or gave nothing for 0.5 s .*use fewer workers"):
        drain(split.batches(4))


def test_a_folder_of_another_layout_is_refused_with_what_is_there(folder: Path) -> None:
    (folder / "val").rename(folder / "valid")
    with pytest.raises(UsageError, match=r"must hold train and val \(or test\).*it has train"):
        open_folder(folder)
    (folder / "valid").rename(folder / "validation")
    assert len(open_folder(folder).test) == 6
    with pytest.raises(UsageError, match="cutout"):
        load_data("imagefolder", data_dir=folder, cutout=3)


def test_class_folders_that_differ_or_are_empty_are_named(folder: Path) -> None:
    (folder / "val" / "bee").rename(folder / "val" / "wasp")
    with pytest.raises(IntegrityError, match="only one has bee, wasp"):
        open_folder(folder)
    (folder / "train" / "cow").mkdir()
    with pytest.raises(IntegrityError, match="cow"):
        open_folder(folder)


def test_the_fingerprint_of_a_folder_follows_names_and_sizes(folder: Path) -> None:
    first = open_folder(folder).fingerprint
    assert first == open_folder(folder, workers=1).fingerprint
    path = folder / "val" / "ant" / "0.png"
    path.write_bytes(path.read_bytes() + b"\0")
    second = open_folder(folder).fingerprint
    path.rename(path.with_name("9.png"))
    assert len({first, second, open_folder(folder).fingerprint}) == 3
