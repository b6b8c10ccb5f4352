"""What each ATen op does to labels: one short rule per kind of op, in one table.

A rule reads the labels of an op's inputs, ties or freezes atoms, and sets the labels of its outputs. An op
without a rule freezes everything that it touches and is named in the report. To teach archsearch an op::

    from archsearch.rules import Call, rule

    @rule("mylib::gated_add")
    def gated_add(call: Call) -> None:
        call.pointwise()

In-place variants (``add_``) follow the rule of ``add``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from archsearch.labels import CONSTANT, Atoms, DimLabels, Labels, blocks

Factor: TypeAlias = "Atoms | int"
"""A dimension in a count: its labels, or its size where it is fixed."""


@dataclass
class Mix:
    """An op whose result reads a labelled dimension as a whole, such as a mean over channels.

    ``dims`` says for each argument position which labelled dimensions are read so. The result of removing
    channels then differs from that of zeroing them, so that verification has to compute this op over the
    kept channels.
    """

    op: str
    dims: dict[int, DimLabels]


@dataclass
class Tally:
    """What the ops of a run cost, each a factor times a product of dimensions."""

    macs: list[tuple[int, tuple[Factor, ...]]] = field(default_factory=list)
    published: list[tuple[int, tuple[Factor, ...]]] = field(default_factory=list)


@dataclass
class Call:
    """One executed op, as a rule sees it."""

    func: OpOverload
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    labels: Labels
    tally: Tally
    mixes: list[Mix] = field(default_factory=list)

    def arg(self, name: str) -> Any:
        """Return an argument by its name in the op's schema, or its default."""
        if name in self.kwargs:
            return self.kwargs[name]
        for position, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                return self.args[position] if position < len(self.args) else argument.default_value
        raise KeyError(f"{self.name} has no argument '{name}'")

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the arguments, in order."""
        return _tensors((self.args, self.kwargs))

    @property
    def outputs(self) -> list[torch.Tensor]:
        """The tensors of the result, in order."""
        return [self.result] if isinstance(self.result, torch.Tensor) else _tensors(self.result)

    @property
    def out(self) -> torch.Tensor:
        """The first tensor of the result."""
        return self.outputs[0]

    def labels_of(self, tensor: torch.Tensor) -> DimLabels:
        """Return the labelled dimensions of a tensor."""
        return self.labels.of(tensor)

    def set(self, dims: DimLabels, tensor: torch.Tensor | None = None) -> None:
        """Label the result, or one tensor of it."""
        self.labels.set(self.out if tensor is None else tensor, dims)

    def pointwise(self, tensors: Sequence[torch.Tensor] | None = None) -> None:
        """Tie the operands index by index, as broadcasting pairs them; label the results alike."""
        out = self.out
        dims: DimLabels = {}
        fixed: set[int] = set()
        for tensor in self.tensors if tensors is None else tensors:
            labels, offset = self.labels.of(tensor), out.dim() - tensor.dim()
            for dim, size in enumerate(tensor.shape):
                if size == 1 or dim + offset < 0:
                    continue
                if dim not in labels:
                    if tensor.stride(dim):  # one element, expanded, fits any size
                        fixed.add(dim + offset)
                elif dim + offset in dims:
                    self.labels.tie(dims[dim + offset], labels[dim])
                else:
                    dims[dim + offset] = labels[dim]
        for dim in fixed & dims.keys():
            self.labels.freeze(dims[dim], f"{self.name} with a tensor of fixed size")
        for output in self.outputs:
            if output.shape == out.shape:
                self.labels.set(output, dims)

    def keep_labels(self, dims: Iterable[int] | None = None) -> None:
        """Give the results the first tensor's labels, of all or the given dimensions; freeze the others."""
        labels = self.labels_of(self.tensors[0])
        kept = labels if dims is None else {dim: labels[dim] for dim in dims if dim in labels}
        self.freeze_except(labels, kept)
        for output in self.outputs:
            self.labels.set(output, kept)

    def freeze_except(self, labels: DimLabels, kept: Iterable[int] = ()) -> None:
        """Freeze all but the ``kept`` dimensions of ``labels``."""
        for dim in labels.keys() - set(kept):
            self.labels.freeze(labels[dim], self.name)

    def match(self, left: Atoms | None, right: Atoms | None, size: int) -> None:
        """Tie two dimensions of ``size`` that are paired index by index; a fixed one freezes the other."""
        if left is not None and right is not None:
            self.labels.tie(left, right)
        else:
            for atoms in (left, right):
                if atoms is not None and size > 1:
                    self.labels.freeze(atoms, f"{self.name} with an input of fixed size")

    def mix(self, position: int, labels: DimLabels, dims: Iterable[int]) -> None:
        """Note that the op reads these dimensions of an argument as a whole, where they are labelled."""
        read = {dim: labels[dim] for dim in dims if dim in labels}
        if read:
            if not self.mixes:
                self.mixes.append(Mix(self.name, {}))
            self.mixes[0].dims[position] = read

    def count_macs(self, factor: int, *dims: Factor) -> None:
        """Count ``factor`` times the product of the dimensions' sizes as multiply-adds."""
        self.tally.macs.append((factor, dims))
        self.count_published(2 * factor, *dims)

    def count_published(self, factor: int, *dims: Factor) -> None:
        """Count for the FLOPs of Liu et al., ICLR 2019 (released code)."""
        self.tally.published.append((factor, dims))

    def count_elements(self, factor: int, tensor: torch.Tensor) -> None:
        """Count ``factor`` FLOPs of Liu et al. for each element of a labelled tensor."""
        labels = self.labels_of(tensor)
        fixed = math.prod(size for dim, size in enumerate(tensor.shape) if dim not in labels)
        self.count_published(factor * fixed, *labels.values())


Rule: TypeAlias = Callable[[Call], None]
RULES: dict[str, Rule] = {}


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Register a rule for ops by name, such as ``"mylib::op"``; ``aten::`` may be left out."""

    def add(function: Rule) -> Rule:
        for op in ops:
            RULES[op if "::" in op else f"aten::{op}"] = function
        return function

    return add


def find_rule(func: OpOverload, name: str) -> Rule | None:
    """Return the rule for an op, if there is one."""
    if name in RULES:
        return RULES[name]
    return Call.pointwise if torch.Tag.pointwise in func.tags else None


def op_name(func: OpOverload) -> str:
    """Return an op's name without the underscore of its in-place variant: ``aten::add`` for ``add_``."""
    name: str = func._schema.name
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _tile(atoms: Atoms, times: int) -> Atoms:
    return np.tile(atoms, times) if times > 1 else atoms


def _factor(labels: DimLabels, tensor: torch.Tensor, dim: int) -> Factor:
    return labels.get(dim, tensor.shape[dim])


# --- ops that make tensors out of nothing, or copy them -------------------------------------------------


@rule(
    "empty", "zeros", "ones", "full", "arange", "linspace", "eye", "rand", "randn", "randint", "randperm",
    "new_empty", "new_zeros", "new_ones", "new_full", "scalar_tensor", "tril_indices", "empty_strided",
    "new_empty_strided", "meshgrid", "sym_size", "is_same_size",
)  # fmt: skip
def creation(call: Call) -> None:
    """Leave new tensors without labels: their size is fixed, as far as the trace can tell."""


@rule(
    "clone", "detach", "alias", "_to_copy", "lift_fresh", "contiguous", "native_dropout", "dropout",
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "bernoulli", "zero",
    "fill", "normal", "uniform", "random", "exponential", "triu", "tril", "view_as_real_copy",
)  # fmt: skip
def same_shape(call: Call) -> None:
    """Keep every label."""
    call.keep_labels()


@rule("_local_scalar_dense", "item", "equal", "is_nonzero")
def scalar(call: Call) -> None:
    """Freeze what decides a Python value."""
    call.labels.freeze_all(call.tensors, f"{call.name} reads its value in Python")


@rule("copy")
def copy(call: Call) -> None:
    """Tie target and source; a target of fixed size freezes the source."""
    call.pointwise(call.tensors[:2])


# --- ops that only move elements ----------------------------------------------------------------------


@rule(
    "view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy", "_reshape_copy", "flatten", "unflatten"
)
def view(call: Call) -> None:
    """Carry labels through a reshape.

    A labelled dimension that splits (heads, groups of a shuffle) is tied across the blocks, so that the
    blocks stay rectangular: its innermost part carries the labels, the outer parts keep their size.
    """
    source, target = call.tensors[0], call.out
    labels = call.labels_of(source)
    dims: DimLabels = {}
    if labels:
        for before, after in blocks(source.shape, target.shape):
            for dim in before:
                if dim in labels:
                    _carry(call, labels[dim], dim, before, after, dims)
    call.set(dims)


def _carry(
    call: Call, atoms: Atoms, dim: int, before: Sequence[int], after: Sequence[int], dims: DimLabels
) -> None:
    if len(before) == len(after) == 1:
        dims[after[0]] = atoms
        return
    source, target = call.tensors[0].shape, call.out.shape
    spread = np.broadcast_to(
        atoms.reshape([-1 if d == dim else 1 for d in before]), [source[d] for d in before]
    ).reshape([target[d] for d in after])
    varying = [axis for axis in range(spread.ndim) if (spread != spread.take([0], axis=axis)).any()]
    axis = max(varying, default=spread.ndim - 1)
    corner = tuple(slice(None) if a == axis else slice(0, 1) for a in range(spread.ndim))
    carried = spread[corner]
    if spread.ndim > 1 and (spread != carried).any():
        call.labels.tie(spread, carried)
    carried = carried.reshape(-1)
    if after[axis] in dims:  # one label an index: the outer dimension keeps it, the inner keeps its size
        call.labels.freeze(carried, f"{call.name} merges it into another dimension")
    else:
        dims[after[axis]] = carried


@rule("t", "permute", "transpose", "swapaxes", "movedim", "numpy_T", "permute_copy")
def permute(call: Call) -> None:
    """Move labels with their dimensions."""
    source = call.tensors[0]
    n = source.dim()
    order = list(range(n))
    if "permute" in call.name:
        order = [dim % n for dim in call.arg("dims")]
    elif n > 1:
        first, second = (0, 1) if call.name == "aten::t" else (call.arg("dim0") % n, call.arg("dim1") % n)
        order[first], order[second] = second, first
    labels = call.labels_of(source)
    call.set({new: labels[old] for new, old in enumerate(order) if old in labels})


@rule("squeeze", "unsqueeze", "squeeze_copy", "unsqueeze_copy")
def squeeze(call: Call) -> None:
    """Move labels past dimensions of size 1."""
    source, out = call.tensors[0], call.out
    labels = call.labels_of(source)
    before = [dim for dim, size in enumerate(source.shape) if size > 1]
    after = [dim for dim, size in enumerate(out.shape) if size > 1]
    call.set({new: labels[old] for old, new in zip(before, after, strict=True) if old in labels})


@rule("expand", "expand_as")
def expand(call: Call) -> None:
    """Keep the labels of the dimensions that were there; new ones have a fixed size."""
    offset = call.out.dim() - call.tensors[0].dim()
    call.set({dim + offset: atoms for dim, atoms in call.labels_of(call.tensors[0]).items()})


@rule("as_strided")
def as_strided(call: Call) -> None:
    """Keep labels where the shape stays, as when strides are normalised; freeze otherwise."""
    source = call.tensors[0]
    call.keep_labels(None if source.shape == call.out.shape else ())


@rule("repeat", "tile")
def repeat(call: Call) -> None:
    """Repeat the labels of repeated dimensions."""
    source, out = call.tensors[0], call.out
    offset = out.dim() - source.dim()
    call.set(
        {
            dim + offset: _tile(atoms, out.shape[dim + offset] // source.shape[dim])
            for dim, atoms in call.labels_of(source).items()
        }
    )


@rule("select", "unbind")
def select(call: Call) -> None:
    """Drop a dimension; a labelled one is frozen, since code picks one of its indices."""
    source, dim = call.tensors[0], call.arg("dim") % call.tensors[0].dim()
    labels = call.labels_of(source)
    call.freeze_except(labels, labels.keys() - {dim})
    rest = {d - (d > dim): atoms for d, atoms in labels.items() if d != dim}
    for output in call.outputs:
        call.set(rest, output)


@rule("slice", "split", "split_with_sizes", "chunk", "narrow", "unsafe_split", "unsafe_chunk", "split_copy")
def split(call: Call) -> None:
    """Cut labels with their dimension.

    Equal parts are tied to each other, so that code which cuts in halves or thirds still does. The units of
    unequal parts are told apart, since they are not interchangeable.
    """
    source, outputs = call.tensors[0], call.outputs
    dim = (call.arg("dim") or 0) % source.dim()
    labels, size = call.labels_of(source), source.shape[dim]
    start, step = 0, 1
    if call.name in ("aten::slice", "aten::narrow"):
        start = call.arg("start") or 0
        start = max(0, min(size, start + size if start < 0 else start))
        step = call.arg("step") if call.name == "aten::slice" else 1
    for output in outputs:
        length = output.shape[dim]
        dims = dict(labels)
        if dim in labels and length != size:
            part = labels[dim][start : start + length * step : step]
            if length and size % length == 0 and start % length == 0 and step == 1:
                parts = labels[dim].reshape(-1, length)
                call.labels.tie(parts[:1], parts)
            else:
                call.labels.tell_apart(part)
            dims[dim] = part
            start += length
        call.set(dims, output)


@rule("cat", "concatenate", "stack")
def cat(call: Call) -> None:
    """Concatenate the labels along the dimension, tie those of the other dimensions."""
    tensors, out = [t for t in call.arg("tensors") if t.dim() > 0], call.out
    dim = (call.arg("dim") or 0) % out.dim()
    stacked = call.name == "aten::stack"
    dims: DimLabels = {}
    fixed: set[int] = set()
    for tensor in tensors:
        labels = call.labels_of(tensor)
        for d, size in enumerate(tensor.shape):
            target = d + (stacked and d >= dim)
            if size == 1 or (target == dim and not stacked):
                continue
            if d not in labels:
                fixed.add(target)
            elif target in dims:
                call.labels.tie(dims[target], labels[d])
            else:
                dims[target] = labels[d]
    for d in fixed & dims.keys():
        call.labels.freeze(dims[d], f"{call.name} with a tensor of fixed size")
    if not stacked and any(dim in call.labels_of(tensor) for tensor in tensors):
        dims[dim] = np.concatenate(
            [
                call.labels_of(t).get(dim, np.full(t.shape[dim], CONSTANT, np.int64))
                for t in tensors
                if t.dim() == out.dim()
            ]
        )
    call.set(dims)


@rule(
    "constant_pad_nd", "pad", "reflection_pad2d", "replication_pad2d", "reflection_pad1d", "replication_pad1d"
)
def pad(call: Call) -> None:
    """Put constant atoms around the labels of a padded dimension; those of the others stay."""
    source = call.tensors[0]
    padding = list(call.arg("padding" if "ication" in call.name or "flection" in call.name else "pad"))
    labels, dims = call.labels_of(source), {}
    for dim, atoms in labels.items():
        pair = 2 * (source.dim() - 1 - dim)
        before, after = padding[pair : pair + 2] if pair < len(padding) else (0, 0)
        if before < 0 or after < 0 or (call.name != "aten::constant_pad_nd" and (before or after)):
            call.labels.freeze(atoms, call.name)
        else:
            dims[dim] = np.pad(atoms, (before, after), constant_values=CONSTANT)
    call.set(dims)


@rule("roll", "flip")
def reorder(call: Call) -> None:
    """Keep the labels of the dimensions that stay in order; freeze the others."""
    source = call.tensors[0]
    moved = {dim % source.dim() for dim in call.arg("dims")}
    call.keep_labels(set(range(source.dim())) - moved)


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def shuffle(call: Call) -> None:
    """Carry labels between channels and space."""
    source, out = call.tensors[0], call.out
    channels = source.dim() - 3
    atoms = call.labels_of(source).get(channels)
    if atoms is None:
        call.keep_labels(range(channels))
        return
    if "channel_shuffle" in call.name:
        parts = atoms.reshape(call.arg("groups"), -1)
        call.labels.tie(parts[:1], parts)
        moved = parts.T.reshape(-1)
    elif out.shape[channels] < source.shape[channels]:
        parts = atoms.reshape(out.shape[channels], -1)
        call.labels.tie(parts[:, :1], parts)
        moved = parts[:, 0]
    else:
        moved = np.repeat(atoms, out.shape[channels] // source.shape[channels])
    call.keep_labels(range(channels + 1))
    call.set({**call.labels_of(out), channels: moved})


@rule("im2col")
def unfold(call: Call) -> None:
    """Repeat each channel's label for the positions of the kernel, ``(N, C, H, W) -> (N, C * k * k, L)``."""
    labels = call.labels_of(call.tensors[0])
    call.freeze_except(labels, {1})
    call.set({1: np.repeat(labels[1], math.prod(call.arg("kernel_size")))} if 1 in labels else {})


@rule("index", "index_select", "gather", "_unsafe_index")
def index(call: Call) -> None:
    """Keep the labels of dimensions that are not indexed; freeze the others.

    A buffer of positions to select is a dimension of its own: an entry can go, and what it selects with it.
    """
    source, out = call.tensors[0], call.out
    labels = call.labels_of(source)
    if call.name == "aten::index_select":
        selected = call.arg("dim") % source.dim()
        call.keep_labels(set(range(source.dim())) - {selected})
        positions = call.labels_of(call.arg("index")).get(0)
        if positions is not None:
            call.labels.produces(positions)
            call.set({**call.labels_of(out), selected: positions})
        return
    indices = call.arg("indices") if "index" in call.name else ()
    used = [dim for dim, i in enumerate(indices) if i is not None]
    if not used or used != list(range(used[0], used[-1] + 1)):
        call.keep_labels(())
        return
    shift = out.dim() - source.dim()
    kept = {dim: atoms for dim, atoms in labels.items() if dim not in used}
    call.freeze_except(labels, kept)
    call.labels.freeze_all(call.tensors[1:], call.name)
    call.set({dim if dim < used[0] else dim + shift: atoms for dim, atoms in kept.items()})


@rule("embedding")
def embedding(call: Call) -> None:
    """Label the last dimension by the columns of the table; its rows are frozen."""
    table = call.labels_of(call.arg("weight"))
    call.freeze_except(table, {1})
    if 1 in table:
        call.labels.produces(table[1])
        call.set({call.out.dim() - 1: table[1]})


# --- contractions -------------------------------------------------------------------------------------


@rule("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution")
def convolution(call: Call) -> None:
    """Tie input channels to the weight's columns; the weight's rows label the output.

    In a grouped convolution the groups are tied to each other, so that they stay equally wide; in a depthwise
    one, or where groups go as a whole, all channels of a group are tied. The weight is
    ``(C_out, C_in / groups, ...)``, transposed ``(C_in, C_out / groups, ...)``.
    """
    x, weight, bias = call.arg("input"), call.arg("weight"), call.arg("bias")
    groups, transposed = call.arg("groups"), call.arg("transposed")
    labels, x_labels, w_labels = call.labels, call.labels_of(x), call.labels_of(weight)
    rows, columns = w_labels.get(0), w_labels.get(1)
    channels = x_labels.get(1)
    call.freeze_except(w_labels, {0, 1})
    call.freeze_except(x_labels, {1})
    inputs, outputs = (rows, columns) if transposed else (columns, rows)
    if inputs is not None:
        labels.consumes(inputs)
    if 1 < groups < x.shape[1] and rows is not None:
        labels.lie_in_conv_groups(rows)
    if groups == 1:
        call.match(channels, inputs, x.shape[1])
    elif groups == x.shape[1] or labels.whole_groups:
        outputs = _whole_groups(call, channels, rows, columns, groups)
    elif transposed:
        outputs = _narrower_transposed(call, channels, rows, columns, groups)
    else:
        for atoms in (channels, rows):
            if atoms is not None:
                parts = atoms.reshape(groups, -1)
                labels.tie(parts[:1], parts)
        call.match(channels, None if columns is None else _tile(columns, groups), x.shape[1])
    if outputs is not None:
        labels.produces(outputs)
    call.set({} if outputs is None else {1: outputs})
    space = math.prod((x if transposed else call.out).shape[2:])
    kernel = math.prod(weight.shape[2:])
    call.count_macs(x.shape[0] * space * kernel, _factor(w_labels, weight, 0), _factor(w_labels, weight, 1))
    if bias is not None:
        call.match(outputs, call.labels_of(bias).get(0), call.out.shape[1])
        call.count_elements(1, call.out)


def _whole_groups(
    call: Call, channels: Atoms | None, rows: Atoms | None, columns: Atoms | None, groups: int
) -> Atoms | None:
    """Tie the channels of each group to each other, inputs and outputs; return the labels of the outputs.

    The inner dimension of the weight is that of a group, and stays.
    """
    if columns is not None:
        call.labels.freeze(columns, f"{call.name} keeps its groups whole")
    if channels is not None and rows is not None:
        inside = rows.reshape(groups, -1)
        call.labels.tie(inside[:, :1], inside)
        call.labels.tie(inside[:, :1], channels.reshape(groups, -1))
    else:
        call.match(channels, rows, call.arg("input").shape[1])
    if rows is None or not call.arg("transposed"):
        return rows
    return np.repeat(rows.reshape(groups, -1)[:, 0], call.out.shape[1] // groups)


def _narrower_transposed(
    call: Call, channels: Atoms | None, rows: Atoms | None, columns: Atoms | None, groups: int
) -> Atoms | None:
    """Tie the groups of a transposed convolution to each other; return the labels of its outputs."""
    call.match(channels, rows, call.arg("input").shape[1])
    if rows is not None:
        parts = rows.reshape(groups, -1)
        call.labels.tie(parts[:1], parts)
    return None if columns is None else _tile(columns, groups)


@rule("mm", "addmm", "bmm", "baddbmm", "_addmm_activation")
def matmul(call: Call) -> None:
    """Contract the inner dimension, ``(..., n, k) x (..., k, m) -> (..., n, m)``."""
    operands = call.tensors
    bias, (left, right) = (operands[0], operands[1:3]) if "add" in call.name else (None, operands[:2])
    a, b = call.labels_of(left), call.labels_of(right)
    n, k = left.dim() - 2, left.dim() - 1
    call.match(a.get(k), b.get(k - 1), left.shape[k])
    for labels, tensor, dim in ((a, left, k), (b, right, k - 1)):
        if dim in labels and not call.labels.is_activation(tensor):
            call.labels.consumes(labels[dim])
    dims: DimLabels = {}
    batch: list[Factor] = []
    if k == 2:  # of activations, whose dropped channels need not be zero: softmax(0) is not
        first = 0 if bias is None else 1
        call.mix(first, a, {k})
        call.mix(first + 1, b, {k - 1})
        batch = [_factor(a, left, 0)]
        if 0 in a and 0 in b:
            call.labels.tie(a[0], b[0])
            dims[0] = a[0]
        else:
            call.freeze_except({d: x[0] for d, x in enumerate((a, b)) if 0 in x})
    for labels, tensor, dim in ((a, left, n), (b, right, k)):
        if dim in labels:
            dims[dim] = labels[dim]
            if not call.labels.is_activation(tensor):
                call.labels.produces(labels[dim])
    call.set(dims)
    call.count_macs(1, *batch, _factor(a, left, n), _factor(a, left, k), _factor(b, right, k))
    if bias is not None:
        call.count_elements(1, call.out)
        call.pointwise([call.out, bias])


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_attention_math",
)
def attention(call: Call) -> None:
    """Contract queries with keys and weights with values, all ``(N, heads, length, channels)``.

    The fused kernels are for heads of one size: values go with queries, or torch would run other ops.
    """
    query, key, value = call.tensors[:3]
    q, k, v = (call.labels_of(t) for t in (query, key, value))
    last = query.dim() - 1
    call.match(q.get(last), k.get(last), query.shape[last])
    call.mix(0, q, {last})
    call.mix(1, k, {last})
    if last in q and last in v:
        call.labels.tie(q[last], v[last])
        call.mix(2, v, {last})
    for labels in (q, k, v):
        call.freeze_except(labels, {last})
    if len(call.tensors) > 3:
        call.labels.freeze_all(call.tensors[3:], call.name)
    call.set({last: v[last]} if last in v else {})
    rows = math.prod(query.shape[:-1]) * key.shape[-2]
    call.count_macs(rows, _factor(q, query, last))
    call.count_macs(rows, _factor(v, value, last))


@rule("mkldnn_rnn_layer")
def recurrent(call: Call) -> None:
    """Freeze everything, since the state feeds itself, gate by gate; count both weights in each step."""
    call.labels.freeze_all(call.tensors, call.name)
    x, weights = call.tensors[0], call.tensors[1:3]
    for weight in weights:
        if 0 in call.labels_of(weight):
            call.labels.produces(call.labels_of(weight)[0])
    call.count_macs(math.prod(x.shape[:-1]) * sum(weight.numel() for weight in weights))


# --- norms, reductions, pooling -----------------------------------------------------------------------


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit_functional", "cudnn_batch_norm", "miopen_batch_norm", "batch_norm",
    "_batch_norm_no_update", "_batch_norm_with_update",
)  # fmt: skip
def batch_norm(call: Call) -> None:
    """Tie scale, shift and statistics to the channels."""
    x = call.arg("input")
    channels = call.labels_of(x).get(1)
    for tensor in call.tensors[1:5]:
        atoms = call.labels_of(tensor).get(0)
        if atoms is not None:
            call.match(channels, atoms, x.shape[1])
    call.set(call.labels_of(x))
    if len(call.tensors) < 4 or call.tensors[3].numel() == 0:  # no running statistics: those of this input
        call.mix(0, call.labels_of(x), call.labels_of(x).keys() - {1})
    if channels is not None:
        for statistic in call.outputs[1:]:
            call.set({0: channels} if statistic.numel() else {}, statistic)
    if x.dim() == 4:
        call.count_elements(2, x)


@rule("native_layer_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> None:
    """Tie scale and shift to the normalised dimensions, whose statistics follow the kept channels."""
    x = call.arg("input")
    shape = call.arg("normalized_shape")
    labels = call.labels_of(x)
    normalised = range(x.dim() - len(shape), x.dim())
    call.mix(0, labels, normalised)
    affine = [t for t in call.tensors[1:3] if t.dim() == len(shape)]
    call.pointwise([x, *affine])


@rule("native_group_norm")
def group_norm(call: Call) -> None:
    """Tie the groups to each other, and scale and shift to the channels."""
    x = call.arg("input")
    labels = call.labels_of(x)
    channels = labels.get(1)
    if channels is not None:
        parts = channels.reshape(call.arg("group"), -1)
        call.labels.tie(parts[:1], parts)
        call.mix(0, labels, {1})
    for tensor in call.tensors[1:3]:
        atoms = call.labels_of(tensor).get(0)
        if atoms is not None:
            call.match(channels, atoms, x.shape[1])
    call.set(labels)


@rule("_weight_norm_interface")
def weight_norm(call: Call) -> None:
    """Tie lengths to directions; a length is that of the kept part (Salimans and Kingma, NeurIPS 2016)."""
    direction, length = call.arg("v"), call.arg("g")
    labels = call.labels_of(direction)
    call.mix(0, labels, labels)
    call.mix(1, call.labels_of(length), labels)
    call.pointwise([direction, length])
    call.set({dim: labels[dim] for dim in (call.arg("dim"),) if dim in labels}, call.outputs[1])


@rule(
    "mean", "sum", "nansum", "amax", "amin", "max", "min", "argmax", "argmin", "var", "std", "var_mean",
    "std_mean", "linalg_vector_norm", "norm", "prod", "logsumexp", "any", "all",
)  # fmt: skip
def reduction(call: Call) -> None:
    """Drop the reduced dimensions; their statistic is then over the kept channels."""
    source, out = call.tensors[0], call.out
    labels = call.labels_of(source)
    if call.func._overloadname in ("other", "out_other"):
        call.pointwise()
        return
    try:
        given = call.arg("dim")
    except KeyError:
        given = None  # over all dimensions
    given = [given] if isinstance(given, int) else given
    reduced = {dim % source.dim() for dim in given} if given else set(range(source.dim()))
    call.mix(0, labels, reduced)
    picks_an_index = call.name in ("aten::argmax", "aten::argmin") or len(call.outputs) > 1
    if picks_an_index and not call.name.endswith("_mean"):
        call.freeze_except(labels, labels.keys() - reduced)
    keepdim = out.dim() == source.dim()
    kept = [dim for dim in range(source.dim()) if keepdim or dim not in reduced]
    dims = {new: labels[old] for new, old in enumerate(kept) if old in labels and old not in reduced}
    for output in call.outputs:
        call.set(dims, output)


@rule("_softmax", "_safe_softmax", "_log_softmax", "softmax", "log_softmax", "cumsum", "glu")
def along(call: Call) -> None:
    """Keep labels; the op reads one dimension as a whole."""
    source = call.tensors[0]
    labels = call.labels_of(source)
    dim = call.arg("dim") % source.dim()
    if call.name == "aten::glu" and dim in labels:
        parts = labels[dim].reshape(2, -1)
        call.labels.tie(parts[0], parts[1])
        call.set({**labels, dim: parts[0]})
        return
    if call.name == "aten::cumsum":
        call.freeze_except(labels, labels.keys() - {dim})
    call.mix(0, labels, {dim})
    call.set(labels)


@rule(
    "max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d",
    "adaptive_max_pool2d", "avg_pool1d", "max_pool1d", "_adaptive_avg_pool3d", "adaptive_max_pool3d",
    "avg_pool3d", "max_pool3d_with_indices", "adaptive_avg_pool1d", "upsample_bilinear2d",
    "upsample_nearest2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_nearest_exact2d",
    "upsample_linear1d", "upsample_nearest1d", "upsample_trilinear3d", "grid_sampler_2d",
)  # fmt: skip
def spatial(call: Call) -> None:
    """Keep the labels of batch and channels; space has a fixed size."""
    call.keep_labels((0, 1))
    source, out = call.tensors[0], call.out
    if source.dim() == 4 and "pool2d" in call.name:
        if "adaptive" in call.name:
            window = math.prod(-(-a // b) for a, b in zip(source.shape[2:], out.shape[2:], strict=True))
        else:
            kernel = call.arg("kernel_size")
            window = kernel[0] ** 2 if len(kernel) == 1 else math.prod(kernel)
        call.count_elements(window, out)


@rule("relu")
def relu(call: Call) -> None:
    """Keep every label."""
    call.keep_labels()
    call.count_elements(1, call.out)


@rule(
    "hardtanh", "hardswish", "hardsigmoid", "gelu", "silu", "leaky_relu", "elu", "sigmoid", "tanh",
    "softplus", "celu", "mish", "prelu", "_prelu_kernel", "masked_fill", "where", "addcmul", "addcdiv",
    "lerp", "rsub",
)  # fmt: skip
def elementwise(call: Call) -> None:
    """Tie the operands index by index."""
    call.pointwise()
