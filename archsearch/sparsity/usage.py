"""How often a network uses each weight, which layer comes last, and what masks save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from torch import Tensor, nn

from archsearch.cost import Cost
from archsearch.errors import UsageError
from archsearch.sparsity.masks import Masks
from archsearch.tracing import call_model, output_tensors, untouched


def uses(model: nn.Module, example: Any) -> dict[str, int]:
    """Return how many multiply-adds one input spends on each weight, by parameter, in order of execution.

    A weight of a convolution is used once for each place of its output (of its input where it is
    transposed), one of a linear layer for each row, one of a recurrent layer in each step. Padding counts as
    a place, as in every count of MACs here. A layer that runs twice counts twice, one that does not run is
    left out.

    Args:
        model: Is not changed; it runs in eval mode, where auxiliary heads are silent.
        example: As for ``trace_module``.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, int] = {}

    def watch(module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], outputs: Any) -> None:
        first = inputs[0] if inputs else next(iter(named.values()))
        for parameter in _used(module).values():
            name = names[id(parameter)]
            # Taken out and put in again, so that the order is that of the last use.
            found[name] = found.pop(name, 0) + _count(module, first, output_tensors(outputs)[0])

    hooks = [
        module.register_forward_hook(watch, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, _WATCHED)
    ]
    try:
        with untouched(model, training=False):
            call_model(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def output_layer(used: Mapping[str, int]) -> str:
    """Return the weight that comes last in a run: the output layer's.

    Raises:
        UsageError: If nothing ran.
    """
    if not used:
        raise UsageError("the network has no convolution, linear or recurrent layer, so no output layer")
    return list(used)[-1]


def masked_cost(dense: Cost, used: Mapping[str, int], masks: Masks) -> Cost:
    """Return what a network costs if the weights that do not stay are neither stored nor multiplied.

    Activations stay as large as they are: single weights leave every shape alone.
    """
    dropped = {name: mask.numel() - int(mask.sum()) for name, mask in masks.items()}
    macs = sum(used.get(name, 0) * count for name, count in dropped.items())
    return replace(
        dense,
        macs=dense.macs - macs,
        params=dense.params - sum(dropped.values()),
        published_flops=dense.published_flops - 2 * macs,
    )


_WATCHED: Final = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)


def _used(module: nn.Module) -> dict[str, Tensor]:
    """Return the weight matrices that one call of a module uses."""
    own: dict[str, Tensor] = {
        key: value for key, value in module.named_parameters(recurse=False) if value.dim() > 1
    }
    if isinstance(module, nn.MultiheadAttention):
        own = {key: value for key, value in own.items() if key.endswith("proj_weight")}
        own["out_proj.weight"] = module.out_proj.weight  # read as it is, so this layer is never called
    return own


def _count(module: nn.Module, inputs: Tensor, outputs: Tensor) -> int:
    """Return how often a call used each weight of a module, all inputs of a batch together."""
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.transposed:
            return inputs.numel() // module.in_channels
        return outputs.numel() // module.out_channels
    if isinstance(module, nn.Linear):
        return outputs.numel() // module.out_features
    if isinstance(module, nn.MultiheadAttention):
        return outputs.numel() // int(module.embed_dim)
    return inputs.shape[:-1].numel()
