"""Make a latency table: probe the staircase, measure cells, then whole networks to calibrate and to test.

Everything is measured in groups that take turns, each beside one reference: the same cell for all cells, the
unpruned network for all networks. What was measured is written down at once; the same command goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from archsearch.errors import UsageError
from archsearch.latency.cells import DEPTHWISE, Cell, Layer, Signature, build_cell
from archsearch.latency.content import FORMAT, CellRecord, Content, Group, NetworkRecord, Role
from archsearch.latency.journal import Journal
from archsearch.latency.knots import choose_knots, macs_of, value_of
from archsearch.latency.meter import Made, Meter, RuntimeMeter, Settings
from archsearch.latency.quantum import (
    FEWEST,
    PROBES,
    TOP,
    Allowed,
    Staircase,
    choose_widths,
    find_quantum,
    stairs_of,
)
from archsearch.latency.sampling import equal_macs_widths, random_widths, without_branches
from archsearch.latency.subject import Subject
from archsearch.latency.table import LatencyTable
from archsearch.latency.workbench import Job, Workbench
from archsearch.rebuild import Traced

Integers: TypeAlias = npt.NDArray[np.int64]

REPEAT = 3
"""Layers behind each other in the cells that tell what it costs to enter and leave one."""

MAX_BOUNDARIES = 8
LEAST_SHARE = 0.05
"""Of the layers or the multiply-adds: what kinds of layers are probed."""

EQUAL_KEEP = 0.5
"""Of the MACs, in the networks of equal MACs; half-way to the smallest network where that is out of reach."""

FEW = 1.25
"""Times the MACs of the smallest network, below which there are too few to choose from."""

REPEATED_NETWORKS = 3
"""That are measured twice, for the noise."""


class Profile:
    """Measures one network on one device.

    Args:
        traced: The reference; with the branches that may vanish, networks without them are measured as well.
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
        self._subject = Subject(traced, settings)
        self._layers = self._subject.layers
        self._signatures = list(dict.fromkeys(layer.signature for layer in self._layers))
        protocols = [vars(settings.cells), vars(settings.networks)]
        self._journal = Journal(journal, {"subject": self._subject.key, "protocols": protocols})
        self._bench = Workbench(
            settings,
            meter or RuntimeMeter(settings),
            self._journal,
            {
                "cell": self._heaviest_cell,
                "network": lambda: self._subject.network(traced.cost.sizes.tolist()),
            },
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
        if self._settings.round_to is None:
            widths = choose_widths(self._allowed, quantum)
            finer = sum(len(steps) != len(widths[name]) for name, steps in self._allowed(quantum).items())
            if finer:
                self._say(
                    f"{finer} groups have finer multiples: these would leave them fewer than {FEWEST} widths"
                )
        else:
            quantum = self._settings.round_to
            widths = dict(self._allowed(quantum))
        sizes = self._traced.graph.sizes
        boundaries = self._boundaries(quantum)
        left = self._settings.max_cells - self._probe_count - 2 * len(boundaries)
        stairs = {one: stairs_of(one, staircases, quantum) for one in self._signatures}
        left = self._bench.affordable(left, 2 * len(boundaries))
        axes = choose_knots(self._layers, widths, sizes, stairs, quantum, left)
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
        self._bench.say_flags()
        return LatencyTable(
            Content(
                format=FORMAT,
                conditions=self._subject.conditions,
                fingerprint=self._subject.fingerprint,
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
                measuring_s=self._journal.measuring_s,
                preparing_s=self._journal.preparing_s,
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
        least = int(cost.macs(np.array([[step[0] for step in steps]]))[0])
        target = int(EQUAL_KEEP * cost.reference.macs)
        if target < FEW * least:
            target = (least + cost.reference.macs) // 2
        equal = equal_macs_widths(steps, cost.macs, target, equal_count, generator)
        free = random_widths(steps, chosen.calibration + chosen.held_out - len(equal), generator)
        taken = {tuple(row) for row in equal.tolist()}
        rows = [tuple(row) for row in free.tolist() if tuple(row) not in taken]
        full = tuple(int(step[-1]) for step in steps)
        rows = [full, *(row for row in rows if row != full)]
        columns = {name: column for column, name in enumerate(cost.names)}
        branches = [[columns[name] for name in branch.groups] for branch in self._traced.graph.branches]
        rows = [full, *without_branches(rows[1:], branches, generator)]
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
        return Job(_network_name(role, row), lambda: self._subject.network(row))

    def _heaviest_cell(self) -> Made:
        """Return the reference's layer with the most multiply-adds."""
        sizes = self._traced.graph.sizes
        layer = max(self._layers, key=lambda layer: macs_of(layer, sizes))
        channels = (value_of(layer.reads, sizes), value_of(layer.makes, sizes))
        return build_cell(layer.signature, *channels, batch=self._settings.batch)


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
        + ("hardly depends on the channels" if curve.flat else f"in steps of {curve.block}")
        for curve in staircases
    ]
    return "; ".join(words) or "nothing was probed"
