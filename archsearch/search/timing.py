"""How long the finalists of a search take on the device of the target, each measured once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archsearch.architecture import Architecture
from archsearch.on_device import Device, measured, note, predicted
from archsearch.rebuild import Traced
from archsearch.search.export import write_finalist
from archsearch.search.finals import Finalist
from archsearch.trainer import Say


@dataclass(frozen=True)
class Stopwatch:
    """Measures networks in fresh processes; what stands in their files is not measured again.

    Attributes:
        device: Whose latency counts.
        trust_code: Whether a model that names the user's own code may be imported.
        say: Takes lines for the user.
    """

    device: Device
    trust_code: bool = False
    say: Say = lambda line: None

    def times(
        self, traced: Traced, finalists: Sequence[Finalist], directory: Path
    ) -> dict[str, dict[str, Any]]:
        """Return prediction and, if this is the device, measurement of each finalist by name.

        Each gets an architecture file that says so. Equal widths are one network, measured once.

        Raises:
            UsageError: If a network cannot be measured here.
        """
        found: dict[str, dict[str, Any]] = {}
        by_key: dict[str, dict[str, Any]] = {}
        for each in finalists:
            path, key = write_finalist(traced, each.name, each.widths, directory)
            seen = predicted(self.device.table, each.widths)
            known = by_key.get(key) or _known(path, seen["table"])
            if known is None and self.device.here:
                known = measured(path, seen, trust_code=self.trust_code, say=self.say)
            found[each.name] = by_key[key] = known or seen
            note(path, found[each.name])
        return found


def _known(path: Path, table: str) -> dict[str, Any] | None:
    """Return what was measured before of the network of a file, with the same table."""
    facts = Architecture.read(path).provenance.get("latency")
    if isinstance(facts, Mapping) and facts.get("verified") and facts.get("table") == table:
        return dict(facts)
    return None
