"""The page of a search: its pictures as one HTML file that answers to the mouse, drawn by plotly."""

from __future__ import annotations

import html
from pathlib import Path

import optuna

from archsearch import files
from archsearch.errors import UsageError
from archsearch.search.figures import figures, plotly
from archsearch.search.overview import Overview
from archsearch.search.pictures import PICTURES, draw

DIRECTORY, PAGE, SCRIPT = "plots", "search.html", "plotly.min.js"


def write_plots(run: Path, study: optuna.Study | None = None) -> list[Path]:
    """Draw the search of a run directory into ``RUN/plots``; return the files.

    The page ``search.html`` has all pictures; the same ones are there as PNG files. Nothing else of the run
    is written, so that it may be done while the search goes on.

    Args:
        run: The run directory.
        study: Of the run, where the caller has it open; else the one in the directory is read.

    Raises:
        UsageError: If the run has no search, or matplotlib or plotly is not installed.
    """
    seen = Overview.read(run) if study is None else Overview.of(study, run)
    if not seen.trials:
        raise UsageError(f"{run}: no trial has ended yet: there is nothing to draw")
    plotly()
    directory = run / DIRECTORY
    files.probe(directory, 2**24)
    return [*draw(seen, directory), *write_page(seen, directory)]


def write_page(seen: Overview, directory: Path) -> list[Path]:
    """Write the page, and the one script that it needs beside it, so that it works without a network."""
    from plotly.offline import get_plotlyjs

    script, page = directory / SCRIPT, directory / PAGE
    files.write_text(script, get_plotlyjs())
    sections = []
    for name, figure in figures(seen).items():
        picture = PICTURES[name]
        plot = figure.to_html(full_html=False, include_plotlyjs=False, div_id=name)
        words = f"<h2>{html.escape(picture.title)}</h2>\n<p>{html.escape(picture.caption)}</p>"
        sections.append(f"<section>\n{words}\n{plot}\n</section>")
    title = html.escape(seen.title)
    files.write_text(page, _FRAME.format(title=title, script=SCRIPT, sections="\n".join(sections)))
    return [page, script]


_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; }}
body {{ margin: 2em auto; padding: 0 1em; }}
h1 {{ font-size: 1.4em; }}
h2 {{ font-size: 1.1em; margin: 2em 0 0; }}
p {{ max-width: 46em; margin: .3em 0; color: #555; }}
</style>
<script src="{script}"></script>
</head>
<body>
<h1>Search: {title}</h1>
<p>The values of trials are not results: they are noisy, and the best one is mostly the luckiest.
The finals decide.</p>
{sections}
</body>
</html>
"""
