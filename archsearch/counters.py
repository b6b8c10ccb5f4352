"""Independent MAC counters, shown beside ours: what other tools would say of the same network."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from archsearch.tracing import call_model, untouched


def flop_counter_macs(model: nn.Module, example: Any) -> int:
    """Count with ``torch.utils.flop_counter`` on meta tensors, where it is exact: half of its FLOPs."""
    twin = copy.deepcopy(model).to("meta")
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    inputs = pytree.tree_map(
        lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, example
    )
    counter = FlopCounterMode(display=False)
    with untouched(twin, training=False), sdpa_kernel(SDPBackend.MATH), counter:
        call_model(twin, inputs)
    return int(counter.get_total_flops()) // 2


def thop_macs(model: nn.Module, example: torch.Tensor) -> int:
    """Count with thop, on a copy, since it leaves buffers behind.

    It counts batch norms and poolings as well, and misses functional calls and subclasses of layers.
    """
    import thop

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        macs, _ = thop.profile(copy.deepcopy(model), inputs=(example,), verbose=False)
    return int(macs)
