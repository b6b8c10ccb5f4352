from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from find_case import FACTORY, MACS
from rich.console import Console
from rich.table import Table

from archsearch.errors import UsageError
from archsearch.models import resolve
from archsearch.pictures import check_picture
from archsearch.rebuild import Traced, trace_source
from archsearch.report import (
    comparison,
    cost_table,
    describe_architecture,
    draw_graph,
    group_table,
    plot_widths,
)
from archsearch.results import Arm, Record

MAGIC = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml", ".pdf": b"%PDF"}
HALF = {"conv1": 4, "conv2": 8}


@pytest.fixture(scope="module")
def traced() -> Traced:
    return trace_source(resolve(FACTORY, trust_code=True), {}, (2, 6, 6))


def _text(table: Table) -> list[list[str]]:
    """Return the words of each row."""
    console = Console(width=160, color_system=None)
    with console.capture() as text:
        console.print(table)
    rows = [line.strip("│ ").split("│") for line in text.get().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row] for row in rows]


def test_a_group_has_the_share_of_the_macs_that_would_vanish_with_it(traced: Traced) -> None:
    conv1, conv2, fc = 36 * 9 * 2 * 4, 9 * 9 * 4 * 8, 8 * 3
    total = conv1 + conv2 + fc
    rows = _text(group_table(traced, HALF))
    assert [row[:5] for row in rows] == [["conv1", "1", "4", "8", "0.50"], ["conv2", "1", "8", "16", "0.50"]]
    assert rows[0][5] == f"{(conv1 + conv2) / total:.1%}"
    assert rows[1][5] == f"{(conv2 + fc) / total:.1%}"
    assert rows[0][6] == f"{(36 * 9 * 2 * 8 + 9 * 9 * 8 * 16) / MACS:.1%}"


def test_the_cost_table_shows_other_counters_beside_ours(traced: Traced) -> None:
    rows = {row[0]: row[1:] for row in _text(cost_table(traced, HALF))}
    small = 36 * 9 * 2 * 4 + 9 * 9 * 4 * 8 + 8 * 3
    assert rows["MACs"] == [f"{small:,}", f"{MACS:,}", f"{small / MACS:.4f}"]
    assert rows["torch's FLOP counter / 2"] == rows["MACs"]


def test_the_comparison_has_one_row_an_arm_with_mean_and_deviation() -> None:
    arms = [
        Arm("reference", "reference", "reference", 200, 50, 20, (90.0, 92.0), 12.4),
        Arm("l1_norm, not trained", "l1_norm", "none", 100, 25),
    ]
    assert _text(comparison(Record({}, arms))) == [
        ["reference", "91.00 ± 1.41", "200", "1.0000", "50", "1.0000", "20", "12"],
        ["l1_norm, not trained", "-", "100", "0.5000", "25", "0.5000", "-", "-"],
    ]


@pytest.mark.parametrize("suffix", MAGIC)
def test_pictures_are_written_in_the_kind_that_their_name_asks_for(
    traced: Traced, tmp_path: Path, suffix: str
) -> None:
    widths, graph = tmp_path / f"widths{suffix}", tmp_path / f"graph{suffix}"
    plot_widths(traced, HALF, widths, "tiny")
    draw_graph(traced, graph)
    for path in (widths, graph):
        assert path.read_bytes().startswith(MAGIC[suffix])
        assert path.stat().st_size > 4000


def test_the_drawn_graph_names_every_layer_and_group(traced: Traced, tmp_path: Path) -> None:
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):
        draw_graph(traced, tmp_path / "graph.svg")
    text = (tmp_path / "graph.svg").read_text()
    assert all(word in text for word in (">fc<", "conv1  (8)", "conv2  (16)"))


@pytest.mark.parametrize(
    ("name", "message"), [("x.bmp", r"ends in \.png, \.svg, \.pdf"), ("no/x.png", "there is no directory")]
)
def test_a_picture_that_cannot_be_is_refused_before_it_is_drawn(
    tmp_path: Path, name: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check_picture(tmp_path / name)


def test_showing_a_file_verifies_it(traced: Traced, tmp_path: Path) -> None:
    path, shown = tmp_path / "a.yaml", list[Any]()
    traced.architecture(HALF).write(path)
    again, widths = describe_architecture(path, True, shown.append)
    assert widths == HALF
    assert again.graph.sizes == traced.graph.sizes
    assert str(shown[-1]).startswith("verified: equal to the reference")
