"""From a network to an engine by way of ONNX, fast enough to measure hundreds of networks.

torch's exporter takes seconds, most of them to trace and translate code that does not change with the widths.
So the graphs of the last networks are kept, and for another one of the same code only the tensors are
exchanged. Whether that was right is not argued but checked: the engine's outputs must be those of torch,
else the network is exported in full.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from archsearch.errors import UsageError
from archsearch.latency.devices import Call
from archsearch.tracing import call_model, output_tensors

OPSET: Final = 18  # the exporter's own, and old enough for the engines of the last years
TOLERANCES: Final = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}  # of the largest output
GRAPHS_KEPT: Final = 16
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


def start_engine(
    model: nn.Module, example: Any, start: Callable[[bytes], Engine], *, optimize: bool = False
) -> Engine:
    """Start an engine on a network, and check that it computes what torch does.

    Args:
        model: In eval mode, on its device.
        example: Its input, as for ``call_model``.
        start: Makes the engine from a serialised ONNX model.
        optimize: Whether to fold constants here, for an engine that does not do so itself; exports in full.

    Raises:
        UsageError: If the network cannot be exported, or the engine computes something else.
    """
    with torch.inference_mode():
        expected = [tensor.float().cpu() for tensor in output_tensors(call_model(model, example))]
    tolerance = TOLERANCES[next((parameter.dtype for parameter in model.parameters()), torch.float32)]
    code = code_of(model, example)
    if not optimize and code in _graphs:
        _graphs.move_to_end(code)
        try:
            engine = _run(start, with_tensors_of(model, _graphs[code]))
            if difference(engine.outputs(), expected) <= tolerance:
                return engine
        except Exception:  # noqa: S110  (each engine has its own; the export in full says what is wrong)
            pass
    proto = export(model, example, optimize=optimize)
    engine = _run(start, proto)
    error = difference(engine.outputs(), expected)
    overflown = not all(bool(tensor.isfinite().all()) for tensor in expected)  # has no one right place
    if not (error <= tolerance or overflown):
        raise UsageError(f"the exported network differs from torch's by {error:.1e} of its largest output")
    if not optimize:
        _graphs[code] = _without_tensors(proto, model.state_dict())
        while len(_graphs) > GRAPHS_KEPT:
            _graphs.popitem(last=False)
    return engine


def export(model: nn.Module, example: Any, *, optimize: bool = True) -> Any:
    """Return the ONNX model of a network, its parameters under their own names.

    Args:
        model: In eval mode.
        example: Its input, as for ``call_model``; its shape is fixed in the export.
        optimize: Whether to fold constants; engines do so themselves, and a folded one has fewer names.

    Raises:
        UsageError: If torch cannot export it.
    """
    named = dict(example) if isinstance(example, Mapping) else None
    args = () if named else tuple(example) if isinstance(example, (tuple, list)) else (example,)
    try:
        program: Any = torch.onnx.export(
            model, args, kwargs=named, dynamo=True, opset_version=OPSET, verbose=False, optimize=optimize
        )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"the network cannot be exported to ONNX ({reason}): give --runtime torch or compile"
        ) from error
    return program.model_proto


def with_tensors_of(model: nn.Module, graph: Any) -> Any:
    """Return a kept graph with the tensors of another network of the same code.

    The number of groups of a convolution is the one thing in the graph that follows the widths: of a
    depthwise convolution it is the number of channels.
    """
    graph = copy.deepcopy(graph)
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


def code_of(model: nn.Module, example: Any) -> object:
    """Return what decides the graph of a network beside its widths."""
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
    return modules, tensors, tuple((tensor.shape, tensor.dtype) for tensor in output_tensors(example))


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


def _run(start: Callable[[bytes], Engine], proto: Any) -> Engine:
    engine = start(proto.SerializeToString())
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
