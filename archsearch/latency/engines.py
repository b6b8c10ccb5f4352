"""Runtimes beside torch: ONNX Runtime, OpenVINO and TensorRT; each is imported when it is first asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from archsearch.errors import UsageError
from archsearch.latency.devices import Call, holding
from archsearch.latency.export import Engine, start_engine
from archsearch.latency.runtimes import Setting, runtime
from archsearch.tracing import output_tensors


@runtime(
    "onnxruntime",
    dtypes={"cpu": ("float32",), "cuda": ("float32", "float16")},
    packages=("onnx", "onnxscript", "onnxruntime"),
    distributions=("onnxruntime", "onnxruntime-gpu"),
    own_layout=True,
)
def onnxruntime(model: nn.Module, example: Any, setting: Setting) -> Call:
    """Run the exported network with ONNX Runtime; inputs lie ready on the device, no call copies them.

    On a GPU it works in the device's stream and does not wait at the end of a call, as torch does.

    Raises:
        UsageError: If the installed one does not run on the device, or cannot run every part there.
    """
    import onnxruntime as ort

    kind = setting.device.kind
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[kind]
    if provider not in ort.get_available_providers():
        raise UsageError(
            f"--runtime onnxruntime: the installed one does not run on {kind}: pip install onnxruntime-gpu"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = setting.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    index = torch.device(setting.device.name).index or 0
    conditions, each_run = {}, None
    if kind == "cuda":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        conditions = {
            "device_id": str(index),
            "use_tf32": str(int(setting.device.tf32)),
            "user_compute_stream": str(torch.cuda.current_stream(setting.device.name).cuda_stream),
        }
        each_run = ort.RunOptions()
        each_run.add_run_config_entry("disable_synchronize_execution_providers", "1")
    inputs = output_tensors(example)

    def start(model_bytes: bytes) -> Engine:
        session = ort.InferenceSession(model_bytes, options, providers=[(provider, conditions)])
        binding = session.io_binding()
        for place, tensor in zip(session.get_inputs(), inputs, strict=True):
            element = np.dtype(str(tensor.dtype).removeprefix("torch."))
            binding.bind_input(place.name, kind, index, element.type, tuple(tensor.shape), tensor.data_ptr())
        for place in session.get_outputs():
            binding.bind_output(place.name, kind, index)

        def call() -> None:
            session.run_with_iobinding(binding, each_run)

        def outputs() -> list[Tensor]:
            setting.device.synchronise()
            return [torch.from_numpy(array) for array in binding.copy_outputs_to_cpu()]

        return Engine(call, outputs)

    return holding(start_engine(model, example, start, tf32=setting.device.tf32).call, inputs)


@runtime(
    "openvino",
    dtypes={"cpu": ("float32",)},
    packages=("onnx", "onnxscript", "openvino"),
    distributions=("openvino",),
    own_layout=True,
)
def openvino(model: nn.Module, example: Any, setting: Setting) -> Call:
    """Run the exported network with OpenVINO, one request at a time."""
    import openvino as ov

    core = ov.Core()
    conditions = {
        "INFERENCE_NUM_THREADS": setting.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # by itself it computes in bfloat16 where the processor can
    }
    inputs = [np.ascontiguousarray(tensor.numpy()) for tensor in output_tensors(example)]

    def start(model_bytes: bytes) -> Engine:
        request = core.compile_model(core.read_model(model_bytes), "CPU", conditions).create_infer_request()
        for place, array in enumerate(inputs):
            request.set_input_tensor(place, ov.Tensor(array, shared_memory=True))

        def outputs() -> list[Tensor]:
            count = len(request.model_outputs)
            return [torch.from_numpy(request.get_output_tensor(place).data.copy()) for place in range(count)]

        def call() -> None:
            request.infer()

        return Engine(call, outputs)

    return holding(start_engine(model, example, start).call, inputs)


@runtime(
    "tensorrt",
    dtypes={"cuda": ("float32", "bfloat16", "float16")},
    packages=("onnx", "onnxscript", "tensorrt"),
    distributions=("tensorrt",),
    own_layout=True,
)
def tensorrt(model: nn.Module, example: Any, setting: Setting) -> Call:
    """Run the exported network with TensorRT, every layer in the dtype of the network.

    Raises:
        UsageError: If TensorRT cannot read or build it.
    """
    import tensorrt as trt

    inputs = [tensor.contiguous() for tensor in output_tensors(example)]
    logger = trt.Logger(trt.Logger.ERROR)

    def start(model_bytes: bytes) -> Engine:
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(model_bytes):
            reason = parser.get_error(0).desc() if parser.num_errors else "no reason given"
            raise UsageError(f"--runtime tensorrt: cannot read the network ({reason}): give another runtime")
        config = builder.create_builder_config()
        if not setting.device.tf32:
            config.clear_flag(trt.BuilderFlag.TF32)  # it is set
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise UsageError("--runtime tensorrt: cannot build the network: give another runtime")
        deserializer = trt.Runtime(logger)
        engine = deserializer.deserialize_cuda_engine(plan)
        context = engine.create_execution_context()
        waiting, outputs = list(inputs), []
        for place in range(engine.num_io_tensors):
            name = engine.get_tensor_name(place)
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                tensor = waiting.pop(0)
            else:
                dtype = _OF_TENSORRT[engine.get_tensor_dtype(name).name]
                shape = tuple(engine.get_tensor_shape(name))
                tensor = torch.empty(shape, dtype=dtype, device=setting.device.name)
                outputs.append(tensor)
            context.set_tensor_address(name, tensor.data_ptr())

        def call() -> None:
            context.execute_async_v3(torch.cuda.current_stream(setting.device.name).cuda_stream)

        def results() -> list[Tensor]:
            setting.device.synchronise()
            return [tensor.cpu() for tensor in outputs]

        # An engine must outlive its context, and a runtime its engine.
        return Engine(holding(call, deserializer, engine, inputs, outputs), results)

    return start_engine(model, example, start, tf32=setting.device.tf32).call


_OF_TENSORRT = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}
