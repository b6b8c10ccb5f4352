"""Run a model's factory so that its layers come out with other widths.

The layers of torch.nn that hold weights are made in a fixed order. Recording that order while the reference
is built, and giving each layer its new channel counts when the factory runs again, makes a small network
whose own initialisation sees the small shapes, whichever way it is written: ``torch.nn.init`` calls,
``reset_parameters``, or a formula in the model's code.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

from archsearch.conv_groups import ConvolutionSizes

Shapes: TypeAlias = Mapping[str, "tuple[int, ...]"]
"""The wanted shape of each parameter and buffer by name."""

Build: TypeAlias = Callable[[], nn.Module]


def build_recorded(build: Build) -> tuple[nn.Module, list[str | None]]:
    """Build a model and return it with the name of each weight layer, in the order of construction.

    A layer that is made and thrown away has no name.
    """
    made: list[nn.Module] = []
    with _constructors(lambda layer, arguments: made.append(layer)):
        model = build()
    names = {id(module): name for name, module in model.named_modules()}
    return model, [names.get(id(layer)) for layer in made]


def build_resized(
    build: Build, order: list[str | None], shapes: Shapes, *, whole_groups: bool = False
) -> tuple[nn.Module, tuple[str, ...]]:
    """Build a model whose weight layers have other channel counts.

    Args:
        build: The factory, the same as recorded.
        order: The names that ``build_recorded`` returned.
        shapes: The wanted shapes.
        whole_groups: Whether whole groups of convolutions are gone, and not channels of each.

    Returns:
        The model, and the parameters that its factory could not make small: they hold a slice of what the
        factory made at full size.
    """
    remaining = iter(order)
    convolution = functools.partial(_convolution, whole_groups=whole_groups)
    kinds: dict[type[nn.Module], _Sizes] = {**_SIZES, nn.modules.conv._ConvNd: convolution}

    def resize(layer: nn.Module, arguments: dict[str, Any]) -> None:
        name = next(remaining, None)
        if name is not None:
            for kind, sizes in kinds.items():
                if isinstance(layer, kind):
                    arguments.update(sizes(arguments, functools.partial(_shape, shapes, name)))

    with _constructors(resize):
        model = build()
    sliced = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            with torch.no_grad():
                tensor.data = tensor[tuple(slice(size) for size in shapes[name])].clone()
            sliced.append(name)
    return model, tuple(sliced)


def _shape(shapes: Shapes, layer: str, *tensors: str) -> tuple[int, ...] | None:
    """Return the wanted shape of the first of a layer's tensors that there is, also if parametrised."""
    for tensor in tensors:
        for name in (tensor, f"parametrizations.{tensor}.original", f"parametrizations.{tensor}.original1"):
            shape = shapes.get(f"{layer}.{name}" if layer else name)
            if shape is not None:
                return shape
    return None


_Sizes: TypeAlias = Callable[[dict[str, Any], Callable[..., "tuple[int, ...] | None"]], dict[str, Any]]


def _convolution(
    arguments: dict[str, Any],
    shape: Callable[..., tuple[int, ...] | None],
    *,
    whole_groups: bool = False,
) -> dict[str, Any]:
    weight = shape("weight", "weight_v")
    if weight is None:
        return {}
    sizes = ConvolutionSizes(*(arguments[name] for name in ConvolutionSizes._fields))
    transposed = arguments["transposed"]
    return sizes.fitted(weight, transposed=transposed, whole_groups=whole_groups)._asdict()


def _linear(arguments: dict[str, Any], shape: Callable[..., tuple[int, ...] | None]) -> dict[str, Any]:
    weight = shape("weight", "weight_v")
    return {} if weight is None else {"out_features": weight[0], "in_features": weight[1]}


def _one(argument: str, *tensors: str) -> _Sizes:
    def sizes(arguments: dict[str, Any], shape: Callable[..., tuple[int, ...] | None]) -> dict[str, Any]:
        found = shape(*tensors)
        return {} if found is None else {argument: found[0]}

    return sizes


def _layer_norm(arguments: dict[str, Any], shape: Callable[..., tuple[int, ...] | None]) -> dict[str, Any]:
    weight = shape("weight")
    return {} if weight is None else {"normalized_shape": weight}


def _embedding(arguments: dict[str, Any], shape: Callable[..., tuple[int, ...] | None]) -> dict[str, Any]:
    weight = shape("weight")
    return {} if weight is None else {"num_embeddings": weight[0], "embedding_dim": weight[1]}


_SIZES: dict[type[nn.Module], _Sizes] = {
    nn.modules.conv._ConvNd: _convolution,
    nn.Linear: _linear,
    nn.modules.batchnorm._NormBase: _one("num_features", "weight", "running_mean"),
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _layer_norm,
    nn.GroupNorm: _one("num_channels", "weight"),
    nn.Embedding: _embedding,
    nn.PReLU: _one("num_parameters", "weight"),
}


@contextmanager
def _constructors(watch: Callable[[nn.Module, dict[str, Any]], None]) -> Iterator[None]:
    """Let ``watch`` see, and change, the constructor's arguments of each weight layer before it is made."""
    originals = {kind: kind.__init__ for kind in _SIZES}
    try:
        for kind, original in originals.items():
            kind.__init__ = _watched(original, watch)  # type: ignore[method-assign]
        yield
    finally:
        for kind, original in originals.items():
            kind.__init__ = original  # type: ignore[method-assign]


def _watched(original: Callable[..., None], watch: Callable[[nn.Module, dict[str, Any]], None]) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def construct(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        named = arguments.pop("kwargs", {})
        arguments.pop("self")
        watch(self, arguments)
        original(self, **arguments, **named)

    return construct
