"""From the ties of a trace to channel groups, all vectorised."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import nn

from archsearch.graph import STAYS, ChannelGraph, ChannelGroup, FrozenLayer, Member, layer_of
from archsearch.labels import CONSTANT, Atoms, Labels
from archsearch.tracing import Trace, trace_model


def channel_graph(model: nn.Module, example: Any, *, whole_groups: bool = False) -> ChannelGraph:
    """Find the channel groups of a network.

    Args:
        model: Any network, on any device, in any mode; left exactly as it was.
        example: An input ``(N, ...)``, or the positional (tuple) or named (mapping) arguments of the model.
        whole_groups: Whether a convolution's groups go as a whole, and do not get narrower.

    Raises:
        UsageError: If the model fails on the example.
    """
    return group_channels(trace_model(model, example, whole_groups=whole_groups))


def freeze_groups(graph: ChannelGraph, names: Iterable[str], reason: str) -> ChannelGraph:
    """Return the graph without some of its groups, whose channels now stay."""
    for name in names:
        group = graph.groups[name]
        inside = (graph.unit_of_atom >= group.first_unit) & (
            graph.unit_of_atom < group.first_unit + group.size
        )
        graph.trace.labels.freeze(np.flatnonzero(inside), reason)
    return group_channels(graph.trace)


def group_channels(trace: Trace) -> ChannelGraph:
    """Find the channel units in the ties of a trace and sort them into groups."""
    units = _Units.of(trace.labels)
    groups: dict[str, ChannelGroup] = {}
    unit_of_component = np.full(units.count, STAYS, dtype=np.int64)
    next_unit = 0
    for family in units.families():
        producers = [slot for slot in units.producing_slots if slot in family.slots]
        ordered = units.in_order_of(producers[0], family.components)
        members = {
            slot: Member(trace.labels.slots[slot].tensor, trace.labels.slots[slot].dim, count)
            for slot, count in family.slots.items()
        }
        name = _free_name(layer_of(members[producers[0]].tensor), groups)
        groups[name] = ChannelGroup(
            name=name,
            size=len(ordered),
            first_unit=next_unit,
            members=tuple(members.values()),
            producers=tuple(members[slot] for slot in producers),
            consumers=tuple(members[slot] for slot in members if slot in units.consuming_slots),
        )
        unit_of_component[ordered] = next_unit + np.arange(len(ordered))
        next_unit += len(ordered)

    unit_of_atom = unit_of_component[units.component]
    unit_of_atom[CONSTANT] = STAYS
    unit_of_index = {
        (slot.tensor, slot.dim): unit_of_atom[slot.first : slot.first + slot.size]
        for slot in trace.labels.slots
    }
    layers = dict.fromkeys(layer_of(trace.labels.slots[slot].tensor) for slot in units.producing_slots)
    frozen = units.frozen_layers(unit_of_atom)
    return ChannelGraph(groups, unit_of_index, tuple(layers), frozen, trace, unit_of_atom)


def _free_name(name: str, taken: Iterable[str]) -> str:
    """Number the second and further groups of one first producer: ``conv1``, ``conv1#2``."""
    names, number = set(taken), 1
    free = name
    while free in names:
        number += 1
        free = f"{name}#{number}"
    return free


@dataclass
class _Units:
    """The components of the ties: what each consists of, and why some stay.

    Attributes:
        component: The component of each atom, ``(atoms,)``.
        count: How many components there are.
        slot_of_atom: Index of the slot of each atom, ``(atoms,)``; -1 for ``CONSTANT``.
        reasons: Why a component is frozen.
        producing_slots: Slots that layers compute, in order of execution.
        consuming_slots: Slots that layers read.
        first_producer: Position in ``producing_slots`` of the first that a component belongs to; the number
            of them where there is none, ``(components,)``.
    """

    labels: Labels
    component: npt.NDArray[np.int64]
    count: int
    slot_of_atom: npt.NDArray[np.int64]
    reasons: dict[int, str]
    producing_slots: list[int]
    consuming_slots: set[int]
    first_producer: npt.NDArray[np.int64]

    @classmethod
    def of(cls, labels: Labels) -> _Units:
        component, tied_to_constant = _components(labels)
        count = int(component.max()) + 1
        reasons = {int(component[CONSTANT]): "constant padding"}
        for atoms, reason in [*labels.frozen, (tied_to_constant, "added to constant padding")]:
            for index in np.unique(component[atoms]).tolist():
                reasons.setdefault(index, reason)
        slot_of_atom = np.full(labels.num_atoms, -1, dtype=np.int64)
        slot_of_atom[CONSTANT + 1 :] = np.repeat(
            np.arange(len(labels.slots)), [slot.size for slot in labels.slots]
        )
        producing = _slots(labels.produced, slot_of_atom)
        first_producer = np.full(count, len(producing), dtype=np.int64)
        for position, slot in reversed(list(enumerate(producing))):
            first_producer[component[labels.slots[slot].atoms]] = position
        consuming = set(_slots(labels.consumed, slot_of_atom))
        return cls(labels, component, count, slot_of_atom, reasons, producing, consuming, first_producer)

    def families(self) -> list[_Family]:
        """Return the prunable components, by the slots they are in and how often; first producer first."""
        prunable = self.first_producer < len(self.producing_slots)
        prunable[list(self.reasons)] = False
        if not prunable.any():
            return []
        width = len(self.labels.slots) + len(self.labels.told_apart)
        places = [(self.component[1:], self.slot_of_atom[1:])]
        for number, atoms in enumerate(self.labels.told_apart, len(self.labels.slots)):
            places.append((self.component[atoms], np.full(len(atoms), number)))
        keys = np.concatenate([(c * width + slot)[prunable[c]] for c, slot in places])
        keys, counts = np.unique(keys, return_counts=True)
        component, slot = np.divmod(keys, width)
        starts = np.flatnonzero(np.diff(component, prepend=-1)).tolist()
        signature = np.stack([slot, counts], axis=1)
        families: dict[bytes, list[int]] = {}
        for start, end in zip(starts, [*starts[1:], len(keys)], strict=True):
            families.setdefault(signature[start:end].tobytes(), []).append(int(component[start]))
        found = []
        for encoded, components in families.items():
            slots = np.frombuffer(encoded, dtype=np.int64).reshape(-1, 2).tolist()
            real = {slot: count for slot, count in slots if slot < len(self.labels.slots)}
            found.append(_Family(np.array(components), real))
        return sorted(found, key=self._place)

    def in_order_of(self, slot: int, components: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the components in the order in which a slot's indices belong to them."""
        present, first = np.unique(self.component[self.labels.slots[slot].atoms], return_index=True)
        return components[np.argsort(first[np.searchsorted(present, components)])]

    def _place(self, family: _Family) -> tuple[int, int]:
        position = int(self.first_producer[family.components[0]])
        atoms = self.labels.slots[self.producing_slots[position]].atoms
        return position, int(np.isin(self.component[atoms], family.components).argmax())

    def frozen_layers(self, unit_of_atom: npt.NDArray[np.int64]) -> tuple[FrozenLayer, ...]:
        """Say which layers have output channels that stay, and why."""
        found = []
        for number in self.producing_slots:
            slot = self.labels.slots[number]
            staying = slot.atoms[unit_of_atom[slot.atoms] == STAYS]
            if len(staying):
                reason = self.reasons[int(self.component[staying[0]])]
                found.append(FrozenLayer(layer_of(slot.tensor), len(staying), slot.size, reason))
        return tuple(found)


@dataclass
class _Family:
    """Interchangeable components, and how many indices of each slot one of them owns."""

    components: npt.NDArray[np.int64]
    slots: dict[int, int]


def _slots(arrays: list[Atoms], slot_of_atom: npt.NDArray[np.int64]) -> list[int]:
    """Return the slots that atoms of these arrays are from, in order, each once."""
    found: dict[int, None] = {}
    for atoms in arrays:
        slots = slot_of_atom[atoms]
        if (slots == slots[0]).all():  # the usual case, quicker than sorting
            found[int(slots[0])] = None
        else:
            found.update(dict.fromkeys(np.unique(slots).tolist()))
    found.pop(-1, None)
    return list(found)


def _components(labels: Labels) -> tuple[npt.NDArray[np.int64], Atoms]:
    """Return the component of each atom, and the atoms that are tied to a constant."""
    pairs = [(a, b) if a.shape == b.shape else np.broadcast_arrays(a, b) for a, b in labels.ties]
    left = np.concatenate([a.reshape(-1) for a, _ in pairs] or [np.empty(0, np.int64)])
    right = np.concatenate([b.reshape(-1) for _, b in pairs] or [np.empty(0, np.int64)])
    constant = (left == CONSTANT) | (right == CONSTANT)
    tied = np.maximum(left, right)[constant]
    edges = coo_matrix(
        (np.ones(len(left), np.int8)[~constant], (left[~constant], right[~constant])),
        shape=(labels.num_atoms,) * 2,
    )
    _, component = connected_components(edges, directed=False)
    return component.astype(np.int64), tied
