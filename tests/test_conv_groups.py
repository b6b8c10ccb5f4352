from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from find_case import search
from hypothesis import given
from hypothesis import strategies as st
from networks import NETWORKS
from path_net import PathNet
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from archsearch.architecture import Architecture
from archsearch.cli.main import main
from archsearch.conv_groups import ConvolutionSizes
from archsearch.errors import ArchsearchError, SpecError, UsageError
from archsearch.graph import Selection
from archsearch.latency.layers import find_layers
from archsearch.models import resolve
from archsearch.pruners import PRUNERS, Context, Sparsifying, inherit_weights
from archsearch.pruners.sss import SparseStructureSelection
from archsearch.rebuild import Traced, load, trace_module, trace_source
from archsearch.space import SearchSpace
from archsearch.surgery import shrink
from archsearch.verification import random_selection

FACTORY = f"{Path(__file__).parent / 'path_net.py'}:paths"
EXAMPLE = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def path_net() -> PathNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PathNet(3, 2).eval()


def traced(name: str = FACTORY, size: int | None = None, **options: Any) -> Traced:
    source = resolve(name, trust_code=True)
    shape = source.input_shape if size is None else (3, size, size)
    assert shape is not None
    return trace_source(source, {}, shape, **{"whole_groups": True, **options})


def widths_of(selection: Selection) -> dict[str, int]:
    return {name: len(kept) for name, kept in selection.items()}


def macs_of(model: nn.Module, example: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        model.eval()(example)
    return int(counter.get_total_flops()) // 2


# --- sizes ----------------------------------------------------------------------------------------------


@given(
    st.integers(2, 6),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([nn.Conv1d, nn.ConvTranspose1d]),
)
def test_sizes_are_those_of_a_layer_that_was_made_with_fewer_groups(
    groups: int, kept: int, reads: int, makes: int, kind: Any
) -> None:
    kept = min(kept, groups)
    small = kind(kept * reads, kept * makes, 1, groups=kept)
    full = ConvolutionSizes(groups * reads, groups * makes, groups)
    fitted = full.fitted(small.weight.shape, transposed=small.transposed, whole_groups=True)
    assert fitted == (small.in_channels, small.out_channels, small.groups)


@given(
    st.integers(2, 6), st.integers(2, 4), st.integers(1, 4), st.sampled_from([nn.Conv1d, nn.ConvTranspose1d])
)
def test_sizes_are_those_of_a_layer_that_was_made_with_narrower_groups(
    groups: int, reads: int, makes: int, kind: Any
) -> None:
    small = kind(groups * (reads - 1), groups * makes, 1, groups=groups)
    full = ConvolutionSizes(groups * reads, groups * (makes + 1), groups)
    fitted = full.fitted(small.weight.shape, transposed=small.transposed, whole_groups=False)
    assert fitted == (small.in_channels, small.out_channels, small.groups)


# --- units ----------------------------------------------------------------------------------------------


def test_a_grouped_network_worked_out_by_hand() -> None:
    network = NETWORKS["Grouped"]
    model = network.build()
    found = trace_module(model, network.example(), whole_groups=True)
    assert found.graph.sizes == {"conv1": 4}  # 2 channels of conv1, 3 of conv2
    counts = {(member.tensor, member.dim): member.count for member in found.graph.groups["conv1"].members}
    assert counts[("conv1.weight", 0)] == 2
    assert counts[("conv2.weight", 0)] == counts[("conv3.weight", 1)] == 3
    assert ("conv2.weight", 1) not in counts
    cost = found.cost.of({"conv1": 3})
    assert cost.macs == 64 * (3 * 6 + 9 * 2 * 9 + 9 * 5)
    assert cost.params == 3 * 6 + 6 + 9 * 2 * 9 + 9 + 9 * 5 + 5
    small: Any = found.inherit({"conv1": np.array([0, 2, 3])})
    assert (small.conv2.in_channels, small.conv2.out_channels, small.conv2.groups) == (6, 9, 3)
    x = network.example()
    first, second = [0, 1, 4, 5, 6, 7], [0, 1, 2, 6, 7, 8, 9, 10, 11]
    y = F.relu(F.conv2d(x, model.conv1.weight[first], model.conv1.bias[first]))
    y = F.relu(F.conv2d(y, model.conv2.weight[second], model.conv2.bias[second], padding=1, groups=3))
    expected = F.conv2d(y, model.conv3.weight[:, second], model.conv3.bias)
    torch.testing.assert_close(small(x), expected)


def test_macs_are_linear_in_the_number_of_kept_groups() -> None:
    found = traced()
    sizes = found.graph.sizes
    macs = [found.cost.of({**sizes, "reduce": width}).macs for width in (1, 2, 3, 4)]
    assert len(set(np.diff(macs))) == 1
    assert macs[1] - macs[0] == 36 * (8 * 3 + 9 * 3 * 3 + 3 * 8)


def test_paths_are_one_group_and_depthwise_convolutions_are_as_ever() -> None:
    assert traced().graph.sizes == {"stem": 8, "reduce": 4}
    assert traced(whole_groups=False).graph.sizes == {"stem": 8, "reduce": 3, "paths": 3}


class Transposed(nn.Module):
    """Transposed convolutions of 3 groups, then one of single channels with 2 outputs each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 1)
        self.up = nn.ConvTranspose2d(6, 12, 2, stride=2, groups=3)
        self.depthwise = nn.ConvTranspose2d(12, 24, 1, groups=12)
        self.last = nn.Conv2d(24, 2, 1)

    def forward(self, x: Tensor) -> Any:
        return self.last(F.relu(self.depthwise(self.up(F.relu(self.conv(x))))))


class Normalised(nn.Module):
    """Grouped filters by length and direction."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 1)
        self.grouped = parametrizations.weight_norm(nn.Conv2d(6, 12, 3, groups=3))
        self.last = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Any:
        return self.last(F.relu(self.grouped(F.relu(self.conv(x)))))


class Shuffling(nn.Module):
    """Two grouped convolutions with a channel shuffle between, as in ShuffleNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 1)
        self.first = nn.Conv2d(8, 8, 1, groups=2)
        self.second = nn.Conv2d(8, 8, 1, groups=2)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.first(self.conv(x)))
        x = x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        return self.last(F.relu(self.second(x)))


class Constant(nn.Module):
    """A number of groups that the code holds itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 1)
        self.kernel = nn.Parameter(torch.randn(6, 2, 3, 3))
        self.more = nn.Conv2d(6, 5, 1)
        self.last = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.conv2d(self.conv(x), self.kernel, groups=3)
        return self.last(F.relu(self.more(x)))


@pytest.mark.parametrize(
    ("build", "sizes"),
    [(Transposed, {"conv": 3}), (Normalised, {"conv": 3}), (PathNet, {"stem": 8, "reduce": 4})],
)
def test_a_smaller_network_is_the_reference_without_some_groups(
    build: Callable[..., nn.Module], sizes: dict[str, int]
) -> None:
    torch.manual_seed(0)
    model = build(3, 2) if build is PathNet else build()
    found = trace_module(model.eval(), EXAMPLE, whole_groups=True)
    assert found.graph.sizes == sizes
    for seed in range(3):
        selection = random_selection(found.graph, seed)
        verification = found.verify(selection)
        assert verification.ok, verification.problem
        cost = found.cost.of(widths_of(selection))
        small = found.inherit(selection)
        assert macs_of(small, EXAMPLE) == cost.macs
        assert sum(parameter.numel() for parameter in small.parameters()) == cost.params


@pytest.mark.parametrize(("name", "conv_groups"), [("resnext50_32x4d", 16), ("regnet_y_400mf", 16)])
def test_networks_of_grouped_and_ordinary_convolutions_rebuild(
    tmp_path: Path, name: str, conv_groups: int
) -> None:
    found = traced(f"torchvision/{name}", 64)
    assert len(found.graph.conv_groups) == conv_groups
    for block in found.graph.conv_groups:
        convs = [
            found.model.get_submodule(m.tensor.removesuffix(".weight"))
            for m in found.graph.groups[block].producers
        ]
        assert {conv.groups for conv in convs} == {1, found.graph.sizes[block]}
    selection = random_selection(found.graph, 0)
    widths = widths_of(selection)
    verification = found.verify(selection)
    assert verification.error < 1e-5, verification.problem
    fresh, sliced = found.fresh(widths)
    assert sliced == ()
    cost = found.cost.of(widths)
    assert macs_of(fresh, found.example) == cost.macs
    assert sum(parameter.numel() for parameter in fresh.parameters()) == cost.params
    small = found.inherit(selection)
    assert [
        (m.in_channels, m.out_channels, m.groups) for m in small.modules() if isinstance(m, nn.Conv2d)
    ] == [(m.in_channels, m.out_channels, m.groups) for m in fresh.modules() if isinstance(m, nn.Conv2d)]


def test_groups_that_a_shuffle_mixes_go_together_or_not_at_all() -> None:
    found = trace_module(Shuffling().eval(), EXAMPLE, whole_groups=True)
    assert found.graph.sizes == {"conv": 1}
    narrower = trace_module(Shuffling().eval(), EXAMPLE)
    assert sum(narrower.graph.sizes.values()) > 1


def test_a_number_of_groups_in_the_models_code_freezes_what_it_reaches() -> None:
    found = trace_module(Constant().eval(), EXAMPLE, whole_groups=True)
    assert found.graph.sizes == {"more": 5}
    reasons = {layer.layer: layer.reason for layer in found.graph.frozen}
    assert "the model's code needs its size at test_conv_groups.py" in reasons["conv"]


def test_grouped_convolutions_of_the_input_stay() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 1, groups=2), nn.Conv2d(6, 5, 1), nn.Conv2d(5, 2, 1))
    found = trace_module(model.eval(), torch.randn(1, 4, 5, 5), whole_groups=True)
    assert found.graph.sizes == {"1": 5}
    assert found.graph.conv_groups == []


@pytest.mark.parametrize("name", ["resnet20", "torchvision/shufflenet_v2_x0_5"])  # depthwise is none
def test_a_network_without_groups_of_several_channels_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"--whole-groups.*: no convolution of this network has groups"):
        traced(name, 32)


def test_a_block_of_paths_can_vanish() -> None:
    found = traced().with_branches()
    assert [branch.groups for branch in found.graph.branches] == [("reduce",)]
    selection = {"stem": np.arange(5), "reduce": np.arange(0)}
    assert found.verify(selection).ok
    assert (
        macs_of(found.fresh(widths_of(selection))[0], found.example)
        == found.cost.of(widths_of(selection)).macs
    )


# --- files ----------------------------------------------------------------------------------------------


def test_a_file_says_that_groups_went_as_a_whole(tmp_path: Path) -> None:
    found = traced()
    path = tmp_path / "a.yaml"
    found.architecture({"stem": 6, "reduce": 3}).write(path)
    content = yaml.safe_load(path.read_text())
    assert content["whole_groups"] is True
    model: Any = load(path, trust_code=True)
    assert (model.paths.in_channels, model.paths.out_channels, model.paths.groups) == (9, 9, 3)
    assert (model.depthwise.in_channels, model.depthwise.groups) == (6, 6)
    cost = Architecture.read(path).cost
    assert cost.macs is not None and macs_of(model, EXAMPLE) == cost.macs.value


def test_only_a_file_of_whole_groups_has_them_in_its_key_and_text() -> None:
    facts: dict[str, Any] = {"model": "m", "input_shape": (3, 8, 8), "widths": {"a": 1}, "sizes": {"a": 2}}
    plain, whole = Architecture.create(**facts), Architecture.create(**facts, whole_groups=True)
    assert plain.key != whole.key
    assert plain.key == Architecture.create(**facts, whole_groups=False).key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"whole_groups": False}, r"widths\.(reduce|paths)"),
        ({"whole_groups": 1}, r"whole_groups: must be a valid boolean"),
        ({"whole_group": True}, r"whole_group: unknown field; did you mean whole_groups\?"),
    ],
)
def test_a_file_that_says_otherwise_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.yaml"
    traced().architecture({"stem": 6, "reduce": 3}).write(path)
    content = yaml.safe_load(path.read_text())
    del content["key"]
    path.write_text(yaml.safe_dump({**content, **change}))
    with pytest.raises(SpecError, match=message):
        load(path, trust_code=True)


def test_a_network_of_fewer_paths_can_be_exported() -> None:
    small = traced().inherit({"stem": np.arange(5), "reduce": np.array([1, 3])}).eval()
    x = torch.randn(2, 2, 6, 6)
    exported = torch.export.export(small, (x,)).module()
    torch.testing.assert_close(exported(x), small(x))


# --- what else looks at groups ----------------------------------------------------------------------------


def context_of(model: nn.Module, found: Traced, **options: Any) -> Context:
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(5)
        yield torch.randn(6, 2, 6, 6, generator=draw), torch.randint(3, (6,), generator=draw)

    return Context(model, found.graph, batches=batches, **options)


@pytest.mark.parametrize("method", list(PRUNERS))
def test_every_method_scores_paths_and_leaves_weights_that_run(method: str) -> None:
    model = path_net()
    found = trace_module(model, EXAMPLE, whole_groups=True)
    pruner: Any = PRUNERS[method]()
    context = context_of(model, found)
    if isinstance(pruner, Sparsifying):
        training = pruner.sparse_training(model, found.graph, found.graph.sizes)
        context = context_of(training.plain(), found, sparse=training.network)
    scores = pruner.score(context)
    assert np.isfinite(scores["reduce"]).all() and scores["reduce"].shape == (4,)
    small: Any = inherit_weights(pruner, context, {"stem": np.arange(6), "reduce": np.array([0, 2])})
    assert small.paths.groups == 2
    assert small.eval()(EXAMPLE).isfinite().all()


def test_a_path_that_computes_nothing_goes_first_by_greedy_reconstruction() -> None:
    model = path_net()
    with torch.no_grad():
        model.expand.weight[:, 3:6] = 0
    found = trace_module(model, EXAMPLE, whole_groups=True)
    scores = PRUNERS["thinet"]().score(context_of(model, found))
    assert int(np.argmin(scores["reduce"])) == 1


def test_steps_keep_groups_whole(tmp_path: Path) -> None:
    found = search(tmp_path, model=FACTORY, whole_groups=True, steps=2, budget="none", method="l2_norm")
    assert found.architecture.whole_groups
    model: Any = found.model
    assert model.paths.groups == len(found.selection["reduce"]) == found.architecture.widths["reduce"].width
    again: Any = load(tmp_path / "out" / "architecture.yaml", trust_code=True)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


def test_a_step_that_leaves_one_group_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArchsearchError, match=r"other channel groups than .*: give --steps 1"):
        search(
            tmp_path,
            model=FACTORY,
            whole_groups=True,
            space=SearchSpace(ignore=("stem",)),
            steps=4,  # the third leaves one path, a convolution like any other
            flops=0.44,
            budget="none",
        )


def test_latency_tables_refuse_groups_that_go() -> None:
    with pytest.raises(UsageError, match="trace without --whole-groups"):
        find_layers(traced())


def test_the_command_line_traces_whole_groups(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["show", "--model", FACTORY, "--trust-code"]
    assert main([*model, "--whole-groups"]) == 0
    whole = capsys.readouterr().out
    assert main(model) == 0
    assert "paths" in capsys.readouterr().out and "reduce" in whole


# --- sss on groups ----------------------------------------------------------------------------------------


def test_a_path_of_factor_zero_can_be_removed_without_a_change() -> None:
    model = path_net()
    found = trace_module(model, EXAMPLE, whole_groups=True)
    training = SparseStructureSelection(on="groups").sparse_training(model, found.graph, found.graph.sizes)
    network: Any = training.network
    paths = found.graph.groups["reduce"]
    with torch.no_grad():
        network.factors.fill_(0.5)  # those of other channels multiply nothing
        network.factors[paths.first_unit : paths.first_unit + 4] = torch.ones(4)
        torch.testing.assert_close(network(EXAMPLE), model(EXAMPLE), rtol=0, atol=0)
        network.factors[paths.first_unit : paths.first_unit + 4] = torch.tensor([0.0, 2.0, 0.0, 0.5])
        plain = training.plain().eval()
        small = shrink(plain, found.graph, {"stem": np.arange(8), "reduce": np.array([1, 3])})
        whole = network(EXAMPLE)
        assert not torch.allclose(whole, model(EXAMPLE), rtol=1e-2)
        torch.testing.assert_close(plain(EXAMPLE), whole, rtol=0, atol=0)
        torch.testing.assert_close(small(EXAMPLE), whole, rtol=1e-5, atol=1e-6)
    scores = SparseStructureSelection(on="groups").score(context_of(plain, found, sparse=network))
    assert scores["reduce"] == pytest.approx([0, 2, 0, 0.5], abs=1e-8)
    assert np.isinf(scores["stem"]).all()


@pytest.mark.parametrize("whole_groups", [False, True])
def test_factors_on_groups_are_refused_where_none_may_go(whole_groups: bool) -> None:
    model, example = (path_net(), EXAMPLE) if not whole_groups else (
        nn.Sequential(nn.Conv2d(4, 6, 1, groups=2), nn.Conv2d(6, 5, 1), nn.Flatten(), nn.Linear(125, 3)),
        torch.randn(1, 4, 5, 5),
    )  # fmt: skip
    found = trace_module(model, example, whole_groups=whole_groups)
    with pytest.raises(UsageError, match=r"on is 'groups', but no group .*: give --whole-groups"):
        SparseStructureSelection(on="groups").sparse_training(model, found.graph, found.graph.sizes)


def test_paths_are_found_from_their_own_training(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "method": "sss",
        "options": {"on": "groups", "strength": 0.1},
        "budget": "none",
    }
    found = search(tmp_path, model=FACTORY, whole_groups=True, flops=0.8, **options)
    widths = {name: group.width for name, group in found.architecture.widths.items()}
    assert widths["stem"] == 8 and widths["reduce"] < 4
