from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import Recurrent, Sorted
from torch import Tensor, nn

from archsearch import rules
from archsearch.grouping import channel_graph
from archsearch.rules import Call, op_name, rule
from archsearch.verification import random_selection, verify


@torch.library.custom_op("archsearch_tests::gated_add", mutates_args=())
def gated_add(a: Tensor, b: Tensor) -> Tensor:
    return a + torch.sigmoid(b)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(3, 7)
        self.a = nn.Linear(7, 6)
        self.b = nn.Linear(7, 6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.before(x)
        return self.fc(gated_add(self.a(x), self.b(x)))


@pytest.fixture
def own_rules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a test register rules that nobody else sees."""
    monkeypatch.setattr(rules, "RULES", dict(rules.RULES))
    yield


def test_an_unknown_op_freezes_what_it_touches_and_is_named() -> None:
    graph = channel_graph(Gated(), torch.randn(1, 3))
    assert graph.sizes == {"before": 7}
    assert graph.unknown_ops == {"archsearch_tests::gated_add": "there is no rule for it"}
    reasons = {layer.layer: layer.reason for layer in graph.frozen}
    assert reasons["a"] == reasons["b"] == "archsearch_tests::gated_add: there is no rule for it"


@pytest.mark.usefixtures("own_rules")
def test_three_lines_teach_an_op() -> None:
    @rule("archsearch_tests::gated_add")
    def gated(call: Call) -> None:
        call.pointwise()

    model, example = Gated(), torch.randn(1, 3)
    graph = channel_graph(model, example)
    assert graph.sizes == {"before": 7, "a": 6}
    assert not graph.unknown_ops
    assert verify(model, graph, random_selection(graph, 0), example).ok


@pytest.mark.usefixtures("own_rules")
def test_a_rule_that_raises_freezes_and_says_what_it_raised() -> None:
    @rule("archsearch_tests::gated_add")
    def broken(call: Call) -> None:
        raise ZeroDivisionError("no luck")

    graph = channel_graph(Gated(), torch.randn(1, 3))
    assert graph.sizes == {"before": 7}
    assert graph.unknown_ops["archsearch_tests::gated_add"] == "its rule failed: ZeroDivisionError: no luck"


def test_sorting_channels_freezes_the_layer_before_and_nothing_else() -> None:
    graph = channel_graph(Sorted().eval(), torch.randn(1, 3, 4, 4))
    assert graph.sizes == {"conv1": 6, "conv3": 4}
    assert list(graph.unknown_ops) == ["aten::sort"]


def test_a_recurrent_layer_freezes_its_input_and_the_layers_after_it_still_shrink() -> None:
    graph = channel_graph(Recurrent().eval(), torch.randn(2, 4, 3))
    assert graph.sizes == {"hidden": 7}
    assert any("rnn" in layer.reason for layer in graph.frozen)


def test_an_in_place_op_follows_the_rule_of_its_twin() -> None:
    assert op_name(torch.ops.aten.add_.Tensor) == "aten::add"
    assert op_name(torch.ops.aten.relu_.default) == "aten::relu"
    assert op_name(torch.ops.aten.__and__.Tensor) == "aten::__and__"


class Hidden(nn.Module):
    """One hidden layer, seven channels wide, with an op between."""

    def __init__(self, op: object) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(3, 6, 1)
        self.op = op
        self.out: nn.Module = nn.LazyConv2d(2, 1)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.op(self.hidden(x)))  # type: ignore[operator]


FREES = {
    "leaves the channels free": {
        "relu in place": lambda x: x.relu_(),
        "clamped": lambda x: x.clamp(-1, 1),
        "scaled": lambda x: 2 * x - 1,
        "squared": lambda x: x**2,
        "compared": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
        "stacked and summed": lambda x: torch.stack([x, 2 * x]).sum(0),
        "repeated": lambda x: x.repeat(1, 2, 1, 1),
        "repeated in space": lambda x: x.repeat(1, 1, 2, 1),
        "expanded": lambda x: x[:, None].expand(-1, 3, -1, -1, -1).mean(1),
        "turned": lambda x: x.permute(0, 2, 3, 1).transpose(1, 3).movedim(3, 2),
        "rolled in space": lambda x: x.roll((1, 1), (2, 3)),
        "flipped in space": lambda x: x.flip(3),
        "padded in space": lambda x: torch.nn.functional.pad(x, (1, 1)),
        "reflected in space": lambda x: torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect"),
        "unfolded": lambda x: torch.nn.functional.unfold(x, 3)[..., None],
        "cropped in space": lambda x: x[:, :, 1:3],
        "interpolated": lambda x: torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear"),
        "pooled": lambda x: torch.nn.functional.avg_pool2d(x, 2),
        "softmaxed": lambda x: x.softmax(1),
        "concatenated with itself": lambda x: torch.cat([x, x], 1),
        "cut in thirds": lambda x: sum(x.chunk(3, 1)),
        "gated linear unit": lambda x: torch.nn.functional.glu(x, 1),
        "centred over channels": lambda x: x - x.mean(1, keepdim=True),
        "pixel unshuffled": lambda x: torch.nn.functional.pixel_unshuffle(x, 2),
        "instance normalised": lambda x: torch.nn.functional.instance_norm(x),
        "normalised": lambda x: torch.nn.functional.normalize(x, dim=1),
        "multiplied out": lambda x: torch.einsum("nchw,nchv->ncwv", x, x),
        "attended to itself": lambda x: (x.flatten(2).transpose(1, 2).softmax(-1) @ x.flatten(2))[:, None][
            :, [0] * 2
        ],
    },
    "keeps the channels": {
        "rolled over channels": lambda x: x.roll(1, 1),
        "flipped over channels": lambda x: x.flip(1),
        "cumulated over channels": lambda x: x.cumsum(1),
        "indexed": lambda x: x[:, [0, 2]],
        "one channel": lambda x: x[:, :1] + x[:, 3:4] * x.select(1, 2)[:, None],
        "with a tensor of fixed size": lambda x: x * torch.arange(6.0)[:, None, None],
        "the strongest": lambda x: x.max(1, keepdim=True).values + x.argmax(1, keepdim=True),
        "read in Python": lambda x: x * float(x[0, 0, 0, 0]),
    },
}


def cases(kind: str) -> list[object]:
    return [pytest.param(op, id=name) for name, op in FREES[kind].items()]


@pytest.mark.parametrize("op", cases("leaves the channels free"))
def test_ops_that_leave_the_channels_free_shrink_rightly(op: object) -> None:
    torch.manual_seed(0)
    example = torch.randn(1, 3, 4, 4)
    model = Hidden(op)
    with torch.no_grad():
        model(example)  # the lazy layer takes its size
    graph = channel_graph(model, example)
    assert not graph.unknown_ops
    assert "hidden" in graph.groups
    for seed in range(3):
        for keep in (0.5, 0.7):
            result = verify(model, graph, random_selection(graph, seed, keep), example, seed=seed)
            assert result.ok, result.problem


@pytest.mark.parametrize("op", cases("keeps the channels"))
def test_ops_that_need_every_channel_keep_it(op: object) -> None:
    example = torch.randn(1, 3, 4, 4)
    model = Hidden(op)
    with torch.no_grad():
        model(example)
    assert "hidden" not in channel_graph(model, example).groups
