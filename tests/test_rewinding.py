from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from sparsity_case import RECIPE, Start, traced_tiny, watched
from torch import Tensor, nn
from training_case import RECIPE as WITH_MOMENTUM
from training_case import SignalAt, network, run, weights_hash

from archsearch.errors import IntegrityError, UsageError
from archsearch.sparsity.masks import MaskedTraining, Masks
from archsearch.sparsity.rewinding import WeightsAt, keeping, parse_step, rewound, weights_path
from archsearch.sparsity.runs import Runs
from archsearch.tensor_files import read_tensors
from archsearch.trainer import Trained
from archsearch.training.callbacks import Callback, State

PLAIN = WITH_MOMENTUM.with_(momentum=0.0, nesterov=False)  # 18 steps, 6 an epoch


class WeightsThen(Callback):
    """Copy all weights after some step."""

    def __init__(self, step: int) -> None:
        self.step, self.weights = step, dict[str, Tensor]()

    def on_step(self, state: State) -> None:
        if state.step == self.step:
            self.weights = {name: value.clone() for name, value in state.model.state_dict().items()}


def everything(model: nn.Module) -> Masks:
    return Masks({"0.weight": torch.ones(4, 2, 3, 3), "5.weight": torch.ones(3, 144)})


@pytest.mark.parametrize(
    ("text", "step"), [("0", 0), ("500it", 500), ("500", 500), ("1ep", 6), ("0ep", 0), ("12ep", 72)]
)
def test_a_step_is_read_in_iterations_or_epochs(text: str, step: int) -> None:
    assert parse_step(text, 6) == step


@pytest.mark.parametrize("text", ["", "-1", "1.5ep", "ep", "5 it", "1epoch", "9" * 13, "\u0661"])
def test_what_is_not_a_step_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="give steps such as 500it"):
        parse_step(text, 6)


@pytest.mark.parametrize("step", [1, 8, 12, 18])
def test_a_training_keeps_exactly_its_weights_at_the_step(tmp_path: Path, step: int) -> None:
    then = WeightsThen(step)
    run(tmp_path / "training", callbacks=[then, WeightsAt(step, tmp_path)])
    kept = read_tensors(weights_path(tmp_path, step))
    assert kept.keys() == then.weights.keys()
    assert all(torch.equal(kept[name], value) for name, value in then.weights.items())


@pytest.mark.parametrize("killed_in", [7, 8, 9, 12, 13])
def test_a_training_that_was_interrupted_keeps_the_same_weights(tmp_path: Path, killed_in: int) -> None:
    run(tmp_path / "whole", callbacks=[WeightsAt(8, tmp_path / "whole")])
    parts = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        run(parts, callbacks=[WeightsAt(8, parts), SignalAt(killed_in, signal.SIGINT)])
    run(parts, callbacks=[WeightsAt(8, parts)])
    assert weights_path(parts, 8).read_bytes() == weights_path(tmp_path / "whole", 8).read_bytes()


@pytest.mark.parametrize("step", [0, 1, 8, 12, 17])
def test_from_the_weights_of_a_step_the_dense_training_comes_out_bit_for_bit(
    tmp_path: Path, step: int
) -> None:
    """Without momentum, which starts afresh, and with masks that keep everything."""
    dense = run(recipe=PLAIN, callbacks=[WeightsAt(step, tmp_path)])
    model = network()
    if step:
        rewound(model, Trained(model, 0.0, 0, 0.0, tmp_path), step)
    again = run(recipe=PLAIN, model=model, start_step=step, callbacks=[MaskedTraining(everything(model))])
    assert weights_hash(again.model) == weights_hash(dense.model)
    assert [row["epoch"] for row in again.history] == list(range(1 + step // 6, 4))
    assert again.last_accuracy == dense.last_accuracy


def test_from_the_initialisation_it_comes_out_with_momentum_too() -> None:
    dense = run()
    again = run(start_step=0, callbacks=[MaskedTraining(everything(network()))])
    assert weights_hash(again.model) == weights_hash(dense.model)


def test_a_late_start_that_was_interrupted_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", start_step=8).model
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", start_step=8, callbacks=[SignalAt(14, signal.SIGINT)])
    assert weights_hash(run(tmp_path / "parts", start_step=8).model) == weights_hash(whole)
    with pytest.raises(IntegrityError, match="start step was 8 and now is 9"):
        run(tmp_path / "parts", start_step=9)


@pytest.mark.parametrize("step", [-1, 18])
def test_a_start_outside_of_the_training_is_refused(step: int) -> None:
    with pytest.raises(UsageError, match=f"cannot start at step {step}; it has the steps 0 to 17"):
        run(start_step=step)


def test_a_start_step_is_part_of_the_trainings_address(tmp_path: Path) -> None:
    starts: list[Start] = []
    runs = Runs(traced_tiny(), watched(tmp_path, starts), RECIPE, [0])
    first = runs.train("from 0", runs.fresh(0), 0)
    late = runs.train("from 7", runs.fresh(0), 0, start_step=7)
    again = runs.train("from 0", runs.fresh(0), 0, start_step=0)
    assert first.directory == again.directory != late.directory
    assert [(start.step, start.steps) for start in starts] == [(0, 24), (7, 17)]


def test_a_network_gets_the_weights_that_its_training_kept(tmp_path: Path) -> None:
    runs = Runs(traced_tiny(), keeping(watched(tmp_path, []), 9), RECIPE, [0])
    then = WeightsThen(9)
    trained = runs.train("dense", runs.fresh(0), 0, callbacks=[then])
    model = rewound(runs.fresh(0), trained, 9)
    assert all(torch.equal(value, then.weights[name]) for name, value in model.state_dict().items())
    with pytest.raises(IntegrityError, match="weights-at-step-10"):
        rewound(model, trained, 10)
