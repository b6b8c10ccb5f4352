from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from archsearch.architecture import Architecture
from archsearch.cli import main
from archsearch.errors import InfeasibleError, SpecError, UnknownNameError, UsageError
from archsearch.guide import guide, resampled
from archsearch.models import resolve
from archsearch.rebuild import Traced, load, trace_source
from archsearch.space import Bounds, SearchSpace
from archsearch.targets import Target


def _trace(model: str, shape: tuple[int, ...] = (3, 32, 32)) -> Traced:
    source = resolve(model)
    return trace_source(source, source.arguments_for(10, shape[0], shape[-1]), shape)


@pytest.fixture(scope="module")
def vgg16() -> Traced:
    return _trace("vgg16", (1, 8, 8))


@pytest.fixture(scope="module")
def vgg19() -> Traced:
    return _trace("vgg19", (1, 8, 8))


@pytest.fixture(scope="module")
def resnet20() -> Traced:
    return _trace("resnet20")


def _file(traced: Traced, widths: Mapping[str, int]) -> Architecture:
    """Return an architecture with these widths, and the full width of what is not named."""
    return traced.architecture({**traced.graph.sizes, **widths})


def _widths(architecture: Architecture) -> dict[str, int]:
    return {name: group.width for name, group in architecture.widths.items()}


@pytest.fixture(scope="module")
def found(vgg16: Traced) -> list[Architecture]:
    """Return two architectures of VGG-16, of which the channels of each stage are counted by hand below."""
    first = {"features.conv1_1": 32, "features.conv1_2": 64, "features.conv2_1": 64}
    second = {"features.conv1_1": 16, "features.conv1_2": 16, "features.conv3_2": 64, "features.conv5_3": 2}
    return [_file(vgg16, first), _file(vgg16, second)]


# Kept channels over all of a stage's, of the one and the other architecture, halved.
SHARES = {
    "features.conv1": Fraction(96 + 32, 2 * 128),
    "features.conv2": Fraction(192 + 256, 2 * 256),
    "features.conv3": Fraction(768 + 576, 2 * 768),
    "features.conv4": Fraction(1),
    "features.conv5": Fraction(1536 + 1026, 2 * 1536),
}
SIZES = {"features.conv1": 64, "features.conv2": 128, "features.conv3": 256}


def _rounded(share: Fraction, size: int) -> int:
    """Round to the nearest, halves up, without floats."""
    return (2 * share.numerator * size + share.denominator) // (2 * share.denominator)


def test_vgg19_gets_what_vgg16_keeps_in_each_stage_on_average(
    found: list[Architecture], vgg19: Traced
) -> None:
    guided = guide(found, vgg19, stage_by="name")
    assert guided.model == "vgg19"
    widths = _widths(guided)
    assert [widths[f"features.conv{stage}_1"] for stage in range(1, 6)] == [32, 112, 224, 512, 427]
    for name, width in widths.items():
        stage = name.rpartition("_")[0]
        assert width == _rounded(SHARES[stage], SIZES.get(stage, 512))


def test_stages_of_one_resolution_are_averaged_together(found: list[Architecture], vgg19: Traced) -> None:
    # 8x8 digits leave 1x1 maps behind the third pooling: the fourth and the fifth stage are one.
    widths = _widths(guide(found, vgg19))
    both = (1 + Fraction(6 * 512 - 510, 6 * 512)) / 2
    assert {widths[f"features.conv4_{n}"] for n in range(1, 5)} == {_rounded(both, 512)}
    assert {widths[f"features.conv5_{n}"] for n in range(1, 5)} == {_rounded(both, 512)}
    assert {widths["features.conv3_1"], widths["features.conv3_4"]} == {224}


def test_resnet56_gets_what_resnet20_keeps(resnet20: Traced) -> None:
    halves = _file(resnet20, {name: size // 2 for name, size in resnet20.graph.sizes.items()})
    stream = _file(resnet20, {"conv1": 4, "layer3.1.conv1": 16})
    resnet56 = _trace("resnet56")
    widths = _widths(guide([halves, stream], resnet56))
    expected = {"conv1": 16 * Fraction(32 + 52, 2 * 64), "layer1": 16 * Fraction(32 + 52, 2 * 64)}
    expected |= {"layer2": 32 * Fraction(48 + 96, 2 * 96), "layer3": 64 * Fraction(96 + 144, 2 * 192)}
    assert expected == {"conv1": 10.5, "layer1": 10.5, "layer2": 24, "layer3": 40}
    assert len(widths) == 28
    # A half goes up.
    assert {(name.partition(".")[0], width) for name, width in widths.items()} == {
        ("conv1", 11),
        ("layer1", 11),
        ("layer2", 24),
        ("layer3", 40),
    }


def test_by_layer_the_same_network_gets_each_groups_own_average(resnet20: Traced) -> None:
    ones = _file(resnet20, {"layer2.1.conv1": 5, "layer3.0.conv1": 64})
    others = _file(resnet20, {"layer2.1.conv1": 16, "layer3.0.conv1": 31})
    widths = _widths(guide([ones, others], resnet20, stage_by="layer"))
    assert widths == {**resnet20.graph.sizes, "layer2.1.conv1": 11, "layer3.0.conv1": 48}


def test_another_number_of_stages_is_spread_over_the_depth(resnet20: Traced) -> None:
    # Three stages over five: each of the five covers .6 of one of the three.
    traced = _trace("vgg19")
    thirds = _file(
        resnet20,
        {
            name: {"conv1": 8, "layer1": 8, "layer2": 32, "layer3": 16}[name.partition(".")[0]]
            for name in resnet20.graph.sizes
        },
    )
    widths = _widths(guide([thirds], traced))
    shares = [0.5, (0.4 * 0.5 + 0.2 * 1) / 0.6, 1, (0.2 * 1 + 0.4 * 0.25) / 0.6, 0.25]
    firsts = [widths[f"features.conv{stage}_1"] for stage in range(1, 6)]
    assert firsts == [
        round(share * size) for share, size in zip(shares, (64, 128, 256, 512, 512), strict=True)
    ]
    assert firsts == [32, 85, 256, 256, 128]


@pytest.mark.parametrize(
    ("values", "spread"),
    [
        ([1, 0], [1, 1, 0, 0]),
        ([1, 0, 0], [Fraction(2, 3), 0]),
        ([Fraction(1, 4), 1], [Fraction(1, 4), Fraction(5, 8), 1]),
        ([Fraction(1, 2)], [Fraction(1, 2)] * 3),
        ([1, 0], [Fraction(1, 2)]),
    ],
)
def test_stages_are_spread_by_what_they_lie_on(values: list[int], spread: list[int]) -> None:
    assert resampled([Fraction(value) for value in values], len(spread)) == spread


@given(st.lists(st.fractions(0, 1, max_denominator=64), min_size=1, max_size=8), st.integers(1, 9))
def test_spreading_keeps_the_mean_and_the_bounds(values: list[Fraction], count: int) -> None:
    spread = resampled(values, count)
    assert sum(spread, Fraction()) / count == sum(values, Fraction()) / len(values)
    assert min(values) <= min(spread) and max(spread) <= max(values)
    assert resampled(values, len(values)) == values


# ----------------------------------------------------------------------------------------- targets and spaces


@pytest.mark.parametrize("keep", ["0.6", "0.2"])
def test_a_target_is_met_and_the_stages_stay_in_proportion(
    found: list[Architecture], vgg19: Traced, keep: str
) -> None:
    targets = [Target.parse("flops", keep)]
    widths = _widths(guide(found, vgg19, targets, stage_by="name"))
    limit = targets[0].limit(vgg19.cost.reference.macs)
    assert vgg19.cost.of(widths).macs <= limit
    for name, size in vgg19.graph.sizes.items():
        if widths[name] < size:
            assert vgg19.cost.of({**widths, name: widths[name] + 1}).macs > limit
    factors = [
        width / size / float(SHARES[name.rpartition("_")[0]])
        for (name, width), size in zip(widths.items(), vgg19.graph.sizes.values(), strict=True)
    ]
    if keep == "0.2":  # nothing is at its full width yet, and the smallest share is 32 channels wide
        assert max(factors) - min(factors) < 2 / 32
    assert guide(found, vgg19, targets, stage_by="name").provenance["target"] == f"flops {keep}"


def test_widths_are_those_that_the_space_allows(found: list[Architecture], vgg19: Traced) -> None:
    space = SearchSpace(Bounds(round_to=48), ignore=("features.conv2_*",))
    widths = _widths(guide(found, vgg19, stage_by="name", space=space))
    assert widths["features.conv1_1"] == 48  # of 48 and 64 the nearer to 32
    assert widths["features.conv2_1"] == 128
    assert widths["features.conv3_1"] == 240  # of 192, 240 and 256 the nearest to 224
    assert widths["features.conv5_1"] == 432


def test_a_target_below_all_allowed_widths_is_refused(found: list[Architecture], vgg19: Traced) -> None:
    with pytest.raises(InfeasibleError, match="flops"):
        guide(found, vgg19, [Target.parse("flops", "0.001")])


# ------------------------------------------------------------------------------------------ the file


def test_the_file_says_where_its_shares_come_from(
    found: list[Architecture], vgg19: Traced, tmp_path: Path
) -> None:
    lines: list[str] = []
    guided = guide(found, vgg19, stage_by="name", provenance={"date": "2019-05-06"}, say=lines.append)
    guided.write(tmp_path / "guided.yaml")
    read = Architecture.read(tmp_path / "guided.yaml")
    assert read == guided
    assert read.provenance == {
        "method": "guided",
        "stages": "name",
        "from": [architecture.key for architecture in found],
        "from_models": ["vgg16"],
        "target": "the average shares",
        "shares": {stage: round(float(share), 4) for stage, share in SHARES.items()},
        "date": "2019-05-06",
    }
    assert len(lines) == 6 and lines[-1].startswith("verified: ")
    assert lines[0].startswith("features.conv1: 0.5000 of the channels on average, for features.conv1_1,")
    model = load(tmp_path / "guided.yaml")
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_the_same_files_give_the_same_architecture(found: list[Architecture], vgg19: Traced) -> None:
    assert guide(found, vgg19).key == guide(list(reversed(found)), vgg19).key


def test_one_architecture_guides_its_own_network_to_shares_that_it_has(resnet20: Traced) -> None:
    widths = {name: size - size // 4 for name, size in resnet20.graph.sizes.items()}
    one = _file(resnet20, widths)
    for rule in ("resolution", "name", "layer"):
        assert guide([one], resnet20, stage_by=rule).key == one.key


# ------------------------------------------------------------------------------------------ refusals


def test_families_without_common_names_are_refused_and_the_way_out_is_named(
    found: list[Architecture], resnet20: Traced
) -> None:
    with pytest.raises(UsageError) as refused:
        guide(found, resnet20, stage_by="name")
    message = str(refused.value)
    assert message.startswith("the stage conv1 of resnet20 (conv1) is not in the architecture")
    assert found[0].key in message and "vgg16, which has features.conv1" in message
    assert "--stage-by resolution" in message


def test_a_stage_that_the_sources_lack_is_refused_unless_it_stays(vgg16: Traced, vgg19: Traced) -> None:
    one = _file(vgg19, {"features.conv1_1": 32})
    with pytest.raises(UsageError, match=r"stage vectors of vgg16 \(head.0\).*--ignore 'head.0'"):
        guide([one], vgg16)
    widths = _widths(guide([one], vgg16, space=SearchSpace(ignore=("head.0",))))
    assert widths == {**vgg16.graph.sizes, "features.conv1_1": 48, "features.conv1_2": 48}


def test_a_network_of_vectors_does_not_guide_one_of_maps(vgg19: Traced) -> None:
    vectors = _trace("lenet_300_100", (1, 28, 28))
    with pytest.raises(UsageError, match="stage 8x8 of vgg19"):
        guide([_file(vectors, {})], vgg19)


def test_nothing_guides_nowhere(vgg19: Traced) -> None:
    with pytest.raises(UsageError, match="at least one architecture"):
        guide([], vgg19)


def test_branches_are_not_dropped_by_averages(found: list[Architecture], resnet20: Traced) -> None:
    with pytest.raises(UsageError, match="--drop-branches"):
        guide(found, resnet20, space=SearchSpace(drop_branches=True))


def test_a_branch_that_is_gone_counts_as_nothing_kept(resnet20: Traced) -> None:
    traced = resnet20.with_branches()
    one = _file(traced, {"layer2.1.conv1": 0, "layer2.2.conv1": 16})
    widths = _widths(guide([one], resnet20))
    assert {name: width for name, width in widths.items() if width < resnet20.graph.sizes[name]} == {
        "layer2.0.conv1": 16,
        "layer2.1.conv1": 16,
        "layer2.2.conv1": 16,
    }


def test_an_unknown_rule_is_refused(found: list[Architecture], vgg19: Traced) -> None:
    with pytest.raises(UnknownNameError, match="unknown stage rule 'depth'"):
        guide(found, vgg19, stage_by="depth")


def test_an_architecture_that_does_not_fit_its_model_is_refused(resnet20: Traced) -> None:
    wrong = Architecture.create(
        model="resnet20", input_shape=(3, 32, 32), widths={"conv9": 3}, sizes={"conv9": 16}
    )
    with pytest.raises(SpecError, match="conv9"):
        guide([wrong], resnet20)


# ------------------------------------------------------------------------------------------ the command line


def test_the_command_writes_a_file_that_rebuilds(
    found: list[Architecture], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for architecture, path in zip(found, paths, strict=True):
        architecture.write(path)
    out = tmp_path / "new" / "guided.yaml"
    words = ["guide", *map(str, paths), "--to", "vgg19", "--input-shape", "1,8,8", "--flops", "50%"]
    assert main([*words, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "8x8: 0.5000 of the channels on average" in shown
    assert shown.splitlines()[-1] == f"wrote {out}"
    guided = Architecture.read(out)
    assert guided.keep is not None and 0.495 < guided.keep <= 0.5
    assert guided.provenance["command"].startswith("archsearch guide ")
    small = load(out)
    first = next(module for module in small.modules() if isinstance(module, nn.Conv2d))
    assert first.out_channels == guided.widths["features.conv1_1"].width < 64


def test_without_another_network_the_first_files_own_is_guided(
    found: list[Architecture], tmp_path: Path
) -> None:
    found[0].write(tmp_path / "a.yaml")
    found[1].write(tmp_path / "b.yaml")
    files = [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]
    assert main(["guide", *files, "--stage-by", "layer", "--out", str(tmp_path / "c.yaml")]) == 0
    guided = Architecture.read(tmp_path / "c.yaml")
    assert (guided.model, guided.input_shape) == ("vgg16", (1, 8, 8))
    pairs = zip(_widths(found[0]).values(), _widths(found[1]).values(), strict=True)
    assert list(_widths(guided).values()) == [int(np.ceil((a + b) / 2)) for a, b in pairs]


def test_the_command_refuses_in_one_line(
    found: list[Architecture], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found[0].write(tmp_path / "a.yaml")
    words = ["guide", str(tmp_path / "a.yaml"), "--out", str(tmp_path / "b.yaml")]
    assert main([*words, "--to", "resnet20", "--stage-by", "name"]) == 2
    assert "is not in the architecture" in capsys.readouterr().err.splitlines()[-1]
    assert main([*words, "--to", "resnet21"]) == 2
    assert "unknown model 'resnet21'" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "b.yaml").exists()
