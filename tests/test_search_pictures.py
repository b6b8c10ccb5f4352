from __future__ import annotations

import csv
from pathlib import Path
from statistics import stdev

import numpy as np
import pytest
from search_case import GROUPS, make_run

from archsearch import files
from archsearch.errors import IntegrityError, StorageError, UsageError
from archsearch.models import resolve
from archsearch.pictures import pyplot
from archsearch.pruning import uniform_widths
from archsearch.rebuild import trace_source
from archsearch.search import pictures
from archsearch.search.model import AdditiveModel
from archsearch.search.overview import Overview
from archsearch.search.page import write_plots
from archsearch.search.pictures import PICTURES, draw
from archsearch.search.posterior import Posterior
from archsearch.search.reading import reading
from archsearch.search.sketches import draw_training, draw_trial_widths
from archsearch.space import SearchSpace
from archsearch.targets import Target

PNG = b"\x89PNG\r\n\x1a\n"


def drawn_names(paths: list[Path]) -> set[str]:
    return {path.stem for path in paths if path.suffix == ".png"}


def test_every_picture_of_a_finished_search_is_drawn(tmp_path: Path) -> None:
    make_run(tmp_path)
    before = (tmp_path / "study.db").read_bytes()
    written = write_plots(tmp_path)
    assert drawn_names(written) == set(PICTURES)
    assert all(path.parent == tmp_path / "plots" for path in written)
    for path in written:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(PNG)
            assert path.stat().st_size > 5_000  # an empty page of this size has less
    assert (tmp_path / "study.db").read_bytes() == before


@pytest.mark.parametrize("name", ["l1_norm", "regression:knapsack", "one with a very long name:knapsack"])
def test_a_legend_of_long_names_stays_inside_its_picture(name: str) -> None:
    figure = pyplot().figure(figsize=(7.2, 4.2), layout="constrained")
    try:
        axes = figure.subplots()
        for number in range(5):
            axes.plot([0, 1], [number, number], label=f"{name} {number} (3 seeds, mean ± deviation)")
        pictures._legend(axes)
        figure.draw_without_rendering()
        box = figure.legends[0].get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
    finally:
        pyplot().close(figure)


def test_what_a_search_has_not_got_to_yet_is_not_drawn_and_old_pictures_go(tmp_path: Path) -> None:
    make_run(tmp_path, trials=6, finals=False)
    (tmp_path / "model.json").unlink()
    (tmp_path / "finals.png").write_bytes(PNG)
    paths = draw(Overview.read(tmp_path), tmp_path)
    assert drawn_names(paths) == {"history", "accuracy", "widths", "keeps"}
    assert not (tmp_path / "finals.png").exists()


def test_an_overview_holds_the_numbers_of_the_study(tmp_path: Path) -> None:
    study = make_run(tmp_path)
    seen = Overview.read(tmp_path)
    values = [trial.value for trial in study.trials]
    assert seen.values.tolist() == values
    assert len(seen.searched) == 16
    assert [start.name for start in seen.starts] == ["uniform", "l1_norm"]
    uniform = seen.uniform
    assert uniform is not None
    same = [values[number] for number in (0, 2, 3)]
    assert uniform.values == same
    assert uniform.mean == pytest.approx(sum(same) / 3)
    assert uniform.deviation == pytest.approx(stdev(same))
    sizes = np.array([size for _, size in GROUPS])
    np.testing.assert_allclose(seen.keeps[0], 100 * np.round(0.7 * sizes) / sizes)
    np.testing.assert_allclose(seen.uniform_keeps, seen.keeps[0])
    found = seen.recommended
    assert found is not None
    assert found[-1] == pytest.approx(100 * round(0.95 * 64) / 64)
    assert sum(seen.importance.values()) == pytest.approx(1)
    assert len(seen.important) == 6
    assert seen.cost_label == "MACs kept, %"
    assert seen.cost(seen.trials[0]) == pytest.approx(100 * study.trials[0].user_attrs["macs_kept"])
    assert seen.unit == "validation accuracy (short training), %"
    assert seen.arms[0].name == "reference"


def test_with_a_latency_target_the_cost_is_the_predicted_latency(tmp_path: Path) -> None:
    study = make_run(tmp_path, latency=True)
    seen = Overview.read(tmp_path)
    assert seen.cost_label == "predicted latency, ms"
    assert seen.cost(seen.trials[3]) == study.trials[3].user_attrs["latency_ms"]


def test_a_directory_without_a_study_is_refused_and_none_is_made(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no search \(study.db\)"):
        write_plots(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_study_that_does_not_say_what_it_searches_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path).set_user_attr("facts", None)
    with pytest.raises(IntegrityError, match="does not say what it searches"):
        Overview.read(tmp_path)


def test_a_study_without_a_finished_trial_has_nothing_to_draw(tmp_path: Path) -> None:
    make_run(tmp_path, trials=0)
    with pytest.raises(UsageError, match="no trial has ended yet"):
        write_plots(tmp_path)


def test_a_file_that_is_no_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_bytes(b"something else, and long enough to be looked at" * 100)
    with pytest.raises(StorageError, match="cannot be read as a study"), reading(tmp_path):
        pass


def test_a_record_of_something_else_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path)
    files.write_json(tmp_path / "results.json", {"arms": [{"name": "x"}]})
    with pytest.raises(IntegrityError, match="is not the record of a search"):
        Overview.read(tmp_path)


def test_a_read_study_refuses_to_be_written(tmp_path: Path) -> None:
    make_run(tmp_path)
    with pytest.raises(StorageError), reading(tmp_path) as study:
        study.set_user_attr("facts", {})


def test_a_posterior_is_kept_and_read_back(tmp_path: Path) -> None:
    make_run(tmp_path)
    kept = Posterior.read(tmp_path)
    assert kept is not None
    again = tmp_path / "again"
    again.mkdir()
    kept.write(again)
    assert Posterior.read(again) == kept
    assert Posterior.read(tmp_path / "nowhere") is None
    (again / "model.json").write_text('{"trials": 1}', encoding="utf-8")
    with pytest.raises(IntegrityError, match="does not hold what a model believes"):
        Posterior.read(again)


def test_the_model_believes_in_the_curve_that_made_the_values() -> None:
    traced = trace_source(resolve("lenet5"), {}, (1, 28, 28))
    cost = traced.cost
    allowed = SearchSpace().allowed(traced.graph)
    model = AdditiveModel(cost, allowed, [Target.parse("flops", "0.5")])
    generator = np.random.default_rng(0)
    widths = np.stack([generator.choice(allowed[name], 60) for name in cost.names], axis=1)
    share = widths / cost.sizes
    weights = np.arange(1, len(cost.names) + 1)
    values = 80 + np.sqrt(share) @ weights + 0.01 * generator.standard_normal(60)
    model.tell(widths, values)
    uniform = uniform_widths(cost, allowed, [Target.parse("flops", "0.5")])
    believed = Posterior.of(model, allowed, uniform, len(values), draws=20)
    assert 0 < believed.gain.low <= believed.gain.mean <= believed.gain.high
    assert believed.trials == 60
    assert believed.noise < 0.1
    assert cost.of(believed.recommended).macs <= 0.5 * cost.reference.macs
    for name, size, weight in zip(cost.names, cost.sizes, weights, strict=True):
        if name not in believed.curves:
            continue
        curve = believed.curves[name]
        truth = weight * (1 - np.sqrt(curve.widths[0] / size))
        assert curve.mean[0] == pytest.approx(0, abs=1e-9)
        assert curve.mean[-1] == pytest.approx(truth, abs=0.15)
        assert curve.low[-1] <= curve.mean[-1] <= curve.high[-1]
        assert np.all(np.diff(curve.mean) >= -1e-9)
    assert len(believed.curves) == sum(len(steps) > 1 for steps in allowed.values())


def test_the_pictures_of_a_trial_are_drawn(tmp_path: Path) -> None:
    draw_trial_widths(GROUPS, [size // 2 for _, size in GROUPS], "trial 3", tmp_path / "widths.png")
    with (tmp_path / "metrics.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["epoch", "train_loss", "train_accuracy"])
        table.writerows([[1, 2.0, 40.0], [2, 1.0, 70.0]])
    draw_training(tmp_path, "trial 3", tmp_path / "training.png")
    for name in ("widths.png", "training.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_a_training_without_metrics_has_no_picture_and_one_with_others_is_refused(tmp_path: Path) -> None:
    draw_training(tmp_path, "trial 3", tmp_path / "training.png")
    assert not (tmp_path / "training.png").exists()
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(IntegrityError, match="is not the record of a training"):
        draw_training(tmp_path, "trial 3", tmp_path / "training.png")
