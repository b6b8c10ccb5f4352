"""Channel groups: which channels of a network can be removed, and what goes with each.

The connected components of the traced ties are the *channel units*; units with the same set of parameter
dimensions are interchangeable and form a *channel group*. The groups, with the layers that produce and
consume them, are also a networkx graph that a person can query and draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import networkx as nx
import numpy as np
import numpy.typing as npt

from archsearch.tracing import Trace

Units: TypeAlias = npt.NDArray[np.int64]
"""For each index of a dimension its unit's number in the whole graph, or ``STAYS``."""

Selection: TypeAlias = Mapping[str, npt.NDArray[np.int64]]
"""For each group the kept units, sorted, ``(width,)``."""

STAYS = -1


@dataclass(frozen=True)
class Member:
    """A parameter dimension of a group: each unit owns ``count`` of its indices."""

    tensor: str
    dim: int
    count: int


@dataclass(frozen=True)
class ChannelGroup:
    """Channel units that are interchangeable.

    Attributes:
        name: The first layer that produces the group, in order of execution.
        size: Units in the reference model.
        first_unit: Number of its first unit in the whole graph.
        members: Everything that shrinks with it.
        producers: Members that compute its channels: ``(tensor, dim)`` of convolution and linear weights.
        consumers: Members that read its channels.
    """

    name: str
    size: int
    first_unit: int
    members: tuple[Member, ...]
    producers: tuple[Member, ...]
    consumers: tuple[Member, ...]

    @property
    def channels_per_unit(self) -> int:
        """Indices of the first producer that one unit owns.

        A width times this is what the layer's ``out_channels`` will be, apart from channels that stay.
        """
        return self.producers[0].count


@dataclass(frozen=True)
class FrozenLayer:
    """A layer some of whose output channels stay, and why."""

    layer: str
    channels: int
    of: int
    reason: str


@dataclass(frozen=True)
class ChannelGraph:
    """The channel groups of one network, by name, in order of execution.

    Attributes:
        groups: The prunable groups.
        units: For each parameter dimension, ``(tensor, dim)``, the unit of each index.
        layers: The layers that compute channels, in order of execution.
        frozen: Those with channels that stay.
        trace: What the run told; costs and verification read it.
        unit_of_atom: For each atom its unit, ``(atoms,)``.
    """

    groups: Mapping[str, ChannelGroup]
    units: Mapping[tuple[str, int], Units]
    layers: tuple[str, ...]
    frozen: tuple[FrozenLayer, ...]
    trace: Trace
    unit_of_atom: Units

    @property
    def sizes(self) -> dict[str, int]:
        """Units of each group in the reference model."""
        return {name: group.size for name, group in self.groups.items()}

    @property
    def num_units(self) -> int:
        """Units of all groups."""
        return sum(group.size for group in self.groups.values())

    @property
    def unknown_ops(self) -> Mapping[str, str]:
        """Ops without a working rule, and what went wrong; everything they touch is frozen."""
        return self.trace.unknown_ops

    def kept_units(self, selection: Selection) -> npt.NDArray[np.bool_]:
        """Return which units a selection keeps, ``(num_units + 1,)``; the last stands for what stays."""
        kept = np.zeros(self.num_units + 1, dtype=bool)
        kept[STAYS] = True
        for name, group in self.groups.items():
            kept[group.first_unit + np.asarray(selection[name], dtype=np.int64)] = True
        return kept

    @cached_property
    def group_of_unit(self) -> tuple[str, ...]:
        """The name of each unit's group."""
        return tuple(name for name, group in self.groups.items() for _ in range(group.size))

    def groups_of(self, units: Units) -> list[str]:
        """Return the groups that some units belong to, in order of execution."""
        return list(dict.fromkeys(self.group_of_unit[unit] for unit in np.unique(units) if unit != STAYS))

    @cached_property
    def networkx(self) -> nx.DiGraph:
        """Layers and groups as nodes; an edge from each producer to its group, and on to each consumer.

        Node attributes: ``kind`` (``"layer"`` or ``"group"``), and ``size`` of groups.
        """
        graph = nx.DiGraph()
        for name, group in self.groups.items():
            node = f"group:{name}"
            graph.add_node(node, kind="group", size=group.size)
            for member in group.producers:
                layer = layer_of(member.tensor)
                graph.add_node(layer, kind="layer")
                graph.add_edge(layer, node)
            for member in group.consumers:
                layer = layer_of(member.tensor)
                graph.add_node(layer, kind="layer")
                graph.add_edge(node, layer)
        return graph


def layer_of(tensor: str) -> str:
    """Return the module that a parameter belongs to, also where it is parametrised."""
    owner = tensor.rpartition(".")[0]
    return owner.partition(".parametrizations")[0] or tensor
