from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from archsearch.errors import DivergedError, IntegrityError
from archsearch.training.checkpoint import Checkpoints, optimizer_tensors, restore_optimizer

TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(3)}


def saved(directory: Path, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(directory)
    for step in steps:
        checkpoints.save(step, TENSORS, {"step": step})
    return checkpoints


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    tensors, state = saved(tmp_path, 5).load() or ({}, {})
    assert state == {"step": 5}
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_an_empty_directory_holds_no_checkpoint(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path).load() is None


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, 10)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000000003", "step-000000010"]


def test_a_half_written_checkpoint_counts_for_nothing_and_is_swept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    half = tmp_path / "step-000000002"
    half.mkdir()
    (half / "tensors.safetensors").write_bytes(b"torn")
    assert checkpoints.load()[1] == {"step": 1}
    checkpoints.save(3, TENSORS, {"step": 3})
    assert not half.exists()


def test_what_comes_after_a_passed_over_checkpoint_takes_its_place(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 9)
    (tmp_path / "step-000000009" / "state.json").write_text("{}")
    assert checkpoints.load()[1] == {"step": 1}
    checkpoints.save(2, TENSORS, {"step": 2})
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000000001", "step-000000002"]


def test_nothing_is_left_to_load_after_clearing(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    checkpoints.clear()
    assert checkpoints.load() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_and_the_old_ones_stay(tmp_path: Path, value: float) -> None:
    checkpoints = saved(tmp_path, 1)
    with pytest.raises(DivergedError, match="weight is not finite"):
        checkpoints.save(2, {"weight": torch.tensor([1.0, value])}, {})
    assert checkpoints.load()[1] == {"step": 1}


@given(name=st.sampled_from(["tensors.safetensors", "state.json", "manifest.json"]), data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_flipped_bit_or_lost_tail_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    logging.disable()
    try:
        directory = tmp_path_factory.mktemp("flip")
        checkpoints = saved(directory, 1)
        path = directory / "step-000000001" / name
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        else:
            del content[place:]
        path.write_bytes(content)
        try:
            tensors, state = checkpoints.load()
        except IntegrityError as error:
            assert "every checkpoint is damaged" in str(error)
        else:  # white space of the manifest carries nothing
            assert name == "manifest.json"
            assert (state, tensors["weight"].tolist()) == ({"step": 1}, TENSORS["weight"].tolist())
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_gets_its_tensors_back_in_the_layout_of_its_parameters(
    kind: type[torch.optim.Optimizer],
) -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    extra = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    first, second = (kind(model.parameters(), lr=0.1, **extra) for _ in range(2))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    first.step()
    tensors = {name: tensor.contiguous() for name, tensor in optimizer_tensors(first).items()}
    restore_optimizer(second, tensors)
    for parameter in model.parameters():
        for key, value in first.state[parameter].items():
            assert torch.equal(second.state[parameter][key], value)
            assert second.state[parameter][key].stride() == value.stride()
