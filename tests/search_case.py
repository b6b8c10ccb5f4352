"""A finished search made by hand: what a run directory looks like, with nothing trained."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import sqlite3
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial
from sqlalchemy.pool import QueuePool

from archsearch import files
from archsearch.models import resolve
from archsearch.rebuild import trace_source
from archsearch.results import Arm
from archsearch.search.posterior import Curve, Gain, Posterior
from archsearch.search.task import Result, Task
from archsearch.search.work import task_directory

GROUPS = [(f"layer{stage}.{block}.conv1", 16 * 2**stage) for stage in range(3) for block in range(3)]
"""Channel groups as in a small ResNet, and their sizes."""

FACTS = {
    "model": "resnet20",
    "data": "digits",
    "targets": ["flops 0.5"],
    "groups": [list(group) for group in GROUPS],
    "uniform": [round(0.7 * size) for _, size in GROUPS],
    "reference": {"macs": 2_000_000, "params": 270_000, "validation accuracy": 97.1},
    "proxy": "l1_norm",
    "objective": "short",
    "budget": "scratch-e",
    "command": "archsearch search --model resnet20 --flops 0.5",
}


def widths_of(share: np.ndarray) -> list[int]:
    return [max(1, round(part * size)) for part, (_, size) in zip(share, GROUPS, strict=True)]


def running_trial(study: optuna.Study, run: Path) -> int:
    """Add a trial whose task has just ended, and which nobody has told yet; return its number."""
    names = [name for name, _ in GROUPS]
    share = np.linspace(0.3, 0.9, len(GROUPS))
    study.enqueue_trial(dict(zip(names, (6 * share - 3).tolist(), strict=True)))
    trial = study.ask({name: FloatDistribution(-3, 3) for name in names})
    facts = {"origin": "ModelSampler", "seed": 0, "macs": 990_000, "macs_kept": 0.495, "params": 121_000}
    for name, fact in {**facts, "widths": json.dumps(widths_of(share))}.items():
        trial.set_user_attr(name, fact)
    traced = trace_source(resolve("lenet5"), {}, (1, 28, 28))
    training = run / "training"
    training.mkdir()
    rows = [
        f"{epoch},0.1,{2 / epoch},{60 + 5 * epoch},1.5,{2.2 / epoch},{58 + 5 * epoch}"
        for epoch in range(1, 6)
    ]
    header = "epoch,lr,train_loss,train_accuracy,seconds,validation_loss,validation_accuracy"
    (training / "metrics.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    place = task_directory(run / "tasks", trial.number)
    Task(
        label="trial",
        objective="short",
        architecture=traced.architecture(traced.graph.sizes, {"method": "search"}),
        recipe={},
        seed=0,
        data=None,
        device="cpu",
        threads=1,
        store=str(run),
    ).write(place)
    Result(accuracy=93.2, epochs=5, seconds=7.5, training=str(training)).write(place)
    return trial.number


def make_run(run: Path, *, trials: int = 20, latency: bool = False, finals: bool = True) -> optuna.Study:
    """Fill a run directory: 3 trials with uniform widths, one of a pruner, the rest searched."""
    shutil.copytree(_made(trials, latency, finals), run, dirs_exist_ok=True)
    return optuna.load_study(study_name="search", storage=_storage(run))


def _storage(run: Path) -> RDBStorage:
    # Tests need not survive a power cut.
    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(run / "study.db", check_same_thread=False, timeout=60)
        connection.execute("PRAGMA synchronous = OFF")
        return connection

    return RDBStorage("sqlite://", engine_kwargs={"creator": connect, "poolclass": QueuePool})


@functools.cache
def _made(trials: int, latency: bool, finals: bool) -> Path:
    run = Path(tempfile.mkdtemp(prefix="archsearch-run-"))
    atexit.register(shutil.rmtree, run, ignore_errors=True)
    generator = np.random.default_rng(0)
    storage = _storage(run)
    study = optuna.create_study(study_name="search", storage=storage, direction="maximize")
    study.set_user_attr("facts", FACTS)
    names = [name for name, _ in GROUPS]
    weights = np.linspace(0.2, 2.0, len(GROUPS))
    origins = ["uniform", "l1_norm", "uniform, again", "uniform, again"]
    origins = (origins + ["ModelSampler"] * trials)[:trials]
    for number, origin in enumerate(origins):
        share = np.full(len(GROUPS), 0.7)
        if not origin.startswith("uniform"):
            share = generator.uniform(0.25, 1.0, len(GROUPS))
        attributes = {
            "origin": origin,
            "seed": number if origin.startswith("uniform") else 0,
            "macs": int(1_000_000 - 400 * generator.integers(10)),
            "params": int(120_000 + 1000 * generator.integers(30)),
            "epochs": 10,
            "seconds": 12.5,
        }
        attributes["macs_kept"] = attributes["macs"] / 2_000_000
        if latency:
            ms = float(generator.uniform(1.1, 1.2))
            attributes |= {"latency_ms": ms, "latency_low_ms": 0.95 * ms, "latency_high_ms": 1.04 * ms}
            attributes["latency_kept"] = ms / 2
        attributes["widths"] = json.dumps(widths_of(share))
        value = float(85 + weights @ share + 0.4 * generator.standard_normal())
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE,
                value=value,
                params=dict(zip(names, (6 * share - 3).tolist(), strict=True)),
                distributions={name: FloatDistribution(-3, 3) for name in names},
                user_attrs=attributes,
                intermediate_values={25: value - 9, 50: value - 4, 100: value},
            )
        )
    curves = {}
    for (name, size), weight in zip(GROUPS, weights, strict=True):
        steps = np.arange(2, size + 1)
        mean = weight * np.sqrt((steps - 2) / (size - 2))
        curves[name] = Curve(steps.tolist(), mean.tolist(), (0.6 * mean).tolist(), (1.3 * mean).tolist())
    recommended = dict(zip(names, widths_of(np.linspace(0.4, 0.95, len(GROUPS))), strict=True))
    Posterior(trials, 0.41, recommended, curves, Gain(0.8, 0.1, 1.5)).write(run)
    if finals:
        arms = [
            Arm("reference", "reference", "reference", 2_000_000, 270_000, 40, (97.2,), 60.0),
            Arm("uniform, scratch-e", "uniform", "scratch-e", 999_000, 130_000, 40, (95.1, 95.9, 95.4), 90.0),
            Arm("l1_norm, scratch-e", "l1_norm", "scratch-e", 998_000, 120_000, 40, (94.6, 95.6, 95.0), 90.0),
            Arm("search, scratch-e", "search", "scratch-e", 997_000, 121_000, 40, (96.1, 96.6, 95.9), 90.0),
        ]
        files.write_json(run / "results.json", {"conditions": {}, "arms": [asdict(arm) for arm in arms]})
    storage.engine.dispose()
    return run
