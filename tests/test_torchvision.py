"""Every classifier of torchvision, and some unusual families of timm."""

from __future__ import annotations

import copy
import fnmatch
import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from archsearch.cost import CostModel
from archsearch.graph import ChannelGraph
from archsearch.grouping import channel_graph
from archsearch.surgery import shrink
from archsearch.verification import TOLERANCE, random_selection, rehearse, verify

GIANTS = ("*_h_14", "vit_l_*", "regnet_y_128gf")
"""They differ from their smaller brothers in size alone."""

QUICK = ("resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "squeezenet1_1", "regnet_y_400mf")

IMAGE_SIZES = {"vit_*": 224, "maxvit_*": 224, "swin_*": 224, "swin_v2_*": 256, "inception_v3": 299}
"""Where it is fixed, or the auxiliary classifier needs it; 64 elsewhere."""

NAMES = [
    name
    for name in models.list_models(module=models)
    if not any(fnmatch.fnmatchcase(name, giant) for giant in GIANTS)
]


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    yield
    gc.collect()


def built(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    fresh = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    size = next((size for pattern, size in IMAGE_SIZES.items() if fnmatch.fnmatchcase(name, pattern)), 64)
    return models.get_model(name, weights=None, **fresh), torch.randn(1, 3, size, size)


def torch_macs(model: nn.Module, example: torch.Tensor) -> int:
    """Return what torch's own counter counts on the meta device: two operations are one multiply-add."""
    on_meta = copy.deepcopy(model).to("meta").eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            on_meta(example.to("meta"))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops()) // 2


def assert_shrinks_rightly(model: nn.Module, graph: ChannelGraph, example: torch.Tensor) -> None:
    cost = CostModel(model, graph)
    for seed, keep in enumerate((0.7, 0.5)):
        selection = random_selection(graph, seed, keep)
        result = verify(model, graph, selection, example, seed=seed)
        assert result.ok and result.error < TOLERANCE, result.problem
        counted = cost.of({name: len(units) for name, units in selection.items()})
        small = shrink(model, graph, selection)
        assert counted.macs == torch_macs(small, example)
        assert counted.params == sum(parameter.numel() for parameter in small.parameters())


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_a_classifier_of_torchvision_shrinks_rightly(name: str) -> None:
    model, example = built(name)
    graph = rehearse(model, channel_graph(model, example), example)
    assert graph.groups
    assert not graph.unknown_ops
    outputs = [layer for layer in graph.frozen if layer.reason == "an output of the network"]
    assert 1000 in [layer.channels for layer in outputs]
    assert all(layer.channels == layer.of == 1000 for layer in outputs)
    assert_shrinks_rightly(model, graph, example)


UNUSUAL = {
    "convmixer_768_32": 64,
    "cspdarknet53": 64,
    "dla34": 64,
    "ghostnet_100": 64,
    "hardcorenas_a": 64,
    "mixer_s32_224": 224,
    "mixnet_s": 64,
    "nf_regnet_b0": 64,
    "repvgg_a0": 64,
    "res2net50_14w_8s": 64,
    "resnest14d": 64,
    "skresnet18": 64,
    "xcit_nano_12_p16_224": 224,
}
"""Families of timm with structures of their own, and an image size for each."""


@pytest.mark.slow
@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_network_of_timm_shrinks_rightly(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False)
    example = torch.randn(1, 3, UNUSUAL[name], UNUSUAL[name])
    graph = rehearse(model, channel_graph(model, example), example)
    assert graph.groups
    assert_shrinks_rightly(model, graph, example)
