from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import training_case as case
from torch import Tensor, nn
from torch.nn import functional as F

from archsearch import files
from archsearch.errors import (
    DivergedError,
    IntegrityError,
    PreemptedError,
    ResourceError,
    StorageError,
    UsageError,
)
from archsearch.recipe import Recipe
from archsearch.tensor_files import read_tensors
from archsearch.trainer import Trained, Trainer
from archsearch.training.callbacks import Callback, State
from archsearch.training.determinism import derive_seed
from archsearch.training.evaluation import evaluate, resolve_device
from archsearch.training.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SCRIPT = str(Path(case.__file__))


@pytest.fixture(scope="module")
def uninterrupted() -> str:
    torch.set_num_threads(1)
    return case.weights_hash(case.run().model)


# ------------------------------------------------------------------------------------------ the loop


def test_a_small_network_learns_an_easy_task() -> None:
    result = case.run(epochs=8)
    assert result.last_accuracy == result.history[-1]["validation_accuracy"] > 90
    assert result.best_accuracy == max(row["validation_accuracy"] for row in result.history)
    assert [row["epoch"] for row in result.history] == list(range(1, 9))
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    assert result.seconds == pytest.approx(sum(row["seconds"] for row in result.history), rel=0.2)
    assert result.images_per_second == pytest.approx(45 * 8 / result.seconds)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(lr=0.05, batch_size=8, epochs=3, milestones=(0.34, 0.67)),
        Recipe(optimizer="adamw", lr=0.01, batch_size=8, epochs=3, schedule="constant", label_smoothing=0.1),
        Recipe(lr=0.05, batch_size=8, epochs=2, nesterov=True, schedule="constant", clip_grad_norm=0.1),
    ],
)
def test_the_loop_does_what_a_loop_written_out_by_hand_does(recipe: Recipe) -> None:
    trained = case.run(recipe=recipe.with_(channels_last=False), model=case.network(dropout=0.0)).model

    model, data = case.network(dropout=0.0), case.source()
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            model.parameters(), recipe.lr, momentum=0.9, weight_decay=1e-4, nesterov=recipe.nesterov
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=1e-4)
    rates = [0.05, 0.005, 0.0005] if recipe.schedule == "step" else [recipe.lr] * 3
    stream_seed = derive_seed(0, "data")
    for epoch in range(recipe.epochs):
        optimizer.param_groups[0]["lr"] = rates[epoch]
        for pictures, labels in data.train.batches(8, seed=stream_seed, epoch=epoch, train=True):
            optimizer.zero_grad()
            F.cross_entropy(model(pictures), labels, label_smoothing=recipe.label_smoothing).backward()
            if recipe.clip_grad_norm:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad_norm)
            optimizer.step()
    for (name, mine), theirs in zip(trained.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=name)


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(uninterrupted: str) -> None:
    assert case.weights_hash(case.run().model) == uninterrupted
    assert case.weights_hash(case.run(seed=1).model) != uninterrupted


def test_callers_generators_and_flags_stay_as_they_were() -> None:
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    model = case.network(seed=5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    case.run(model=model)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_network_comes_back_as_it_was_given() -> None:
    model = case.network()
    result = case.run(model=model, recipe=case.RECIPE.with_(precision="bf16"))
    assert result.model is model
    assert model.__dict__.keys() == case.network().__dict__.keys()
    assert all(parameter.grad is None and parameter.is_contiguous() for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_bf16_computes_the_convolutions_in_bf16() -> None:
    seen: list[torch.dtype] = []
    model = case.network()
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for precision, expected in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        seen.clear()
        case.run(model=model, recipe=case.RECIPE.with_(precision=precision))
        assert set(seen) == {expected}, "a network that was trained before is trained like a new one"


def test_training_without_validation_images_leaves_its_figures_out(tmp_path: Path) -> None:
    data = case.in_memory(*case.images(), test=case.images(3), validation_share=0.0)
    for _ in range(2):
        result = train(
            case.network(), data.train, data.validation, case.RECIPE, directory=tmp_path, device="cpu"
        )
        assert (result.best_accuracy, result.last_accuracy) == (None, None)
        assert "validation_loss" not in result.history[0]


def test_averaged_weights_follow_their_formula() -> None:
    class Watch(Callback):
        def __init__(self) -> None:
            self.mean: Tensor | None = None

        def on_start(self, state: State) -> None:
            self.mean = state.model[5].weight.detach().double().clone()

        def on_step(self, state: State) -> None:
            number = state.step - 1
            decay = min(0.8, (1 + number) / (10 + number))
            self.mean = decay * self.mean + (1 - decay) * state.model[5].weight.detach().double()

    watch = Watch()
    result = case.run(recipe=case.RECIPE.with_(ema_decay=0.8), callbacks=[watch])
    torch.testing.assert_close(result.model[5].weight.detach().double(), watch.mean, rtol=1e-5, atol=1e-6)
    measured = evaluate(result.model, case.source().validation, device="cpu")
    assert measured.accuracy == result.last_accuracy  # what is validated is what is returned


def test_a_quadratic_penalty_is_weight_decay() -> None:
    recipe = case.RECIPE.with_(epochs=2, weight_decay=0.0)
    penalised = case.run(
        recipe=recipe, penalty=lambda model: 0.05 * sum(p.square().sum() for p in model.parameters())
    )
    decayed = case.run(recipe=recipe.with_(weight_decay=0.1))
    for mine, theirs in zip(penalised.model.parameters(), decayed.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    # The reported loss is the cross-entropy alone.
    assert penalised.history[0]["train_loss"] == pytest.approx(decayed.history[0]["train_loss"], rel=1e-4)


def test_a_callback_may_change_the_gradients() -> None:
    class Freeze(Callback):
        def after_backward(self, state: State) -> None:
            for parameter in state.model.parameters():
                parameter.grad.zero_()

    before = [parameter.clone() for parameter in case.network().parameters()]
    after = case.run(recipe=case.RECIPE.with_(weight_decay=0.0), callbacks=[Freeze()]).model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_auxiliary_heads_count_three_tenths() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.side = nn.Linear(72, 3), nn.Linear(72, 3)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            x = x.flatten(1)
            return (self.main(x), self.side(x)) if self.training else self.main(x)

    torch.manual_seed(0)
    model = TwoHeads()
    model.side.load_state_dict(model.main.state_dict())
    start = model.main.weight.detach().clone()
    one_step = Recipe(lr=0.01, momentum=0.0, weight_decay=0.0, batch_size=64, epochs=1, schedule="constant")
    case.run(model=model, recipe=one_step)
    torch.testing.assert_close(
        model.side.weight - start, 0.3 * (model.main.weight - start), rtol=1e-3, atol=1e-6
    )


@pytest.mark.slow
def test_a_compiled_network_learns_the_same_within_rounding() -> None:
    plain, compiled = (
        case.run(model=case.network(dropout=0.0), recipe=case.RECIPE.with_(compile=flag))
        for flag in (False, True)
    )
    for mine, theirs in zip(plain.model.parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_processes_sharing_each_batch_equal_one_process(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for start, name in (([sys.executable], "one"), (launch, "two")):
        command = [*start, SCRIPT, "share", str(tmp_path / f"{name}.safetensors")]
        subprocess.run(command, check=True, env=ENVIRONMENT, capture_output=True, timeout=200)
    one, two = (read_tensors(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    moved = case.network(norm=False, dropout=0.0).state_dict()
    for name in one:
        assert not torch.allclose(one[name], moved[name], atol=1e-3)
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6, msg=name)
    rows = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")]
    for mine, theirs in zip(*rows, strict=True):
        del mine["seconds"], theirs["seconds"]
        assert mine == pytest.approx(theirs, rel=1e-5)


# -------------------------------------------------------------------------------- what cannot be


def test_an_absent_device_is_refused_with_those_that_exist() -> None:
    with pytest.raises(UsageError, match=r"no 'cuda:99' here; give auto or one of cpu"):
        case_source = case.source()
        train(case.network(), case_source.train, case_source.validation, case.RECIPE, device="cuda:99")
    with pytest.raises(UsageError, match="no 'gpu' here"):
        resolve_device("gpu")


def test_fp16_on_the_cpu_is_refused() -> None:
    with pytest.raises(UsageError, match="fp16 needs a GPU"):
        case.run(recipe=case.RECIPE.with_(precision="fp16"))


@pytest.mark.parametrize("directory", [True, False])
def test_a_poisoned_image_stops_the_training_at_once(tmp_path: Path, directory: bool) -> None:
    class Poison(Callback):
        def on_step(self, state: State) -> None:
            self.last = state.step
            if state.step == 7:
                with torch.no_grad():
                    state.model[0].weight[0, 0, 0, 0] = math.nan

    poison = Poison()
    with pytest.raises(
        DivergedError, match=r"loss is nan in epoch 2, step 2 of 6, at lr 0\.0\d+; try a smaller"
    ):
        case.run(tmp_path if directory else None, callbacks=[poison], checkpoint_every_s=1e9)
    assert poison.last == 7


def test_a_learning_rate_far_too_high_diverges_with_advice() -> None:
    with pytest.raises(DivergedError, match=r"try a smaller --lr, --set warmup="):
        case.run(recipe=Recipe(lr=1e30, batch_size=8, epochs=3))


def test_a_checkpoint_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    class Poison(Callback):
        def on_step(self, state: State) -> None:
            if (
                state.step == 4
            ):  # in train mode nothing reads the running statistics, so the loss stays finite
                state.model[1].running_mean[0] = math.inf

    with pytest.raises(DivergedError, match=r"model\.1\.running_mean is not finite"):
        case.run(tmp_path, callbacks=[Poison()], checkpoint_every_s=0)
    newest = max((tmp_path / "checkpoints").glob("step-*"))
    assert newest.name == "step-000000003"
    tensors = read_tensors(newest / "tensors.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def test_a_directory_that_cannot_be_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="file"):
        case.run(tmp_path / "file" / "run", callbacks=[case.SignalAt(1, signal.SIGKILL)])


def test_a_directory_that_another_process_uses_is_refused(tmp_path: Path) -> None:
    with files.lock(tmp_path), pytest.raises(StorageError, match="in use by process"):
        case.run(tmp_path)


# ------------------------------------------------------------------------- stopping and going on


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 6, 9])
def test_a_signal_saves_the_step_and_the_rerun_ends_with_the_same_bits(
    tmp_path: Path, signum: int, step: int, uninterrupted: str
) -> None:
    kind = KeyboardInterrupt if signum == signal.SIGINT else PreemptedError
    with pytest.raises(kind):
        case.run(tmp_path, callbacks=[case.SignalAt(step, signum)])
    steps: list[int] = []

    class Count(Callback):
        def on_step(self, state: State) -> None:
            steps.append(state.step)

    assert case.weights_hash(case.run(tmp_path, callbacks=[Count()]).model) == uninterrupted
    assert steps == list(range(step + 1, 19))  # nothing was lost, nothing done twice
    assert signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler)


def test_the_message_of_a_preemption_says_where_and_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(PreemptedError, match=r"epoch 2, after step 2 of 6; .* the same command goes on"):
        case.run(tmp_path, callbacks=[case.SignalAt(8, signal.SIGTERM)])


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, signal; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "import training_case as case\n"
        "case.run(Path(sys.argv[2]), callbacks=[case.SignalAt(3, signal.SIGTERM, times=2)])"
    )
    command = [sys.executable, "-c", code, str(Path(SCRIPT).parent), str(tmp_path)]
    assert subprocess.run(command, env=ENVIRONMENT, check=False).returncode == -signal.SIGTERM


def test_a_signal_that_comes_too_late_to_stop_anything_is_not_forgotten(tmp_path: Path) -> None:
    class Late(Callback):
        def on_epoch_end(self, state: State) -> None:
            if state.epoch == state.epochs:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        case.run(tmp_path, callbacks=[Late()])
    assert case.run(tmp_path).reused


def test_without_a_directory_signals_do_what_they_always_do() -> None:
    with pytest.raises(KeyboardInterrupt):
        case.run(callbacks=[case.SignalAt(3, signal.SIGINT)])


@pytest.mark.parametrize(
    "changes",
    [
        {"ema_decay": 0.9},
        {"optimizer": "adam", "nesterov": False, "lr": 0.01},
        {"precision": "bf16"},
        {"momentum": 0.0, "nesterov": False},
    ],
)
def test_every_kind_of_training_goes_on_with_the_same_bits(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    recipe = case.RECIPE.with_(**changes)
    with pytest.raises(PreemptedError):
        case.run(tmp_path, recipe, callbacks=[case.SignalAt(8, signal.SIGTERM)])
    resumed, whole = case.run(tmp_path, recipe), case.run(recipe=recipe)
    assert case.weights_hash(resumed.model) == case.weights_hash(whole.model)
    for mine, theirs in zip(resumed.history, whole.history, strict=True):
        del mine["seconds"], theirs["seconds"]
        assert mine == theirs


def test_a_training_may_go_on_and_is_found_again_with_other_threads(tmp_path: Path) -> None:
    def trained(callbacks: Callback | None = None) -> Trained:
        chosen = [callbacks] if callbacks is not None else []
        trainer = Trainer(case.source(), "cpu", tmp_path)
        return trainer.train("it", case.network(), case.RECIPE, 0, callbacks=chosen)

    with pytest.raises(KeyboardInterrupt):
        trained(case.SignalAt(8, signal.SIGINT))
    torch.set_num_threads(2)
    second = trained()
    torch.set_num_threads(1)
    third = trained(case.SignalAt(1, signal.SIGKILL))
    assert third.directory == second.directory
    assert case.weights_hash(third.model) == case.weights_hash(second.model)
    assert second.directory is not None
    began = files.read_json(second.directory / "training.json")["began on"]
    assert began == {"threads": 1, "vectors": torch.backends.cpu.get_cpu_capability()}


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    first = case.run(tmp_path)
    again = case.run(tmp_path, callbacks=[case.SignalAt(1, signal.SIGKILL)])
    assert again.reused and not first.reused
    assert again.history == first.history
    assert (again.best_accuracy, again.seconds) == (first.best_accuracy, first.seconds)
    assert case.weights_hash(again.model) == case.weights_hash(first.model)


def test_a_finished_training_whose_weights_were_changed_is_refused(tmp_path: Path) -> None:
    case.run(tmp_path)
    weights = tmp_path / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"weights\.safetensors"):
        case.run(tmp_path)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("recipe.lr was 0.05 and now is 0.02", {"recipe": case.RECIPE.with_(lr=0.02)}),
        ("recipe.epochs was 3 and now is 4", {"epochs": 4}),
        ("seed was 0 and now is 7", {"seed": 7}),
        ("network was", {"model": case.network(dropout=0.1)}),
        ("initial weights was", {"model": case.network(seed=3)}),
        ("data was 'a' and now is 'b'", {"identity": {"data": "b"}}),
    ],
)
def test_another_training_in_the_same_directory_is_refused_naming_what_differs(
    tmp_path: Path, field: str, options: dict[str, object]
) -> None:
    case.run(tmp_path, identity={"data": "a"})
    with pytest.raises(IntegrityError, match=field):
        case.run(tmp_path, **{"identity": {"data": "a"}, **options})


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, uninterrupted: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(PreemptedError):
        case.run(tmp_path, callbacks=[case.SignalAt(9, signal.SIGTERM)], checkpoint_every_s=0)
    *_, before, newest = sorted((tmp_path / "checkpoints").glob("step-*"))
    tensors = newest / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-9])
    assert case.weights_hash(case.run(tmp_path).model) == uninterrupted
    assert f"{newest} is damaged" in caplog.text
    assert before.name not in caplog.text


def test_when_every_checkpoint_is_damaged_the_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreemptedError):
        case.run(tmp_path, callbacks=[case.SignalAt(9, signal.SIGTERM)], checkpoint_every_s=0)
    for state in (tmp_path / "checkpoints").glob("step-*/state.json"):
        state.write_text(state.read_text().replace("0", "1"))
    with pytest.raises(IntegrityError, match="every checkpoint is damaged; delete the directory"):
        case.run(tmp_path)


@pytest.mark.parametrize("call", [9, 16, 27])
def test_a_full_disk_keeps_the_checkpoints_and_the_rerun_ends_with_the_same_bits(
    tmp_path: Path, call: int, uninterrupted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, made = os.fsync, [0]

    def full(descriptor: int) -> None:
        made[0] += 1
        if made[0] >= call:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match=str(tmp_path)):
            case.run(tmp_path, checkpoint_every_s=0)
    assert case.weights_hash(case.run(tmp_path).model) == uninterrupted


def _killed(directory: Path, *points: str) -> list[dict[str, object]]:
    command = [sys.executable, SCRIPT, "kill", str(directory), *points]
    done = subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, text=True)
    return [dict(json.loads(line)) for line in done.stdout.splitlines()]


def test_killed_in_some_step_or_in_some_write_the_rerun_ends_with_the_same_bits(tmp_path: Path) -> None:
    chosen = random.Random(os.environ.get("PYTEST_SEED", "kill"))
    points = [f"step:{chosen.randint(1, 17)}", *(f"write:{chosen.randint(1, 760)}" for _ in range(3))]
    for outcome in _killed(tmp_path, *points):
        assert (outcome["first"], outcome["second"], outcome["same"]) == (-9, 0, True), outcome


@pytest.mark.slow
def test_killed_in_every_step_and_in_every_fifth_write_the_rerun_ends_with_the_same_bits(
    tmp_path: Path,
) -> None:
    outcomes = _killed(tmp_path, *(f"step:{step}" for step in range(1, 19)), "write:every:5")
    assert len(outcomes) > 18 + 100
    for outcome in outcomes:
        assert (outcome["first"], outcome["second"], outcome["same"]) == (-9, 0, True), outcome
