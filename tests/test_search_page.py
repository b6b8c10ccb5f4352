from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from search_case import make_run

from archsearch.errors import UsageError
from archsearch.search.figures import FIGURES, figures
from archsearch.search.overview import Overview
from archsearch.search.page import write_page, write_plots
from archsearch.search.pictures import PICTURES, missing


def test_there_is_a_figure_for_every_picture() -> None:
    assert list(FIGURES) == list(PICTURES)


def test_the_page_has_every_figure_with_words_and_asks_nobody_else(tmp_path: Path) -> None:
    make_run(tmp_path)
    page, script = write_page(Overview.read(tmp_path), tmp_path)
    text = page.read_text(encoding="utf-8")
    for name, picture in PICTURES.items():
        assert f'id="{name}"' in text
        assert picture.title in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert [source for source in sources if not source.startswith("data:")] == [script.name]
    assert script.stat().st_size > 1_000_000


def test_a_title_cannot_bring_its_own_markup(tmp_path: Path) -> None:
    study = make_run(tmp_path)
    study.set_user_attr("facts", {**study.user_attrs["facts"], "model": "<script>alert(1)</script>"})
    page, _ = write_page(Overview.read(tmp_path), tmp_path)
    assert "<script>alert(1)" not in page.read_text(encoding="utf-8")


def test_the_figures_show_the_numbers_of_the_study(tmp_path: Path) -> None:
    make_run(tmp_path, latency=True)
    seen = Overview.read(tmp_path)
    drawn = figures(seen)
    searched, uniform, pruner = drawn["accuracy"].data
    assert list(searched.y) == [trial.value for trial in seen.searched]
    assert list(searched.x) == [trial.user_attrs["latency_ms"] for trial in seen.searched]
    assert seen.uniform is not None
    assert uniform.y[0] == pytest.approx(seen.uniform.mean)
    assert uniform.error_y.array[0] == pytest.approx(seen.uniform.deviation)
    assert uniform.error_y.visible
    assert not pruner.error_y.visible
    heat = drawn["keeps"].data[0]
    best = int(np.argmax(seen.values))
    np.testing.assert_allclose(heat.z[0], seen.keeps[best], atol=0.05)
    assert seen.posterior is not None
    curve = next(line for line in drawn["utility"].data if line.name == "layer0.0.conv1")
    assert list(curve.y) == list(seen.posterior.curves["layer0.0.conv1"].mean)
    assert [arm.x[0] for arm in drawn["finals"].data][::-1] == [arm.mean for arm in seen.arms]


def test_without_plotly_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path)
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(UsageError, match=r"pip install 'archsearch\[plots\]'"):
        write_plots(tmp_path)
    assert not (tmp_path / "plots").exists()


def test_what_is_missing_is_told_before_anything_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing() is None
    monkeypatch.setattr("archsearch.search.pictures.find_spec", lambda name: None)
    assert missing() == "no pictures without matplotlib and plotly: pip install 'archsearch[plots]'"
