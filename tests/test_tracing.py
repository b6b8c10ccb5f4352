from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, Auxiliary, Chain, Network, TwoInputs
from torch import Tensor, nn

from archsearch.cost import CostModel
from archsearch.errors import ArchsearchError
from archsearch.grouping import channel_graph
from archsearch.surgery import shrink
from archsearch.tracing import output_tensors, trace_model
from archsearch.verification import random_selection, rehearse, verify

networks = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What must not change: tensors, identities, modes, gradients, hooks, attributes."""
    return {
        "values": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "identities": {name: id(tensor) for name, tensor in model.named_parameters()},
        "buffers": {name: id(tensor) for name, tensor in model.named_buffers()},
        "modes": [module.training for module in model.modules()],
        "needs": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [id(parameter.grad) for parameter in model.parameters()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "shown": str(model),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    values = before.pop("values"), after.pop("values")
    assert before == after
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0] | values[1])


@networks
@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_a_model_is_left_exactly_as_it_was(network: Network, mode: str) -> None:
    model, example = network.build(), network.example()
    model.train(mode != "eval")
    if mode == "mixed":
        for module in list(model.modules())[::2]:
            module.training = False
        next(model.parameters()).requires_grad = False
        model.register_forward_hook(lambda module, inputs, output: None)
    if next(model.parameters()).requires_grad:
        next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before, unseen = snapshot(model), example.clone()
    random_state = torch.get_rng_state()
    graph = rehearse(model, channel_graph(model, example), example)
    verify(model, graph, random_selection(graph, 0), example)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.equal(example, unseen)
    assert_same(before, snapshot(model))


class Noisy(nn.Module):
    """Draws random numbers and counts its calls in a buffer, in every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(3, 6)
        self.fc = nn.Linear(6, 2)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.fc(F.dropout(torch.relu(self.hidden(x)), 0.5, training=True))


def test_buffers_that_every_call_changes_and_the_random_state_come_back() -> None:
    model = Noisy()
    state = torch.get_rng_state()
    graph = channel_graph(model, torch.randn(1, 3, generator=torch.Generator()))
    assert graph.sizes == {"hidden": 6}
    assert int(model.calls) == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_the_statistics_of_batch_norm_come_back_after_the_run_in_train_mode() -> None:
    model: Any = Auxiliary()
    before = copy.deepcopy(model.norm.running_mean)
    graph = channel_graph(model, torch.randn(1, 3, 4, 4))
    assert "aux1" in graph.groups  # so the run in train mode took place
    assert torch.equal(model.norm.running_mean, before)
    assert int(model.norm.num_batches_tracked) == 0


def test_a_model_that_fails_comes_back_too() -> None:
    model = Chain().train()
    before = snapshot(model)
    with pytest.raises(ArchsearchError):
        trace_model(model, torch.randn(1, 4, 8, 8))
    assert_same(before, snapshot(model))


def test_a_wrong_example_is_one_clear_error() -> None:
    with pytest.raises(
        ArchsearchError, match=r"fails on an example input of shape \[\(1, 4, 8, 8\)\]: RuntimeError"
    ):
        trace_model(Chain(), torch.randn(1, 4, 8, 8))


class Silent(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return None


def test_a_model_that_returns_nothing_is_one_clear_error() -> None:
    with pytest.raises(ArchsearchError, match="returns no tensor"):
        trace_model(Silent(), torch.randn(1, 3))


IMAGE, DEPTH = torch.ones(1, 3, 4, 4), torch.ones(1, 1, 4, 4)


@pytest.mark.parametrize(
    "example",
    [(IMAGE, DEPTH), [IMAGE, DEPTH], (IMAGE, DEPTH, 2.0), {"depth": DEPTH, "image": IMAGE}],
    ids=["tuple", "list", "with a number", "by name"],
)
def test_inputs_come_in_a_row_or_by_name(example: Any) -> None:
    model = TwoInputs()
    graph = channel_graph(model, example)
    assert graph.sizes == {"left": 6}
    assert verify(model, graph, random_selection(graph, 0, 0.5), example).ok


def test_tensors_are_found_in_nested_outputs_and_plain_objects() -> None:
    class Result:
        def __init__(self) -> None:
            self.logits, self.note = torch.ones(1), "note"

    a, b = torch.zeros(2), torch.zeros(3)
    found = output_tensors({"a": a, "rest": (b, None, 3, [Result()])})
    assert [tensor.shape for tensor in found] == [(2,), (3,), (1,)]


def test_every_op_knows_the_line_of_model_code_behind_it() -> None:
    trace = trace_model(Chain(), torch.randn(1, 3, 8, 8))
    convolutions = [op for op in trace.ops if op.name == "aten::convolution"]
    assert len(convolutions) == 2
    for op, code in zip(convolutions, ["self.conv1(x)", "self.conv2(x)"], strict=True):
        assert op.site.line is not None and op.site.line[0] == __file__.replace("test_tracing", "networks")
        assert code in Path(op.site.line[0]).read_text().splitlines()[op.site.line[1] - 1]


def test_only_the_run_in_eval_mode_counts() -> None:
    trace = trace_model(Auxiliary(), torch.randn(1, 3, 8, 8))
    assert len(trace.tally.macs) == 2


class OnlyAlone(nn.Module):
    """Takes one input at a time, and has a layer for train mode that fails on two."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.fc, self.aux = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.hidden(x))
        if self.training:
            assert len(x) == 1
            return self.aux(x)
        return self.fc(x)


def test_parts_that_training_uses_are_found_also_where_a_batch_of_two_fails() -> None:
    model, example = OnlyAlone(), torch.randn(1, 3)
    graph = channel_graph(model, example)
    small: Any = shrink(model, graph, {"hidden": np.array([0, 4])}).train()
    assert small.aux.in_features == 2
    assert small(example).shape == (1, 2)


def test_a_model_in_double_precision_is_traced() -> None:
    assert channel_graph(Chain().double(), torch.randn(1, 3, 8, 8).double()).sizes == {
        "conv1": 8,
        "conv2": 12,
    }


def test_a_model_on_the_meta_device_is_traced() -> None:
    with torch.device("meta"):
        model, example = Chain(), torch.randn(1, 3, 8, 8)
    assert channel_graph(model, example).sizes == {"conv1": 8, "conv2": 12}


def test_inference_tensors_and_no_grad_do_not_matter() -> None:
    with torch.no_grad():
        assert channel_graph(Chain(), torch.randn(2, 3, 8, 8)).sizes == {"conv1": 8, "conv2": 12}
    assert torch.is_grad_enabled()


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        for number in range(30):
            x = x * torch.tensor(float(number)) + torch.tensor(1.0)
        return x


def test_a_constant_in_the_place_of_a_freed_tensor_does_not_lengthen_its_life() -> None:
    """Torch gives memory, and addresses, out again; at most two tensors of 64 floats live at once here."""
    model, example = Counting(), torch.randn(1, 1, 8, 8)
    cost = CostModel(model, channel_graph(model, example)).reference
    assert cost.peak_activation_bytes == 2 * 64 * 4
