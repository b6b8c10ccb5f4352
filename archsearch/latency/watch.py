"""Whether a GPU slows itself down while it is measured, as its driver tells (nvidia-ml-py)."""

from __future__ import annotations

from typing import Any

import torch

# Names of NVML's bits; docs.nvidia.com/deploy/nvml-api, "Clocks Event Reasons". An idle GPU, clocks that the
# user has set and the power limit are not among them: they are no fault of the moment, and the limit stands
# in the fingerprint.
_REASONS = {
    0x08: "hardware slowdown",
    0x20: "thermal limit (software)",
    0x40: "thermal limit (hardware)",
    0x80: "power brake",
}


class ClockWatch:
    """Reads, never changes, what a driver tells about clocks.

    Args:
        nvml: The module ``pynvml``, initialised; ``None`` where it is not installed.
        handle: NVML's handle of the GPU.
    """

    def __init__(self, nvml: Any = None, handle: Any = None) -> None:
        self._nvml, self._handle = nvml, handle

    @classmethod
    def of_cuda(cls, index: int) -> ClockWatch:
        """Return the watch of the GPU that torch calls ``index``.

        The two count in different orders, so that the GPU is looked up by its identity.
        """
        try:
            import pynvml
        except ImportError:
            return cls()
        try:
            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(index).uuid
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
        except pynvml.NVMLError:
            return cls()  # a driver that tells nothing, in some containers: ``watching`` says so

    @property
    def watching(self) -> bool:
        """Whether anybody tells here when the GPU slows down."""
        return self._reasons() is not None

    def slowdowns(self) -> frozenset[str]:
        """Return why clocks are below the highest right now; empty where they are not, or nobody tells."""
        bits = self._reasons() or 0
        return frozenset(name for bit, name in _REASONS.items() if bits & bit)

    def facts(self) -> dict[str, Any]:
        """Return the driver's version and the power limit in watts; ``None`` where nobody tells."""
        milliwatts = self._asked("nvmlDeviceGetPowerManagementLimit", self._handle)
        return {
            "driver": self._asked("nvmlSystemGetDriverVersion"),
            "power_cap_w": None if milliwatts is None else milliwatts / 1000,
        }

    def _reasons(self) -> int | None:
        bits: int | None = self._asked("nvmlDeviceGetCurrentClocksThrottleReasons", self._handle)
        return bits

    def _asked(self, query: str, *about: Any) -> Any:
        """Return NVML's answer; ``None`` where it has none, such as for the power limit of many laptops."""
        if self._nvml is None:
            return None
        try:
            return getattr(self._nvml, query)(*about)
        except self._nvml.NVMLError:
            return None
