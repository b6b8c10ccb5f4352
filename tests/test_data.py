"""Splits, order, augmentation and the sources that live in memory or come from loaders."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchvision.transforms import v2

from archsearch.data import DATASETS, Augmentation, DataSource, from_loaders, in_memory, load_data
from archsearch.data.augmentation import cut_out
from archsearch.data.order import Pass, derived_generator, stratified_split
from archsearch.data.source import Batch
from archsearch.data.tensors import channel_statistics, resized
from archsearch.errors import UnknownNameError, UsageError

VARIED = Augmentation(pad=2, flip=True, cutout=3)


def numbered(
    samples: int, channels: int = 3, size: int = 6, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise images and labels; the label counts up, so that it tells which image it is."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (samples, channels, size, size), dtype=torch.uint8, generator=generator)
    return images, torch.arange(samples)


def source_of(samples: int = 50, augmentation: Augmentation = VARIED) -> DataSource:
    images, labels = numbered(samples)
    test = images[:5], labels[:5]
    return in_memory(images, labels, test=test, validation_share=0, augmentation=augmentation)


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True)
    )


# Order


@given(
    samples=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    world_size=st.integers(1, 5),
    start=st.integers(0, 10),
    train=st.booleans(),
    drop_last=st.booleans(),
)
def test_the_ranks_batches_joined_are_the_batches_of_one_process_from_any_start(
    samples: int, batch_size: int, world_size: int, start: int, train: bool, drop_last: bool
) -> None:
    joint = list(Pass(batch_size * world_size, 3, 7, train, drop_last=drop_last).indices(samples))
    start = min(start, len(joint))
    ranks = [
        list(Pass(batch_size, 3, 7, train, start, rank, world_size, drop_last=drop_last).indices(samples))
        for rank in range(world_size)
    ]
    assert [torch.cat(parts).tolist() for parts in zip(*ranks, strict=True)] == [
        b.tolist() for b in joint[start:]
    ]
    for parts in zip(*ranks, strict=True):
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= batch_size


@given(samples=st.integers(1, 60), batch_size=st.integers(1, 20), epoch=st.integers(0, 3))
def test_every_sample_comes_exactly_once_in_an_epoch(samples: int, batch_size: int, epoch: int) -> None:
    order = torch.cat(list(Pass(batch_size, 1, epoch, train=True).indices(samples)))
    assert sorted(order.tolist()) == list(range(samples))


def test_dropping_the_last_batch_leaves_only_full_ones() -> None:
    split = source_of(50).train
    assert split.num_batches(8) == 7
    assert split.num_batches(8, drop_last=True) == 6
    assert split.num_batches(4, world_size=2, drop_last=True) == 6
    assert [len(labels) for _, labels in split.batches(8, drop_last=True, train=True)] == [8] * 6


def test_seed_and_epoch_each_change_the_order_and_nothing_else_does() -> None:
    orders = {
        tuple(torch.cat(list(Pass(7, seed, epoch, train=True).indices(50))).tolist())
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9
    assert tuple(torch.cat(list(Pass(50, 2, 2, train=True).indices(50))).tolist()) in orders


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    share=st.floats(0.05, 0.9),
    seed=st.integers(0, 3),
)
def test_a_stratified_split_takes_the_share_of_every_class(
    counts: list[int], share: float, seed: int
) -> None:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    wanted = round(share * len(labels))
    # Classes whose share is no whole number, and that can spare it rounded up.
    spare = sum(int(share * count) < share * count and int(share * count) + 1 < count for count in counts)
    certain = sum(int(share * count) for count in counts)
    expected = certain + min(wanted - certain, spare)
    if expected == 0:
        with pytest.raises(UsageError, match="holds out none"):
            stratified_split(labels, share, seed)
        return
    stay, held = stratified_split(labels, share, seed)
    assert sorted([*stay.tolist(), *held.tolist()]) == list(range(len(labels)))
    assert len(held) == expected
    for label, count in enumerate(counts):
        assert abs(int((labels[held] == label).sum()) - share * count) < 1
        assert bool((labels[stay] == label).any())


def test_a_split_of_few_samples_rounds_up_where_the_fraction_is_largest() -> None:
    labels = torch.tensor([0] * 7 + [1] * 4 + [2] * 1 + [3] * 8)  # quotas 1.4, 0.8, 0.2 and 1.6 of 20 samples
    _, held = stratified_split(labels, 0.2, seed=0)
    assert labels[held].bincount(minlength=4).tolist() == [1, 1, 0, 2]


def test_the_validation_split_depends_on_its_seed_alone() -> None:
    labels = torch.arange(200) % 10
    first = stratified_split(labels, 0.2, 5)[1]
    torch.manual_seed(123)
    assert torch.equal(first, stratified_split(labels, 0.2, 5)[1])
    assert not torch.equal(first, stratified_split(labels, 0.2, 6)[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 4, "rank": 2, "world_size": 2}, r"rank is 2, but must be in \[0, 2\)"),
        ({"batch_size": 4, "epoch": -1}, "epoch is -1"),
        ({"batch_size": 4, "start": 14}, "start is 14, but an epoch has only 13 batches"),
    ],
)
def test_a_number_out_of_range_is_refused_before_the_first_batch(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        source_of(50).train.batches(**arguments)


# Images in memory


@given(
    start=st.integers(0, 7),
    world_size=st.integers(1, 3),
    epoch=st.integers(0, 2),
    channels_last=st.booleans(),
)
@settings(deadline=None)
def test_a_pass_from_the_middle_and_over_ranks_gives_the_same_bits(
    start: int, world_size: int, epoch: int, channels_last: bool
) -> None:
    split = source_of(50).train
    options: dict[str, Any] = {"seed": 9, "epoch": epoch, "train": True, "channels_last": channels_last}
    whole = list(split.batches(6 * world_size, **options))
    start = min(start, len(whole))
    ranks = [
        split.batches(6, start=start, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    joined = [
        (torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts]))
        for parts in zip(*ranks, strict=True)
    ]
    assert same(joined, whole[start:])


def test_a_sample_is_varied_alike_whatever_the_batch_size_and_differently_in_each_epoch() -> None:
    split = source_of(20).train

    def by_sample(batch_size: int, epoch: int) -> torch.Tensor:
        images, labels = zip(*split.batches(batch_size, epoch=epoch, train=True), strict=True)
        return torch.cat(images)[torch.cat(labels).argsort()]

    assert torch.equal(by_sample(3, 0), by_sample(20, 0))
    assert not torch.equal(by_sample(3, 0), by_sample(3, 1))


def test_crop_flip_and_normalisation_are_those_of_torchvision() -> None:
    images, labels = numbered(40, size=8)
    mean, std, change = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1), Augmentation(pad=3, flip=True)
    source = in_memory(
        images, labels, test=(images, labels), validation_share=0, mean=mean, std=std, augmentation=change
    )
    draws = change.draw(40, 8, 8, derived_generator("augmentation", 4, 2))
    seen = 0
    for batch, numbers in source.train.batches(7, seed=4, epoch=2, train=True):
        for image, number in zip(batch, numbers.tolist(), strict=True):
            top, left, flip = draws[number, :3].tolist()
            expected = v2.functional.crop(v2.functional.pad(images[number], [3, 3, 3, 3]), top, left, 8, 8)
            expected = v2.functional.horizontal_flip(expected) if flip else expected
            expected = v2.functional.normalize(expected.float() / 255, list(mean), list(std))
            torch.testing.assert_close(image, expected)
            seen += 1
    assert seen == 40
    plain = torch.cat([batch for batch, _ in source.train.batches(16)])
    torch.testing.assert_close(plain, v2.functional.normalize(images.float() / 255, list(mean), list(std)))


def test_draws_are_uniform() -> None:
    draws = Augmentation(pad=1, flip=True, cutout=4).draw(30_000, 5, 7, derived_generator("any"))
    for column, values in enumerate((3, 3, 2, 5, 7)):
        counts = Counter(draws[:, column].tolist())
        assert sorted(counts) == list(range(values))
        expected = 30_000 / values
        chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
        assert chi_square < 22.5  # the 0.1 % point of six degrees of freedom


@pytest.mark.parametrize(
    ("side", "row", "column", "rows", "columns"),
    [
        (3, 2, 2, (1, 4), (1, 4)),
        (2, 2, 4, (1, 3), (3, 5)),
        (4, 0, 5, (0, 2), (3, 6)),
        (1, 5, 0, (5, 6), (0, 1)),
    ],
)
def test_cutout_blanks_the_square_and_clips_it_at_the_border(
    side: int, row: int, column: int, rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    images = cut_out(torch.ones(1, 6, 6, 2), side, torch.tensor([row]), torch.tensor([column]))
    expected = torch.ones(1, 6, 6, 2)
    expected[:, slice(*rows), slice(*columns)] = 0
    assert torch.equal(images, expected)


def test_training_batches_carry_the_cutout() -> None:
    images, labels = torch.full((30, 1, 8, 8), 200, dtype=torch.uint8), torch.arange(30)
    images[0] = 0
    source = in_memory(
        images, labels, test=(images, labels), validation_share=0, augmentation=Augmentation(cutout=4)
    )
    for image, number in zip(*next(source.train.batches(30, train=True)), strict=True):
        blank = int((image == 0).sum())
        assert 4 <= blank <= 16, number  # a quarter of the square at a corner, else all of it
    assert not bool((next(source.train.batches(30))[0] == 0).any())


def test_evaluation_keeps_order_and_images_in_every_epoch() -> None:
    split = source_of(20).train
    first, second = list(split.batches(6, seed=1, epoch=1)), list(split.batches(6, seed=2, epoch=5))
    assert same(first, second)
    assert torch.cat([labels for _, labels in first]).tolist() == list(range(20))


def test_the_layout_changes_strides_and_not_values() -> None:
    split = source_of(20).train
    plain, _ = next(split.batches(6, train=True))
    last, _ = next(split.batches(6, train=True, channels_last=True))
    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    assert plain.dtype == last.dtype == torch.float32
    assert torch.equal(plain, last)


def test_the_global_random_state_is_neither_read_nor_changed() -> None:
    split = source_of(20).train
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = list(split.batches(6, train=True))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert same(first, list(split.batches(6, train=True)))


def test_a_caller_who_changes_a_batch_does_not_change_the_data() -> None:
    images, labels = numbered(12)
    for own in (images, images.float()):
        source = in_memory(own, labels, test=(own, labels), validation_share=0)
        clean = [(a.clone(), b.clone()) for a, b in source.train.batches(5)]
        for batch, numbers in source.train.batches(5):
            batch.zero_()
            numbers.zero_()
        assert same(clean, list(source.train.batches(5)))


def test_images_that_are_not_square_are_cut_right() -> None:
    images = torch.arange(2 * 1 * 4 * 7, dtype=torch.float32).view(2, 1, 4, 7)
    source = in_memory(
        images,
        torch.tensor([0, 1]),
        test=(images, torch.tensor([0, 1])),
        validation_share=0,
        mean=[0],
        std=[1],
        augmentation=Augmentation(pad=1),
    )
    assert source.input_shape == (1, 4, 7)
    assert torch.equal(next(source.train.batches(2))[0], images)
    assert next(source.train.batches(2, train=True))[0].shape == (2, 1, 4, 7)


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_by_default_the_training_images_have_mean_0_and_deviation_1(kind: str) -> None:
    images, labels = numbered(64, size=5)
    images = images if kind == "uint8" else images.float() / 3 + 7
    source = in_memory(images, labels % 4, test=(images, labels % 4), validation_share=0.25)
    assert (len(source.train), len(source.validation)) == (48, 16)
    batch = next(source.train.batches(64))[0]
    torch.testing.assert_close(batch.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_channel_statistics_equal_numpys() -> None:
    images, _ = numbered(30)
    for own in (images, images.float()):
        mean, std = channel_statistics(own)
        np.testing.assert_allclose(mean, own.double().numpy().mean((0, 2, 3)), rtol=1e-12)
        np.testing.assert_allclose(std, own.double().numpy().std((0, 2, 3)), rtol=1e-12)
    constant = torch.full((4, 1, 3, 3), 9, dtype=torch.uint8)
    assert channel_statistics(constant)[1].item() == 1


def test_resizing_equals_torchvisions() -> None:
    images, _ = numbered(5, size=20)
    expected = v2.functional.resize(images, [9, 9], antialias=True)
    assert int((resized(images, 9).int() - expected.int()).abs().max()) <= 1
    assert resized(images, 20) is images


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_the_gpu_equal_those_on_the_cpu() -> None:
    split = source_of(50).train
    there = [(a.cpu(), b.cpu()) for a, b in split.batches(8, train=True, device="cuda")]
    for (left, numbers), (right, others) in zip(split.batches(8, train=True), there, strict=True):
        assert torch.equal(numbers, others)
        torch.testing.assert_close(left, right)


def test_the_fingerprint_tells_data_split_and_augmentation_apart() -> None:
    images, labels = numbered(40)
    labels = labels % 4
    other = images.clone()
    other[3, 0, 0, 0] ^= 1

    def fingerprint(
        train: torch.Tensor = images,
        test: torch.Tensor = images,
        seed: int = 0,
        pad: int = 0,
        share: float = 0.2,
    ) -> str:
        return in_memory(
            train,
            labels,
            test=(test, labels),
            seed=seed,
            validation_share=share,
            augmentation=Augmentation(pad),
        ).fingerprint

    assert fingerprint() == fingerprint()
    distinct = [
        fingerprint(),
        fingerprint(train=other),
        fingerprint(test=other),
        fingerprint(seed=1),
        fingerprint(pad=1),
        fingerprint(share=0),
    ]
    assert len(set(distinct)) == len(distinct)
    assert len(bytes.fromhex(fingerprint())) == hashlib.sha256().digest_size


def test_the_test_set_is_loaded_when_first_used_and_only_once() -> None:
    images, labels = numbered(40)
    calls = []

    def test() -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        return images, labels

    source = in_memory(images, labels, test=test, validation_share=0)
    list(source.train.batches(8))
    assert source.fingerprint
    assert not calls
    assert len(source.test) == len(source.test) == 40
    assert len(calls) == 1


IMAGES, LABELS = numbered(10)
TEST: dict[str, Any] = {"test": (IMAGES, LABELS)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: in_memory(IMAGES.double(), LABELS, **TEST),
            r"uint8 or float32 \(N, C, H, W\), not torch.float64",
        ),
        (lambda: in_memory(IMAGES[0], LABELS, **TEST), r"not torch.uint8 \(3, 6, 6\)"),
        (lambda: in_memory(IMAGES, LABELS[:9], **TEST), "must be 10 integers, one for each image"),
        (lambda: in_memory(IMAGES, LABELS.float(), **TEST), "must be 10 integers"),
        (lambda: in_memory(IMAGES, LABELS - 1, **TEST), r"in \[-1, 8\], but must be in \[0, 9\)"),
        (lambda: in_memory(IMAGES, LABELS, num_classes=9, **TEST), r"in \[0, 9\], but must be in \[0, 9\)"),
        (lambda: in_memory(IMAGES[:0], LABELS[:0], **TEST), "there are no training images"),
        (lambda: in_memory(IMAGES.float() / 0, LABELS, **TEST), "not finite"),
        (
            lambda: in_memory(IMAGES, LABELS, validation_share=0, test=(IMAGES[:, :1], LABELS)),
            "but the training images torch.uint8",
        ),
        (lambda: in_memory(IMAGES, LABELS, validation=(IMAGES, LABELS + 1), **TEST), "validation labels"),
        (
            lambda: in_memory(IMAGES, LABELS, validation_share=0, mean=[0.5], **TEST),
            "mean has 1 values for 3 channels",
        ),
        (lambda: in_memory(IMAGES, LABELS, validation_share=0, std=[1, 0, 1], **TEST), "must be above 0"),
        (
            lambda: in_memory(IMAGES, LABELS, validation_share=1, **TEST),
            r"share is 1, but must be in \[0, 1\)",
        ),
        (lambda: in_memory(IMAGES, LABELS, validation_share=0.1, **TEST), "holds out none"),
        (lambda: Augmentation(pad=-1), "pad -1"),
    ],
)
def test_wrong_tensors_are_refused_in_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


# Digits and names


def test_digits_are_the_1797_images_of_scikit_learn_in_fixed_splits() -> None:
    source = load_data("digits")
    assert source.input_shape == (1, 8, 8)
    assert source.num_classes == 10
    assert "1,797 8x8 images" in source.announcement
    assert (len(source.train), len(source.validation), len(source.test)) == (1294, 144, 359)
    parts = [next(split.batches(2000)) for split in (source.train, source.validation, source.test)]
    images, labels = torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts])
    # The class counts of the data set's own description; a fifth of each, rounded, is the test set.
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert parts[2][1].bincount().tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]

    raw = load_digits()
    ink = ((images - images.min()) * 16 / (images.max() - images.min())).round().int().view(1797, 64)
    mine = sorted(zip(ink.tolist(), labels.tolist(), strict=True))
    assert mine == sorted(zip(raw.data.astype(int).tolist(), raw.target.tolist(), strict=True))


def test_the_test_digits_stay_the_same_whatever_the_seed() -> None:
    first, second = load_data("digits", seed=0), load_data("digits", seed=1, validation_share=0.3)
    (left, numbers), (right, others) = next(first.test.batches(400)), next(second.test.batches(400))
    assert torch.equal(numbers, others)
    torch.testing.assert_close(left, right, atol=0.1, rtol=0)  # the statistics of another training split
    assert first.fingerprint != second.fingerprint
    assert first.fingerprint == load_data("digits").fingerprint


def test_digits_grow_with_the_image_size_and_so_does_the_padding() -> None:
    source = load_data("digits", image_size=32, cutout=8)
    assert source.input_shape == (1, 32, 32)
    assert next(source.train.batches(3, train=True))[0].shape == (3, 1, 32, 32)
    assert source.train.augmentation == Augmentation(pad=4, flip=False, cutout=8)  # type: ignore[attr-defined]


def test_a_train_share_leaves_out_training_images_of_each_class_and_no_others() -> None:
    whole, part = load_data("digits"), load_data("digits", train_share=0.25)
    few = next(part.train.batches(2000))[1].bincount()
    all_of_them = next(whole.train.batches(2000))[1].bincount()
    assert len(part.train) == round(0.25 * len(whole.train))
    assert ((few - 0.25 * all_of_them).abs() < 1).all()
    for split in ("validation", "test"):
        kept, (_, labels) = (
            next(getattr(part, split).batches(2000)),
            next(getattr(whole, split).batches(2000)),
        )
        assert torch.equal(kept[1], labels)
    assert part.fingerprint != whole.fingerprint


def test_a_train_share_that_leaves_nothing_out_changes_nothing() -> None:
    assert load_data("digits", train_share=0.9999).fingerprint == load_data("digits").fingerprint


def test_a_wrong_name_gets_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown data set 'cifar-10': did you mean cifar10"):
        load_data("cifar-10")


def test_all_promised_data_sets_are_registered() -> None:
    promised = {"digits", "fashion-mnist", "mnist", "cifar10", "cifar100", "imagefolder"}
    assert promised <= set(DATASETS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation_share": 1.0}, "validation share is 1.0"),
        ({"train_share": 0.0}, "train share is 0.0"),
        ({"workers": -1}, "workers is -1"),
        ({"image_size": 0}, "image size is 0"),
        ({"cutout": -2}, "cutout is -2"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_data("digits", **arguments)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "imagefolder"])
def test_a_set_of_files_without_a_directory_says_which_option_is_missing(name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name}: .*give --data-dir DIR"):
        load_data(name)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion-mnist", "imagefolder"])
def test_a_directory_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(UsageError, match="the data directory /not/there does not exist"):
        load_data(name, data_dir="/not/there")


# Loaders


def float_batches(samples: int = 10, batch_size: int = 4) -> DataLoader[tuple[torch.Tensor, ...]]:
    images, labels = numbered(samples)
    generator = torch.Generator()
    return DataLoader(
        TensorDataset(images.float(), labels), batch_size=batch_size, shuffle=True, generator=generator
    )


def test_a_loader_with_a_generator_follows_seed_and_epoch() -> None:
    loader = float_batches()
    source = from_loaders(loader, [], input_shape=(3, 6, 6), num_classes=10)
    split = source.train
    assert (len(split), split.num_batches(999)) == (10, 3)
    whole = list(split.batches(4, seed=1, epoch=2, train=True))
    assert same(whole[1:], list(split.batches(4, seed=1, epoch=2, train=True, start=1)))
    orders = {
        tuple(torch.cat([labels for _, labels in split.batches(4, seed=1, epoch=epoch)]).tolist())
        for epoch in range(4)
    }
    assert len(orders) == 4


def test_a_list_of_batches_is_a_loader() -> None:
    images, labels = numbered(10)
    batches = [(images[:6].float(), labels[:6]), (images[6:].float(), labels[6:].int())]
    source = from_loaders(batches, batches, validation_loader=batches, input_shape=(3, 6, 6), num_classes=10)
    assert [len(split) for split in (source.train, source.validation, source.test)] == [10, 10, 10]
    delivered = list(source.test.batches(3, channels_last=True))
    assert torch.equal(torch.cat([images for images, _ in delivered]), images.float())
    assert delivered[0][0].is_contiguous(memory_format=torch.channels_last)
    assert delivered[1][1].dtype == torch.int64
    assert len(from_loaders(batches, batches, input_shape=(3, 6, 6), num_classes=10).validation) == 0


def test_a_distributed_sampler_is_told_the_epoch_and_must_fit_the_processes() -> None:
    images, labels = numbered(10)
    data = TensorDataset(images.float(), labels)
    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(data, num_replicas=2, rank=0)
    loader = DataLoader(data, batch_size=5, sampler=sampler)
    split = from_loaders(loader, [], input_shape=(3, 6, 6), num_classes=10).train
    next(split.batches(5, epoch=3, world_size=2))
    assert sampler.epoch == 3
    with pytest.raises(UsageError, match="among 2 processes, but there are 1"):
        split.batches(5)


def test_loaders_that_cannot_serve_are_refused() -> None:
    shape: dict[str, Any] = {"input_shape": (3, 6, 6), "num_classes": 10}
    images, labels = numbered(4)
    with pytest.raises(UsageError, match="the test loader does not tell its length"):
        from_loaders([], iter([]), **shape)
    with pytest.raises(UsageError, match="must give images float32"):
        from_loaders([(images, labels)], [], **shape)
    with pytest.raises(UsageError, match="pairs"):
        next(from_loaders(DataLoader(TensorDataset(images), 4), [], **shape).train.batches(4))
    with pytest.raises(UsageError, match="pairs"):
        from_loaders([images], [], **shape)  # type: ignore[list-item]
    with pytest.raises(UsageError, match="start is 2"):
        from_loaders([(images.float(), labels)], [], **shape).train.batches(4, start=2)


def test_the_fingerprint_of_loaders_is_what_the_user_says_it_is() -> None:
    facts: dict[str, Any] = {"input_shape": (3, 6, 6), "num_classes": 10}
    one = from_loaders([], [], identity="v1", **facts).fingerprint
    assert one == from_loaders([], [], identity="v1", **facts).fingerprint
    assert one != from_loaders([], [], identity="v2", **facts).fingerprint
