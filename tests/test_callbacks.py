from __future__ import annotations

import csv
import io
import json
import signal
import sys
from pathlib import Path

import pytest
import training_case as case
from rich.console import Console

from archsearch.errors import PreemptedError, UsageError
from archsearch.training.callbacks import MetricsFile, TensorBoard
from archsearch.training.progress import ProgressBar


@pytest.mark.parametrize("name", ["metrics.csv", "metrics.jsonl"])
def test_a_metrics_file_holds_each_epoch_once_also_after_a_resumption(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(PreemptedError):
        case.run(tmp_path / "run", callbacks=[MetricsFile(path), case.SignalAt(14, signal.SIGTERM)])
    history = case.run(tmp_path / "run", callbacks=[MetricsFile(path)]).history
    if path.suffix == ".csv":
        rows = [
            {key: float(value) for key, value in row.items()}
            for row in csv.DictReader(path.read_text().splitlines())
        ]
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == history


def test_tensorboard_gets_every_figure(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    result = case.run(callbacks=[TensorBoard(tmp_path)])
    record = EventAccumulator(str(tmp_path)).Reload()
    shown = record.Scalars("validation_accuracy")
    assert [event.step for event in shown] == [1, 2, 3]
    assert [event.value for event in shown] == pytest.approx(
        [row["validation_accuracy"] for row in result.history]
    )


def test_without_tensorboard_one_clear_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="tensorboard is not installed: pip install"):
        TensorBoard(tmp_path)


def test_outside_a_terminal_each_epoch_is_one_plain_line() -> None:
    text = io.StringIO()
    case.run(callbacks=[ProgressBar("scratch [seed 0]", Console(file=text, width=120))])
    lines = text.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"scratch [seed 0]: epoch {n}/3" for n in (1, 2, 3)]
    assert lines[-1].endswith("about 0 s left")


def test_a_resumed_training_says_where_it_goes_on(tmp_path: Path) -> None:
    with pytest.raises(PreemptedError):
        case.run(tmp_path, callbacks=[case.SignalAt(8, signal.SIGTERM)])
    text = io.StringIO()
    case.run(tmp_path, callbacks=[ProgressBar("scratch", Console(file=text, width=120))])
    assert text.getvalue().splitlines()[0] == "scratch: goes on at epoch 2, step 2"


def test_on_a_terminal_a_bar_shows_rate_and_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProgressBar, "REFRESH_S", 0.0)
    text = io.StringIO()
    case.run(callbacks=[ProgressBar("scratch", Console(file=text, width=120, force_terminal=True))])
    assert "images/s" in text.getvalue()
    assert "epoch 3/3" in text.getvalue()
    assert " %" in text.getvalue()
