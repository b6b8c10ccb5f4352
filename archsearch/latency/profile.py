"""Make a latency table: probe the staircase, measure cells, then whole networks to calibrate and to test.

Everything is measured in groups that take turns, each beside one reference: the same cell for all cells, the
unpruned network for all networks. What was measured is written down at once; the same command goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.utils import _pytree as pytree

from archsearch.errors import UsageError
from archsearch.latency import measure
from archsearch.latency.bench import settled
from archsearch.latency.cells import DEPTHWISE, Cell, Layer, Signature, build_cell, find_layers
from archsearch.latency.journal import Journal
from archsearch.latency.knots import choose_knots, macs_of, value_of
from archsearch.latency.meter import Made, Meter, RuntimeMeter, Settings
from archsearch.latency.quantum import PROBES, TOP, Staircase, find_quantum, steps_of
from archsearch.latency.sampling import equal_macs_widths, random_widths
from archsearch.latency.table import (
    FORMAT,
    CellRecord,
    Conditions,
    Content,
    Group,
    LatencyTable,
    NetworkRecord,
    Role,
)
from archsearch.latency.workbench import Job, Workbench
from archsearch.rebuild import Traced
from archsearch.surgery import shrink

Integers: TypeAlias = npt.NDArray[np.int64]
Allowed: TypeAlias = Callable[[int], Mapping[str, Integers]]

REPEAT = 3
"""Layers behind each other in the cells that tell what it costs to enter and leave one."""

MAX_BOUNDARIES = 8
LEAST_SHARE = 0.05
"""Of the layers or the multiply-adds: what kinds of layers are probed."""

REPEATED_NETWORKS = 3
"""That are measured twice, for the noise."""


class Profile:
    """Measures one network on one device.

    Args:
        traced: The reference.
        allowed: Returns the widths that each group may have, given the multiples of channels worth having.
        settings: What to measure and how.
        journal: Where to write each measurement down; ``None`` does not.
        meter: What measures; the runtime by default.
        say: Called with each line for the user.
        progress: Called with how much is done and how much there is.
    """

    def __init__(
        self,
        traced: Traced,
        allowed: Allowed,
        settings: Settings | None = None,
        *,
        journal: Path | None = None,
        meter: Meter | None = None,
        say: Callable[[str], None] = lambda line: None,
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> None:
        settings = settings or Settings()
        self._traced, self._allowed, self._settings = traced, allowed, settings
        self._say = say
        self._layers = find_layers(traced)
        if not self._layers or not traced.graph.groups:
            raise UsageError(
                f"{traced.name}: has no layers whose widths could change: `archsearch show` says why"
            )
        self._signatures = list(dict.fromkeys(layer.signature for layer in self._layers))
        example = self._example()
        self.fingerprint = measure.fingerprint(
            settings.runtime,
            settings.device,
            settings.dtype,
            example=example,
            channels_last=settings.channels_last,
            threads=settings.threads,
        )
        self._conditions = Conditions(
            model=traced.name,
            arguments=dict(traced.arguments),
            input_shape=traced.input_shape,
            batch=settings.batch,
            runtime=settings.runtime,
            device=settings.device,
            dtype=settings.dtype,
            threads=settings.threads,
            channels_last=settings.channels_last,
        )
        journal_conditions = {
            "fingerprint": self.fingerprint,
            "conditions": self._conditions.model_dump(mode="json"),
            "protocols": [vars(settings.cells), vars(settings.networks)],
        }
        plain = isinstance(traced.example, torch.Tensor)
        self._settled = settled(traced.model, traced.input_shape) if plain else traced.model
        self._journal = Journal(journal, journal_conditions)
        self._bench = Workbench(
            settings,
            meter or RuntimeMeter(settings),
            self._journal,
            {"cell": self._heaviest_cell, "network": lambda: self._network(traced.cost.sizes.tolist())},
            say,
            progress,
        )

    def run(self) -> LatencyTable:
        """Measure everything that is not in the journal yet, and return the table.

        Raises:
            PreemptedError: If the time is over before everything was measured.
            UsageError: If there are too few widths to make networks of.
        """
        self._bench.estimate(self._settings.calibration + self._settings.held_out + REPEATED_NETWORKS)
        staircases = self._probe()
        quantum = find_quantum(staircases)
        self._say(f"channel quantum {quantum}: {_explained(staircases)}")
        if self._settings.round_to is not None:
            quantum = self._settings.round_to
        widths = {name: np.asarray(steps) for name, steps in self._allowed(quantum).items()}
        sizes = self._traced.graph.sizes
        boundaries = self._boundaries(quantum)
        left = self._settings.max_cells - self._probe_count - 2 * len(boundaries)
        steps = {one: steps_of(one, staircases, quantum) for one in self._signatures}
        axes = choose_knots(self._layers, widths, sizes, steps, self._bench.affordable(left))
        grid = [
            Cell(number, reads, makes)
            for number, one in enumerate(axes)
            for reads in one.reads
            for makes in one.makes
        ]
        both = [(cell, repeat) for cell in boundaries for repeat in (1, REPEAT)]
        wanted = list(dict.fromkeys([*both, *((cell, 1) for cell in grid)]))
        self._bench.measure("cell", [self._cell_job(*each) for each in wanted])
        roles = self._networks(widths)
        # In random order, so that a machine that changes does not do so between calibration and test.
        order = np.random.default_rng(self._settings.seed).permutation(len(roles))
        jobs = [self._network_job(*roles[place]) for place in order]
        self._bench.measure("network", jobs)
        return LatencyTable(
            Content(
                format=FORMAT,
                conditions=self._conditions,
                fingerprint=self.fingerprint,
                quantum=quantum,
                groups=tuple(
                    Group(name=name, size=sizes[name], widths=tuple(steps.tolist()))
                    for name, steps in widths.items()
                ),
                layers=self._layers,
                axes=axes,
                cells=tuple(
                    CellRecord(
                        signature=cell.signature,
                        reads=cell.reads,
                        makes=cell.makes,
                        repeat=repeat,
                        times=self._journal[_cell_name(cell, repeat)],
                    )
                    for cell, repeat in wanted
                ),
                networks=tuple(
                    NetworkRecord(role=role, widths=row, times=self._journal[_network_name(role, row)])
                    for role, row in roles
                ),
                staircases=tuple(staircases),
                measuring_s=self._bench.measuring_s,
                preparing_s=self._bench.preparing_s,
            )
        )

    def finish(self) -> None:
        """Remove the journal, once the table is written."""
        self._journal.remove()

    # --- what to measure ----------------------------------------------------------------------------------

    def _probe(self) -> list[Staircase]:
        """Measure time over channels of each kind of layer that matters."""
        curves = [
            (op, axis, layers, [cell_at(width) for width in PROBES])
            for op, number, layers in self._ops()
            for axis, cell_at in self._axes_of(number)
        ]
        cells = list(dict.fromkeys(cell for *_, cells in curves for cell in cells))
        self._probe_count = len(cells)
        self._bench.measure("cell", [self._cell_job(cell, 1) for cell in cells], "probe")
        anchor = float(
            np.median(np.concatenate([self._journal[_cell_name(cell, 1)].reference_ms for cell in cells]))
        ) if cells else 1.0  # fmt: skip
        return [
            Staircase(
                op=op,
                axis=axis,
                layers=layers,
                channels=PROBES,
                ms=tuple(anchor * self._journal[_cell_name(cell, 1)].ratio for cell in cells),
            )
            for op, axis, layers, cells in curves
        ]

    def _ops(self) -> list[tuple[str, int, int]]:
        """Return the kinds of convolutions to probe, the largest signature and the layers of each."""
        sizes = self._traced.graph.sizes
        kinds: dict[str, list[Layer]] = {}
        for layer in self._layers:
            if layer.signature.groups in (1, DEPTHWISE) and layer.signature.multiplier == 1:
                kinds.setdefault(layer.signature.op, []).append(layer)
        total = sum(macs_of(layer, sizes) for layer in self._layers)
        found = []
        for op, layers in kinds.items():
            varying = [layer for layer in layers if layer.makes.groups or layer.reads.groups]
            share = max(
                len(layers) / len(self._layers), sum(macs_of(layer, sizes) for layer in layers) / total
            )
            if varying and share >= LEAST_SHARE:
                # Where 64 channels are most work: in a small cell the start of a run hides the steps.
                largest = max(varying, key=lambda layer: layer.signature.macs_a_weight)
                found.append((op, self._signatures.index(largest.signature), len(layers)))
        return found

    def _axes_of(self, number: int) -> list[tuple[str, Callable[[int], Cell]]]:
        if self._signatures[number].groups == DEPTHWISE:
            return [("makes", lambda width: Cell(number, 1, width))]
        return [
            ("makes", lambda width: Cell(number, TOP, width)),
            ("reads", lambda width: Cell(number, width, TOP)),
        ]

    def _boundaries(self, quantum: int) -> list[Cell]:
        """Return cells whose output is as their input, some of each signature that can be."""
        sizes = self._traced.graph.sizes
        found: dict[Cell, None] = {}
        for layer in sorted(self._layers, key=lambda layer: -macs_of(layer, sizes)):
            if not _repeats(layer.signature) or not (layer.reads.groups or layer.makes.groups):
                continue
            top = max(quantum, 8)
            depthwise = layer.signature.groups == DEPTHWISE
            for width in (top, 4 * top):
                if len(found) < MAX_BOUNDARIES:
                    number = self._signatures.index(layer.signature)
                    found[Cell(number, 1 if depthwise else width, width)] = None
        return list(found)

    def _networks(self, widths: Mapping[str, Integers]) -> list[tuple[Role, tuple[int, ...]]]:
        """Return the widths of the networks to measure, each for one purpose."""
        chosen, cost = self._settings, self._traced.cost
        steps = [widths[name] for name in cost.names]
        generator = np.random.default_rng(chosen.seed)
        equal_count = chosen.held_out // 2
        target = int(chosen.equal_keep * cost.reference.macs)
        equal = equal_macs_widths(steps, cost.macs, target, equal_count, generator)
        free = random_widths(steps, chosen.calibration + chosen.held_out - len(equal), generator)
        taken = {tuple(row) for row in equal.tolist()}
        rows = [tuple(row) for row in free.tolist() if tuple(row) not in taken]
        full = tuple(int(step[-1]) for step in steps)
        rows = [full, *(row for row in rows if row != full)]
        calibration, held_out = rows[: chosen.calibration], rows[chosen.calibration :]
        if len(calibration) < chosen.calibration or not held_out:
            raise UsageError(
                f"{self._traced.name}: only {len(rows)} networks with these multiples of channels could be "
                f"drawn, {chosen.calibration + 1} are needed: the network is too small for a table"
            )
        roles: list[tuple[Role, tuple[int, ...]]] = [("calibration", row) for row in calibration]
        roles += [("held-out", row) for row in held_out]
        roles += [("equal-macs", tuple(row)) for row in equal.tolist()]
        again = [row for _, row in roles[1 : 1 + REPEATED_NETWORKS]]
        return [*roles, *(("repeat", row) for row in again)]

    def _cell_job(self, cell: Cell, repeat: int) -> Job:
        signature = self._signatures[cell.signature]

        def make() -> Made:
            return build_cell(signature, cell.reads, cell.makes, batch=self._settings.batch, repeat=repeat)

        return Job(_cell_name(cell, repeat), make)

    def _network_job(self, role: Role, row: tuple[int, ...]) -> Job:
        return Job(_network_name(role, row), lambda: self._network(row))

    def _heaviest_cell(self) -> Made:
        """Return the reference's layer with the most multiply-adds."""
        sizes = self._traced.graph.sizes
        layer = max(self._layers, key=lambda layer: macs_of(layer, sizes))
        channels = (value_of(layer.reads, sizes), value_of(layer.makes, sizes))
        return build_cell(layer.signature, *channels, batch=self._settings.batch)

    def _network(self, row: Sequence[int]) -> Made:
        selection = {name: np.arange(width) for name, width in zip(self._traced.cost.names, row, strict=True)}
        return shrink(self._settled, self._traced.graph, selection), self._example()

    def _example(self) -> Any:
        """Return the input of the trace, as many times as the batch says."""

        def repeated(leaf: Any) -> Any:
            batch = self._settings.batch
            return torch.cat([leaf] * batch) if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf

        return pytree.tree_map(repeated, self._traced.example)


def _cell_name(cell: Cell, repeat: int) -> str:
    return f"cell {cell.signature} {cell.reads} {cell.makes} x{repeat}"


def _network_name(role: Role, row: Iterable[int]) -> str:
    return f"network {'again ' if role == 'repeat' else ''}{' '.join(map(str, row))}"


def _repeats(signature: Signature) -> bool:
    """Return whether a layer of as many channels in as out can stand behind itself."""
    if signature.kind == "linear":
        return True
    if signature.groups not in (1, DEPTHWISE) or signature.multiplier > 1:
        return False
    return signature.kind == "conv" and all(
        step == 1 and 2 * pad == spread * (kernel - 1)
        for step, pad, spread, kernel in zip(
            signature.stride, signature.padding, signature.dilation, signature.kernel, strict=True
        )
    )


def _explained(staircases: Sequence[Staircase]) -> str:
    """Say what each kind of layer would like."""
    words = [
        f"{curve.op} {curve.axis} "
        + ("hardly depends on the channels" if curve.flat else f"in steps of {curve.quantum}")
        for curve in staircases
    ]
    return "; ".join(words) or "nothing was probed"
