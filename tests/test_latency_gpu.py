"""What only a GPU can show. Each test needs one, and some a package beside torch: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from archsearch.errors import UsageError
from archsearch.latency.bench import bench
from archsearch.latency.devices import Cuda, opened
from archsearch.latency.fingerprint import fingerprint
from archsearch.latency.measure import Protocol, measure, measure_interleaved
from archsearch.latency.meter import Settings
from archsearch.latency.profile import Profile
from archsearch.latency.runtimes import prepare
from archsearch.latency.selftest import selftest
from archsearch.latency.watch import ClockWatch
from archsearch.models import resolve
from archsearch.rebuild import trace_source
from archsearch.space import Bounds, SearchSpace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
QUICK = Protocol(warm_up_s=0.05, blocks=5, block_s=0.01)
EXAMPLE = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
EACH_GPU = [f"cuda:{index}" for index in range(max(1, torch.cuda.device_count()))]


def net(channels: int = 64) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 256, 3)
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("runtime", ["torch", "compile", "cudagraph", "onnxruntime", "tensorrt"])
def test_every_runtime_is_measured_and_more_work_takes_longer(runtime: str, dtype: str) -> None:
    if runtime in ("onnxruntime", "tensorrt"):  # whose outputs are compared with torch's on the way
        pytest.importorskip(runtime)
    calls = [prepare(net(width), EXAMPLE, runtime, device="cuda", dtype=dtype) for width in (32, 256)]
    small, large = measure_interleaved(calls, QUICK, "cuda")
    assert 0 < small.median_ms < large.median_ms < 100
    assert large.ratio is not None
    assert large.ratio > 1.2  # of eight times the work, and a small network waits for its launches


@pytest.mark.parametrize("device", EACH_GPU)
@pytest.mark.parametrize("runtime", ["torch", "cudagraph", "onnxruntime", "tensorrt"])
def test_every_gpu_does_its_own_work(runtime: str, device: str) -> None:
    if runtime in ("onnxruntime", "tensorrt"):
        pytest.importorskip(runtime)
    measured = measure(net(), EXAMPLE, runtime, device, QUICK, dtype="float16")
    assert 0 < measured.median_ms < 100
    assert measured.fingerprint["accelerator"] == torch.cuda.get_device_name(device)


@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
def test_a_deep_network_in_float32_computes_what_torch_does(runtime: str) -> None:
    pytest.importorskip(runtime)
    example = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prepare(resolve("resnet56").build(), example, runtime, device="cuda")()


def test_replays_of_two_networks_in_turn_keep_their_weights_and_inputs() -> None:
    outputs: dict[int, torch.Tensor] = {}

    class Kept(nn.Module):
        """Leaves what it computes where the replay writes it."""

        def __init__(self, channels: int) -> None:
            super().__init__()
            self.channels, self.net = channels, net(channels)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            outputs[self.channels] = self.net(x)
            return outputs[self.channels]

    calls = {}
    for channels in (64, 96):
        calls[channels] = prepare(Kept(channels), EXAMPLE, "cudagraph", device="cuda")
        torch.cuda.empty_cache()
    with torch.inference_mode():
        # What the first network's memory is given to, if it was freed.
        filled = [torch.full((2**18,), float("nan"), device="cuda") for _ in range(64)]
        for channels in (64, 96, 64):
            outputs[channels].fill_(float("nan"))
            torch.cuda.synchronize()
            calls[channels]()
            torch.cuda.synchronize()
            expected = net(channels)(EXAMPLE)
            torch.testing.assert_close(outputs[channels].cpu(), expected, rtol=1e-2, atol=1e-2)
    del filled


def test_a_network_that_waits_for_the_gpu_is_measured_without_its_replay() -> None:
    class Waiting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 64, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(UsageError, match="cannot be recorded as a CUDA graph"):
        prepare(Waiting(), EXAMPLE, "cudagraph", device="cuda")
    measured = measure(Waiting(), EXAMPLE, "torch", "cuda", QUICK)
    assert measured.flags == ("not recordable as a CUDA graph: launch-bound share unknown",)
    assert measure(net(), EXAMPLE, "torch", "cuda", QUICK).replay_ms is not None  # nothing stays broken


def test_float32_is_what_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    device = opened("cuda")
    ampere = torch.cuda.get_device_capability()[0] >= 8
    assert device.tf32 == ampere
    assert fingerprint("torch", "cuda")["tf32"] == ampere
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    assert not device.tf32
    assert not fingerprint("torch", "cuda")["tf32"]


def test_the_driver_tells_its_version_and_of_slowdowns() -> None:
    pytest.importorskip("pynvml")
    watch = ClockWatch.of_cuda(0)
    facts = watch.facts()
    assert facts["driver"]
    assert facts["power_cap_w"] is None or 1 < facts["power_cap_w"] < 5000
    assert watch.watching
    assert isinstance(watch.slowdowns(), frozenset)


def test_memory_is_counted_by_torch(tmp_path: Path) -> None:
    traced = trace_source(resolve("resnet20"), {}, (3, 32, 32))
    widths = {name: max(1, size // 2) for name, size in traced.graph.sizes.items()}
    path = tmp_path / "half.yaml"
    traced.architecture(widths).write(path)
    reference, half = bench([path], device="cuda", batch=512, protocol=QUICK).entries
    assert reference.memory_measured
    assert 0.3 < half.memory_bytes / reference.memory_bytes < 1
    computed = 4 * reference.params + 512 * traced.cost.reference.peak_activation_bytes
    assert 0.5 < reference.memory_bytes / computed < 5


def test_a_small_table_is_made() -> None:
    traced = trace_source(resolve("resnet20"), {}, (3, 32, 32))

    def allowed(quantum: int) -> Mapping[str, Any]:
        return SearchSpace(Bounds(round_to=quantum)).allowed(traced.graph)

    settings = Settings(
        runtime="cudagraph", device="cuda", batch=8, max_cells=60, calibration=10, held_out=10, blocks=3
    )
    table = Profile(traced, allowed, settings).run()
    assert table.reference_ms > 0
    assert table.content.fingerprint["accelerator"] == torch.cuda.get_device_name()


def test_the_selftest_passes() -> None:
    found = {each.name: each for each in selftest("cuda")}
    for name in ("clock", "scale", "noise", "triton.testing.do_bench", "replay of a CUDA graph"):
        assert found[name].ok, found[name].words


def test_all_callers_share_the_stream_of_a_gpu() -> None:
    assert isinstance(opened("cuda"), Cuda)
    assert opened("cuda") is opened("cuda:0")
    with opened("cuda").current():
        own = torch.cuda.current_stream()
    assert own != torch.cuda.default_stream()
    with opened("cuda:0").current():
        assert torch.cuda.current_stream() == own
