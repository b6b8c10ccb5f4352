from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from archsearch.architecture import Architecture

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "plot_widths_by_method.py"))
main: Callable[[list[str]], int] = SCRIPT["main"]
labels_of: Callable[[list[Architecture]], list[str]] = SCRIPT["labels_of"]


def _architecture(first: int, *, model: str = "resnet20", **provenance: Any) -> Architecture:
    return Architecture.create(
        model=model,
        input_shape=(3, 32, 32),
        widths={"conv1": first, "conv2": 9},
        sizes={"conv1": 16, "conv2": 32},
        cost={"macs": {"value": 50, "reference": 100}},
        provenance=provenance,
    )


@pytest.mark.parametrize("count", [1, 4])
def test_the_picture_has_a_panel_for_each_file(count: int, tmp_path: Path) -> None:
    paths = []
    for number in range(count):
        paths.append(tmp_path / f"{number}.yaml")
        _architecture(number + 1, method=f"method_{number}").write(paths[-1])
    picture = tmp_path / "widths.svg"
    assert main([str(picture), *map(str, paths)]) == 0
    assert picture.read_bytes().startswith(b"<?xml")
    drawn = picture.read_text()
    assert all(f"method_{number}   0.500 of the MACs" in drawn for number in range(count))


def test_files_of_other_networks_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _architecture(3).write(tmp_path / "a.yaml")
    _architecture(3, model="resnet56").write(tmp_path / "b.yaml")
    words = [str(tmp_path / "widths.png"), str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]
    assert main(words) == 2
    assert "give files of one network" in capsys.readouterr().err
    assert not (tmp_path / "widths.png").exists()


def test_a_method_that_comes_twice_is_told_apart() -> None:
    files = [
        _architecture(3, method="l1_norm", allocation="local"),
        _architecture(4, method="l1_norm", allocation="global"),
        _architecture(5, method="l1_norm", allocation="global"),
        _architecture(6, method="fpgm", allocation="local"),
        _architecture(7),
    ]
    first, second, third, *others = labels_of(files)
    assert first == "l1_norm, local"
    assert second == f"l1_norm, global, {files[1].key[:6]}" != third
    assert others == ["fpgm", "by hand"]
