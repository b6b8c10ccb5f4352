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
        """Whether anything is told here."""
        return self._nvml is not None

    def slowdowns(self) -> frozenset[str]:
        """Return why clocks are below the highest right now; empty where they are not, or nobody tells."""
        if self._nvml is None:
            return frozenset()
        bits = self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)
        return frozenset(name for bit, name in _REASONS.items() if bits & bit)

    def facts(self) -> dict[str, Any]:
        """Return the driver's version and the power limit in watts; ``None`` where nobody tells."""
        if self._nvml is None:
            return {"driver": None, "power_cap_w": None}
        milliwatts = self._nvml.nvmlDeviceGetPowerManagementLimit(self._handle)
        return {"driver": self._nvml.nvmlSystemGetDriverVersion(), "power_cap_w": milliwatts / 1000}
