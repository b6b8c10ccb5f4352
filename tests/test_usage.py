from __future__ import annotations

from typing import Any

import pytest
import torch
from find_case import MACS
from tiny_net import TinyNet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from archsearch.cost import Cost
from archsearch.errors import UsageError
from archsearch.models import resolve
from archsearch.rebuild import trace_source
from archsearch.sparsity.masks import Masks, magnitude
from archsearch.sparsity.usage import masked_cost, output_layer, uses

PER_WEIGHT = {"conv1.weight": 36, "conv2.weight": 9, "fc.weight": 1}


def test_a_weight_is_used_once_for_each_place_of_its_output() -> None:
    model = TinyNet(3, 2)
    used = uses(model, torch.zeros(1, 2, 6, 6))
    assert used == PER_WEIGHT
    assert sum(count * model.get_parameter(name).numel() for name, count in used.items()) == MACS
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Conv2d(4, 8, 3, stride=2, groups=2), (1, 4, 9, 9)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (1, 4, 5, 5)),
        (nn.Conv1d(4, 8, 3, dilation=2), (1, 4, 9)),
        (nn.Linear(6, 5), (1, 7, 6)),
    ],
)
def test_it_adds_up_to_what_torchs_counter_counts(model: nn.Module, shape: tuple[int, ...]) -> None:
    example = torch.zeros(shape)
    counter = FlopCounterMode(display=False)
    with counter:
        model(example)
    assert uses(model, example)["weight"] * model.weight.numel() == counter.get_total_flops() // 2


def test_recurrent_weights_are_used_in_every_step() -> None:
    lstm = nn.LSTM(8, 16, num_layers=2, bidirectional=True, batch_first=True)
    assert set(uses(lstm, torch.zeros(1, 5, 8)).values()) == {5}
    assert len(uses(lstm, torch.zeros(1, 5, 8))) == 8
    assert set(uses(nn.GRUCell(8, 16), torch.zeros(1, 8)).values()) == {1}


def test_attention_projections_are_used_for_every_token() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    used = uses(layer, torch.zeros(1, 5, 8))
    assert used == dict.fromkeys(
        ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"), 5
    )


class Odd(nn.Module):
    """A layer that runs twice, one that never runs, and an output layer that was made first."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.silent, self.body = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(self.body(x)))


def test_a_layer_that_runs_twice_counts_twice_and_a_silent_one_not() -> None:
    used = uses(Odd(), torch.zeros(1, 4))
    assert used == {"body.weight": 2, "head.weight": 1}
    assert output_layer(used) == "head.weight"
    with pytest.raises(UsageError, match="no output layer"):
        output_layer({})


def test_masks_save_the_places_of_what_they_drop() -> None:
    dense = Cost(macs=MACS, params=10_000, peak_activation_bytes=77, published_flops=30_000)
    masks = Masks(
        {
            "conv1.weight": torch.arange(144).view(8, 2, 3, 3) >= 100,  # 100 dropped
            "fc.weight": torch.arange(48).view(3, 16) >= 10,  # 10 dropped
        }
    )
    assert masked_cost(dense, PER_WEIGHT, masks) == Cost(
        MACS - 3600 - 10, 10_000 - 110, 77, 30_000 - 2 * 3610
    )


def test_of_resnet20_it_is_what_the_kept_weights_of_each_layer_multiply() -> None:
    traced = trace_source(resolve("resnet20"), {}, (3, 32, 32))
    masks = magnitude(traced.model, 0.2)
    cost = masked_cost(traced.cost.reference, uses(traced.model, traced.example), masks)
    # Three stages of 16, 32 and 64 channels on 32, 16 and 8 pixels; the classifier runs once.
    places = {"conv1": 1024, "layer1": 1024, "layer2": 256, "layer3": 64, "fc": 1, "linear": 1}
    assert cost.macs == sum(places[name.split(".")[0]] * int(mask.sum()) for name, mask in masks.items())
    assert cost.params == traced.cost.reference.params - masks.total + masks.kept
