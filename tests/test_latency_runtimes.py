from __future__ import annotations

import contextlib
import gc
import re
import sys
import types
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from virtual_device import VirtualDevice

from archsearch.errors import ResourceError, UnknownNameError, UsageError
from archsearch.latency import runtimes
from archsearch.latency.devices import Cpu, Cuda, opened
from archsearch.latency.fingerprint import differences, fingerprint
from archsearch.latency.measure import Protocol, measure_interleaved
from archsearch.latency.runtimes import RUNTIMES, prepare
from archsearch.latency.watch import ClockWatch

EXAMPLE = torch.randn(2, 3, 8, 8)
ON_CPU = sorted(name for name in ("torch", "onnxruntime", "openvino") if name in RUNTIMES)


class Watched(nn.Module):
    """A network that writes down what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.seen: list[Tensor] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Watched:
        twin = Watched()
        twin.load_state_dict(self.state_dict())
        twin.seen = self.seen
        return twin

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        self.seen.append(x)
        return self.norm(self.conv(x))


def net(channels: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU())


def test_the_runtimes_are_those_of_the_issue() -> None:
    assert RUNTIMES.names() == ["compile", "cudagraph", "onnxruntime", "openvino", "tensorrt", "torch"]


@pytest.mark.parametrize("runtime", ON_CPU)
def test_a_runtime_leaves_the_network_as_it_was(runtime: str) -> None:
    if runtime != "torch":
        pytest.importorskip(runtime)
    model = net().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepare(model, EXAMPLE, runtime)()
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_call_runs_once_with_the_dtype_and_layout_asked_for(dtype: str, channels_last: bool) -> None:
    model = Watched()
    call = prepare(model, EXAMPLE, dtype=dtype, channels_last=channels_last)
    model.seen.clear()
    call()
    (seen,) = model.seen
    assert str(seen.dtype) == f"torch.{dtype}"
    assert seen.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert seen.is_inference() is False  # our own, made outside


def test_named_and_several_inputs_arrive_and_integers_stay_integers() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3)

        def forward(self, index: Tensor, scale: Tensor) -> Tensor:
            assert index.dtype == torch.int64
            assert scale.dtype == torch.bfloat16
            return self.table(index) * scale

    index, scale = torch.tensor([1, 2]), torch.ones(1)
    prepare(Two(), (index, scale), dtype="bfloat16")
    prepare(Two(), {"scale": scale, "index": index}, dtype="bfloat16")


def test_a_network_of_volumes_keeps_its_layout() -> None:
    prepare(nn.Conv3d(1, 2, 3), torch.randn(1, 1, 4, 4, 4))()


def test_what_cannot_be_had_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="did you mean onnxruntime"):
        prepare(net(), EXAMPLE, "onnxruntim")
    with pytest.raises(UsageError, match="--runtime tensorrt: does not run on cpu: give --device cuda"):
        prepare(net(), EXAMPLE, "tensorrt")
    with pytest.raises(UsageError, match="--dtype float16: onnxruntime on cpu runs float32"):
        prepare(net(), EXAMPLE, "onnxruntime", dtype="float16")
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs onnx, onnxscript, onnxruntime: pip install 'archsearch\["):
        prepare(net(), EXAMPLE, "onnxruntime")


# ---------------------------------------------------------------------------------------- torch.compile


def test_the_compiler_is_shown_the_outputs_and_a_code_object_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: given.append(function) or function)
    model = net().eval()
    prepare(model, EXAMPLE, "compile", channels_last=False)
    prepare(model, EXAMPLE, "compile", channels_last=False)
    with torch.no_grad():  # a network whose outputs nobody sees is compiled to nothing
        assert torch.equal(given[0](), model(EXAMPLE))
    assert given[0].__code__ == given[1].__code__
    assert given[0].__code__ is not given[1].__code__


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    def broken(function: Any, dynamic: bool) -> Any:
        def fails() -> None:
            raise InvalidCxxCompiler

        return fails

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UsageError, match=r"--runtime compile: .*apt install g\+\+ python3-dev"):
        prepare(net(), EXAMPLE, "compile")


@pytest.mark.slow
def test_every_one_of_many_networks_is_compiled(request: pytest.FixtureRequest) -> None:
    from torch._dynamo.utils import counters

    # Compiled code holds for the number of threads that it was compiled with.
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(1)
    counters.clear()
    calls = [prepare(net(channels), EXAMPLE, "compile") for channels in range(2, 12)]
    assert counters["stats"]["unique_graphs"] == 10  # torch itself stops at eight
    calls[0]()
    assert counters["stats"]["unique_graphs"] == 10


@pytest.mark.slow
def test_a_compiled_network_takes_as_long_as_its_work() -> None:
    model = nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1) for _ in range(4)))
    example = torch.randn(1, 32, 32, 32)
    calls = [prepare(model, example, runtime) for runtime in ("torch", "compile")]
    quick = Protocol(warm_up_s=0.01, blocks=5, block_s=0.01)
    assert 0.3 < (measure_interleaved(calls, quick)[1].ratio or 0) < 2


# --------------------------------------------------------------------------------- without the hardware


def test_a_graph_is_replayed_in_place_of_the_kernels() -> None:
    class Recorder(VirtualDevice):
        def capture(self, call: Any) -> Any:
            call()
            return lambda: self.log.append("replay")

    device = Recorder(name="cpu")
    model = Watched()
    call = prepare(model, EXAMPLE, "cudagraph", device=device)
    assert len(model.seen) == 1  # while it was recorded
    call()
    assert device.log.count("replay") == 2
    assert len(model.seen) == 1


class FakeCuda:
    """The part of ``torch.cuda`` that records graphs; a graph knows no tensor, and what is run runs here."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.breaks: list[RuntimeError] = []
        self.streams = [self.Stream()]
        fake = self

        class Graph:
            def replay(self) -> None:
                pass

        @contextlib.contextmanager
        def recording(graph: Graph, stream: object) -> Iterator[None]:
            assert stream is fake.streams[-1]
            try:
                yield
                for error in fake.breaks:
                    raise error
            finally:
                if len(fake.breaks) > 1:
                    raise fake.breaks[-1]

        @contextlib.contextmanager
        def stream(stream: FakeCuda.Stream) -> Iterator[None]:
            fake.streams.append(stream)
            yield
            fake.streams.pop()

        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", recording)
        patch.setattr(torch.cuda, "Stream", lambda index: self.Stream())
        patch.setattr(torch.cuda, "stream", stream)
        patch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda index: self.streams[-1])
        patch.setattr(torch.cuda, "synchronize", lambda index: None)

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    def device(self) -> Cuda:
        device = Cuda(0, ClockWatch())
        device.name = "cpu"
        return device


def test_weights_and_input_live_as_long_as_the_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(nn.Conv2d):
        alive: ClassVar[list[weakref.ref[Tensor]]] = []

        def forward(self, x: Tensor) -> Tensor:
            self.alive[:] = map(weakref.ref, (self.weight, x))
            return super().forward(x)

    device = FakeCuda(monkeypatch).device()
    call = prepare(Seen(3, 4, 3), EXAMPLE, "cudagraph", device=device)
    gc.collect()
    assert all(tensor() is not None for tensor in Seen.alive)
    call()
    del call
    gc.collect()
    assert all(tensor() is None for tensor in Seen.alive)


def test_what_breaks_a_recording_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)
    device = fake.device()
    fake.breaks = [RuntimeError("a call that waits\nC++ trace"), RuntimeError("invalidated")]
    with pytest.raises(UsageError, match=r"recorded as a CUDA graph \(a call that waits\): give"):
        device.capture(lambda: None)
    fake.breaks = [torch.OutOfMemoryError("CUDA out of memory")]
    with pytest.raises(ResourceError, match="no memory is left to record the network"):
        device.capture(lambda: None)


def test_a_cpu_has_no_graphs() -> None:
    with pytest.raises(UsageError, match="--runtime cudagraph"):
        Cpu().capture(lambda: None)


class FakeTensorRT(types.ModuleType):
    """Takes the calls of TensorRT's Python API and writes down their order; computes with ONNX Runtime."""

    def __init__(self, readable: bool = True) -> None:
        super().__init__("tensorrt")
        self.readable = readable
        self.addresses: dict[str, int] = {}
        self.ran: list[int] = []
        self.cleared: list[str] = []
        self.BuilderFlag = types.SimpleNamespace(TF32="tf32")
        self.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
        self.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=1)
        self.TensorIOMode = types.SimpleNamespace(INPUT="in", OUTPUT="out")
        fake = self

        class Parser:
            num_errors = 1

            def __init__(self, network: object, logger: object) -> None:
                assert network == 2  # 1 << STRONGLY_TYPED

            def parse(self, model: bytes) -> bool:
                fake.model = model
                return fake.readable

            def get_error(self, place: int) -> Any:
                return types.SimpleNamespace(desc=lambda: "Unsupported op")

        class Context:
            def set_tensor_address(self, name: str, address: int) -> None:
                fake.addresses[name] = address

            def execute_async_v3(self, stream: int) -> None:
                fake.ran.append(stream)
                fake.compute()

        class Engine:
            num_io_tensors = 2
            get_tensor_name = staticmethod(["x", "y"].__getitem__)
            get_tensor_mode = staticmethod({"x": "in", "y": "out"}.get)
            get_tensor_shape = staticmethod({"y": (2, 4, 6, 6)}.get)
            get_tensor_dtype = staticmethod({"y": types.SimpleNamespace(name="FLOAT")}.get)
            create_execution_context = staticmethod(Context)

        class Builder:
            def __init__(self, logger: object) -> None:
                pass

            create_network = staticmethod(lambda flags: flags)
            create_builder_config = staticmethod(
                lambda: types.SimpleNamespace(clear_flag=fake.cleared.append)
            )
            build_serialized_network = staticmethod(lambda network, config: b"plan")

        self.Builder, self.OnnxParser = Builder, Parser
        self.Runtime = lambda logger: types.SimpleNamespace(deserialize_cuda_engine=lambda plan: Engine())

    def compute(self) -> None:
        import ctypes

        import onnxruntime

        session = onnxruntime.InferenceSession(self.model, providers=["CPUExecutionProvider"])
        (name,) = (place.name for place in session.get_inputs())
        (result,) = session.run(None, {name: EXAMPLE.numpy()})
        ctypes.memmove(self.addresses["y"], result.ctypes.data, result.nbytes)


def test_tensorrt_is_driven_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTensorRT()
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(runtimes, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=7))
    call = prepare(net(), EXAMPLE, "tensorrt", device=VirtualDevice(name="cpu"))
    call()
    assert fake.ran == [7, 7, 7]  # to compare, to warm up, and ours
    assert fake.cleared == ["tf32"]
    prepare(net(), EXAMPLE, "tensorrt", device=VirtualDevice(name="cpu", tf32=True))
    assert fake.cleared == ["tf32"]  # and not once more
    fake.readable = False
    with pytest.raises(UsageError, match=r"cannot read the network \(Unsupported op\)"):
        prepare(net(), EXAMPLE, "tensorrt", device=VirtualDevice(name="cpu"))


def test_onnx_runtime_works_in_the_stream_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its real session, on the CPU, behind the options of a GPU."""
    real = pytest.importorskip("onnxruntime")
    told: list[Any] = []

    class Session(real.InferenceSession):  # type: ignore[misc, name-defined]
        def __init__(self, model: bytes, options: Any, providers: Any) -> None:
            told.append(providers)
            told.append(options.get_session_config_entry("session.disable_cpu_ep_fallback"))
            super().__init__(model, providers=["CPUExecutionProvider"])

        def io_binding(self) -> Any:
            binding = super().io_binding()
            bind_input, bind_output = binding.bind_input, binding.bind_output
            binding.bind_input = lambda name, kind, *rest: bind_input(name, "cpu", *rest)
            binding.bind_output = lambda name, kind, index: bind_output(name, "cpu", index)
            return binding

        def run_with_iobinding(self, binding: Any, run_options: Any = None) -> None:
            told.append(run_options.get_run_config_entry("disable_synchronize_execution_providers"))
            super().run_with_iobinding(binding)

    monkeypatch.setattr(real, "InferenceSession", Session)
    monkeypatch.setattr(real, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=7))
    device = VirtualDevice(name="cpu", tf32=True)
    prepare(net(), EXAMPLE, "onnxruntime", device=device)()
    conditions = {"device_id": "0", "use_tf32": "1", "user_compute_stream": "7"}
    assert told == [[("CUDAExecutionProvider", conditions)], "1", "1", "1", "1"]
    assert device.log.count("wait") == 2  # before outputs are compared, and at the end of the preparation


def test_the_driver_is_asked_for_the_reasons_that_are_faults_of_the_moment() -> None:
    nvml = types.SimpleNamespace(
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x01 | 0x04 | 0x40,
        nvmlDeviceGetPowerManagementLimit=lambda handle: 350_000,
        nvmlSystemGetDriverVersion=lambda: "580.1",
        NVMLError=RuntimeError,
    )
    watch = ClockWatch(nvml, "handle")
    assert watch.slowdowns() == {"thermal limit (hardware)"}  # an idle GPU and its power limit are none
    assert watch.facts() == {"driver": "580.1", "power_cap_w": 350.0}
    assert ClockWatch().slowdowns() == frozenset()
    assert watch.watching
    assert not ClockWatch().watching
    assert ClockWatch().facts() == {"driver": None, "power_cap_w": None}


def test_a_driver_that_does_not_answer_a_question_is_still_asked_the_others() -> None:
    class NotSupported(Exception):  # noqa: N818  (NVML's way)
        pass

    def refuses(handle: object) -> int:
        raise NotSupported("Not Supported")

    nvml = types.SimpleNamespace(
        nvmlDeviceGetCurrentClocksThrottleReasons=refuses,
        nvmlDeviceGetPowerManagementLimit=refuses,
        nvmlSystemGetDriverVersion=lambda: "580.1",
        NVMLError=NotSupported,
    )
    watch = ClockWatch(nvml, "handle")
    assert watch.slowdowns() == frozenset()
    assert not watch.watching
    assert watch.facts() == {"driver": "580.1", "power_cap_w": None}


# ------------------------------------------------------------------------------------------ fingerprint


def test_a_fingerprint_tells_conditions_apart() -> None:
    one = fingerprint("torch", example=EXAMPLE)
    assert one["batch"] == 2
    assert one["layout"] == "channels_last"
    assert one["runtime_version"] == {"torch": torch.__version__.partition("+")[0]}
    assert fingerprint("onnxruntime")["layout"] == "the runtime's own"
    assert differences(one, fingerprint("torch", example=EXAMPLE)) == []
    other = fingerprint("torch", opened("cpu"), "bfloat16", example=EXAMPLE, threads=4)
    assert differences(one, other) == ["dtype: float32 and bfloat16", "threads: 1 and 4"]


def test_the_docs_name_every_runtime() -> None:
    page = (Path(__file__).parents[1] / "docs" / "latency.md").read_text(encoding="utf-8")
    table = page.partition("<!-- names: runtimes -->")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == RUNTIMES.names()
