from __future__ import annotations

from pathlib import Path

import pytest

from archsearch.latency import processor

X86 = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
stepping\t: 8
flags\t\t: fpu vme: de

processor\t: 1
model name\t: another
"""

ARM = """processor\t: 0
BogoMIPS\t: 243.75
CPU implementer\t: 0x41
CPU architecture: 8
CPU part\t: 0xd40
CPU revision\t: 1
"""


@pytest.mark.parametrize(
    ("listed", "found"),
    [
        (
            X86,
            {
                "accelerator": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
                "processor": "cpu family 6, model 143, stepping 8",
            },
        ),
        (
            ARM,
            {
                "accelerator": "aarch64",
                "processor": "CPU implementer 0x41, CPU part 0xd40, CPU revision 1",
            },
        ),
        (None, {"accelerator": "aarch64"}),
    ],
)
def test_a_processor_is_told_by_name_and_revision(
    listed: str | None, found: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if listed is not None:
        (tmp_path / "cpuinfo").write_text(listed)
    monkeypatch.setattr(processor, "LISTED", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert processor.facts() == found
