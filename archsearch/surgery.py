"""Cut channel units out of a model: the kept slices of every parameter and buffer, and right attributes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from archsearch.graph import ChannelGraph, Selection
from archsearch.tracing import model_tensors


def shrink(model: nn.Module, graph: ChannelGraph, selection: Selection) -> nn.Module:
    """Return a copy of ``model`` with the kept units only, weights inherited.

    Args:
        model: The traced model, or one of the same architecture; not changed.
        graph: Its channel groups.
        selection: For each group the kept units, sorted.
    """
    return _copy(model, kept_slices(model, graph, selection))


def mask(model: nn.Module, graph: ChannelGraph, selection: Selection) -> nn.Module:
    """Return a copy of ``model`` at full size with the parameters of dropped units set to zero."""
    dropped = ~graph.kept_units(selection)
    tensors = {}
    for name, tensor in model_tensors(model).items():
        zeroed = tensor
        for dim in range(tensor.dim()):
            units = graph.units.get((name, dim))
            if units is not None and dropped[units].any() and isinstance(tensor, nn.Parameter):
                zeroed = zeroed.detach().index_fill(dim, _indices(dropped[units], tensor), 0)
        tensors[name] = zeroed
    return _copy(model, tensors)


def kept_slices(model: nn.Module, graph: ChannelGraph, selection: Selection) -> dict[str, torch.Tensor]:
    """Return what each parameter and buffer of ``model`` keeps, a shared one under each of its names."""
    kept = graph.kept_units(selection)
    tensors = {}
    for name, tensor in model_tensors(model).items():
        part = tensor.detach()
        for dim in range(tensor.dim()):
            units = graph.units.get((name, dim))
            if units is not None and not kept[units].all():
                part = part.index_select(dim, _indices(kept[units], tensor))
        tensors[name] = part
    names = {id(tensor): name for name, tensor in model_tensors(model).items()}
    every_name = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {name: tensors[names[id(tensor)]] for name, tensor in chain(*every_name)}


def _indices(wanted: npt.NDArray[np.bool_], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(wanted)).to(like.device)


def _copy(model: nn.Module, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """Copy the modules of a model around other tensors, so that no full tensor is ever copied."""
    replaced: dict[int, object] = {}
    keep_alive = []
    for name, tensor in model_tensors(model).items():
        new = tensors[name].detach()
        if new.data_ptr() == tensor.data_ptr():
            new = new.clone()
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        replaced[id(tensor)] = new
        keep_alive.append(tensor)
    small = copy.deepcopy(model, replaced)
    for module in small.modules():
        fit_attributes(module)
    return small


def fit_attributes(module: nn.Module) -> None:
    """Make ``in_channels``, ``groups``, ``num_features`` and the like agree with a module's tensors."""
    for kind, fit in _FITS:
        if isinstance(module, kind):
            fit(module)
            return


def _fit_convolution(conv: nn.modules.conv._ConvNd) -> None:
    first, second = conv.weight.shape[:2]
    depthwise = conv.groups == conv.in_channels > 1
    if conv.transposed:
        conv.groups = first if depthwise else conv.groups
        conv.in_channels, conv.out_channels = first, second * conv.groups
    else:
        if depthwise:
            conv.groups = first // (conv.out_channels // conv.in_channels)
        conv.in_channels, conv.out_channels = second * conv.groups, first


def _fit_linear(linear: nn.Linear) -> None:
    linear.out_features, linear.in_features = linear.weight.shape


def _fit_batch_norm(norm: nn.modules.batchnorm._NormBase) -> None:
    for tensor in (norm.weight, norm.running_mean):
        if tensor is not None:
            norm.num_features = len(tensor)


def _fit_layer_norm(norm: nn.LayerNorm | nn.RMSNorm) -> None:
    if norm.weight is not None:
        norm.normalized_shape = tuple(norm.weight.shape)


def _fit_group_norm(norm: nn.GroupNorm) -> None:
    if norm.weight is not None:
        norm.num_channels = len(norm.weight)


def _fit_embedding(embedding: nn.Embedding) -> None:
    embedding.num_embeddings, embedding.embedding_dim = embedding.weight.shape


def _fit_prelu(prelu: nn.PReLU) -> None:
    prelu.num_parameters = len(prelu.weight)


_FITS: list[tuple[type[nn.Module] | tuple[type[nn.Module], ...], Callable[..., None]]] = [
    (nn.modules.conv._ConvNd, _fit_convolution),
    (nn.Linear, _fit_linear),
    (nn.modules.batchnorm._NormBase, _fit_batch_norm),
    ((nn.LayerNorm, nn.RMSNorm), _fit_layer_norm),
    (nn.GroupNorm, _fit_group_norm),
    (nn.Embedding, _fit_embedding),
    (nn.PReLU, _fit_prelu),
]
