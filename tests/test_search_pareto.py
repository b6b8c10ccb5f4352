"""Fronts: several targets, one model, and what is written of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from find_case import FACTORY
from latency_case import PaperDevice, profiled
from training_case import RECIPE, source

from archsearch import files
from archsearch.api import front
from archsearch.architecture import Architecture
from archsearch.cli import main
from archsearch.errors import InfeasibleError, UnknownNameError, UsageError
from archsearch.models import resolve
from archsearch.rebuild import trace_source
from archsearch.search import pareto
from archsearch.search.front_picture import draw_front, front_figure
from archsearch.search.model import AdditiveModel
from archsearch.search.pareto import Front
from archsearch.search.points import Point, table, undominated
from archsearch.search.project import project
from archsearch.search.sampler import ModelSampler
from archsearch.search.standing import Standing
from archsearch.space import SearchSpace
from archsearch.targets import Target
from archsearch.training.callbacks import Callback

pytestmark = pytest.mark.usefixtures("without_pictures")

TARGETS = [0.3, "60%"]


def along(directory: Path, **changes: Any) -> Front:
    settings = {"trials": 5, "objective": "inherit", "finals": 2, **changes.pop("search", {})}
    given = {
        "resource": "flops",
        "targets": TARGETS,
        "data": source(),
        "recipe": RECIPE.with_(epochs=2),
        "trust_code": True,
        "out": directory / "out",
        "store": directory / "store",
        "device": "cpu",
        **changes,
    }
    return front(FACTORY, search=settings, **given)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Front, list[str]]:
    directory, said = tmp_path_factory.mktemp("front"), list[str]()
    return directory, along(directory, say=said.append), said


def test_each_target_is_an_ordinary_run_that_meets_it(found: tuple[Path, Front, list[str]]) -> None:
    directory, result, _ = found
    for place, keep in (("0.3", 0.3), ("0.6", 0.6)):
        run = directory / "out" / place
        assert f"flops {keep}" in next(iter(Standing.read(run).status()))
        written = Architecture.read(run / "architecture.yaml")
        assert written.cost.macs is not None and written.cost.macs.keep <= keep
        assert (run / "weights.safetensors").exists() and (run / "results.md").exists()
        assert result.searches[place].architecture.key == written.key
    assert result.architecture.key == result.searches["0.3"].architecture.key


def test_the_model_is_told_the_trials_of_all_targets(found: tuple[Path, Front, list[str]]) -> None:
    directory, _, _ = found
    for place in ("0.3", "0.6"):
        assert files.read_json(directory / "out" / place / "model.json")["trials"] == 10
        assert len(Standing.read(directory / "out" / place).trials) == 5


def test_all_trials_come_before_the_first_finals(found: tuple[Path, Front, list[str]]) -> None:
    _, _, said = found
    stages = [line for line in said if line.startswith("flops ")]
    assert [line.split(":")[1].split()[-1] for line in stages] == ["trials", "trials", "targets", "targets"]


def test_the_front_is_written_as_data_table_and_picture(found: tuple[Path, Front, list[str]]) -> None:
    directory, result, _ = found
    out = directory / "out"
    names = ["front.json", "front.md", "front.png", "front.html", "plotly.min.js"]
    assert result.files[:5] == [out / name for name in names]
    assert all(path.stat().st_size > 0 for path in result.files)
    points = files.read_json(out / "front.json")["points"]
    names = ["uniform", "l1_norm:knapsack", "search"]
    assert [(point["target"], point["network"]) for point in points] == [
        ("", "reference"), *(("0.3", name) for name in names), *(("0.6", name) for name in names)
    ]  # fmt: skip
    for point in points[1:]:
        assert point["cost"] <= 100 * float(point["target"])
        kept = Architecture.read(out / point["architecture"]).cost.macs
        assert kept is not None and kept.value == point["macs"]
        assert kept.keep == pytest.approx(point["cost"] / 100, abs=1e-4)
    exported = [point["target"] for point in points if point["exported"]]
    assert exported == ["0.3", "0.6"]
    rows = [line for line in (out / "front.md").read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    assert len(rows) == 2 + len(points)


def test_the_same_front_again_trains_nothing(found: tuple[Path, Front, list[str]]) -> None:
    directory, result, _ = found
    started: list[str] = []

    def watch(label: str, place: Path) -> Sequence[Callback]:
        class Started(Callback):
            def on_step(self, state: Any) -> None:
                started.append(label)

        return [Started()]

    again = along(directory, callbacks=watch)
    assert not started
    assert again.points == result.points


def test_the_status_of_a_front_is_that_of_all_its_searches(
    found: tuple[Path, Front, list[str]], capsys: Any
) -> None:
    out = found[0] / "out"
    assert main(["search", "status", str(out)]) == 0
    shown = capsys.readouterr().out.replace("\n", "")
    assert shown.index(f"{out / '0.3'}:") < shown.index(f"{out / '0.6'}:")
    assert shown.count("5 of 5 trials have ended") == 2


@pytest.mark.slow
def test_a_front_that_was_stopped_between_its_finals_ends_as_one_in_peace(
    found: tuple[Path, Front, list[str]], tmp_path: Path
) -> None:
    def stop(line: str) -> None:
        if line.startswith("flops 0.6: finals"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        along(tmp_path, say=stop)
    assert (tmp_path / "out" / "0.3" / "results.json").exists()
    assert not (tmp_path / "out" / "0.6" / "results.json").exists()
    assert along(tmp_path).points == found[1].points


@pytest.mark.slow
def test_a_front_of_latencies_has_predicted_times(tmp_path: Path) -> None:
    traced = trace_source(resolve(FACTORY, trust_code=True), {}, (2, 6, 6))
    profiled(traced, PaperDevice(block=2), round_to=2).run().write(tmp_path / "paper.lat.json")
    elsewhere = files.read_json(tmp_path / "paper.lat.json")
    elsewhere["fingerprint"]["accelerator"] = "a device of paper"
    files.write_json(tmp_path / "paper.lat.json", elsewhere)
    result = along(
        tmp_path,
        resource="latency",
        targets=[0.997, 0.9985],
        table=tmp_path / "paper.lat.json",
        other_device=True,
        search={"objective": "proxy", "trials": 4, "finals": 2},
    )
    reference, *others = result.points
    assert len(others) == 6
    for each in others:
        assert each.cost <= float(each.target) * reference.cost
        latencies = result.searches[each.target].record.conditions["latencies"]
        assert each.cost == latencies[each.network]["predicted_ms"]


def test_one_impossible_target_shows_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(InfeasibleError):
        along(tmp_path, targets=[0.5, 0.001])
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": [0.5]}, "--targets 0.5: a front has two targets or more"),
        ({"targets": [0.5, "50%"]}, "--targets 0.5,0.5: a front"),
        ({"resource": "memory"}, "resource of a front 'memory'"),
        ({"resource": "params", "params": 0.5}, "--params: the front has its own"),
    ],
)
def test_what_makes_no_front_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((UsageError, UnknownNameError), match=message):
        along(tmp_path, **changes)
    assert not (tmp_path / "out").exists()


def test_the_directory_of_one_search_does_not_become_that_of_a_front(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "study.db").touch()
    with pytest.raises(UsageError, match="has a search of one target"):
        along(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pareto", "flops,accuracy"], "go together"),
        (["--targets", "0.3,0.5"], "go together"),
        (["--pareto", "flops", "--targets", "0.3,0.5"], "--pareto flops: give flops,accuracy or"),
        (["--pareto", "flops,speed", "--targets", "0.3,0.5"], "--pareto flops,speed: give"),
        (["--pareto", "accuracy,flops", "--targets", "0.3,0.5", "--flops", "0.4"], "leave it out"),
    ],
)
def test_wrong_words_on_the_command_line_are_refused(words: list[str], message: str, capsys: Any) -> None:
    assert main(["search", "--model", "lenet5", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("resource", "text", "name"),
    [("flops", "50%", "0.5"), ("flops", "60M", "60000000"), ("latency", "1200us", "1.2ms")],
)
def test_a_run_directory_is_called_as_its_target(resource: Any, text: str, name: str) -> None:
    assert pareto.place_of(Target.parse(resource, text)) == name


def point(cost: float, *accuracies: float, network: str = "search") -> Point:
    return Point("0.5", network, cost, 1000, 100, accuracies)


def test_a_point_is_on_the_front_if_none_is_cheaper_and_better() -> None:
    reference = Point("", "reference", 100, 9000, 900, (97.0,))
    best, worse, dear, twin = point(50, 95, 97), point(50, 95.0), point(60, 95.9), point(50, 96, 96)
    assert undominated([reference, best, worse, dear, twin]) == [reference, best, twin]


def test_the_table_says_what_is_on_the_front_and_what_is_exported() -> None:
    exported = Point("0.5", "search", 49.9, 4990, 500, (95.0, 96.0), (1.25, 0.5), True, "0.5/x.yaml")
    header, first, second = table([exported, point(55, 90.0)], "flops")
    assert first == ["0.5", "search, exported", "49.9", "95.50 ± 0.71", "+1.25 ± 0.50", "4,990", "500", "yes"]
    assert second[3:5] == ["90.00", "-"] and second[-1] == "no"
    assert header[2] == "MACs kept, %" and len(header) == len(first)


def test_a_point_that_another_one_beats_is_drawn_hollow(tmp_path: Path, monkeypatch: Any) -> None:
    from matplotlib.axes import Axes

    drawn: dict[float, Any] = {}
    seen: list[Axes] = []
    real = Axes.errorbar

    def spy(axes: Axes, x: float, y: float, **how: Any) -> Any:
        drawn[x] = how["markerfacecolor"]
        seen.append(axes)
        return real(axes, x, y, **how)

    monkeypatch.setattr(Axes, "errorbar", spy)
    points = [point(100, 97.0, network="reference"), point(50, 95, 96), point(49, 96, 97, network="uniform")]
    draw_front(points, "flops", "a title", tmp_path)
    assert drawn[50] == "white" and "white" not in (drawn[100], drawn[49])
    (low, high), (left, right) = seen[0].get_ylim(), seen[0].get_xlim()
    assert 90 < low < 94.8 and 97.2 < high < 100 and 40 < left < 49 and 100 < right < 110
    assert (tmp_path / "front.png").stat().st_size > 5000


def test_the_page_of_a_front_shows_what_its_picture_shows_and_needs_no_network(tmp_path: Path) -> None:
    found = [point(100, 97.0, network="reference"), point(50, 95, 96), point(30, 90, 92),
             point(49, 96, 97, network="uniform"), point(31, 88, 90, network="<b>")]  # fmt: skip
    shown = {trace.name: trace for trace in front_figure(found, "flops", "a title").data}
    assert list(shown) == ["reference", "search", "uniform", "&lt;b&gt;"]
    search = shown["search"]
    assert (list(search.x), list(search.y)) == ([30, 50], [91.0, 95.5])
    assert list(search.error_y.array) == pytest.approx([2**0.5, 0.5**0.5])
    assert [symbol.endswith("-open") for symbol in search.marker.symbol] == [False, True]
    written = draw_front(found, "flops", "a <title>", tmp_path)
    assert [path.name for path in written] == ["front.png", "front.html", "plotly.min.js"]
    page = (tmp_path / "front.html").read_text(encoding="utf-8")
    assert 'src="plotly.min.js"' in page and 'src="http' not in page
    assert "a &lt;title&gt;" in page.encode().decode("unicode_escape") and "MACs kept, %" in page


def test_without_matplotlib_the_front_has_no_picture_and_says_so(
    found: tuple[Path, Front, list[str]], tmp_path: Path, monkeypatch: Any
) -> None:
    _, result, _ = found
    said: list[str] = []
    monkeypatch.setattr("archsearch.search.pictures.find_spec", lambda name: None)
    written = pareto.write(tmp_path, "flops", result.points, result.searches, said.append)
    assert [path.name for path in written] == ["front.json", "front.md"]
    assert said == ["no pictures without matplotlib and plotly: pip install 'archsearch[plots]'"]


def test_trials_of_other_targets_bring_the_recommendation_nearer_to_the_optimum() -> None:
    traced = trace_source(resolve("resnet20"), {}, (3, 32, 32))
    cost, allowed = traced.cost, SearchSpace(ignore=("conv1",)).allowed(traced.graph)
    lost = {"alone": 0.0, "together": 0.0}
    for seed in range(3):
        generator = np.random.default_rng(seed)
        weights = generator.lognormal(0, 0.8, len(cost.names))
        truth = {
            name: weight * (1 - np.sqrt(np.arange(size + 1) / size))
            for name, weight, size in zip(cost.names, weights, cost.sizes.tolist(), strict=True)
        }
        told, models = {}, {}
        for keep in (0.3, 0.6):
            models[keep] = AdditiveModel(cost, allowed, [Target.parse("flops", keep)])
            points = ModelSampler([name for name in cost.names if len(allowed[name]) > 1], seed)
            networks = [
                project(points.point(number), cost, allowed, [Target.parse("flops", keep)])
                for number in range(30)
            ]
            values = [80 - error(truth, widths) + generator.normal(0, 0.3) for widths in networks]
            told[keep] = np.stack([cost.array(widths) for widths in networks]), np.array(values)
        for keep, model in models.items():
            best = error(truth, model.best(truth))
            model.tell(*told[keep])
            lost["alone"] += error(truth, model.best()) - best
            model.tell(*map(np.concatenate, zip(*told.values(), strict=True)))
            lost["together"] += error(truth, model.best()) - best
    assert 0 <= lost["together"] < 0.9 * lost["alone"]


def error(curves: Mapping[str, Any], widths: Mapping[str, int]) -> float:
    return float(sum(curves[name][width] for name, width in widths.items()))
