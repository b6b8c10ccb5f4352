"""What a compression gives: the stages, the layers, and both as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from archsearch import files
from archsearch.compression.shared import Shared

STAGE_COLUMNS = ("stage", "test accuracy %", "bytes", "ratio")
LAYER_COLUMNS = ("layer", "weights", "survive", "kept", "fillers", "values", "bytes", "ratio")


@dataclass(frozen=True)
class Stage:
    """What is left after one stage.

    Attributes:
        name: What was done.
        nbytes: Bytes that all tensors take, as the paper counts them; of the last, of the file.
        accuracy: Test accuracy in percent; ``None`` without data.
    """

    name: str
    nbytes: float
    accuracy: float | None = None


@dataclass(frozen=True)
class Layer:
    """One compressed layer.

    Attributes:
        name: Of the parameter.
        weights: In all.
        survivors: That were not pruned.
        entries: Survivors and fillers.
        values: Different weights.
        nbytes: In the file.
    """

    name: str
    weights: int
    survivors: int
    entries: int
    values: int
    nbytes: int

    @classmethod
    def of(cls, name: str, weights: Shared) -> Layer:
        """Return what is to be said of the quantised weights of one layer."""
        nbytes = weights.stage_bits().coded // 8
        values = len(weights.centroids)
        return cls(name, weights.size, len(weights.codes), weights.coded.entries, values, nbytes)


@dataclass(frozen=True)
class Compression:
    """What ``compress`` gives.

    Attributes:
        model: The network with the weights of the file.
        stages: In order; the first is the network as it came.
        layers: The compressed ones.
        conditions: What else is to be recorded.
        files: What was written.
    """

    model: nn.Module
    stages: Sequence[Stage]
    layers: Sequence[Layer]
    conditions: Mapping[str, Any]
    files: Sequence[Path] = ()

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than the weights."""
        return self.stages[0].nbytes / self.stages[-1].nbytes

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Yield the stages as cells, their names first."""
        yield STAGE_COLUMNS
        for stage in self.stages:
            accuracy = "-" if stage.accuracy is None else f"{stage.accuracy:.2f}"
            ratio = self.stages[0].nbytes / stage.nbytes
            yield stage.name, accuracy, f"{stage.nbytes:,.0f}", f"{ratio:.2f}x"

    def layer_rows(self) -> Iterator[tuple[str, ...]]:
        """Yield the layers as cells, their names first."""
        yield LAYER_COLUMNS
        for layer in self.layers:
            yield (
                layer.name,
                f"{layer.weights:,}",
                f"{layer.survivors:,}",
                f"{layer.survivors / layer.weights:.4f}",
                f"{layer.entries - layer.survivors:,}",
                f"{layer.values:,}",
                f"{layer.nbytes:,}",
                f"{4 * layer.weights / layer.nbytes:.2f}x",
            )

    def markdown(self) -> str:
        """Return conditions and tables as a page."""
        lines = [f"- {name}: {value}" for name, value in self.conditions.items()]
        for table in (self.rows(), self.layer_rows()):
            header, *rows = table
            lines += ["", *(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])]
        return "\n".join([*lines, ""])

    def write(self, directory: Path) -> list[Path]:
        """Write ``results.json`` and ``results.md``; return their paths."""
        as_json, as_table = directory / "results.json", directory / "results.md"
        tables = {name: [asdict(item) for item in getattr(self, name)] for name in ("stages", "layers")}
        files.write_json(as_json, {"conditions": dict(self.conditions), **tables})
        files.write_text(as_table, self.markdown())
        return [as_json, as_table]
