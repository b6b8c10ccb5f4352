"""What a search is for: finalists, latencies, calibration, and what is known of a run from outside."""

from __future__ import annotations

import copy
import inspect
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from find_case import FACTORY
from latency_case import PaperDevice, profiled
from torch.optim.swa_utils import update_bn
from training_case import RECIPE, source

from archsearch import files, stopwatch
from archsearch.api import find, search
from archsearch.architecture import Architecture
from archsearch.catalogue import CATALOGUES
from archsearch.cli import main
from archsearch.cli.parser import build_parser
from archsearch.errors import UnknownNameError, UsageError
from archsearch.models import resolve
from archsearch.pipeline import widths_by
from archsearch.plan import NO_PROXY, Plan
from archsearch.rebuild import Traced, trace_source
from archsearch.search import defaults
from archsearch.search.crew import Crew
from archsearch.search.driver import Searched
from archsearch.search.inherit import inherited
from archsearch.search.objectives import OBJECTIVES
from archsearch.search.quest import Quest
from archsearch.search.reference import Reference
from archsearch.search.sampler import MODEL, SAMPLERS
from archsearch.search.standing import Standing
from archsearch.targets import Target
from archsearch.trainer import Trainer
from archsearch.training.callbacks import Callback

pytestmark = pytest.mark.usefixtures("without_pictures")

TRIALS = 8


def network() -> Traced:
    return trace_source(resolve(FACTORY, trust_code=True), {}, (2, 6, 6))


def plan(**changes: Any) -> Plan:
    short = RECIPE.with_(epochs=2)
    return replace(Plan([Target.parse("flops", 0.5)], recipe=short, budget="scratch-e"), **changes)


def asked(directory: Path, **changes: Any) -> dict[str, Any]:
    given = {
        "flops": 0.5,
        "data": source(),
        "recipe": RECIPE.with_(epochs=2),
        "trust_code": True,
        "out": directory / "out",
        "store": directory / "store",
        "device": "cpu",
    }
    return {**given, **changes}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Searched, list[str]]:
    """Return a search with everything: baselines, best trials, calibration."""
    directory, said = tmp_path_factory.mktemp("goals"), list[str]()
    found = search(
        FACTORY,
        trials=TRIALS,
        objective="inherit",
        sampler="random",
        baselines=["taylor", "l1_norm:knapsack", "slimming"],
        top=2,
        calibrate=5,
        finals=2,
        say=said.append,
        **asked(directory),
    )
    return directory / "out", found, said


def test_finalists_are_uniform_the_baselines_the_recommendation_and_the_best_trials(
    searched: tuple[Path, Searched, list[str]],
) -> None:
    out, found, _ = searched
    names = ["uniform", "taylor", "l1_norm:knapsack", "slimming", "search", "best trial", "best trial 2"]
    assert [arm.widths for arm in found.record.arms] == ["reference", *names]
    limit = network().cost.reference.macs // 2
    for name in names:
        written = Architecture.read(out / "finalists" / f"{name.replace(':', '-').replace(' ', '-')}.yaml")
        assert written.cost.macs is not None and written.cost.macs.value <= limit


def test_what_a_method_finds_is_asked_for_once(searched: tuple[Path, Searched, list[str]]) -> None:
    assert sum(line.startswith("taylor: keeps") for line in searched[2]) == 1


def test_equal_widths_are_trained_once(searched: tuple[Path, Searched, list[str]]) -> None:
    out, found, _ = searched
    arms = {arm.widths: arm for arm in found.record.arms}
    keys = {path.stem: Architecture.read(path).key for path in (out / "finalists").iterdir()}
    same = [(a, b) for a in keys for b in keys if a < b and keys[a] == keys[b]]
    assert same  # three of the seven finalists of such a small space meet
    by_file = {name.replace(":", "-").replace(" ", "-"): arm for name, arm in arms.items()}
    assert all(by_file[a].accuracies == by_file[b].accuracies for a, b in same)
    assert all(by_file[a].seconds == by_file[b].seconds for a, b in same)


def test_the_calibration_is_told_and_recorded_and_its_trainings_are_kept(
    searched: tuple[Path, Searched, list[str]],
) -> None:
    out, found, said = searched
    facts = files.read_json(out / "results.json")["conditions"]["calibration"]
    assert facts["networks"] == 5
    assert set(facts["objectives"]) == {"proxy", "inherit", "short", "full"}
    assert [line.split()[0] for line in said if line.startswith(("proxy ", "inherit ", "short ", "full "))]
    assert "calibration" not in found.architecture.provenance
    assert len(list((out / "calibration").rglob("result.json"))) == 15


def test_status_best_and_export_only_read(
    searched: tuple[Path, Searched, list[str]], tmp_path: Path, capsys: Any
) -> None:
    out, _, _ = searched
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert main(["search", "status", str(out)]) == 0
    assert f"{TRIALS} of {TRIALS} trials have ended ({TRIALS} complete)" in capsys.readouterr().out
    assert main(["search", "best", str(out), "--trust-code"]) == 0
    shown = capsys.readouterr().out
    assert "not a result: the finals decide" in shown and "conv1: " in shown
    best, trial = tmp_path / "best.yaml", tmp_path / "trial.yaml"
    assert main(["search", "export", str(out), "--out", str(best), "--trust-code"]) == 0
    assert main(["search", "export", str(out), "--trial", "0", "--out", str(trial), "--trust-code"]) == 0
    recommended = {name: group.width for name, group in Architecture.read(best).widths.items()}
    assert recommended == files.read_json(out / "model.json")["recommended"]
    uniform = Architecture.read(out / "finalists" / "uniform.yaml")
    assert Architecture.read(trial).key == uniform.key
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status"], "give the run directory"),
        (["status", "nowhere"], "nowhere: has no search"),
        (["stauts", "nowhere"], "did you mean status"),
        (["status", "nowhere", "--trial", "1"], "--trial goes with"),
        (["resnet20", "--flops", "0.5"], "resnet20 is a model, not an action: give --model resnet20"),
        (["torchvision/resnet18"], "give --model torchvision/resnet18"),
        ([FACTORY, "--flops", "0.5"], f"give --model {FACTORY}"),
        (["resnet"], "unknown action resnet"),
        (["--model", "lenet5", "--flops", "0.5", "--sampler", "modle"], "did you mean model"),
    ],
)
def test_wrong_questions_are_refused(words: list[str], message: str, capsys: Any) -> None:
    assert main(["search", *words]) == 2
    assert message in capsys.readouterr().err.replace("'", "")


def test_a_trial_that_is_none_is_refused(searched: tuple[Path, Searched, list[str]], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--trial 99: has no widths; trials are 0 to 7"):
        Standing.read(searched[0]).export(tmp_path / "a.yaml", 99)


def test_the_defaults_of_a_search_stand_in_one_place() -> None:
    """What is given by default means the same from Python, on the command line, and in a quest."""
    from_python = {
        name: parameter.default
        for name, parameter in inspect.signature(search).parameters.items()
        if parameter.default is not parameter.empty
    }
    on_the_command_line = vars(build_parser().parse_args(["search"]))
    in_a_quest = {each.name: each.default for each in [*fields(Quest), *fields(Crew)]}
    for name, default in vars(defaults).items():
        if name.isupper():
            assert from_python[name.lower()] == default
            assert on_the_command_line[name.lower()] == default
            assert in_a_quest.get(name.lower(), default) == default
    assert defaults.PROXY == NO_PROXY
    assert defaults.SAMPLER == MODEL


def test_find_with_the_method_search_is_the_same_search(
    searched: tuple[Path, Searched, list[str]], tmp_path: Path
) -> None:
    settings = {"trials": 5, "objective": "proxy", "finals": 2}
    found = find(FACTORY, method="search", search=settings, budget="scratch-e", **asked(tmp_path))
    assert isinstance(found, Searched)
    assert (tmp_path / "out" / "results.md").exists()
    reference, uniform = found.record.arms[:2]
    assert reference == replace(searched[1].record.arms[0], seconds=reference.seconds)
    assert uniform.accuracies == searched[1].record.arms[1].accuracies


def test_what_find_has_trained_is_not_trained_again_by_a_search_on_its_store(tmp_path: Path) -> None:
    met: set[Path] = set()
    stepped: set[Path] = set()

    def watch(label: str, place: Path) -> list[Callback]:
        class Watch(Callback):
            def on_step(self, state: Any) -> None:
                stepped.add(place)

        met.add(place)
        return [Watch()]

    find(FACTORY, method="l1_norm", budget="scratch-e", **asked(tmp_path, callbacks=watch))
    before, store = set(stepped), tmp_path / "store" / "trainings"
    assert before == set(store.iterdir())
    met.clear()
    stepped.clear()
    settings: dict[str, Any] = {"trials": 3, "objective": "full", "finals": 2, "baselines": []}
    search(FACTORY, **settings, **asked(tmp_path, callbacks=watch, out=tmp_path / "searched"))
    assert len(met & before) == 2, "the reference, and uniform widths with the first seed"
    assert not stepped & before
    assert stepped | before == set(store.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": {"trails": 3}}, "trails"),
        ({"steps": 2}, "--steps does not go with a search"),
        ({"seeds": 3}, "--seeds does not go with a search: finalists get --finals"),
        ({"method": "l1_norm", "search": {}}, "search says how to search"),
        ({"out": None}, "give out"),
        ({"search": {"baselines": ["tailor"]}}, "tailor"),
        ({"search": {"baselines": ["taylor", "taylor"]}}, "one stands twice"),
        ({"search": {"calibrate": 2}}, "--calibrate 2"),
        ({"search": {"top": -1}}, "--top -1"),
        ({"search": {"jobs": 2}}, "the images are in this process's memory"),
    ],
)
def test_what_does_not_go_with_a_search_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((UsageError, UnknownNameError), match=message):
        find(FACTORY, **asked(tmp_path, **{"method": "search", "budget": "scratch-e", **changes}))


def test_weights_that_were_inherited_are_measured_with_fresh_statistics(tmp_path: Path) -> None:
    trainer = Trainer(source(), "cpu", tmp_path).blinded()
    reference = Reference(network(), plan(), trainer)
    sizes = network().graph.sizes
    by_hand = copy.deepcopy(reference.model)
    update_bn(trainer.calibration(), by_hand)
    by_hand.eval()
    with torch.no_grad():
        right = [by_hand(images).argmax(1) == labels for images, labels in source().validation.batches(8)]
    accuracy = 100 * torch.cat(right).double().mean().item()
    assert inherited(network(), reference, reference.selection(sizes), trainer) == pytest.approx(accuracy)
    few = reference.selection({name: size // 2 for name, size in sizes.items()})
    assert 0 <= inherited(network(), reference, few, trainer) <= 100
    assert not list(tmp_path.rglob("test.json"))


def test_a_method_that_trains_the_reference_its_own_way_leaves_the_test_set_alone(tmp_path: Path) -> None:
    trainer = Trainer(source(), "cpu", tmp_path).blinded()
    asked = plan(method="slimming")
    widths = widths_by(network(), asked, trainer)(asked.targets)
    assert network().cost.of(widths).macs <= network().cost.reference.macs // 2
    assert len(list(tmp_path.rglob("result.json"))) == 2
    assert not list(tmp_path.rglob("test.json"))


def test_latencies_are_predicted_for_trials_and_finalists_and_the_best(tmp_path: Path, capsys: Any) -> None:
    table = profiled(network(), PaperDevice(block=2), round_to=2).run()
    table.write(tmp_path / "paper.lat.json")
    elsewhere = files.read_json(tmp_path / "paper.lat.json")
    elsewhere["fingerprint"]["accelerator"] = "a device of paper"
    files.write_json(tmp_path / "paper.lat.json", elsewhere)
    given = {
        "latency": 0.997,
        "flops": None,
        "table": tmp_path / "paper.lat.json",
        "trials": 5,
        "objective": "proxy",
        "finals": 2,
    }
    with pytest.raises(UsageError, match="was measured elsewhere"):
        search(FACTORY, **asked(tmp_path, **given))
    found = search(FACTORY, other_device=True, **asked(tmp_path, **given))
    facts = found.record.conditions
    assert facts["latency"] == found.architecture.provenance["latency"]
    assert facts["latency"]["verified"] is False
    assert list(facts["latencies"]) == ["uniform", "l1_norm:knapsack", "search"]
    assert all(
        seen["high_ms"] <= 0.997 * facts["latency"]["reference_ms"] for seen in facts["latencies"].values()
    )
    assert Architecture.read(tmp_path / "out" / "finalists" / "search.yaml").provenance["latency"]
    for trial in Standing.read(tmp_path / "out").trials:
        seen = trial.user_attrs
        assert seen["latency_low_ms"] <= seen["latency_ms"] <= seen["latency_high_ms"]
        assert seen["latency_kept"] == pytest.approx(seen["latency_ms"] / table.reference_ms, rel=1e-4)
    reference = Standing.read(tmp_path / "out").facts["reference"]
    assert reference["latency_ms"] == pytest.approx(table.reference_ms)

    recommended = files.read_json(tmp_path / "out" / "model.json")["recommended"]
    ms, low, high = map(float, table.predict([recommended[name] for name in table.names]))
    assert main(["search", "best", str(tmp_path / "out"), "--trust-code"]) == 0
    assert f"predicted latency: {ms:.4g} ms, {low:.4g} to {high:.4g} with 90 %; " in capsys.readouterr().out


def test_finalists_are_measured_before_the_finals_where_the_device_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiled(network(), PaperDevice(block=2), round_to=2).run().write(tmp_path / "paper.lat.json")
    measured: list[str] = []

    def measure(path: Path, facts: dict[str, Any], **_more: Any) -> dict[str, Any]:
        """Measure what was predicted, but with steps that are eighty times as high."""
        measured.append(Architecture.read(path).key)
        share = 1 - 80 * (1 - facts["predicted_ms"] / facts["reference_ms"])
        ms = share * facts["reference_ms"]
        return {**facts, "measured_share": share, "measured_ms": ms, "stable": True, "verified": True}

    monkeypatch.setattr(stopwatch, "measured", measure)
    given = {"latency": 0.997, "flops": None, "table": tmp_path / "paper.lat.json", "trials": 5}
    given |= {"objective": "proxy", "finals": 2}
    found = search(FACTORY, **asked(tmp_path, **given))
    arms = {arm.widths: arm.latency for arm in found.record.arms}
    assert all((arms[name] or 0) > 0.8 for name in ("uniform", "l1_norm:knapsack", "search"))
    assert all(share is not None and share <= 0.997 for name, share in arms.items() if name != "reference")
    assert "latency kept" in found.record.markdown()
    assert len(measured) == len(set(measured))
    count = len(measured)
    again = search(FACTORY, **asked(tmp_path, **given))
    assert len(measured) == count
    assert again.record.arms == found.record.arms


@pytest.mark.slow  # two processes that import torch
def test_finalists_are_trained_side_by_side_by_the_workers(tmp_path: Path) -> None:
    given = {"data": "digits", "data_options": {"train_share": 0.1}, "arguments": {"in_channels": 1}}
    settings: dict[str, Any] = {"trials": 4, "objective": "proxy", "finals": 2}
    again: list[str] = []
    found = search(FACTORY, jobs=2, **settings, **asked(tmp_path, **given, say=again.append))
    results = list((tmp_path / "out" / "finals").rglob("result.json"))
    assert len(results) == 2 * len(found.outcome.validation)
    # What workers have trained was found by the driver, and not trained again.
    finals = [line for line in again if ", seed 100" in line]
    assert len(finals) == len(results) and all("trained before" in line for line in finals)


@pytest.mark.parametrize(
    ("given", "names"),
    [({}, ["l1_norm:knapsack"]), ({"baselines": []}, []), ({"baselines": ["taylor"]}, ["taylor"])],
)
def test_the_proxy_alone_is_the_baseline_unless_others_are_named(
    given: dict[str, Any], names: list[str]
) -> None:
    assert Quest(plan(), **given).baseline_names == names


def test_only_samplers_without_a_recommendation_send_their_best_trial_to_the_finals() -> None:
    assert Quest(plan()).best_trials == 0
    assert Quest(plan(), sampler="random").best_trials == 1
    assert Quest(plan(), top=3).best_trials == 3


def test_the_default_is_among_the_samplers_that_an_error_names() -> None:
    with pytest.raises(UnknownNameError, match="known: gp, model, nsga2, random, tpe "):
        Quest(plan(), sampler="Zufall")


def test_samplers_and_objectives_are_listed() -> None:
    assert [line.split()[0] for line in CATALOGUES["objectives"]("*")] == list(OBJECTIVES)
    assert [line.split()[0] for line in CATALOGUES["samplers"]("*")] == sorted(["model", *SAMPLERS])
    assert [line.split()[0] for line in CATALOGUES["samplers"]("m*")] == ["model"]
