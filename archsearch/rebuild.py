"""From a name and widths to a fresh network, and the architecture file in between."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from archsearch.architecture import Amount, Architecture
from archsearch.architecture import Cost as FileCost
from archsearch.branches import find_branches
from archsearch.construction import build_recorded, build_resized
from archsearch.cost import CostModel
from archsearch.errors import ArchsearchError, SpecError, UsageError
from archsearch.gathers import (
    BUFFER,
    add_gathers,
    channels_of,
    is_gather,
    set_channels,
    shared_stream_norms,
    spread,
)
from archsearch.graph import ChannelGraph, Selection
from archsearch.models import ModelSource, resolve
from archsearch.surgery import kept_slices, shrink, vanish
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
        gathers: The norms that gather what they read from a shared stream.
    """

    name: str
    arguments: Mapping[str, Any]
    model: nn.Module
    example: Any
    graph: ChannelGraph
    cost: CostModel
    build: Callable[[], nn.Module] | None = None
    order: Sequence[str | None] = ()
    gathers: Sequence[str] = ()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input without the batch."""
        return tuple(output_tensors(self.example)[0].shape[1:])

    def with_branches(self) -> Traced:
        """Return the same with the residual branches that may vanish, whose groups then may have width 0."""
        if self.graph.branches:
            return self
        graph = find_branches(self.model, self.graph, self.example)
        return replace(self, graph=graph, cost=CostModel(self.model, graph, self.cost.latency))

    def inherit(self, selection: Selection) -> nn.Module:
        """Return the small network with the kept slices of this network's weights."""
        return shrink(self.model, self.graph, selection)

    def fresh(
        self, widths: Mapping[str, int], selection: Selection | None = None
    ) -> tuple[nn.Module, tuple[str, ...]]:
        """Return a small network with its own fresh initialisation, and what could not be initialised so.

        The global random state decides the weights. A network whose factory is unknown is initialised by the
        ``reset_parameters`` of its modules.

        Args:
            widths: Of each group.
            selection: The kept units; they matter only to norms that gather, which otherwise read channels
                spread over the stream.

        Returns:
            The network, and the names of the parameters that hold a slice of a full-size one instead.
        """
        sizes = self.graph.sizes
        chosen = selection or {
            name: spread(width, sizes[name], name) if name in self.gathers else np.arange(width)
            for name, width in widths.items()
        }
        if self.build is None:
            return _reset(shrink(self.model, self.graph, chosen))
        kept = kept_slices(self.model, self.graph, chosen)
        shapes = {name: tuple(part.shape) for name, part in kept.items()}
        model, sliced = build_resized(
            self.build, list(self.order), shapes, whole_groups=self.graph.whole_groups
        )
        set_channels(model, channels_of(kept, self.gathers))
        vanish(model, self.graph, chosen)
        return model, sliced

    def verify(self, selection: Selection) -> Verification:
        """Compare the small network with the reference whose dropped units are zero."""
        return verify(self.model, self.graph, selection, self.example)

    def architecture(
        self,
        widths: Mapping[str, int],
        provenance: Mapping[str, Any] | None = None,
        selection: Selection | None = None,
    ) -> Architecture:
        """Return the architecture file's content for these widths.

        Args:
            widths: Of each group.
            provenance: Where they come from.
            selection: The kept units; needed where norms gather.
        """
        gathers = {}
        if self.gathers:
            units = selection or {name: np.arange(width) for name, width in widths.items()}
            gathers = channels_of(kept_slices(self.model, self.graph, units), self.gathers)
        value, reference = self.cost.of(widths), self.cost.reference
        return Architecture.create(
            model=self.name,
            arguments=dict(self.arguments),
            input_shape=self.input_shape,
            widths={name: int(width) for name, width in widths.items()},
            sizes=self.graph.sizes,
            gathers=gathers,
            whole_groups=self.graph.whole_groups,
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
    source: ModelSource,
    arguments: Mapping[str, Any],
    input_shape: Sequence[int],
    *,
    seed: int = 0,
    gathers: Sequence[str] | bool = False,
    whole_groups: bool = False,
) -> Traced:
    """Build a network from its source and find its channel groups.

    Args:
        source: Where it comes from.
        arguments: Keyword arguments of its factory.
        input_shape: One input without the batch, such as ``(C, H, W)``.
        seed: Of its fresh weights.
        gathers: The norms that gather what they read, or whether all those of shared streams do.
        whole_groups: Whether a convolution's groups go as a whole, and do not get narrower.

    Raises:
        ArchsearchError: If it cannot be built, or fails on such an input, or has no groups that could go.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, order = build_recorded(lambda: source.build(**arguments))
    example = example_input(input_shape)
    try:
        norms = _gathering(model, example, gathers)
        graph = _graph(add_gathers(model, norms), example, whole_groups)
    except ArchsearchError as error:  # the network runs, but not on such an input
        raise UsageError(f"{source.name} on an input of {tuple(input_shape)}: {error}") from error

    def build() -> nn.Module:
        return add_gathers(source.build(**arguments), norms)

    cost = CostModel(model, graph)
    return Traced(source.name, arguments, model, example, graph, cost, build, order, norms)


def trace_module(
    model: nn.Module,
    example: Any,
    *,
    gathers: Sequence[str] | bool = False,
    whole_groups: bool = False,
) -> Traced:
    """Find the channel groups of a network in hand.

    Args:
        model: Any network; not changed.
        example: One input ``(1, ...)``, or the positional (tuple) or named (mapping) arguments of the model.
        gathers: As for ``trace_source``.
        whole_groups: As for ``trace_source``.
    """
    norms = _gathering(model, example, gathers)
    if norms:
        model = add_gathers(copy.deepcopy(model), norms)
    graph = _graph(model, example, whole_groups)
    kind = type(model)
    name = f"{kind.__module__}:{kind.__qualname__}"
    return Traced(name, {}, model, example, graph, CostModel(model, graph), gathers=norms)


def _gathering(model: nn.Module, example: Any, gathers: Sequence[str] | bool) -> list[str]:
    """Return the norms that gather.

    Raises:
        UsageError: If those of shared streams are asked for and there are none.
    """
    if gathers is False:
        return []
    if gathers is not True:
        return list(gathers)
    norms = shared_stream_norms(model, example)
    if not norms:
        raise UsageError("--gather: no batch norm of this network reads a shared stream: leave it out")
    return norms


def _graph(model: nn.Module, example: Any, whole_groups: bool) -> ChannelGraph:
    """Return the prunable groups.

    Raises:
        UsageError: If whole convolution groups are asked for and there are none.
    """
    graph = prunable_graph(model, example, whole_groups=whole_groups)
    if whole_groups and not graph.trace.labels.in_conv_groups:
        raise UsageError(
            "whole_groups (--whole-groups): no convolution of this network has groups of several channels: "
            "leave it out"
        )
    return graph


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
    model = build_fresh(traced, architecture)
    if weights is not None:
        load_weights(model, weights)
    return model


def build_fresh(traced: Traced, architecture: Architecture) -> nn.Module:
    """Return the fresh network of an architecture; the global random state decides its weights."""
    model, _ = traced.fresh({name: group.width for name, group in architecture.widths.items()})
    set_channels(model, architecture.gathers)
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
        traced = trace_source(
            source,
            architecture.arguments,
            architecture.input_shape,
            gathers=list(architecture.gathers),
            whole_groups=architecture.whole_groups,
        )
    except UsageError as error:
        raise SpecError(f"{where}: arguments, input_shape: {error}") from error
    try:
        architecture.check_groups(traced.graph.sizes)
        _check_gathers(traced, architecture)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None
    widths = {name: group.width for name, group in architecture.widths.items()}
    if 0 in widths.values():
        traced = traced.with_branches()
        try:
            traced.graph.vanished(widths)
        except UsageError as error:
            raise SpecError(f"{where}: widths: {error}") from None
    cost = traced.cost.of(widths)
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


def _check_gathers(traced: Traced, architecture: Architecture) -> None:
    """Raise SpecError if a norm is said to read other channels than there are, or than its width says."""
    sizes = {name: len(traced.model.get_buffer(f"{name}.{BUFFER}")) for name in architecture.gathers}
    for name, channels in architecture.gathers.items():
        group = architecture.widths.get(name)
        width = sizes[name] if group is None else sizes[name] - group.size + group.width
        if channels and channels[-1] >= sizes[name]:
            raise SpecError(f"gathers.{name}: reads channel {channels[-1]}, but the stream has {sizes[name]}")
        if len(channels) != width:
            raise SpecError(f"gathers.{name}: names {len(channels)} channels, but its width is {width}")


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill a network with weights from a file.

    Raises:
        UsageError: If there is no such file.
        IntegrityError: If it is damaged or another network's.
    """
    if not Path(path).is_file():
        raise UsageError(f"weights: there is no file {path}")
    # Weights of a reference that does not gather fit one that gathers everything.
    whole = {name: value for name, value in model.state_dict().items() if is_gather(model, name)}
    tensors = {**whole, **read_weights(path)}
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
