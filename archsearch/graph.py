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

from archsearch.errors import UsageError
from archsearch.labels import Atoms
from archsearch.tracing import Trace
from archsearch.vanished import Resize

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


@dataclass(frozen=True, eq=False)
class GoneModule:
    """A module that does nothing outside a branch, and how large the zeros in its place are.

    Each dimension of its output follows from the same one of its input, or is labelled.
    """

    name: str
    sizes: tuple[Resize | Atoms, ...]


@dataclass(frozen=True, eq=False)
class Branch:
    """A residual branch that may vanish: its groups then have width 0, and it adds zeros to the shortcut.

    Attributes:
        name: The module that holds its layers and no other branch, or else its first layer.
        groups: The groups that lie in it as a whole; all of them have width 0, or none has.
        layers: The layers with weights that it takes along, in order of execution.
        modules: The modules whose place zeros take, outermost ones.
        tensors: Parameters and buffers that go.
        loose: Those of them that are attributes of modules which stay.
        ops: Numbers of the traced ops that no longer run.
        unmade: Those of them whose results are not made any more, not even as zeros.
        held: Where zeros are made from the shape of a tensor: the op that made this, the op of the zeros.
        joined: The traced op that adds it to the shortcut, and which of the operands it is.
    """

    name: str
    groups: tuple[str, ...]
    layers: tuple[str, ...]
    modules: tuple[GoneModule, ...]
    tensors: frozenset[str]
    loose: frozenset[str]
    ops: frozenset[int]
    unmade: frozenset[int]
    held: tuple[tuple[int, int], ...]
    joined: tuple[int, int]


@dataclass(frozen=True)
class FrozenBranch:
    """A residual branch that has to stay, and why."""

    name: str
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
        branches: The residual branches that may vanish; empty until somebody looked for them.
        frozen_branches: Those that may not.
    """

    groups: Mapping[str, ChannelGroup]
    units: Mapping[tuple[str, int], Units]
    layers: tuple[str, ...]
    frozen: tuple[FrozenLayer, ...]
    trace: Trace
    unit_of_atom: Units
    branches: tuple[Branch, ...] = ()
    frozen_branches: tuple[FrozenBranch, ...] = ()

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

    @property
    def whole_groups(self) -> bool:
        """Whether a convolution's groups go as a whole, and do not get narrower."""
        return self.trace.labels.whole_groups

    @property
    def conv_groups(self) -> list[str]:
        """The groups with outputs of convolutions in groups, depthwise ones aside; in order of execution."""
        made = [self.unit_of_atom[atoms] for atoms in self.trace.labels.in_conv_groups]
        return self.groups_of(np.concatenate(made)) if made else []

    def kept_units(self, selection: Selection) -> npt.NDArray[np.bool_]:
        """Return which units a selection keeps, ``(num_units + 1,)``; the last stands for what stays."""
        kept = np.zeros(self.num_units + 1, dtype=bool)
        kept[STAYS] = True
        for name, group in self.groups.items():
            kept[group.first_unit + np.asarray(selection[name], dtype=np.int64)] = True
        return kept

    def vanished(self, widths: Mapping[str, int]) -> tuple[Branch, ...]:
        """Return the branches whose groups have width 0.

        Raises:
            UsageError: If a group has width 0 that is in no branch, or without the others of its branch.
        """
        empty = {name for name, width in widths.items() if width == 0}
        if not empty:
            return ()
        branch_of = {group: branch for branch in self.branches for group in branch.groups}
        for name in widths:  # in the order of the file
            if name not in empty:
                continue
            if name not in branch_of:
                raise UsageError(
                    f"the group '{name}' has width 0, but lies in no residual branch that may vanish: "
                    "it keeps at least 1"
                )
            for other in branch_of[name].groups:
                if other not in empty:
                    raise UsageError(
                        f"the group '{name}' has width 0, but '{other}' of the same residual branch "
                        f"({branch_of[name].name}) has {widths[other]}: all are 0, or none is"
                    )
        return tuple(branch for branch in self.branches if empty.issuperset(branch.groups))

    def placeholder_units(self, selection: Selection) -> npt.NDArray[np.bool_]:
        """Return the kept units, with one of each group whose branch is gone: the shapes of its zeros."""
        one = np.zeros(1, dtype=np.int64)
        return self.kept_units({name: kept if len(kept) else one for name, kept in selection.items()})

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
