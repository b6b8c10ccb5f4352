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

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from archsearch.errors import ArchsearchError, UsageError
from archsearch.latency.devices import Call, first_line
from archsearch.tracing import call_model, output_tensors

OPSET: Final = 18  # the exporter's own, and old enough for the engines of the last years
TOLERANCES: Final = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}  # of the largest output
AS_FAR: Final = 4  # times as far as torch from the exact outputs; from 0.7 to 2 with batch norms folded
LARGEST: Final = 0.5  # tolerance; another network's outputs differ by 1 to 2
GRAPHS_KEPT: Final = 64  # without their tensors they are small
_WIDTHS = {"in_channels", "out_channels", "num_features", "in_features", "out_features", "groups"}
_PLAIN = (bool, int, float, str, tuple, type(None))

_graphs: OrderedDict[object, Any] = OrderedDict()


@dataclass(frozen=True)
class Expectation:
    """What an engine must compute.

    Attributes:
        outputs: In true float32, of the weights as they are rounded.
        tolerance: How far the engine's may be from them, as a share of the largest output.
        overflown: Whether torch itself overflows in the network's dtype: then there is nothing to compare.
    """

    outputs: Sequence[Tensor]
    tolerance: float
    overflown: bool


@dataclass(frozen=True)
class Engine:
    """A network inside another engine.

    Attributes:
        call: Runs it once on the example.
        outputs: Returns what the last call gave, on the CPU.
    """

    call: Call
    outputs: Callable[[], Sequence[Tensor]]


def start_engine(
    model: nn.Module, example: Any, start: Callable[[bytes], Engine], *, tf32: bool = False
) -> Engine:
    """Start an engine on a network, and check that it computes what torch does.

    Args:
        model: In eval mode, on its device.
        example: Its input, as for ``call_model``.
        start: Makes the engine from a serialised ONNX model.
        tf32: Whether the engine computes float32 in TF32.

    Raises:
        UsageError: If the network cannot be exported, or the engine cannot run it or computes something else.
    """
    expected = expectation(model, example, tf32)
    code = code_of(model, example)
    if code in _graphs:
        _graphs.move_to_end(code)
        try:
            kept = with_tensors_of(model, _graphs[code], output_tensors(example), expected.outputs)
            engine = _run(start, free_columns(folded(kept)))
            if difference(engine.outputs(), expected.outputs) <= expected.tolerance:
                return engine
        except Exception:  # noqa: S110  (each engine has its own; the export in full says what is wrong)
            pass
    graph = export(model, example)
    try:
        engine = _run(start, folded(graph))
        error = difference(engine.outputs(), expected.outputs)
    except (ArchsearchError, torch.OutOfMemoryError):
        raise
    except Exception as reason:
        raise UsageError(
            f"the runtime cannot run the network ({first_line(reason)}): give another --runtime"
        ) from reason
    if not (error <= expected.tolerance or expected.overflown):
        raise UsageError(
            f"the exported network differs from torch's by {error:.1e} of its largest output: measure it "
            "with --runtime torch or compile"
        )
    _graphs[code] = _without_tensors(graph, model.state_dict())
    while len(_graphs) > GRAPHS_KEPT:
        _graphs.popitem(last=False)
    return engine


def expectation(model: nn.Module, example: Any, tf32: bool) -> Expectation:
    """Return what an engine must compute.

    What rounding to a few bits adds up to depends on the network: in TF32 and float16, torch itself is 1e-3
    of the largest output away from the exact ones in a ResNet-56, and 5e-2 in a ResNet-50. So an engine is
    measured against torch's own rounding.

    Args:
        model: In eval mode, on its device.
        example: Its input.
        tf32: Whether the engine computes float32 in TF32.
    """
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    if dtype == torch.float32:
        whole, inputs = model, example
    else:
        whole = copy.deepcopy(model).float()
        inputs = pytree.tree_map(
            lambda value: value.to(torch.float32) if _is(value, dtype) else value, example
        )
    with _float32_in("ieee"):
        exact = own = _outputs(whole, inputs)
    if tf32 or dtype != torch.float32:
        with _float32_in("tf32" if tf32 else "ieee"):
            own = _outputs(model, example)
    overflown = not all(bool(tensor.isfinite().all()) for tensor in own)
    tolerance = TOLERANCES[dtype]
    if not overflown:
        tolerance = min(max(tolerance, AS_FAR * difference(own, exact)), LARGEST)
    return Expectation(exact, tolerance, overflown)


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
        raise UsageError(
            f"the network cannot be exported to ONNX ({first_line(error)}): give --runtime torch or compile"
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


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    with torch.inference_mode():
        return [tensor.float().cpu() for tensor in output_tensors(call_model(model, example))]


def _is(value: Any, dtype: torch.dtype) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == dtype


@contextlib.contextmanager
def _float32_in(precision: str) -> Iterator[None]:
    """Let torch compute float32 convolutions and products on a GPU as ``"ieee"`` or ``"tf32"`` says."""
    settings: tuple[Any, ...] = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = precision
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


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
