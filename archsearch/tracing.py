"""One run of a network with labels beside its tensors.

The network runs once on an example input, under a dispatch mode that sees every ATen op and applies its
rule. Nothing of the network is changed: parameters, buffers, modes and the random state are as before.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from archsearch.errors import ArchsearchError, UsageError
from archsearch.labels import DimLabels, Labels
from archsearch.rules import Call, Mix, Tally, find_rule, op_name


@dataclass
class Activation:
    """A tensor that an op allocates: when it is made and last read, and how large it is.

    ``born`` and ``last_read`` are op numbers; an output of the network lives to the end.
    """

    born: int
    last_read: int
    itemsize: int
    shape: tuple[int, ...]
    labels: DimLabels


Line: TypeAlias = "tuple[str, int]"
"""A line of the model's own code: file and number."""


@dataclass(frozen=True)
class Site:
    """A line of a model's own code, and torch's functions that the line led to, innermost first."""

    line: Line | None
    functions: tuple[CodeType, ...]

    @property
    def innermost(self) -> Site:
        """The same line with the innermost function alone."""
        return Site(self.line, self.functions[:1])


@dataclass
class Op:
    """One executed op: its name, the place in the model's code behind it, and the labels around it.

    ``counted`` is how many terms of MACs and of published FLOPs there are up to and with this op.
    """

    name: str
    site: Site
    inputs: list[DimLabels]
    outputs: list[tuple[tuple[int, ...], DimLabels]]
    counted: tuple[int, int]


@dataclass
class Trace:
    """What one run tells: labels and ties, costs, activations, and the ops that nobody has a rule for.

    ``training_example`` is the input of the second run, in train mode, where there was one.
    """

    labels: Labels
    tally: Tally = field(default_factory=Tally)
    mixes: dict[int, Mix] = field(default_factory=dict)
    activations: list[Activation] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    unknown_ops: dict[str, str] = field(default_factory=dict)
    touched: set[int] = field(default_factory=set)
    output_shapes: list[tuple[int, ...]] = field(default_factory=list)
    training_example: Any = None


class OpMode(TorchDispatchMode):
    """See every ATen op of a run, without the second or two that importing the compiler costs."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would wrap __torch_dispatch__, and import torch._dynamo at the first op


class _Tracer(OpMode):
    """Apply the rule of each op; an op without one freezes what it touches."""

    def __init__(self, trace: Trace, counts: bool) -> None:
        super().__init__()
        self._trace = trace
        self._counts = counts
        self._living: dict[int, Activation] = {}
        self._known: list[StorageWeakRef] = []  # as long as they are kept, no other storage has their address

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        trace, name = self._trace, op_name(func)
        tally = trace.tally if self._counts else Tally()
        call = Call(func, name, args, kwargs, result, trace.labels, tally)
        inputs = call.tensors
        trace.touched.update(map(id, inputs))
        apply = find_rule(func, name)
        if apply is None:
            if any(map(trace.labels.of, inputs)):
                self._give_up(call, "there is no rule for it")
        else:
            try:
                apply(call)
            except Exception as error:  # a rule that fails must never make a wrong network
                self._give_up(call, f"its rule failed: {type(error).__name__}: {error}")
        if any(map(trace.labels.is_activation, inputs)):
            for tensor in call.outputs:
                trace.labels.note_activation(tensor)
        if self._counts:
            for mix in call.mixes:
                trace.mixes[len(trace.ops)] = mix
            self._note_activations(call, inputs)
            trace.ops.append(
                Op(
                    name,
                    site_of(sys._getframe(1)),
                    list(map(trace.labels.of, inputs)),
                    [(tuple(tensor.shape), trace.labels.of(tensor)) for tensor in call.outputs],
                    (len(tally.macs), len(tally.published)),
                )
            )
        return result

    def _give_up(self, call: Call, why: str) -> None:
        self._trace.unknown_ops[call.name] = why
        count = flop_registry.get(call.func.overloadpacket)
        if count is not None:  # what stays still costs
            flops = count(*call.args, **call.kwargs, out_val=call.result)
            call.count_macs(int(flops) // 2)
        self._trace.labels.freeze_all(call.tensors, f"{call.name}: {why}")

    def _note_activations(self, call: Call, inputs: list[torch.Tensor]) -> None:
        step = len(self._trace.ops)
        read = {tensor.untyped_storage()._cdata for tensor in inputs}
        for storage in read & self._living.keys():
            self._living[storage].last_read = step
        for tensor in call.outputs:
            storage = tensor.untyped_storage()._cdata
            if storage not in read:  # neither a view nor in place: a new allocation
                labels = self._trace.labels.of(tensor)
                made = Activation(step, step, tensor.element_size(), tuple(tensor.shape), labels)
                self._living[storage] = made
                self._known.append(StorageWeakRef(tensor.untyped_storage()))
                self._trace.activations.append(made)

    def outlive(self, outputs: list[torch.Tensor]) -> None:
        """Keep the network's outputs to the end."""
        for tensor in outputs:
            storage = tensor.untyped_storage()._cdata
            if storage in self._living:
                self._living[storage].last_read = len(self._trace.ops)


_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
_OURS = f"{Path(__file__).parent}{os.sep}"
_ZOO = f"{_OURS}models{os.sep}"


def _is_model_code(file: str) -> bool:
    return file.startswith(_ZOO) or not file.startswith((_TORCH, _OURS, "<"))


def site_of(frame: FrameType | None) -> Site:
    """Return the line of model code behind a frame, and torch's functions between the two."""
    functions: list[CodeType] = []
    while frame is not None:
        if _is_model_code(frame.f_code.co_filename):
            return Site((frame.f_code.co_filename, frame.f_lineno), tuple(functions))
        functions.append(frame.f_code)
        frame = frame.f_back
    return Site(None, tuple(functions))


def failing_site(error: BaseException) -> Site:
    """Return the innermost line of model code that an error passed, and the torch.nn function behind it."""
    line, function, step = None, None, error.__traceback__
    while step is not None:
        file = step.tb_frame.f_code.co_filename
        if _is_model_code(file):
            line, function = (file, step.tb_lineno), None
        elif file.startswith(f"{_TORCH}nn{os.sep}"):
            function = step.tb_frame.f_code
        step = step.tb_next
    return Site(line, (function,) if function else ())


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by name; one that several modules share comes once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def call_model(model: nn.Module, example: Any) -> Any:
    """Call a model with one tensor, a tuple of positional or a mapping of named arguments."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, (tuple, list)) else model(example)


def output_tensors(outputs: Any) -> list[torch.Tensor]:
    """Return the tensors in a model's outputs, also those of plain objects with tensor attributes."""
    found = []
    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__"):
            found.extend(value for value in vars(leaf).values() if isinstance(value, torch.Tensor))
    return found


@contextmanager
def untouched(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Run a model in one mode without gradients, and leave it exactly as it was.

    Fused attention is off, since one op would hide what it contracts.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = {tensor.device for tensor in model_tensors(model).values() if tensor.device.type == "cuda"}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)), torch.no_grad():
            model.train(training)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if (
                    name in buffers
                    and buffer.device.type != "meta"
                    and not torch.equal(buffer, buffers[name])
                ):
                    buffer.copy_(buffers[name])


def trace_model(model: nn.Module, example: Any, *, whole_groups: bool = False) -> Trace:
    """Run ``model`` on ``example`` and return what its ops tell.

    The run is in eval mode. Parts that only training uses (auxiliary classifiers) are found by a second run
    in train mode, on the example repeated to a batch of two, or on the example itself where that fails.

    Args:
        model: Any network, on any device; left exactly as it was.
        example: A tensor ``(N, ...)``, or the positional (tuple) or named (mapping) arguments of the model.
        whole_groups: Whether a convolution's groups go as a whole, and do not get narrower.

    Raises:
        UsageError: If the model fails on the example, or returns no tensor.
    """
    trace = Trace(Labels(model_tensors(model), whole_groups=whole_groups))
    _run(model, example, trace, training=False)
    parameters = list(model.parameters())
    if any(id(parameter) not in trace.touched for parameter in parameters):
        for batch in (twice(example), example):
            try:
                _run(model, batch, trace, training=True)
                trace.training_example = batch
                break
            except ArchsearchError:
                continue  # what training alone uses then stays as it is: nothing ties it, nothing produces it
    return trace


def _run(model: nn.Module, example: Any, trace: Trace, *, training: bool) -> None:
    tracer = _Tracer(trace, counts=not training)
    for tensor in output_tensors(example):
        trace.labels.note_activation(tensor)
    with untouched(model, training=training):
        try:
            with tracer:
                outputs = output_tensors(call_model(model, example))
        except Exception as error:
            shapes = [tuple(t.shape) for t in output_tensors(example)]
            raise UsageError(
                f"the model fails on an example input of shape {shapes}: {type(error).__name__}: {error}"
            ) from error
        if not outputs:
            raise UsageError("the model returns no tensor, so that nothing tells what it computes")
        trace.labels.freeze_all(outputs, "an output of the network")
        if not training:
            tracer.outlive(outputs)
            trace.output_shapes = [tuple(tensor.shape) for tensor in outputs]


def twice(example: Any) -> Any:
    """Return a model's input as a batch of two of the same, as training modes may ask for."""

    def double(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf

    return pytree.tree_map(double, example)
