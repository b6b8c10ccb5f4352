from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, pooled
from torch import Tensor, nn

from archsearch.allocation import ALLOCATIONS, allocate, solve
from archsearch.api import shape_and_arguments
from archsearch.architecture import Architecture
from archsearch.branches import find_branches, residual_branches
from archsearch.cli import main
from archsearch.cost import CostModel
from archsearch.counters import flop_counter_macs
from archsearch.errors import InfeasibleError, SpecError, UsageError
from archsearch.graph import Branch, FrozenBranch, Selection
from archsearch.grouping import channel_graph
from archsearch.models import resolve
from archsearch.pruners import PRUNERS, Context, inherit_weights
from archsearch.rebuild import Traced, load, trace_module, trace_source
from archsearch.space import Bounds, SearchSpace
from archsearch.surgery import kept_slices, mask, shrink
from archsearch.targets import Target
from archsearch.verification import randomised


class Blocks(nn.Module):
    """A block that adds in place, and one of stride 2 with a projection, a scale and average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(4)
        self.one = nn.ModuleDict({
            "conv1": nn.Conv2d(4, 6, 3, padding=1, bias=False),
            "bn1": nn.BatchNorm2d(6),
            "relu": nn.ReLU(inplace=True),
            "conv2": nn.Conv2d(6, 4, 3, padding=1, bias=False),
            "bn2": nn.BatchNorm2d(4),
        })  # fmt: skip
        self.two = nn.ModuleDict({
            "conv1": nn.Conv2d(4, 5, 1),
            "pool": nn.AvgPool2d(2),
            "conv2": nn.Conv2d(5, 7, 3, padding=1),
            "conv3": nn.Conv2d(7, 8, 1),
        })  # fmt: skip
        self.gamma = nn.Parameter(torch.full((8, 1, 1), 0.1))
        self.project = nn.Conv2d(4, 8, 1, stride=2)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.bn0(self.stem(x)))
        one: Any = self.one
        y = one.bn2(one.conv2(one.relu(one.bn1(one.conv1(x)))))
        y += x
        x = F.relu(y)
        two: Any = self.two
        y = two.conv3(F.relu(two.conv2(F.relu(two.pool(two.conv1(x))))))
        return self.fc(pooled(F.relu(self.project(x) + self.gamma * y)))


STEM, ONE = 64 * 9 * 3 * 4, 64 * 9 * (4 * 6 + 6 * 4)
TWO = 64 * 4 * 5 + 16 * (9 * 5 * 7 + 7 * 8)
REST = 16 * 4 * 8 + 8 * 3
ONE_PARAMS = 9 * 4 * 6 + 2 * 6 + 9 * 6 * 4 + 2 * 4
TWO_PARAMS = (4 * 5 + 5) + (9 * 5 * 7 + 7) + (7 * 8 + 8) + 8
OTHER_PARAMS = 9 * 3 * 4 + 2 * 4 + (4 * 8 + 8) + (8 * 3 + 3)
IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@cache
def blocks() -> Traced:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return trace_module(Blocks().eval(), IMAGE).with_branches()


@cache
def traced(name: str, size: int | None = None, **arguments: Any) -> Traced:
    source = resolve(name)
    shape, words = shape_and_arguments(source, None, (3, size, size) if size else (3, 32, 32), 10, arguments)
    return trace_source(source, words, shape).with_branches()


def without(found: Traced, gone: Iterable[str], keep: float = 1.0, seed: int = 0) -> Selection:
    """Keep nothing of some branches, and random units of a share of the other groups."""
    draw = np.random.default_rng(seed)
    names = set(gone)
    empty = {group for branch in found.graph.branches if branch.name in names for group in branch.groups}
    return {
        name: np.sort(draw.choice(size, 0 if name in empty else max(1, round(size * keep)), replace=False))
        for name, size in found.graph.sizes.items()
    }


def widths_of(selection: Selection) -> dict[str, int]:
    return {name: len(kept) for name, kept in selection.items()}


def names(found: Traced) -> list[str]:
    return [branch.name for branch in found.graph.branches]


def check(found: Traced, selection: Selection) -> None:
    """Verify, and count what the cost model says in the rebuilt network."""
    verified = found.verify(selection)
    assert verified.ok, verified.problem
    widths = widths_of(selection)
    cost, (fresh, _) = found.cost.of(widths), found.fresh(widths)
    small = found.inherit(selection)
    for model in (small, fresh):
        assert cost.params == sum(parameter.numel() for parameter in model.parameters())
        assert cost.macs == flop_counter_macs(model.eval(), found.example)
    counted = CostModel(small, channel_graph(small, found.example)).reference
    assert (cost.macs, cost.params, cost.published_flops) == (
        counted.macs, counted.params, counted.published_flops,
    )  # fmt: skip
    assert cost.peak_activation_bytes >= counted.peak_activation_bytes
    shapes = {name: tensor.shape for name, tensor in small.state_dict().items()}
    assert {name: tensor.shape for name, tensor in fresh.state_dict().items()} == shapes


def test_the_branches_of_a_small_network_are_those_that_a_person_sees() -> None:
    one, two = blocks().graph.branches
    assert (one.name, one.groups) == ("one", ("one.conv1",))
    assert one.layers == ("one.conv1", "one.bn1", "one.conv2", "one.bn2")
    assert one.loose == frozenset()
    assert two.name == "two.conv1"  # the scale is the network's own, so that nothing else holds all of it
    assert two.groups == ("two.conv1", "two.conv2")
    assert two.loose == {"gamma"}
    assert blocks().graph.frozen_branches == ()


@pytest.mark.parametrize("gone", [(), ("one",), ("two.conv1",), ("one", "two.conv1")])
def test_the_cost_without_branches_is_that_of_a_hand_count(gone: tuple[str, ...]) -> None:
    found = blocks()
    cost = found.cost.of(widths_of(without(found, gone)))
    assert cost.macs == STEM + REST + ONE * ("one" not in gone) + TWO * ("two.conv1" not in gone)
    assert cost.params == (
        OTHER_PARAMS + ONE_PARAMS * ("one" not in gone) + TWO_PARAMS * ("two.conv1" not in gone)
    )
    check(found, without(found, gone))
    check(found, without(found, gone, 0.6))


def test_without_its_branches_a_network_computes_its_shortcuts() -> None:
    found = blocks()
    model: Any = found.model
    small = found.inherit(without(found, names(found)))
    images = torch.randn(2, 3, 12, 12)  # and at another resolution
    x = F.relu(model.bn0(model.stem(images)))
    expected = model.fc(pooled(F.relu(model.project(x))))
    assert torch.equal(small.eval()(images), expected)
    left = {"stem.weight", "bn0.weight", "bn0.bias", "bn0.running_mean", "bn0.running_var",
            "bn0.num_batches_tracked", "project.weight", "project.bias", "fc.weight", "fc.bias"}  # fmt: skip
    assert set(small.state_dict()) == left
    assert set(kept_slices(model, found.graph, without(found, names(found)))) == left


def test_what_is_left_can_be_traced_and_cut_again() -> None:
    found = blocks()
    small = found.inherit(without(found, ["one"]))
    again = trace_module(small, IMAGE).with_branches()
    assert again.graph.sizes == {n: size for n, size in found.graph.sizes.items() if n != "one.conv1"}
    assert names(again) == ["two.conv1"]
    check(again, without(again, ["two.conv1"], 0.5))
    twice = again.inherit(without(again, [], 0.5, seed=3))
    selection = {**without(again, [], 0.5, seed=3), "one.conv1": np.array([], dtype=np.int64)}
    once = found.inherit({name: selection[name] for name in found.graph.groups})
    assert torch.equal(twice.eval()(IMAGE), once.eval()(IMAGE))


def test_the_reference_is_left_as_it_was() -> None:
    found = blocks()
    before = {name: tensor.clone() for name, tensor in found.model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in found.model.modules()]
    again = find_branches(found.model, found.graph, IMAGE)
    shrink(found.model, again, without(found, names(found)))
    after = found.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert hooks == [len(module._forward_hooks) for module in found.model.modules()]
    assert isinstance(found.model.gamma, nn.Parameter)


def test_the_masked_reference_loses_all_of_the_branch_and_nothing_else() -> None:
    found = blocks()
    masked = mask(randomised(found.model, 0), found.graph, without(found, ["one"]))
    for name, parameter in masked.named_parameters():
        assert (not parameter.any()) == name.startswith("one."), name


def test_a_network_without_branches_trains_exports_and_compiles(tmp_path: Path) -> None:
    found = blocks()
    small, _ = found.fresh(widths_of(without(found, names(found))))
    before = {name: parameter.clone() for name, parameter in small.named_parameters()}
    optimiser = torch.optim.SGD(small.parameters(), lr=0.1)
    F.cross_entropy(small.train()(torch.randn(4, 3, 8, 8)), torch.tensor([0, 1, 2, 0])).backward()
    optimiser.step()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in small.named_parameters())
    small.eval()
    images = torch.randn(2, 3, 8, 8)
    exported = torch.export.export(small, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    more = torch.randn(5, 3, 8, 8)
    assert torch.allclose(exported.module()(more), small(more), atol=1e-6)
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images), small(images))


@pytest.mark.slow
def test_a_network_without_branches_runs_as_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    found = traced("resnet20")
    small = found.inherit(without(found, names(found)[::2], 0.5)).eval()
    path = tmp_path / "small.onnx"
    torch.onnx.export(small, (found.example,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path)
    (out,) = session.run(None, {session.get_inputs()[0].name: found.example.numpy()})
    assert np.allclose(out, small(found.example).detach().numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "arguments", "count", "first"),
    [
        ("resnet20", {}, 9, "layer1.0"),
        ("resnet20", {"shortcut": "projection"}, 9, "layer1.0"),
        ("preresnet56", {}, 18, "layer1.0"),
        ("torchvision/resnet50", {}, 16, "layer1.0"),  # also the first of each stage
        ("torchvision/mobilenet_v2", {}, 10, "features.3.conv"),  # 17 blocks, 7 of them without a shortcut
        ("vgg16", {}, 0, ""),
        ("densenet40", {}, 0, ""),
    ],
)
def test_networks_have_the_branches_of_their_papers(
    name: str, arguments: dict[str, Any], count: int, first: str
) -> None:
    found = traced(name, **arguments)
    assert len(found.graph.branches) == count
    assert not found.graph.frozen_branches
    assert names(found)[:1] == ([first] if first else [])
    inside = list(itertools.chain.from_iterable(branch.groups for branch in found.graph.branches))
    assert len(set(inside)) == len(inside)


def test_the_shortcut_of_a_projection_stays() -> None:
    found = traced("resnet20", shortcut="projection")
    gone = next(branch for branch in found.graph.branches if branch.name == "layer2.0")
    assert gone.layers == ("layer2.0.conv1", "layer2.0.bn1", "layer2.0.conv2", "layer2.0.bn2")
    small = found.inherit(without(found, ["layer2.0"]))
    kept = [name for name in small.state_dict() if name.startswith("layer2.0.")]
    assert kept and all(name.startswith("layer2.0.shortcut.") for name in kept)


FAMILIES: list[tuple[str, int]] = [("resnet20", 16), ("preresnet56", 16)]
MORE_FAMILIES: list[tuple[str, int]] = [
    ("resnet56", 32), ("torchvision/mobilenet_v2", 32), ("torchvision/resnet50", 64),
    ("torchvision/resnext50_32x4d", 64),
    ("torchvision/efficientnet_b0", 64), ("torchvision/mobilenet_v3_small", 64),
    ("torchvision/regnet_y_400mf", 64), ("torchvision/convnext_tiny", 64), ("torchvision/swin_t", 224),
    ("timm/resnet26d", 64), ("timm/res2net50_26w_4s", 64), ("timm/convnext_atto", 64),
    ("timm/hrnet_w18_small", 64), ("timm/vit_tiny_patch16_224", 224), ("timm/poolformer_s12", 64),
]  # fmt: skip


def check_family(name: str, size: int) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    found = traced(name, size)
    draw = np.random.default_rng(0)
    every = names(found)
    some = [branch for branch in every if draw.random() < 0.5]
    for gone, keep in ((every, 1.0), (some, 0.5), (every[:1], 1.0), (every[-1:], 0.2)):
        check(found, without(found, gone, keep))
    small = found.inherit(without(found, some, 0.5)).train()
    out = small(torch.cat([found.example] * 2))
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


@pytest.mark.parametrize(("name", "size"), FAMILIES)
def test_any_branches_of_a_network_may_vanish(name: str, size: int) -> None:
    check_family(name, size)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), MORE_FAMILIES)
def test_any_branches_of_larger_networks_may_vanish(name: str, size: int) -> None:
    check_family(name, size)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_costs_rise_with_each_width_and_are_the_same_in_a_batch(data: st.DataObject) -> None:
    found = blocks()
    branches = found.graph.branches
    gone = data.draw(st.sets(st.sampled_from(names(found))))
    empty = {group for branch in branches if branch.name in gone for group in branch.groups}
    small = {
        name: 0 if name in empty else data.draw(st.integers(1, size))
        for name, size in found.graph.sizes.items()
    }
    back = data.draw(st.sets(st.sampled_from(names(found))))
    more = dict(small)
    for branch in branches:
        if branch.name in gone and branch.name not in back:
            continue
        for name in branch.groups:
            more[name] = data.draw(st.integers(max(1, small[name]), found.graph.sizes[name]))
    cost = found.cost
    batch = np.stack([cost.array(small), cost.array(more)])
    for count in (cost.macs, cost.params, cost.published_flops, cost.peak_activation_bytes):
        few, many = int(count(cost.array(small))), int(count(cost.array(more)))
        assert few <= many
        assert count(batch).tolist() == [few, many]
        assert count(batch.reshape(1, 2, -1)).tolist() == [[few, many]]


def test_the_macs_by_layer_of_a_vanished_branch_are_zero() -> None:
    found = blocks()
    widths = widths_of(without(found, ["one"]))
    by_layer = found.cost.macs_by_layer(widths)
    assert by_layer[1:3] == [0, 0]
    assert sum(by_layer) == found.cost.of(widths).macs


def test_a_plain_layer_never_gets_width_0() -> None:
    found = traced("resnet20")
    with pytest.raises(UsageError, match="'conv1' has width 0, but lies in no residual branch"):
        found.inherit({**without(found, []), "conv1": np.array([], dtype=np.int64)})


def test_half_a_branch_is_refused() -> None:
    found = blocks()
    half = {**widths_of(without(found, [])), "two.conv2": 0}
    with pytest.raises(UsageError, match=r"'two.conv2' has width 0, but 'two.conv1' of the same .* has 5"):
        found.graph.vanished(half)


class Gated(nn.Module):
    """What the branch adds is a sigmoid, which is one half where its layers give zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
        self.a, self.b = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.fc(pooled(x + torch.sigmoid(self.b(F.relu(self.a(x))))))


class Twice(Gated):
    """The branch's first layer also feeds the classifier."""

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        x = x + self.b(F.relu(self.a(x)))
        x = x + self.b(F.relu(self.a(x)))
        return self.fc(pooled(x))


class Called(Gated):
    """The branch uses a weight without its layer."""

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.fc(pooled(x + self.b(F.relu(F.conv2d(x, self.a.weight, self.a.bias)))))


class Single(Gated):
    """One layer from the stream to the stream has no width of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.fc(pooled(x + self.a(x)))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Gated, "still adds what its activations make of zeros"),
        (Twice, "its a is also used elsewhere"),
        (Called, r"its code at line \d+ of test_branches.py uses weights without calling their module"),
        (Single, "no channel group lies in it alone"),
    ],
)
def test_a_branch_that_cannot_vanish_says_why(model: type[nn.Module], reason: str) -> None:
    found = trace_module(model().eval(), IMAGE).with_branches()
    assert not found.graph.branches
    assert found.graph.frozen_branches
    for branch in found.graph.frozen_branches:
        assert re.search(reason, branch.reason), branch


class Inspected(Gated):
    """The code looks at the branch's values."""

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        y = self.b(F.relu(self.a(x)))
        if not self.training and not bool(y.any()):
            raise ValueError("nothing comes out of the branch")
        return self.fc(pooled(x + y))


class Outside(Gated):
    """What the branch computes inside is also used outside."""

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        inside = F.relu(self.a(x))
        return self.fc(pooled(x + self.b(inside))) + inside.mean((1, 2, 3))[:, None]


class NoShortcut(Gated):
    """Neither operand of the addition comes from the other's input."""

    def forward(self, x: Tensor) -> Any:
        x = self.b(F.relu(self.a(self.stem(x)))) + self.stem.bias[:, None, None]
        return self.fc(pooled(x))


@pytest.mark.parametrize("model", [Inspected, Outside, NoShortcut])
def test_what_is_no_branch_is_none(model: type[nn.Module]) -> None:
    assert not trace_module(model().eval(), IMAGE).with_branches().graph.branches


class Sums(nn.Module):
    """Two branches at once, one inside another, and one that its code cannot do without."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
        layers = {}
        for name in ("first", "second", "outer", "inner", "sized"):
            layers[name] = nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))
        self.parts = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Any:
        parts = self.parts
        x = self.stem(x)
        x = x + parts["first"](x) + parts["second"](x)
        y = parts["outer"](x)
        y = y + parts["inner"](y)
        x = x + parts["outer"][2](F.relu(y).repeat(1, 2, 1, 1)[:, :6]) if False else x + y
        y = parts["sized"](x)
        return self.fc(pooled(x + y.flatten(1).view(y.shape)))


def test_parallel_and_nested_branches_vanish_one_by_one() -> None:
    found = trace_module(Sums().eval(), IMAGE).with_branches()
    assert names(found) == ["parts.first", "parts.second", "parts.inner", "parts.sized"]
    for gone in itertools.chain.from_iterable(itertools.combinations(names(found), n) for n in range(5)):
        check(found, without(found, gone, 0.7))


def test_looking_for_branches_alone_names_what_may_be_one() -> None:
    found = traced("resnet20")
    candidates = list(residual_branches(found.model, found.graph, found.example))
    assert all(isinstance(branch, Branch) for branch in candidates)
    assert [branch.name for branch in candidates] == names(found)
    single = trace_module(Single().eval(), IMAGE)
    (frozen,) = residual_branches(single.model, single.graph, IMAGE)
    assert isinstance(frozen, FrozenBranch)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_the_branches_of_the_test_networks_may_vanish(name: str) -> None:
    network = NETWORKS[name]
    model, example = network.build(), network.example()
    found = trace_module(model, example).with_branches()
    expected = {"Residual": ["conv1"], "PaddedShortcut": ["conv1"]}
    if name in expected:
        assert names(found) == expected[name]
    check(found, without(found, names(found), 0.7))


def test_a_file_with_dropped_branches_rebuilds_the_same_network(tmp_path: Path) -> None:
    found = traced("resnet20")
    widths = widths_of(without(found, ["layer1.1", "layer3.2"], 0.5))
    path = tmp_path / "small.yaml"
    found.architecture(widths).write(path)
    assert "layer3.2.conv1: {width: 0, size: 64}" in path.read_text(encoding="utf-8")
    small = found.inherit(without(found, ["layer1.1", "layer3.2"], 0.5))
    weights = tmp_path / "weights.pt"
    torch.save(small.state_dict(), weights)
    loaded = load(path, weights)
    assert torch.equal(loaded.eval()(found.example), small.eval()(found.example))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv1": 0}, "widths: the group 'conv1' has width 0, but lies in no residual branch"),
        ({"layer1.0.conv1": -1}, "must be greater than or equal to 0"),
    ],
)
def test_a_file_in_which_a_layer_is_empty_is_refused(
    tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    found = traced("resnet20")
    path = tmp_path / "wrong.yaml"
    right = found.architecture(found.graph.sizes)
    right.write(path)
    text = path.read_text(encoding="utf-8")
    ((name, width),) = changes.items()
    size = found.graph.sizes[name]
    wrong = text.replace(f"  {name}: {{width: {size}, size", f"  {name}: {{width: {width}, size")
    path.write_text("".join(line for line in wrong.splitlines(True) if not line.startswith("key:")))
    with pytest.raises(SpecError, match=message):
        load(path)


def test_gathering_norms_vanish_with_their_branch(tmp_path: Path) -> None:
    source = resolve("preresnet56")
    found = trace_source(source, {}, (3, 16, 16), gathers=True).with_branches()
    gone = found.graph.branches[1]
    assert gone.groups == ("layer1.1.bn1", "layer1.1.conv1", "layer1.1.conv2")
    selection = without(found, [gone.name], 0.5)
    check(found, selection)
    path = tmp_path / "small.yaml"
    found.architecture(widths_of(selection), selection=selection).write(path)
    assert Architecture.read(path).gathers["layer1.1.bn1"] == ()
    small, loaded = found.inherit(selection), load(path)
    loaded.load_state_dict(small.state_dict())
    assert torch.equal(loaded.eval()(found.example), small.eval()(found.example))


# --- which widths are allowed, and the solver ---------------------------------------------------------


def test_only_branches_may_have_width_0_and_only_if_asked_for() -> None:
    graph = blocks().graph
    bounds = Bounds(min_keep=0.5)
    plain = SearchSpace(bounds).allowed(graph)
    dropping = SearchSpace(bounds, drop_branches=True).allowed(graph)
    inside = {"one.conv1", "two.conv1", "two.conv2"}
    for name in graph.groups:
        zero = [0] if name in inside else []
        assert dropping[name].tolist() == [*zero, *plain[name].tolist()]
    assert 0 not in np.concatenate(list(plain.values()))


@pytest.mark.parametrize("pattern", ["two.conv2", "two.conv3", "gamma"])
def test_a_branch_with_a_layer_to_ignore_stays(pattern: str) -> None:
    space = SearchSpace(ignore=[pattern], drop_branches=True)
    if pattern == "gamma":
        with pytest.raises(UsageError, match="matches no layer"):
            space.allowed(blocks().graph)
        return
    allowed = space.allowed(blocks().graph)
    assert {name for name, widths in allowed.items() if widths[0] == 0} == {"one.conv1"}


def test_dropping_branches_of_a_network_without_any_is_an_error() -> None:
    with pytest.raises(UsageError, match="no residual branch of this network may vanish"):
        SearchSpace(drop_branches=True).allowed(traced("vgg16").graph)


def test_a_space_file_may_ask_for_it(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("drop_branches: true\nbounds: {min_keep: 0.3}\n", encoding="utf-8")
    assert SearchSpace.read(path) == SearchSpace(Bounds(min_keep=0.3), drop_branches=True)
    path.write_text("drop_branches: 1\n", encoding="utf-8")
    with pytest.raises(SpecError, match="drop_branches: must be true or false, not 1"):
        SearchSpace.read(path)


def test_scores_of_whole_blocks_drop_whole_blocks() -> None:
    """As factors on blocks give them: all units of a block are worth the same."""
    found = traced("resnet20")
    worth = dict(zip(names(found), [9, 3, 8, 7, 2, 6, 5, 1, 4], strict=True))
    scores = {"conv1": np.full(found.graph.sizes["conv1"], np.inf)}
    for branch in found.graph.branches:
        scores |= {
            name: np.full(found.graph.sizes[name], float(worth[branch.name])) for name in branch.groups
        }
    space = SearchSpace(Bounds(min_keep=1.0), drop_branches=True)
    full = found.cost.reference.macs
    widths = solve(
        found.cost,
        ALLOCATIONS["threshold"](scores),
        space.allowed(found.graph),
        [Target.parse("flops", 0.7)],
    )
    gone = {branch.name for branch in found.graph.vanished(widths)}
    assert gone == {"layer1.1", "layer2.1", "layer3.1"}  # the three that are worth least, and no more
    assert found.cost.of(widths).macs <= 0.7 * full
    assert all(width in (0, found.graph.sizes[name]) for name, width in widths.items())


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_the_solver_empties_whole_branches_meets_targets_and_leaves_no_step(data: st.DataObject) -> None:
    found = blocks()
    cost, graph = found.cost, found.graph
    worth = st.integers(0, 4).map(float)
    scores = {
        name: np.array(data.draw(st.lists(worth, min_size=size, max_size=size)))
        for name, size in graph.sizes.items()
    }
    priorities = ALLOCATIONS[data.draw(st.sampled_from(["local", "global", "threshold"]))](scores)
    bounds = Bounds(min_keep=data.draw(st.sampled_from([0, 0.3, 0.8])), round_to=data.draw(st.integers(1, 2)))
    allowed = SearchSpace(bounds, drop_branches=True).allowed(graph)
    targets = [
        Target.parse("flops", data.draw(st.sampled_from([0.2, 0.35, 0.5, 0.7, 1.0]))),
        Target.parse("memory", data.draw(st.sampled_from([0.6, 1.0]))),
    ]
    counts = [cost.macs, cost.peak_activation_bytes]
    limits = [t.limit(int(count(cost.sizes))) for t, count in zip(targets, counts, strict=True)]

    def fits(widths: dict[str, int]) -> bool:
        at = cost.array(widths)
        return all(int(count(at)) <= limit for count, limit in zip(counts, limits, strict=True))

    try:
        widths = solve(cost, priorities, allowed, targets)
    except InfeasibleError:
        assert not fits({name: int(steps[0]) for name, steps in allowed.items()})
        return
    assert fits(widths)
    assert all(width in allowed[name] for name, width in widths.items())
    gone = graph.vanished(widths)  # raises where only some groups of a branch are empty
    assert {name for name, width in widths.items() if width == 0} == {
        name for branch in gone for name in branch.groups
    }
    steps = [list(branch.groups) for branch in gone]
    steps += [[name] for name, width in widths.items() if width]
    for step in steps:
        more = dict(widths)
        for name in step:
            larger = allowed[name][allowed[name] > widths[name]]
            more[name] = int(larger[0]) if len(larger) else widths[name]
        assert more == widths or not fits(more)


def test_the_knapsack_drops_whole_branches_too() -> None:
    found = blocks()
    allowed = SearchSpace(Bounds(min_keep=0.5), drop_branches=True).allowed(found.graph)
    errors = {"stem": 100.0, "one.conv1": 0.5, "two.conv1": 3.0, "two.conv2": 4.0, "project": 100.0}
    curves = {
        name: errors.get(name, 100.0) * (1 - np.arange(size + 1) / size)
        for name, size in found.graph.sizes.items()
    }
    scores = {name: np.ones(size) for name, size in found.graph.sizes.items()}
    targets = [Target.parse("flops", 0.5)]
    widths = allocate("knapsack", found.cost, scores, lambda: curves, allowed, targets)
    assert [branch.name for branch in found.graph.vanished(widths)] == ["one"]
    assert found.cost.of(widths).macs <= 0.5 * found.cost.reference.macs
    tiny = [Target.parse("flops", absolute_macs(found))]
    widths = allocate("knapsack", found.cost, scores, lambda: curves, allowed, tiny)
    assert len(found.graph.vanished(widths)) == 2


def absolute_macs(found: Traced) -> str:
    """The MACs of the smallest network that keeps half of each group outside of its branches."""
    allowed = SearchSpace(Bounds(min_keep=0.5), drop_branches=True).allowed(found.graph)
    return str(found.cost.of({name: int(widths[0]) for name, widths in allowed.items()}).macs)


# --- the commands -------------------------------------------------------------------------------------


def test_find_drops_branches_and_show_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = "find --model resnet20 --input-shape 3,16,16 --flops 0.3 --budget none --allocation global"
    assert main([*words.split(), "--drop-branches", "--min-keep", "0.6", "--out", str(out)]) == 0
    said = "".join(capsys.readouterr())
    architecture = Architecture.read(out / "architecture.yaml")
    empty = [name for name, group in architecture.widths.items() if group.width == 0]
    assert empty
    gone = ", ".join(name.removesuffix(".conv1") for name in empty)
    assert f"drops {len(empty)} of 9 residual branches: {gone}" in said
    assert main(["show", str(out / "architecture.yaml")]) == 0
    assert f"residual branches that are gone: {gone}" in "".join(capsys.readouterr())


def test_show_says_which_branches_of_a_model_may_vanish(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "--model", "resnet20", "--input-shape", "3,16,16"]) == 0
    shown = "".join(capsys.readouterr())
    assert "Residual branches" in shown and "layer3.2" in shown
    assert main(["show", "--model", "vgg16", "--input-shape", "3,32,32"]) == 0
    assert "Residual branches" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("method", ["thinet", "regression"])
def test_methods_that_fit_weights_do_so_without_the_branches(method: str) -> None:
    found = blocks()
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    batches = [(images, torch.zeros(16, dtype=torch.long))]
    context = Context(found.model, found.graph, batches=lambda: batches)
    selection = without(found, ["two.conv1"], 0.6)
    fitted = inherit_weights(PRUNERS[method](), context, selection)
    plain = found.inherit(selection)
    shapes = {name: tensor.shape for name, tensor in plain.state_dict().items()}
    assert {name: tensor.shape for name, tensor in fitted.state_dict().items()} == shapes
    expected = found.model(images)
    with torch.no_grad():
        assert (fitted(images) - expected).square().sum() < (plain(images) - expected).square().sum()
