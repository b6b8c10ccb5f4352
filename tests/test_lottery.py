from __future__ import annotations

import csv
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from find_case import EPOCHS, MACS, PARAMS
from sparsity_case import RECIPE, Start, traced_tiny, watched
from training_case import SignalAt

from archsearch.cli.main import main
from archsearch.errors import InfeasibleError, UsageError
from archsearch.rebuild import load
from archsearch.sparsity.curve import Point, arms_of, plot_points, write_points
from archsearch.sparsity.lottery import CONTROLS, Lottery, LotteryPlan, lottery
from archsearch.sparsity.masks import Masks
from archsearch.sparsity.removal import ChannelRemoval, WeightRemoval
from archsearch.sparsity.rule import Rule
from archsearch.sparsity.runs import Runs
from archsearch.tensor_files import read_tensors

NAMES = ("conv1.weight", "conv2.weight", "fc.weight")
WEIGHTS = 144 + 1152 + 48
ALL = tuple(CONTROLS)


def draw(directory: Path, starts: list[Start] | None = None, others: Any = (), **options: Any) -> Lottery:
    plan: dict[str, Any] = {
        "rounds": 2,
        "keep_per_round": 0.5,
        "recipe": RECIPE,
        "rule": Rule(allocation="layer"),
    }
    trainer = watched(directory / "store", [] if starts is None else starts, others)
    return lottery(traced_tiny(), LotteryPlan(**{**plan, **options}), trainer, out=directory / "out")


@pytest.fixture(scope="module")
def rewound_lottery(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Start], Lottery]:
    """One lottery with all controls, rewound to step 4, and how each of its trainings began."""
    directory, starts = tmp_path_factory.mktemp("lottery"), list[Start]()
    return directory, starts, draw(directory, starts, controls=ALL, rewind="4it")


@pytest.fixture(scope="module")
def structured_lottery(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Start], Lottery]:
    directory, starts = tmp_path_factory.mktemp("structured"), list[Start]()
    return directory, starts, draw(directory, starts, controls=ALL, rewind="1ep", structured=True)


def kept_by_ticket(directory: Path) -> list[Masks]:
    return [Masks.read(directory / "out" / f"round-0{number}.safetensors") for number in (1, 2)]


def named(starts: list[Start], label: str) -> Start:
    (found,) = [start for start in starts if start.label == label]
    return found


# -------------------------------------------------------------------------------------------- what is trained


def test_every_round_trains_the_ticket_and_each_control_once(rewound_lottery: Any) -> None:
    _, starts, found = rewound_lottery
    labels = [start.label for start in starts]
    assert labels[0] == "dense"
    expected = {f"{kind}, round {number} of 2" for kind in ("ticket", *ALL) for number in (1, 2)}
    assert len(labels) == 11
    assert set(labels[1:]) == expected
    assert [(point.kind, point.round) for point in found.points[:3]] == [
        ("dense", 0),
        ("ticket", 1),
        ("reinit", 1),
    ]


def test_a_round_leaves_its_share_of_every_layer_within_what_was_left(rewound_lottery: Any) -> None:
    directory, _, found = rewound_lottery
    first, second = kept_by_ticket(directory)
    for name, size in zip(NAMES, (144, 1152, 48), strict=True):
        assert int(first[name].sum()) == size // 2
        assert int(second[name].sum()) == size // 4
        assert not (second[name] & ~first[name]).any()
    assert {point.weights_kept for point in found.points} == {1.0, 0.5, 0.25}


def test_a_ticket_has_the_weights_of_the_step_and_goes_on_from_there(rewound_lottery: Any) -> None:
    directory, starts, _ = rewound_lottery
    early = read_tensors(directory / "out" / "weights.safetensors")
    (kept,) = (directory / "store" / "trainings").glob("*/weights-at-step-4.safetensors")
    assert all(torch.equal(value, early[name]) for name, value in read_tensors(kept).items())
    for number, masks in enumerate(kept_by_ticket(directory), start=1):
        start = named(starts, f"ticket, round {number} of 2")
        assert start.step == 4
        assert start.steps == 24 - 4
        for name, value in start.weights.items():
            assert torch.equal(value, early[name] * masks[name] if name in masks else early[name])


def test_the_masks_are_those_of_the_largest_trained_weights(rewound_lottery: Any) -> None:
    directory, _, _ = rewound_lottery
    (training,) = (directory / "store" / "trainings").glob("*/weights-at-step-4.safetensors")
    trained = read_tensors(training.parent / "weights.safetensors")
    first = kept_by_ticket(directory)[0]
    for name, mask in first.items():
        assert trained[name].abs()[mask].min() >= trained[name].abs()[~mask].max()


def test_reinit_has_fresh_weights_under_the_tickets_masks_and_a_whole_training(rewound_lottery: Any) -> None:
    directory, starts, _ = rewound_lottery
    for number, masks in enumerate(kept_by_ticket(directory), start=1):
        start = named(starts, f"reinit, round {number} of 2")
        assert (start.step, start.steps) == (0, 24)
        for name, mask in masks.items():
            assert torch.equal(start.weights[name] != 0, mask)
            assert not torch.equal(start.weights[name], starts[0].weights[name] * mask)


def test_random_has_the_tickets_weights_in_other_places(rewound_lottery: Any) -> None:
    directory, starts, _ = rewound_lottery
    early = read_tensors(directory / "out" / "weights.safetensors")
    for number, masks in enumerate(kept_by_ticket(directory), start=1):
        start = named(starts, f"random, round {number} of 2")
        assert (start.step, start.steps) == (4, 20)
        for name, mask in masks.items():
            chosen = start.weights[name] != 0
            assert int(chosen.sum()) == int(mask.sum())
            assert torch.equal(start.weights[name], early[name] * chosen)
        assert any(not torch.equal(start.weights[name] != 0, mask) for name, mask in masks.items())


@pytest.mark.parametrize(
    ("kind", "steps", "epochs"), [("lr-rewind", 24, EPOCHS), ("finetune", 6, EPOCHS // 4)]
)
def test_the_others_go_on_from_trained_weights(
    rewound_lottery: Any, kind: str, steps: int, epochs: int
) -> None:
    directory, starts, _ = rewound_lottery
    (training,) = (directory / "store" / "trainings").glob("*/weights-at-step-4.safetensors")
    trained = read_tensors(training.parent / "weights.safetensors")
    first, second = (named(starts, f"{kind}, round {number} of 2") for number in (1, 2))
    assert [(start.step, start.steps, start.epochs) for start in (first, second)] == 2 * [(0, steps, epochs)]
    assert torch.equal(first.weights["bn1.running_mean"], trained["bn1.running_mean"])
    for name in NAMES:
        gone = first.weights[name] == 0
        assert torch.equal(first.weights[name], trained[name] * ~gone)
        assert not second.weights[name][gone].any()


def test_with_no_rewinding_the_dense_network_is_the_reference_of_all_verbs(tmp_path: Path) -> None:
    starts: list[Start] = []
    runs = Runs(traced_tiny(), watched(tmp_path / "store", []), RECIPE, [0])
    runs.train("reference", runs.fresh(0), 0)
    found = draw(tmp_path, starts, rounds=1, controls=[])
    assert [start.label for start in starts] == ["ticket, round 1 of 1"]
    masks = Masks.read(tmp_path / "out" / "round-01.safetensors")
    fresh = dict(runs.fresh(0).named_parameters())
    for name, mask in masks.items():
        assert torch.equal(starts[0].weights[name], fresh[name] * mask)
    assert not list((tmp_path / "store").rglob("weights-at-step-*"))
    assert [arm.name for arm in found.record.arms] == ["dense", "ticket, round 1: 50.0% of the weights"]


def test_each_seed_is_a_lottery_of_its_own(tmp_path: Path) -> None:
    found = draw(tmp_path, rounds=1, controls=[], seeds=2)
    assert [(point.kind, point.seed) for point in found.points] == [
        ("dense", 0),
        ("ticket", 0),
        ("dense", 1),
        ("ticket", 1),
    ]
    assert [len(arm.accuracies) for arm in found.record.arms] == [2, 2]


# ------------------------------------------------------------------------------------------------- resumption


def test_an_interrupted_lottery_goes_on_without_training_anything_again(tmp_path: Path) -> None:
    def rows(directory: Path) -> list[list[str]]:
        with (directory / "out" / "curve.csv").open() as file:
            return [row[:-1] for row in csv.reader(file)]  # without the seconds

    whole, parts = list[Start](), list[Start]()
    draw(tmp_path / "whole", whole, rewind="4it")

    class KillTheFifth(SignalAt):
        def after_backward(self, state: Any) -> None:
            if len(parts) == 5:
                super().after_backward(state)

    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "parts", parts, [KillTheFifth(9, signal.SIGINT)], rewind="4it")
    assert len(parts) == 5
    assert not (tmp_path / "parts" / "out" / "curve.csv").exists()
    draw(tmp_path / "parts", parts, rewind="4it")
    assert [start.label for start in parts[5:]] == [start.label for start in whole[4:]]
    assert sum(start.steps for start in parts) == sum(start.steps for start in whole)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    for number in (1, 2):
        name = Path("out") / f"round-0{number}.safetensors"
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    draw(tmp_path / "parts", parts, rewind="4it")
    assert len(parts) == 5 + len(whole) - 4


# ------------------------------------------------------------------------------------------------- structured


def test_a_structured_round_leaves_a_share_of_the_macs(structured_lottery: Any) -> None:
    _, starts, found = structured_lottery
    assert len(starts) == 11
    for point in found.points:
        assert point.macs <= 0.5**point.round * MACS
        assert point.weights_kept == point.params / PARAMS
        assert point.macs > 0.5 ** (point.round + 1) * MACS


def test_a_structured_ticket_is_made_of_slices_of_the_early_weights(structured_lottery: Any) -> None:
    directory, starts, _ = structured_lottery
    early = read_tensors(directory / "out" / "weights.safetensors")
    channels = set(range(8))
    for number in (1, 2):
        start = named(starts, f"ticket, round {number} of 2")
        assert start.step == 6
        small = load(directory / "out" / f"round-0{number}.yaml", trust_code=True)
        assert {n: v.shape for n, v in small.state_dict().items()} == {
            n: v.shape for n, v in start.weights.items()
        }
        rows = [
            next(row for row in channels if torch.equal(early["conv1.weight"][row], filter_))
            for filter_ in start.weights["conv1.weight"]
        ]
        assert set(rows) < channels
        assert torch.equal(start.weights["bn1.weight"], early["bn1.weight"][rows])
        channels = set(rows)  # the next round keeps some of these


def test_structured_controls_have_the_tickets_widths(structured_lottery: Any) -> None:
    _, starts, _ = structured_lottery
    for number in (1, 2):
        ticket, reinit, chance = (
            named(starts, f"{kind}, round {number} of 2") for kind in ("ticket", "reinit", "random")
        )
        for name, value in ticket.weights.items():
            assert reinit.weights[name].shape == chance.weights[name].shape == value.shape
        assert not torch.equal(reinit.weights["conv1.weight"], ticket.weights["conv1.weight"])
        assert (reinit.step, chance.step) == (0, 6)
    again = named(starts, "lr-rewind, round 2 of 2")
    before = named(starts, "lr-rewind, round 1 of 2")
    assert len(again.weights["conv2.weight"]) <= len(before.weights["conv2.weight"])
    assert again.step == 0


def test_channels_by_chance_are_as_many_of_each_group_and_sorted() -> None:
    removal = ChannelRemoval(traced_tiny(), "global")
    whole = removal.everything()
    some = removal.further(traced_tiny().model, whole, 0.5, 1)
    chance = removal.by_chance(some, 3)
    for name, kept in chance.items():
        assert len(kept) == len(some[name]) < len(whole[name])
        assert (kept[1:] > kept[:-1]).all() and kept[0] >= 0 and kept[-1] < len(whole[name])


def test_more_than_the_network_can_give_is_refused() -> None:
    removal = ChannelRemoval(traced_tiny(), "layer")
    with pytest.raises(InfeasibleError):
        removal.further(traced_tiny().model, removal.everything(), 0.001, 1)


def test_nothing_removed_is_the_network_itself() -> None:
    traced = traced_tiny()
    for removal in (WeightRemoval(traced, Rule()), ChannelRemoval(traced, "global")):
        everything: Any = removal.everything()
        assert removal.share(everything) == 1
        assert removal.cost(everything) == traced.cost.reference
        same = removal.of(traced.model, everything).state_dict()
        assert all(torch.equal(value, same[name]) for name, value in traced.model.state_dict().items())


# -------------------------------------------------------------------------------------------------- the curve

POINTS = [
    Point("dense", 0, 0, 1.0, 1000, 100, 90.0, 4, 1.5),
    Point("ticket", 1, 0, 0.5, 400, 50, 91.0, 4, 1.0),
    Point("reinit", 1, 0, 0.5, 400, 50, 85.0, 4, 1.0),
    Point("dense", 0, 1, 1.0, 1000, 100, 92.0, 4, 1.5),
    Point("ticket", 1, 1, 0.5, 500, 50, 94.0, 4, 2.0),
    Point("reinit", 1, 1, 0.5, 500, 50, 85.0, 4, 1.0),
]


def test_the_csv_has_one_row_for_each_network(tmp_path: Path) -> None:
    write_points(tmp_path / "curve.csv", POINTS)
    lines = (tmp_path / "curve.csv").read_text().splitlines()
    assert lines[0] == "kind,round,seed,weights_kept,macs,params,accuracy,epochs,seconds"
    assert lines[2] == "ticket,1,0,0.5,400,50,91.0,4,1.0"
    assert len(lines) == 7


def test_an_arm_is_a_kind_and_a_round_over_the_seeds() -> None:
    dense, ticket, _ = arms_of(POINTS)
    assert (dense.name, dense.accuracies, dense.macs) == ("dense", (90.0, 92.0), 1000)
    assert ticket.name == "ticket, round 1: 50.0% of the weights"
    assert (ticket.macs, ticket.accuracies, ticket.seconds) == (450, (91.0, 94.0), 3.0)


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    plot_points(POINTS, tmp_path / "curve.png", "tiny")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------------- refused plans


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_per_round": 1.0}, "--keep-per-round 1: must be a share in"),
        ({"keep_per_round": float("nan")}, "--keep-per-round nan"),
        ({"rounds": 0}, "--rounds 0: at least 1"),
        ({"seeds": 0}, "--seeds 0: at least 1"),
        ({"controls": ["rewind"]}, "--controls rewind: give reinit, random, lr-rewind, finetune, or none"),
        ({"rule": Rule("snip")}, "take archsearch sparsify"),
        ({"structured": True, "rule": Rule(scope="conv")}, "--structured removes channels"),
        ({"finetune": "none"}, "does not fine-tune"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LotteryPlan(**options)


@pytest.mark.parametrize(
    ("rewind", "message"), [("4ep", "has 24 steps"), ("24it", "has 24 steps"), ("x", "give")]
)
def test_a_step_behind_the_end_is_refused_before_anything_is_trained(
    tmp_path: Path, rewind: str, message: str
) -> None:
    starts: list[Start] = []
    with pytest.raises(UsageError, match=message):
        draw(tmp_path, starts, rewind=rewind)
    assert not starts


# ------------------------------------------------------------------------------------------- the command line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["sparsify", "--keep", "0.3", "--method", "snip"], ["masks.safetensors", "results.md"]),
        (["lottery", "--rounds", "1", "--rewind", "5it"], ["curve.png", "curve.csv", "round-01.safetensors"]),
        (["lottery", "--rounds", "1", "--structured"], ["curve.png", "round-01.yaml"]),
    ],
)
def test_the_commands_do_their_jobs_on_digits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: Sequence[str], written: Sequence[str]
) -> None:
    options = ["--model", "lenet_300_100", "--epochs", "1", "--device", "cpu"]
    places = ["--store", str(tmp_path / "store"), "--out", str(tmp_path / "out")]
    assert main([*words, *options, *places]) == 0
    shown = capsys.readouterr().out
    for name in written:
        assert f"wrote {tmp_path / 'out' / name}" in shown
        assert (tmp_path / "out" / name).is_file()
