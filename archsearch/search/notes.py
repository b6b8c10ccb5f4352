"""The notes of a study and its trials, in the Markdown that the dashboard shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial

from archsearch.search.overview import unit

_READ = """### How to read it

{feasible}
- A trial's **value** is {unit}. It is **not a result**: it is noisy, it was measured on validation images,
  and the best of many trials is mostly the luckiest one.
- Trials of origin `uniform` have the same keep ratio everywhere. Those with further seeds show the noise:
  what differs by less says nothing.
- What counts are the **finals**: recommendation, uniform widths and pruners, trained anew with fresh seeds
  and measured once on the test set. They stand in `results.md` of the run, and in the plot *Finals* when
  they are done.
- Parameter importances are shares of a noisy spread. The plot of each group's utility says how sure the
  model is.
"""

_PROJECTED = """\
- Every trial meets the targets: its parameters are logits that were *projected* onto them. So all trials
  are feasible, and nothing has to be filtered."""

_PREDICTED = """\
- Every trial meets the targets, the latency *as predicted*: its parameters are logits that were *projected*
  onto them, with the upper end of the prediction's interval within the limit. So nothing has to be filtered.
  But no trial is measured, and what is measured may miss the target. Where the device is at hand, finalists
  are measured before the finals; one that misses is exported only where all miss."""


def of_study(facts: Mapping[str, Any]) -> str:
    """Return the note of a study: what is searched, and how to read the pages."""
    rows = [(name, _plain(value)) for name, value in facts.items() if name not in ("groups", "uniform")]
    groups = facts["groups"]
    rows.append(("channel groups", f"{len(groups)}, {sum(int(size) for _, size in groups):,} channels"))
    title = " on ".join(str(facts[name]) for name in ("model", "data") if name in facts)
    feasible = _PREDICTED if "latency_ms" in facts["reference"] else _PROJECTED
    how = _READ.format(unit=unit(facts), feasible=feasible)
    return f"## Search: {title}\n\n{_table(('', ''), rows)}\n{how}"


def of_trial(trial: FrozenTrial, facts: Mapping[str, Any], widths: Sequence[int]) -> str:
    """Return the note of a trial: where it comes from, what it costs, and its widths."""
    told = trial.user_attrs
    rows = [("origin", told.get("origin", "")), ("seed", told.get("seed", ""))]
    rows.append(("MACs", f"{told['macs']:,}, {100 * told['macs_kept']:.2f} % kept"))
    rows.append(("parameters", f"{told['params']:,}"))
    if "latency_ms" in told:
        low, at, high = (told[f"latency_{end}ms"] for end in ("low_", "", "high_"))
        rows.append(("predicted latency", f"{at:.4g} ms ({low:.4g} to {high:.4g})"))
    kept = [
        (f"`{name}`", str(width), str(size), f"{100 * width / size:.0f} %")
        for (name, size), width in zip(facts["groups"], widths, strict=True)
    ]
    table = _table(("channel group", "width", "of", "kept"), kept)
    return f"{_table(('', ''), rows)}\nThe value is {unit(facts)}; the finals decide, not it.\n\n{table}"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |\n" for line in lines)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)
