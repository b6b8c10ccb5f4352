from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS

from archsearch.errors import SpecError, UsageError
from archsearch.graph import STAYS, ChannelGraph
from archsearch.grouping import channel_graph
from archsearch.models import resolve
from archsearch.rebuild import trace_source
from archsearch.space import Bounds, SearchSpace


def graph_of(name: str) -> ChannelGraph:
    return channel_graph(NETWORKS[name].build(), NETWORKS[name].example())


def allowed(name: str, **bounds: Any) -> dict[str, list[int]]:
    widths = SearchSpace(Bounds(**bounds)).allowed(graph_of(name))
    return {group: each.tolist() for group, each in widths.items()}


def test_by_default_a_tenth_stays() -> None:
    assert allowed("Chain") == {"conv1": list(range(1, 9)), "conv2": list(range(2, 13))}


def test_the_share_that_stays_is_bounded_from_both_sides() -> None:
    assert allowed("Chain", min_keep=0.5, max_keep=0.8) == {"conv1": [4, 5, 6], "conv2": [6, 7, 8, 9]}


def test_the_smallest_width_counts_channels_not_units() -> None:
    assert allowed("Chain", min_width=6) == {"conv1": [6, 7, 8], "conv2": list(range(6, 13))}
    # Units of 4 channels: two are eight.
    assert allowed("Grouped", min_width=5) == {"conv1": [2], "conv2": [2, 3]}


def test_a_layer_smaller_than_the_smallest_width_stays_whole() -> None:
    assert allowed("Chain", min_width=10) == {"conv1": [8], "conv2": [10, 11, 12]}


def test_channels_are_multiples_or_all() -> None:
    assert allowed("Chain", round_to=5) == {"conv1": [5, 8], "conv2": [5, 10, 12]}
    assert allowed("Chain", round_to=4) == {"conv1": [4, 8], "conv2": [4, 8, 12]}
    assert allowed("Grouped", round_to=8) == {"conv1": [2], "conv2": [2, 3]}


def test_channels_that_stay_count_in_multiples() -> None:
    graph = graph_of("PaddedShortcut")
    stem = SearchSpace(Bounds(round_to=2)).allowed(graph)["stem"]
    assert stem.tolist() == [2, 4]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["Chain", "Grouped", "PaddedShortcut", "MeasuredGroup"]),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(1, 12),
    st.integers(1, 9),
)
def test_allowed_widths_rise_are_never_none_and_keep_the_rules(
    name: str, a: float, b: float, min_width: int, round_to: int
) -> None:
    graph = GRAPHS[name]
    bounds = Bounds(min(a, b), max(a, b), min_width, round_to)
    for group, widths in SearchSpace(bounds).allowed(graph).items():
        size = graph.sizes[group]
        assert len(widths) and (np.diff(widths) > 0).all()
        assert widths[0] >= 1 and widths[-1] <= size
        if widths.tolist() == [size]:
            continue  # where no multiple is in bounds, the layer stays whole
        assert widths[-1] <= max(1, bounds.max_keep * size)
        first = graph.groups[group].producers[0]
        staying = int((graph.units[first.tensor, first.dim] == STAYS).sum())
        channels = staying + widths * first.count
        odd = widths[channels % round_to != 0]
        assert odd.tolist() in ([], [size], [widths[0]])
        if widths[0] < widths[-1]:
            assert widths[0] >= bounds.min_keep * size
            assert channels[0] >= min_width


GRAPHS = {
    **{name: graph_of(name) for name in ("Chain", "Grouped", "PaddedShortcut")},
    "MeasuredGroup": graph_of("Attention"),
}


def test_ignored_layers_keep_all_their_channels() -> None:
    widths = SearchSpace(ignore=["conv1"]).allowed(graph_of("Chain"))
    assert widths["conv1"].tolist() == [8] and len(widths["conv2"]) > 1


def test_ignoring_any_layer_of_a_group_keeps_the_group() -> None:
    widths = SearchSpace(ignore=["conv2"]).allowed(graph_of("Residual"))  # it writes to the stem's stream
    assert widths["stem"].tolist() == [8] and len(widths["conv1"]) > 1


def test_the_last_exception_that_matches_counts() -> None:
    space = SearchSpace(Bounds(), {"conv*": {"min_keep": 0.5}, "conv2": {"round_to": 6}})
    widths = space.allowed(graph_of("Chain"))
    assert widths["conv1"].tolist() == [4, 5, 6, 7, 8]
    assert set(widths["conv2"].tolist()) == {6, 12}


@pytest.mark.parametrize("space", [SearchSpace(ignore=["layer9.*"]), SearchSpace(groups={"layer9.*": {}})])
def test_a_pattern_that_matches_nothing_is_refused(space: SearchSpace) -> None:
    with pytest.raises(UsageError, match=r"the pattern 'layer9\.\*' matches no layer"):
        space.allowed(graph_of("Chain"))


def test_a_layer_that_stays_anyway_may_be_ignored() -> None:
    assert SearchSpace(ignore=["fc"]).allowed(graph_of("Chain")).keys() == {"conv1", "conv2"}


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({"min_keep": 0.9, "max_keep": 0.5}, "min_keep 0.9 and max_keep 0.5"),
        ({"min_keep": -0.1}, "min_keep -0.1"),
        ({"max_keep": 1.5}, "max_keep 1.5"),
        ({"min_width": 0}, "min_width 0: a layer keeps at least 1 channel"),
        ({"round_to": 0}, "round_to 0"),
        ({"min_keep": float("nan")}, "min_keep nan"),
    ],
)
def test_bounds_that_cannot_be_are_refused(bounds: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Bounds(**bounds)


def write(folder: Path, text: str) -> Path:
    path = folder / "space.yaml"
    path.write_text(text)
    return path


def test_a_space_is_read_from_a_file(tmp_path: Path) -> None:
    space = SearchSpace.read(
        write(
            tmp_path,
            "bounds:\n  min_keep: 0.25\n  round_to: 2\ngroups:\n  conv2: {max_keep: 0.5}\nignore: [fc]\n",
        )
    )
    assert space == SearchSpace(Bounds(0.25, round_to=2), {"conv2": {"max_keep": 0.5}}, ("fc",))
    assert {name: widths.tolist() for name, widths in space.allowed(graph_of("Chain")).items()} == {
        "conv1": [2, 4, 6, 8],
        "conv2": [4, 6],
    }


def test_ties_are_read_with_and_without_brackets(tmp_path: Path) -> None:
    space = SearchSpace.read(write(tmp_path, "ties:\n  - layer1.*\n  - [layer2.*, fc]\n"))
    assert space.ties == (("layer1.*",), ("layer2.*", "fc"))


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (SearchSpace(ties=[["layer9.*"]]), r"the pattern 'layer9\.\*' matches no channel group"),
        (SearchSpace(ties=[["conv1"]]), "conv1 matches conv1 alone"),
        (SearchSpace(ties=[["conv1", "conv2"], ["conv*"]]), r"conv1 is in conv\* and in another tie"),
        (
            SearchSpace(Bounds(), {"conv1": {"max_keep": 0.3}, "conv2": {"min_keep": 0.6}}, ties=[["conv*"]]),
            "no allowed share in common",
        ),
    ],
)
def test_ties_that_cannot_be_are_refused(space: SearchSpace, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        space.allowed(graph_of("Chain"))


def test_tied_groups_keep_the_same_share_to_the_nearest_channel() -> None:
    allowed = SearchSpace(ties=[["conv*"]]).allowed(graph_of("Chain"))  # of 8 and 12 channels
    assert allowed["conv1"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert allowed["conv2"].tolist() == [2, 3, 5, 6, 8, 9, 11, 12]
    assert allowed.ties == (("conv1", "conv2"),)


def test_a_group_that_is_tied_to_an_ignored_one_stays_whole() -> None:
    allowed = SearchSpace(ignore=["conv2"], ties=[["conv*"]]).allowed(graph_of("Chain"))
    assert {name: steps.tolist() for name, steps in allowed.items()} == {"conv1": [8], "conv2": [12]}


def test_branches_that_may_vanish_are_not_tied() -> None:
    traced = trace_source(resolve("resnet20"), {}, (3, 32, 32)).with_branches()
    with pytest.raises(UsageError, match="may vanish, and cannot be tied"):
        SearchSpace(drop_branches=True, ties=[["layer1.*.conv1"]]).allowed(traced.graph)


def test_an_empty_mapping_is_the_default_space(tmp_path: Path) -> None:
    assert SearchSpace.read(write(tmp_path, "{}\n")) == SearchSpace()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bound: {}\n", "bound: unknown; known are bounds, groups, ignore, drop_branches and ties"),
        ("bounds: {keep: 0.5}\n", r"bounds\.keep: unknown; known are min_keep"),
        ("bounds: {min_keep: half}\n", r"bounds\.min_keep: must be a number, not 'half'"),
        ("bounds: {min_keep: true}\n", r"bounds\.min_keep: must be a number, not True"),
        ("bounds: {round_to: 2.5}\n", r"bounds\.round_to: must be a whole number, not 2\.5"),
        ("bounds: {min_keep: 2}\n", "bounds: min_keep 2"),
        ("bounds: [1]\n", "bounds: must be a mapping"),
        ("bounds:\n", "bounds: must be a mapping"),
        ("groups: [conv1]\n", "groups: must map patterns to bounds"),
        ("groups: {conv1: {min_width: 0}}\n", r"groups\.conv1: min_width 0"),
        ("groups: {conv1: 3}\n", r"groups\.conv1: must be a mapping"),
        ("ignore: fc\n", "ignore: must be a list of patterns"),
        ("ignore: [1]\n", "ignore: must be a list of patterns"),
        ("ties: layer1.*\n", "ties: must be a list of patterns"),
        ("ties: [[conv1], []]\n", r"ties: \[\] is no pattern"),
        ("ties: [[conv1, 2]]\n", r"ties: \['conv1', 2\] is no pattern"),
        ("[]\n", "space.yaml"),
    ],
)
def test_a_file_that_breaks_a_rule_is_refused_and_named(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SpecError, match=words) as caught:
        SearchSpace.read(path)
    assert "space.yaml" in str(caught.value)


def test_patterns_name_layers_of_a_real_network() -> None:
    model = resolve("resnet20").build()
    graph = channel_graph(model, torch.randn(1, 3, 32, 32))
    widths = SearchSpace(Bounds(min_keep=0.5), {"layer3.*": {"max_keep": 0.75}}, ["layer1.*"]).allowed(graph)
    assert widths["conv1"].tolist() == [16]  # layer1 writes to the stem's stream
    assert widths["layer1.0.conv1"].tolist() == [16]
    assert widths["layer2.1.conv1"].tolist() == list(range(16, 33))
    assert widths["layer3.0.conv1"].tolist() == list(range(32, 49))
