"""Which processor this is: its name, and what tells it from others that a cloud calls by the same one."""

from __future__ import annotations

import platform
from pathlib import Path

LISTED = Path("/proc/cpuinfo")

EXACT = ("cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU revision")
"""What x86 and ARM kernels tell of a design and its revision."""


def facts() -> dict[str, str]:
    """Return ``accelerator``, as its maker writes it, and ``processor``, where the system tells more."""
    told = _told()
    exact = ", ".join(f"{field} {told[field]}" for field in EXACT if field in told)
    name = told.get("model name") or platform.processor() or platform.machine()
    return {"accelerator": name, **({"processor": exact} if exact else {})}


def _told() -> dict[str, str]:
    """Return what the system tells of the first processor."""
    if not LISTED.is_file():
        return {}
    first, _, _ = LISTED.read_text(encoding="utf-8", errors="replace").partition("\n\n")
    fields = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}
