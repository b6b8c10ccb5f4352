"""The tables of this machine: measured when one is first asked for, and found again by what they are of."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from archsearch import files
from archsearch.latency.meter import Meter, Settings
from archsearch.latency.profile import Profile
from archsearch.latency.quantum import Allowed
from archsearch.latency.subject import Subject
from archsearch.latency.table import LatencyTable
from archsearch.rebuild import Traced

TABLE = "dev.lat.json"
WAIT_S = 0.5


def own_table(
    traced: Traced,
    allowed: Allowed,
    settings: Settings,
    directory: Path,
    *,
    leads: bool = True,
    meter: Meter | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> LatencyTable:
    """Return the table of a network on this machine; measure it where there is none yet.

    What was measured of one that was stopped is found again. Another driver, another version of the runtime,
    another batch, other multiples of channels make another table, each in a directory of its own.

    Args:
        traced: The reference.
        allowed: Returns the widths that each group may have, given the multiples of channels worth having.
        settings: What runs it, and how well to measure.
        directory: Of all tables.
        leads: Whether this process measures; of several that run the same command the others wait.
        meter: What measures; the runtime by default.
        say: Called with each line for the user.

    Raises:
        StorageError: If another process measures the same table now.
        UsageError: If the network cannot be measured here.
    """
    subject = Subject(traced, settings)
    words = [traced.name, settings.runtime, settings.device, f"b{settings.batch}", settings.dtype]
    words += [f"by{settings.round_to}"] if settings.round_to is not None else []
    name = "-".join(words)
    home = directory / f"{files.plain(name)}-{subject.key[:12]}"
    path = home / TABLE
    while not leads and not path.exists():
        time.sleep(WAIT_S)
    if path.exists():
        say(f"latency: by {path}")
        return LatencyTable.read(path, subject.fingerprint)
    files.probe(home, 2**20)
    with files.lock(home):
        if path.exists():
            return LatencyTable.read(path, subject.fingerprint)
        say(f"latency: there is no table of {traced.name} on this machine yet: measures {path}")
        profile = Profile(traced, allowed, settings, journal=journal_of(path), meter=meter, say=say)
        table = profile.run()
        table.write(path)
        profile.finish()
    return table


def journal_of(table: Path) -> Path:
    """Return where the measurements of a table stand until it is written; see ``Journal``."""
    return table.with_name(f"{table.name}.part")
