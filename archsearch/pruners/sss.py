"""Sparse structure selection: factors on channels or blocks, trained by an accelerated proximal gradient.

The factors stand beside the reference, which runs with its parameters multiplied by them. So the trained
network and the merged one compute the same.
"""

from __future__ import annotations

import bisect
import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from archsearch.errors import UsageError
from archsearch.graph import STAYS, ChannelGraph, Units
from archsearch.pruners.norm import filter_norms
from archsearch.pruners.norm_scale import is_norm, norm_scales
from archsearch.pruners.pruner import PRUNERS, Context, Need, Scores, SparseTraining
from archsearch.pruners.reading import CONTRACTIONS
from archsearch.training.callbacks import Callback, State

_TIE = 1e-9  # of a factor: less than any difference that training makes


class Scaled(nn.Module):
    """A network some of whose parameters are multiplied by factors, at first all 1.

    Args:
        reference: The network.
        scaled: For each parameter and dimension the number of each index's factor, or ``STAYS``.
        count: How many factors there are.

    Attributes:
        factors: ``(count,)``.
        momentum: What their next step carries on from the last, ``(count,)``.
    """

    def __init__(self, reference: nn.Module, scaled: Mapping[tuple[str, int], Units], count: int) -> None:
        super().__init__()
        like = next(reference.parameters())
        self.reference = reference
        self.factors = nn.Parameter(torch.ones(count, dtype=like.dtype, device=like.device))
        self.momentum: torch.Tensor
        self.register_buffer("momentum", torch.zeros_like(self.factors))
        self._places = list(scaled)
        for number, units in enumerate(scaled.values()):  # buffers, so that they move with the network
            self.register_buffer(f"place{number}", torch.from_numpy(units), persistent=False)

    def multiplied(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Return each scaled parameter's name and its value times the factors."""
        with_one = torch.cat([self.factors, self.factors.new_ones(1)])  # STAYS is -1: the last
        values: dict[str, torch.Tensor] = {}
        for number, (name, dim) in enumerate(self._places):
            value = values.get(name, self.reference.get_parameter(name))
            factors = with_one[self.get_buffer(f"place{number}")]
            values[name] = value * factors.reshape(-1, *[1] * (value.dim() - dim - 1))
        yield from values.items()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the reference with the multiplied parameters."""
        return functional_call(self.reference, dict(self.multiplied()), args, kwargs)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return a copy of the reference with the factors in its parameters."""
        plain = copy.deepcopy(self.reference)
        for name, value in self.multiplied():
            plain.get_parameter(name).copy_(value)
        return plain


class ProximalStep(Callback):
    """Step the factors of a network itself, so that no optimiser does.

    Their gradients are averaged over the processes of a data-parallel training like any others.

    Args:
        network: Has the factors and their momentum, all that changes here.
        strength: Of the penalty on the sum of the factors, ``gamma`` in the paper.
        momentum: ``mu`` in the paper.
    """

    def __init__(self, network: Scaled, strength: float, momentum: float) -> None:
        self._network, self._strength, self._momentum = network, strength, momentum

    def after_backward(self, state: State) -> None:
        """Take the step at the optimiser's learning rate, and hide the gradient from the optimiser."""
        network = self._network
        gradient, network.factors.grad = network.factors.grad, None
        if gradient is not None and bool(gradient.isfinite().all()):  # fp16's overflows are no steps
            with torch.no_grad():
                proximal_step(
                    network.factors, network.momentum, gradient, state.lr, self._strength, self._momentum
                )


def proximal_step(
    factors: torch.Tensor,
    momentum: torch.Tensor,
    gradient: torch.Tensor,
    lr: float,
    strength: float,
    decay: float,
) -> None:
    """Change factors and momentum in place by one step (Huang and Wang, ECCV 2018, section 3).

    ``z = soft(w - lr g, lr strength)``, ``m = z - w + decay m``, ``w = max(0, z + decay m)``: an accelerated
    proximal gradient in the form of Nesterov's momentum, with factors that stay above zero.
    """
    z = nn.functional.softshrink(factors - lr * gradient, lr * strength)
    momentum.mul_(decay).add_(z - factors)
    factors.copy_((z + decay * momentum).clamp_min(0))


def channel_places(
    model: nn.Module, graph: ChannelGraph, groups: Iterable[str]
) -> dict[tuple[str, int], Units]:
    """Return what a factor on each unit of some groups multiplies, so that at 0 the unit puts out zeros.

    That is scale and shift of every norm of the unit's channels, and the filters and biases of the layers
    that no norm follows at once: behind a norm, the size of filters changes nothing.

    Returns:
        For each parameter and dimension the unit of each index, or ``STAYS``, also for those of other groups.

    Raises:
        UsageError: If a group has nothing to multiply.
    """
    scales, normed = norm_scales(model), _normed_producers(graph)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    plain = {name: tensor for name, tensor in model.named_parameters() if ".parametrizations." not in name}
    places: dict[tuple[str, int], Units] = {}
    wanted = np.zeros(graph.num_units + 1, dtype=bool)  # the last stands for what stays
    for group in map(graph.groups.__getitem__, groups):
        for member in group.members:
            place = member.tensor, member.dim
            bare = member in group.producers and place not in normed and member.tensor in plain
            if member.tensor in scales or bare:
                places[place] = graph.units[place]
                for name in names[id(plain[member.tensor])]:
                    bias = f"{name.removesuffix('weight')}bias", 0
                    if bias in graph.units:
                        places[bias] = graph.units[bias]
        own = np.arange(group.first_unit, group.first_unit + group.size)
        if not any(np.isin(own, units).all() for units in places.values()):
            raise UsageError(
                f"sss: no norm scale and no plain filter multiplies the channels of {group.name}; take "
                "another --method"
            )
        wanted[own] = True
    return {place: np.where(wanted[units], units, STAYS) for place, units in places.items()}


def whole_conv_groups(graph: ChannelGraph) -> list[str]:
    """Return the channel groups whose units are groups of a convolution.

    Raises:
        UsageError: If there are none.
    """
    found = graph.conv_groups if graph.whole_groups else []
    if not found:
        raise UsageError(
            "sss: on is 'groups', but no group of a convolution may go as a whole: give --whole-groups; if "
            "you did, `archsearch show` says why"
        )
    return found


def block_places(model: nn.Module, graph: ChannelGraph) -> dict[tuple[str, int], Units]:
    """Return what a factor on each residual branch multiplies: all of its last layer.

    Returns:
        For each parameter and dimension the number of the branch, for each index.

    Raises:
        UsageError: If there is no branch that may vanish, or one ends in a layer with computed weights.
    """
    if not graph.branches:
        raise UsageError(
            "sss: on is 'blocks', but no residual branch may vanish: give --drop-branches; if you did, "
            "`archsearch show` says why"
        )
    places: dict[tuple[str, int], Units] = {}
    for number, branch in enumerate(graph.branches):
        layer = branch.layers[-1]
        own = dict(model.get_submodule(layer).named_parameters(prefix=layer, recurse=False))
        last = {name: tensor for name, tensor in own.items() if name in branch.tensors}
        if not any(name.endswith("weight") for name in last) and len(last) != 1:
            raise UsageError(
                f"sss: {layer}, the last of the block {branch.name}, has no weight of its own to multiply; "
                "take another --method"
            )
        places |= {(name, 0): np.full(len(tensor), number) for name, tensor in last.items()}
    return places


def _normed_producers(graph: ChannelGraph) -> set[tuple[str, int]]:
    """Return the weights, and which of their dimensions, all of whose outputs go straight into a norm."""
    slots = graph.trace.labels.slots
    first = [slot.first for slot in slots]
    normed: dict[tuple[str, int], bool] = {}
    ops = [op for op in graph.trace.ops if op.inputs]
    for op, after in itertools.pairwise(ops):
        if op.name not in CONTRACTIONS:
            continue
        for dim, atoms in op.outputs[0][1].items():
            slot = slots[bisect.bisect_right(first, int(atoms[0])) - 1]
            follows = is_norm(after.name) and np.array_equal(after.inputs[0].get(dim, atoms[:0]), atoms)
            place = slot.tensor, slot.dim
            normed[place] = normed.get(place, True) and follows
    return {place for place, always in normed.items() if always}


@PRUNERS.register("sss")
@dataclass(frozen=True)
class SparseStructureSelection:
    """Keep the channels with the largest factors, which a penalty drives to zero while the reference trains.

    Args:
        on: What has a factor: ``"neurons"``, each channel unit, ``"groups"``, each group of a convolution
            (of a network that is traced so), or ``"blocks"``, each residual branch.
        strength: Of the penalty on the sum of the factors, ``gamma`` in the paper.
        momentum: Of the factors' steps.
    """

    on: Literal["neurons", "groups", "blocks"] = "neurons"
    strength: float = 0.01
    momentum: float = 0.9

    source: ClassVar[str] = "Huang and Wang, Data-Driven Sparse Structure Selection, ECCV 2018, section 3"
    allocation: ClassVar[str] = "threshold"
    needs: ClassVar[tuple[Need, ...]] = ("sparse training",)

    def __post_init__(self) -> None:
        if self.on not in ("neurons", "groups", "blocks"):
            raise UsageError(f"sss: on is '{self.on}': it must be 'neurons', 'groups' or 'blocks'")
        if not 0 < self.strength < float("inf"):
            raise UsageError(f"sss: strength is {self.strength}: it must be above 0 and finite")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"sss: momentum is {self.momentum}: it must be in [0, 1)")

    def sparse_training(
        self, model: nn.Module, graph: ChannelGraph, widths: Mapping[str, int]
    ) -> SparseTraining:
        """Train the reference with a factor on each unit, convolution group or residual branch.

        Raises:
            UsageError: If there is something that no factor could multiply, or no such structure.
        """
        if self.on == "blocks":
            network = Scaled(model, block_places(model, graph), len(graph.branches))
        else:
            places = channel_places(model, graph, self._groups(graph))
            network = Scaled(model, places, graph.num_units)
        step = ProximalStep(network, self.strength, self.momentum)
        return SparseTraining(network, [step], network.merged)

    def score(self, context: Context) -> Scores:
        """Return the factor of each unit, or of the block that it lies in.

        Among equals, such as zeros, units with larger filters are worth more. Where only blocks or groups of
        convolutions have factors, everything else stays.

        Raises:
            UsageError: If the factors were not trained.
        """
        network, graph = context.sparse, context.graph
        if not isinstance(network, Scaled):
            raise UsageError("sss: the factors come from its own training of the reference: give --data")
        factors = network.factors.detach().double().cpu().numpy()
        if self.on == "blocks":
            block = {name: number for number, branch in enumerate(graph.branches) for name in branch.groups}
            return {
                name: np.full(size, factors[block[name]] if name in block else np.inf)
                for name, size in graph.sizes.items()
            }
        sizes = filter_norms(Context(network.reference, graph), 2)
        scores = {name: np.full(size, np.inf) for name, size in graph.sizes.items()}
        for name in self._groups(graph):
            group = graph.groups[name]
            own = factors[group.first_unit : group.first_unit + group.size]
            largest = float(sizes[name].max())
            tie = sizes[name] / largest if 0 < largest < np.inf else 0.0  # gathers have no filters
            scores[name] = own + _TIE * tie
        return scores

    def _groups(self, graph: ChannelGraph) -> list[str]:
        """Return the channel groups whose units have factors of their own."""
        return whole_conv_groups(graph) if self.on == "groups" else list(graph.groups)
