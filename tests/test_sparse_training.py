"""What holds for every method that trains the reference its own way before it scores."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sparse_case as case
import torch
from find_case import ENVIRONMENT
from training_case import RECIPE, SignalAt, weights_hash

from archsearch.errors import PreemptedError
from archsearch.grouping import channel_graph
from archsearch.pruners import PRUNERS, Context
from archsearch.tensor_files import read_tensors

METHODS = [name for name in PRUNERS if "sparse training" in PRUNERS[name].needs]
methods = pytest.mark.parametrize("method", METHODS)

STRONG: dict[str, tuple[dict[str, float], int]] = {
    "slimming": ({"strength": 0.02}, 40),
    "sss": ({"strength": 0.02}, 40),
    "soft_filter": ({}, 20),
    "group_l1": ({"strength": 0.02}, 20),
}
"""Penalties and epochs that do in a few steps what the published ones do in many."""


@methods
def test_the_plain_network_computes_what_was_trained_and_has_the_same_channels(method: str) -> None:
    training, graph = case.sparse_training(method, case.planted())
    case.run(training, epochs=1)
    plain = training.plain().eval()
    assert type(plain) is case.TinyNet
    torch.testing.assert_close(plain(case.EXAMPLE), training.network.eval()(case.EXAMPLE), rtol=0, atol=0)
    assert channel_graph(plain, case.EXAMPLE).sizes == graph.sizes


@methods
def test_the_training_changes_what_is_scored(method: str) -> None:
    training, graph = case.sparse_training(method, case.planted())
    pruner = PRUNERS[method]()
    before = pruner.score(Context(training.plain(), graph, sparse=training.network))
    before = {name: worth.copy() for name, worth in before.items()}
    case.run(training, epochs=1)
    after = pruner.score(Context(training.plain(), graph, sparse=training.network))
    assert all((after[name] != before[name]).any() for name in before)


@methods
@pytest.mark.parametrize("step", [3, 6, 12, 18])  # inside an epoch, and in the last step of each
def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path: Path, method: str, step: int) -> None:
    whole, _ = case.sparse_training(method, case.planted())
    case.run(whole, directory=tmp_path / "whole")
    stopped, _ = case.sparse_training(method, case.planted())
    with pytest.raises(PreemptedError):
        case.run(stopped, directory=tmp_path / "parts", after=(SignalAt(step, signal.SIGTERM),))
    rest, _ = case.sparse_training(method, case.planted())
    case.run(rest, directory=tmp_path / "parts")
    assert weights_hash(rest.network) == weights_hash(whole.network)
    assert weights_hash(rest.plain()) == weights_hash(whole.plain())
    found, _ = case.sparse_training(method, case.planted())
    assert case.run(found, directory=tmp_path / "parts").reused
    assert weights_hash(found.plain()) == weights_hash(whole.plain())


@methods
@pytest.mark.parametrize(
    "changes",
    [
        {"ema_decay": 0.9},
        {"optimizer": "adam", "nesterov": False, "lr": 0.01},
        {"precision": "bf16"},
        {"clip_grad_norm": 1.0, "channels_last": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_kind_of_training_ends_with_a_plain_network(method: str, changes: dict[str, object]) -> None:
    training, _ = case.sparse_training(method, case.planted())
    case.run(training, recipe=RECIPE.with_(**changes), epochs=2)
    plain = training.plain().eval()
    assert torch.equal(plain(case.EXAMPLE), training.network.eval()(case.EXAMPLE))
    assert all(torch.isfinite(tensor).all() for tensor in plain.state_dict().values())


@methods
def test_planted_useless_channels_are_driven_to_zero_and_most_of_the_others_are_not(method: str) -> None:
    """Channels that their readers ignore, whatever else is learnt."""
    options, epochs = STRONG[method]
    training, graph = case.sparse_training(method, case.planted(), **options)
    case.run(training, epochs=epochs)
    scores = PRUNERS[method]().score(Context(training.plain().eval(), graph, sparse=training.network))
    for layer, useless in case.USELESS.items():
        relative = scores[layer] / scores[layer].max()
        assert relative[useless].max() < 0.01
        assert np.mean(np.delete(relative, useless) > 0.03) > 0.5


@methods
@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path: Path, method: str) -> None:
    script, together = str(Path(__file__).parent / "sparse_case.py"), tmp_path / "together.safetensors"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, script, method, str(together)],
        env=ENVIRONMENT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    torch.manual_seed(0)
    alone, _ = case.sparse_training(method, case.Normed())
    case.run(alone)
    found = read_tensors(together)
    for name, tensor in alone.network.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-3, atol=2e-5)
