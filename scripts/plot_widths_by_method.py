"""Draw the widths that several methods find on one network, side by side.

    python scripts/plot_widths_by_method.py PICTURE ARCH.yaml ARCH.yaml ...

Each architecture file gets a panel, named after its method, with the kept width of each channel group in
front of the reference's; the panels share their axes. The picture in the docs was made from the files of

    for method in $(archsearch list pruners | cut -d ' ' -f 1); do
      archsearch find --model resnet20 --data digits --flops 0.5 --budget none --method $method \
        --out runs/widths/$method
    done
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from archsearch.architecture import Architecture
from archsearch.errors import ArchsearchError, UsageError
from archsearch.pictures import check_picture, pyplot

COLUMNS = 3
KEPT, REFERENCE = "#2f6f9f", "#d9dee3"  # as in `archsearch show --plot`


def read(paths: Sequence[Path]) -> list[Architecture]:
    """Read architectures of one network.

    Raises:
        UsageError: If they are of several.
    """
    found = [Architecture.read(path) for path in paths]
    sizes = [{name: group.size for name, group in architecture.widths.items()} for architecture in found]
    for path, architecture, others in zip(paths, found, sizes, strict=True):
        if (architecture.model, others) != (found[0].model, sizes[0]):
            raise UsageError(
                f"{path}: is of {architecture.model} with other groups than {found[0].model} of {paths[0]}: "
                "give files of one network"
            )
    return found


def labels_of(architectures: Sequence[Architecture]) -> list[str]:
    """Return the methods; with their allocation where a method comes twice, and the key where both do."""
    facts = [architecture.provenance for architecture in architectures]
    labels = [str(fact.get("method", "by hand")) for fact in facts]
    times = Counter(labels)
    labels = [
        f"{label}, {fact.get('allocation', '')}" if times[label] > 1 else label
        for label, fact in zip(labels, facts, strict=True)
    ]
    times = Counter(labels)
    return [
        f"{label}, {architecture.key[:6]}" if times[label] > 1 else label
        for label, architecture in zip(labels, architectures, strict=True)
    ]


def draw(architectures: Sequence[Architecture], picture: Path) -> None:
    """Draw one panel an architecture."""
    plot = pyplot()
    names = list(architectures[0].widths)
    columns = min(COLUMNS, len(architectures))
    rows = math.ceil(len(architectures) / columns)
    places = range(len(names))
    width = columns * max(2.6, 0.13 * len(names) + 0.8)
    with plot.rc_context({"font.size": 8}):
        figure, panels = plot.subplots(
            rows, columns, sharex=True, sharey=True, squeeze=False, layout="constrained",
            figsize=(width, 1.35 * rows + 1.0),
        )  # fmt: skip
        for panel, architecture, label in zip(
            panels.flat, architectures, labels_of(architectures), strict=False
        ):
            groups = architecture.widths.values()
            panel.bar(places, [group.size for group in groups], width=0.86, color=REFERENCE)
            panel.bar(places, [group.width for group in groups], width=0.86, color=KEPT)
            macs = f"   {architecture.keep:.3f} of the MACs" if architecture.keep is not None else ""
            panel.set_title(f"{label}{macs}", loc="left", fontsize=8)
        for panel in panels.flat:
            panel.spines[["top", "right"]].set_visible(False)
            panel.set_xticks(places, names, rotation=90, fontsize=6)
        for panel in panels.flat[len(architectures) :]:
            panel.set_visible(False)
        for panel in panels.flat[max(0, len(architectures) - columns) : len(architectures)]:
            panel.tick_params(labelbottom=True)  # also above a place where no panel is
        figure.supylabel("channels", fontsize=8)
        figure.savefig(picture, dpi=150)
        plot.close(figure)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("picture", type=Path, metavar="PICTURE", help="a .png, .svg or .pdf file")
    parser.add_argument("architectures", type=Path, nargs="+", metavar="ARCH.yaml")
    options = parser.parse_args(words)
    try:
        check_picture(options.picture)
        draw(read(options.architectures), options.picture)
    except ArchsearchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {options.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
