"""Cut channel units out of a model: the kept slices of every parameter and buffer, and right attributes.

Where all groups of a residual branch have width 0, its modules go too, and zeros take their place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from archsearch.conv_groups import ConvolutionSizes
from archsearch.graph import Branch, ChannelGraph, Selection
from archsearch.labels import Atoms
from archsearch.tracing import model_tensors
from archsearch.vanished import Resize, Vanished, fixed


def shrink(model: nn.Module, graph: ChannelGraph, selection: Selection) -> nn.Module:
    """Return a copy of ``model`` with the kept units only, weights inherited.

    Args:
        model: The traced model, or one of the same architecture; not changed.
        graph: Its channel groups.
        selection: For each group the kept units, sorted.
    """
    small = _copy(model, kept_slices(model, graph, selection), vanished(graph, selection))
    vanish(small, graph, selection)
    for module in small.modules():
        fit_attributes(module, whole_groups=graph.whole_groups)
    return small


def mask(model: nn.Module, graph: ChannelGraph, selection: Selection) -> nn.Module:
    """Return a copy of ``model`` at full size with the parameters of dropped units set to zero.

    Of a vanished branch they are all parameters, also those of its last norm.
    """
    dropped = ~graph.kept_units(selection)
    gone = gone_tensors(vanished(graph, selection))
    tensors = {}
    for name, tensor in model_tensors(model).items():
        zeroed = tensor
        if name in gone and isinstance(tensor, nn.Parameter):
            tensors[name] = torch.zeros_like(tensor)
            continue
        for dim in range(tensor.dim()):
            units = graph.units.get((name, dim))
            if units is not None and dropped[units].any() and isinstance(tensor, nn.Parameter):
                zeroed = zeroed.detach().index_fill(dim, _indices(dropped[units], tensor), 0)
        tensors[name] = zeroed
    return _copy(model, tensors)


def kept_slices(model: nn.Module, graph: ChannelGraph, selection: Selection) -> dict[str, torch.Tensor]:
    """Return what each parameter and buffer of ``model`` keeps, a shared one under each of its names.

    Those of vanished branches are left out.
    """
    kept = graph.kept_units(selection)
    gone = gone_tensors(vanished(graph, selection))
    tensors = {}
    for name, tensor in model_tensors(model).items():
        if name in gone:
            continue
        part = tensor.detach()
        for dim in range(tensor.dim()):
            units = graph.units.get((name, dim))
            if units is not None and not kept[units].all():
                part = part.index_select(dim, _indices(kept[units], tensor))
        tensors[name] = part
    names = {id(tensor): name for name, tensor in model_tensors(model).items()}
    every_name = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    canonical = {name: names[id(tensor)] for name, tensor in chain(*every_name)}
    return {name: tensors[first] for name, first in canonical.items() if first in tensors}


def vanished(graph: ChannelGraph, selection: Selection) -> tuple[Branch, ...]:
    """Return the branches of which a selection keeps nothing.

    Raises:
        UsageError: If a group is empty that may not be.
    """
    return graph.vanished({name: len(kept) for name, kept in selection.items()})


def gone_tensors(branches: Iterable[Branch]) -> frozenset[str]:
    """Return the parameters and buffers that go with some branches."""
    return frozenset().union(*(branch.tensors for branch in branches))


def vanish(model: nn.Module, graph: ChannelGraph, selection: Selection) -> None:
    """Put zeros in the place of the modules of vanished branches, in place.

    A parameter of a module that stays (a layer scale, say) becomes a buffer of zeros, in no state dict.
    """
    branches = vanished(graph, selection)
    if not branches:
        return
    kept = graph.placeholder_units(selection)
    stand_ins = {}
    for gone in chain.from_iterable(branch.modules for branch in branches):
        module = model.get_submodule(gone.name)
        sizes = [_resize(size, graph, kept) for size in gone.sizes]
        stand_ins[id(module)] = Vanished(sizes, next(module.parameters()).detach())
    loose = {}
    for name in chain.from_iterable(branch.loose for branch in branches):
        parameter = model.get_parameter(name)
        shape = [_placeholder_size(graph, kept, name, dim, n) for dim, n in enumerate(parameter.shape)]
        loose[id(parameter)] = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if id(child) in stand_ins:  # under whichever names
                module._modules[name] = stand_ins[id(child)]
    for module in model.modules():
        for name, held in list(module._parameters.items()):
            if id(held) in loose:
                del module._parameters[name]
                module.register_buffer(name, loose[id(held)], persistent=False)


def _resize(size: Resize | Atoms, graph: ChannelGraph, kept: npt.NDArray[np.bool_]) -> Resize:
    if isinstance(size, Resize):
        return size
    return fixed(int(kept[graph.unit_of_atom[size]].sum()))


def _placeholder_size(
    graph: ChannelGraph, kept: npt.NDArray[np.bool_], name: str, dim: int, size: int
) -> int:
    units = graph.units.get((name, dim))
    return size if units is None else int(kept[units].sum())


def _indices(wanted: npt.NDArray[np.bool_], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(wanted)).to(like.device)


def _copy(model: nn.Module, tensors: dict[str, torch.Tensor], gone: Iterable[Branch] = ()) -> nn.Module:
    """Copy the modules of a model around other tensors, so that no full tensor is ever copied.

    What goes with some branches is not copied: it is still the model's own, and to be replaced.
    """
    replaced: dict[int, object] = {}
    keep_alive: list[object] = []
    for left in chain.from_iterable(branch.modules for branch in gone):
        replaced[id(model.get_submodule(left.name))] = model.get_submodule(left.name)
    for name, tensor in model_tensors(model).items():
        if name not in tensors:
            replaced[id(tensor)] = tensor
            continue
        new = tensors[name].detach()
        if new.data_ptr() == tensor.data_ptr():
            new = new.clone()
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        replaced[id(tensor)] = new
        keep_alive.append(tensor)
    return copy.deepcopy(model, replaced)


def fit_attributes(module: nn.Module, *, whole_groups: bool = False) -> None:
    """Make ``in_channels``, ``groups``, ``num_features`` and the like agree with a module's tensors.

    Args:
        module: Changed in place.
        whole_groups: Whether whole groups of convolutions went.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        _fit_convolution(module, whole_groups)
        return
    for kind, fit in _FITS:
        if isinstance(module, kind):
            fit(module)
            return


def _fit_convolution(conv: nn.modules.conv._ConvNd, whole_groups: bool) -> None:
    sizes = ConvolutionSizes(conv.in_channels, conv.out_channels, conv.groups)
    conv.in_channels, conv.out_channels, conv.groups = sizes.fitted(
        conv.weight.shape, transposed=conv.transposed, whole_groups=whole_groups
    )


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
    (nn.Linear, _fit_linear),
    (nn.modules.batchnorm._NormBase, _fit_batch_norm),
    ((nn.LayerNorm, nn.RMSNorm), _fit_layer_norm),
    (nn.GroupNorm, _fit_group_norm),
    (nn.Embedding, _fit_embedding),
    (nn.PReLU, _fit_prelu),
]
