"""From a name and widths to a fresh network, and the architecture file in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from archsearch.architecture import Amount, Architecture
from archsearch.architecture import Cost as FileCost
from archsearch.construction import build_recorded, build_resized
from archsearch.cost import CostModel
from archsearch.errors import ArchsearchError, SpecError, UsageError
from archsearch.graph import ChannelGraph, Selection
from archsearch.models import ModelSource, resolve
from archsearch.surgery import kept_slices, shrink
from archsearch.tensor_files import check_tensors, read_weights
from archsearch.tracing import output_tensors
from archsearch.verification import Verification, prunable_graph, verify


@dataclass(frozen=True)
class Traced:
    """A reference network with what its trace tells.

    Attributes:
        name: What goes into the architecture file as its model.
        arguments: Keyword arguments of its factory.
        model: The network, with whatever weights it has.
        example: The input of the trace.
        graph: Its channel groups, rehearsed.
        cost: Its costs as functions of the widths.
        build: Makes a fresh one; ``None`` if the network was given as it is.
        order: The weight layers in the order in which ``build`` makes them.
    """

    name: str
    arguments: Mapping[str, Any]
    model: nn.Module
    example: Any
    graph: ChannelGraph
    cost: CostModel
    build: Callable[[], nn.Module] | None = None
    order: Sequence[str | None] = ()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input without the batch."""
        return tuple(output_tensors(self.example)[0].shape[1:])

    def inherit(self, selection: Selection) -> nn.Module:
        """Return the small network with the kept slices of this network's weights."""
        return shrink(self.model, self.graph, selection)

    def fresh(self, widths: Mapping[str, int]) -> tuple[nn.Module, tuple[str, ...]]:
        """Return a small network with its own fresh initialisation, and what could not be initialised so.

        The global random state decides the weights. A network whose factory is unknown is initialised by the
        ``reset_parameters`` of its modules.

        Returns:
            The network, and the names of the parameters that hold a slice of a full-size one instead.
        """
        selection = {name: np.arange(width) for name, width in widths.items()}
        if self.build is None:
            return _reset(shrink(self.model, self.graph, selection))
        shapes = {
            name: tuple(part.shape) for name, part in kept_slices(self.model, self.graph, selection).items()
        }
        return build_resized(self.build, list(self.order), shapes)

    def verify(self, selection: Selection) -> Verification:
        """Compare the small network with the reference whose dropped units are zero."""
        return verify(self.model, self.graph, selection, self.example)

    def architecture(
        self, widths: Mapping[str, int], provenance: Mapping[str, Any] | None = None
    ) -> Architecture:
        """Return the architecture file's content for these widths."""
        value, reference = self.cost.of(widths), self.cost.reference
        return Architecture.create(
            model=self.name,
            arguments=dict(self.arguments),
            input_shape=self.input_shape,
            widths={name: int(width) for name, width in widths.items()},
            sizes=self.graph.sizes,
            cost=FileCost(
                macs=Amount(value=value.macs, reference=reference.macs),
                params=Amount(value=value.params, reference=reference.params),
                peak_activation_bytes=Amount(
                    value=value.peak_activation_bytes, reference=reference.peak_activation_bytes
                ),
            ),
            provenance=provenance,
        )


def trace_source(
    source: ModelSource, arguments: Mapping[str, Any], input_shape: Sequence[int], *, seed: int = 0
) -> Traced:
    """Build a network from its source and find its channel groups.

    Args:
        source: Where it comes from.
        arguments: Keyword arguments of its factory.
        input_shape: One input without the batch, such as ``(C, H, W)``.
        seed: Of its fresh weights.

    Raises:
        ArchsearchError: If it cannot be built, or fails on such an input.
    """

    def build() -> nn.Module:
        return source.build(**arguments)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, order = build_recorded(build)
    example = example_input(input_shape)
    try:
        graph = prunable_graph(model, example)
    except ArchsearchError as error:  # the network runs, but not on such an input
        raise UsageError(f"{source.name} on an input of {tuple(input_shape)}: {error}") from error
    return Traced(source.name, arguments, model, example, graph, CostModel(model, graph), build, order)


def trace_module(model: nn.Module, example: Any) -> Traced:
    """Find the channel groups of a network in hand.

    Args:
        model: Any network; not changed.
        example: One input ``(1, ...)``, or the positional (tuple) or named (mapping) arguments of the model.
    """
    graph = prunable_graph(model, example)
    kind = type(model)
    return Traced(
        f"{kind.__module__}:{kind.__qualname__}", {}, model, example, graph, CostModel(model, graph)
    )


def example_input(input_shape: Sequence[int]) -> torch.Tensor:
    """Return a random input ``(1, *input_shape)``, always the same."""
    return torch.randn(1, *input_shape, generator=torch.Generator().manual_seed(0))


def load(
    path: str | Path,
    weights: str | Path | None = None,
    *,
    factory: Callable[..., nn.Module] | None = None,
    trust_code: bool = False,
) -> nn.Module:
    """Build the network of an architecture file.

    Args:
        path: The YAML file.
        weights: Weights of this very architecture, ``.safetensors`` or a state dict in ``.pt``; without,
            the network is fresh and the global random state decides its weights.
        factory: Makes the reference model, in place of the name in the file.
        trust_code: Whether a model that names the user's own code may be imported.

    Returns:
        The network in train mode, on the CPU.

    Raises:
        SpecError: If the file breaks a rule, or does not fit the model.
        UsageError: If its model is unknown, or code that is not trusted.
        IntegrityError: If the weights are damaged or another network's.
    """
    architecture = Architecture.read(path)
    traced = trace_architecture(architecture, factory=factory, trust_code=trust_code, where=str(path))
    model, _ = traced.fresh({name: group.width for name, group in architecture.widths.items()})
    if weights is not None:
        load_weights(model, weights)
    return model


def trace_architecture(
    architecture: Architecture,
    *,
    factory: Callable[..., nn.Module] | None = None,
    trust_code: bool = False,
    where: str = "the architecture file",
) -> Traced:
    """Build and trace the reference of an architecture, and check that the file fits it.

    Raises:
        SpecError: If groups or costs in the file are not those of the model.
        UsageError: If its model is unknown, or code that is not trusted.
    """
    if factory is not None:
        source = ModelSource(architecture.model, "code", factory, None, None)
    else:
        source = resolve(architecture.model, trust_code=trust_code)
    try:
        traced = trace_source(source, architecture.arguments, architecture.input_shape)
    except UsageError as error:
        raise SpecError(f"{where}: arguments, input_shape: {error}") from error
    try:
        architecture.check_groups(traced.graph.sizes)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None
    cost = traced.cost.of({name: group.width for name, group in architecture.widths.items()})
    for what, amount, value in (
        ("macs", architecture.cost.macs, cost.macs),
        ("params", architecture.cost.params, cost.params),
    ):
        if amount is not None and amount.value != value:
            raise SpecError(
                f"{where}: cost.{what}.value: is {amount.value:,}, but {architecture.model} of these widths "
                f"has {value:,}; the model's code is not the one that the file was made with"
            )
    return traced


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill a network with weights from a file.

    Raises:
        UsageError: If there is no such file.
        IntegrityError: If it is damaged or another network's.
    """
    if not Path(path).is_file():
        raise UsageError(f"weights: there is no file {path}")
    tensors = read_weights(path)
    check_tensors(tensors, model.state_dict(), str(path))
    model.load_state_dict(tensors)


def _reset(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Draw fresh weights by each module's own ``reset_parameters``; name what has none."""
    fresh: set[int] = set()
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
            fresh.update(map(id, module.parameters(recurse=False)))
    return model, tuple(name for name, tensor in model.named_parameters() if id(tensor) not in fresh)
