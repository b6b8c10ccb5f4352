"""From a network to an engine by way of ONNX, fast enough to measure hundreds of networks.

torch's exporter takes seconds, most of them to trace and translate code that does not change with the widths.
So the graphs of the last networks are kept as they were traced, and for another one of the same code only the
tensors are exchanged. Whether that was right is not argued but checked: the engine's outputs must be those of
torch, else the network is exported in full.

Either way constants and batch norms are folded then, as ``torch.onnx.export`` does by itself. As it was
traced, a convolution without a bias has a computed one, and no engine fuses what follows it or changes its
layout.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from archsearch.errors import UsageError
from archsearch.latency.devices import Call
from archsearch.tracing import call_model, output_tensors

OPSET: Final = 18  # the exporter's own, and old enough for the engines of the last years
TOLERANCES: Final = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}  # of the largest output
GRAPHS_KEPT: Final = 64  # without their tensors they are small
_WIDTHS = {"in_channels", "out_channels", "num_features", "in_features", "out_features", "groups"}
_PLAIN = (bool, int, float, str, tuple, type(None))

_graphs: OrderedDict[object, Any] = OrderedDict()


@dataclass(frozen=True)
class Engine:
    """A network inside another engine.

    Attributes:
        call: Runs it once on the example.
        outputs: Returns what the last call gave, on the CPU.
    """

    call: Call
    outputs: Callable[[], Sequence[Tensor]]


def start_engine(model: nn.Module, example: Any, start: Callable[[bytes], Engine]) -> Engine:
    """Start an engine on a network, and check that it computes what torch does.

    Args:
        model: In eval mode, on its device.
        example: Its input, as for ``call_model``.
        start: Makes the engine from a serialised ONNX model.

    Raises:
        UsageError: If the network cannot be exported, or the engine computes something else.
    """
    with torch.inference_mode():
        expected = [tensor.float().cpu() for tensor in output_tensors(call_model(model, example))]
    tolerance = TOLERANCES[next((parameter.dtype for parameter in model.parameters()), torch.float32)]
    code = code_of(model, example)
    if code in _graphs:
        _graphs.move_to_end(code)
        try:
            kept = with_tensors_of(model, _graphs[code], output_tensors(example), expected)
            engine = _run(start, free_columns(folded(kept)))
            if difference(engine.outputs(), expected) <= tolerance:
                return engine
        except Exception:  # noqa: S110  (each engine has its own; the export in full says what is wrong)
            pass
    graph = export(model, example)
    engine = _run(start, folded(graph))
    error = difference(engine.outputs(), expected)
    overflown = not all(bool(tensor.isfinite().all()) for tensor in expected)  # has no one right place
    if not (error <= tolerance or overflown):
        raise UsageError(f"the exported network differs from torch's by {error:.1e} of its largest output")
    _graphs[code] = _without_tensors(graph, model.state_dict())
    while len(_graphs) > GRAPHS_KEPT:
        _graphs.popitem(last=False)
    return engine


def export(model: nn.Module, example: Any) -> Any:
    """Return the ONNX model of a network as it was traced, its parameters under their own names.

    Args:
        model: In eval mode.
        example: Its input, as for ``call_model``; its shape is fixed in the export.

    Raises:
        UsageError: If torch cannot export it.
    """
    named = dict(example) if isinstance(example, Mapping) else None
    args = () if named else tuple(example) if isinstance(example, (tuple, list)) else (example,)
    try:
        program: Any = torch.onnx.export(
            model, args, kwargs=named, dynamo=True, opset_version=OPSET, verbose=False, optimize=False
        )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"the network cannot be exported to ONNX ({reason}): give --runtime torch or compile"
        ) from error
    return program.model_proto


def folded(graph: Any) -> Any:
    """Return a graph with constants and batch norms folded, as people deploy it."""
    from onnxscript import optimizer

    return optimizer.optimize(graph)


def with_tensors_of(model: nn.Module, graph: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Any:
    """Return a kept graph with the tensors of another network of the same code.

    Two more things in the graph follow the widths: the number of groups of a depthwise convolution, which is
    the number of channels, and the shapes of what comes in and goes out.
    """
    graph = copy.deepcopy(graph)
    places = [*graph.graph.input, *graph.graph.output]
    for place, tensor in zip(places, [*inputs, *outputs], strict=True):
        for dimension, size in zip(place.type.tensor_type.shape.dim, tensor.shape, strict=True):
            dimension.dim_value = size
    tensors = model.state_dict()
    for initializer in graph.graph.initializer:
        if initializer.name in tensors:
            tensor = tensors[initializer.name].cpu()
            initializer.raw_data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            initializer.dims[:] = tensor.shape
    modules = dict(model.named_modules())
    for node in graph.graph.node:
        owner = modules.get(node.input[1].rpartition(".")[0]) if node.op_type == "Conv" else None
        for attribute in node.attribute:
            if attribute.name == "group" and isinstance(owner, nn.modules.conv._ConvNd):
                attribute.i = owner.groups
    return graph


def free_columns(graph: Any) -> Any:
    """Return a folded graph in which what is reshaped to a matrix has as many columns as come.

    The exporter writes a flattening before a classifier as the numbers that it had in the traced network.
    """
    from onnx import numpy_helper

    shapes = {node.input[1] for node in graph.graph.node if node.op_type == "Reshape"}
    for initializer in graph.graph.initializer:
        if initializer.name in shapes and tuple(initializer.dims) == (2,):
            rows = numpy_helper.to_array(initializer)[0]
            initializer.CopyFrom(numpy_helper.from_array(np.array([rows, -1]), initializer.name))
    return graph


def code_of(model: nn.Module, example: Any) -> object:
    """Return what decides the graph of a network beside its widths and the channels of its input."""
    modules = tuple(
        (
            name,
            type(module),
            tuple(
                (key, repr(value))
                for key, value in sorted(vars(module).items())
                if key not in _WIDTHS and isinstance(value, _PLAIN)
            ),
        )
        for name, module in model.named_modules()
    )
    tensors = tuple((name, tensor.ndim, tensor.dtype) for name, tensor in model.state_dict().items())
    inputs = tuple(
        ((*tensor.shape[:1], *tensor.shape[2:]), tensor.ndim, tensor.dtype)
        for tensor in output_tensors(example)
    )
    return modules, tensors, inputs


def difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference as a share of the largest output; infinite where shapes differ."""
    if [tensor.shape for tensor in outputs] != [tensor.shape for tensor in expected]:
        return float("inf")
    return max(
        (
            float((one.float() - other).abs().max() / other.abs().max().clamp_min(1e-30))
            for one, other in zip(outputs, expected, strict=True)
            if other.numel()
        ),
        default=0.0,
    )


def _run(start: Callable[[bytes], Engine], graph: Any) -> Engine:
    engine = start(graph.SerializeToString())
    engine.call()
    return engine


def _without_tensors(proto: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return a graph that needs little memory: what will be exchanged is left out, and so are the shapes."""
    graph = copy.deepcopy(proto)
    for initializer in graph.graph.initializer:
        if initializer.name in tensors:
            initializer.raw_data = b""
    del graph.graph.value_info[:]
    return graph
