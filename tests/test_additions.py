from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from archsearch.grouping import channel_graph
from archsearch.pruners import Context
from archsearch.pruners.additions import Additions, Part
from archsearch.pruners.reading import Reading, Run, watch
from archsearch.pruners.regression import Regression
from archsearch.surgery import shrink


class Net(nn.Module):
    def __init__(self, end: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.stem, self.inner, self.last = (nn.Conv2d(i, 4, 1) for i in (3, 4, 4))
        self.side = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.batch_norm = nn.BatchNorm2d(4, track_running_stats=False)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4, 3)
        self.proj = nn.Linear(4, 4)
        self.end = end
        nn.init.uniform_(self.norm.running_var, 0.5, 2)  # type: ignore[arg-type]
        nn.init.uniform_(self.norm.weight, 0.5, 2)

    def forward(self, images: torch.Tensor) -> Any:
        x = torch.sigmoid(self.stem(images))
        return self.fc(torch.relu(self.end(self, x, torch.sigmoid(self.inner(x)))).mean((2, 3)))


def in_place(net: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = net.norm(net.last(y))
    out += x
    return out


def shared(net: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = net.last(y)
    return (out + x) * torch.sigmoid(out)


def overwritten(net: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = net.last(y)
    y.mul_(2)
    return out + x


def tokens(net: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    rows = x.flatten(2).transpose(1, 2)
    return (rows + net.proj(y.flatten(2).transpose(1, 2))).transpose(1, 2).unflatten(2, x.shape[2:])


ENDS: dict[str, tuple[Any, list[int]]] = {
    "plain": (lambda net, x, y: x + net.last(y), [2]),
    "after a norm": (lambda net, x, y: net.norm(net.last(y)) + x, [2]),
    "in place": (in_place, [2]),
    "a projection after the branch": (lambda net, x, y: net.norm(net.last(y)) + net.side(x), [3]),
    "a projection before the branch": (lambda net, x, y: net.side(x) + net.norm(net.last(y)), [3]),
    "a linear layer on tokens": (tokens, [2]),
    "weighed": (lambda net, x, y: torch.add(x, net.last(y), alpha=2), []),
    "after an activation": (lambda net, x, y: torch.tanh(net.last(y)) + x, []),
    "after a norm of the batch": (lambda net, x, y: net.batch_norm(net.last(y)) + x, []),
    "doubled": (lambda net, x, y: (lambda out: out + out)(net.last(y)), []),
    "another shape": (lambda net, x, y: net.last(y) + x.mean((2, 3), keepdim=True), []),
    "read by something else": (shared, []),
    "its input overwritten": (overwritten, []),
}


def context_of(end: str) -> Context:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net(ENDS[end][0]).eval()
    images = torch.randn(40, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return Context(model, channel_graph(model, images[:1]), batches=lambda: [(images, torch.empty(0))])


@pytest.mark.parametrize("end", ENDS)
def test_an_addition_is_found_where_the_output_comes_to_it_scaled_at_most(end: str) -> None:
    context = context_of(end)
    met: list[int] = []

    def meet(part: Part, operand: torch.Tensor, other: torch.Tensor) -> None:
        assert operand.shape == other.shape and operand is not other
        met.append(part.reading.number)

    def see(reading: Reading, run: Run) -> torch.Tensor:
        out = run()
        additions.begin(reading, out)
        return out

    additions = Additions(meet)
    (images, _), *_ = context.batches()  # type: ignore[misc]
    watch(context.model, context.graph, images, see, follow=additions.follow)
    assert [number for number in met if number not in additions.shared] == ENDS[end][1]


@pytest.mark.parametrize("end", ENDS)
def test_whatever_the_end_of_the_branch_the_fitted_network_is_nearer_than_the_cut_one(end: str) -> None:
    context = context_of(end)
    kept = {name: torch.arange(max(1, size - 1)).numpy() for name, size in context.graph.sizes.items()}
    (images, _), *_ = context.batches()  # type: ignore[misc]
    with torch.no_grad():
        wanted = context.model(images)
        cut = shrink(context.model, context.graph, kept)(images)
        fitted = Regression(images=40, places=16).inherit(context, kept)(images)
    assert nn.functional.mse_loss(fitted, wanted) < 0.9 * nn.functional.mse_loss(cut, wanted)


def test_the_scale_is_that_of_the_norm() -> None:
    context = context_of("after a norm")
    scales = []

    def see(reading: Reading, run: Run) -> torch.Tensor:
        out = run()
        additions.begin(reading, out)
        return out

    additions = Additions(lambda part, operand, other: scales.append(part.scale))
    (images, _), *_ = context.batches()  # type: ignore[misc]
    watch(context.model, context.graph, images, see, follow=additions.follow)
    norm: Any = context.model.norm
    with torch.no_grad():
        probe = torch.zeros(1, 4, 1, 1)
        assert scales[0] == pytest.approx((norm(probe + 1) - norm(probe)).flatten().numpy(), rel=1e-5)
