"""What a network of given widths costs: MACs, parameters and activation memory, without building it.

Every count is a sum of products of dimensions, and every dimension a linear form of the widths: a polynomial
that is recorded once, in the trace. One candidate or a million are then a few matrix products.

MACs are the multiply-adds of convolutions, linear layers and attention, for the example input (one image).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from torch import nn

from archsearch.graph import STAYS, ChannelGraph
from archsearch.rules import Factor
from archsearch.tracing import Activation

Floats: TypeAlias = npt.NDArray[np.float64]

Columns: TypeAlias = npt.NDArray[np.int64]
"""Which of the groups."""

Term: TypeAlias = "tuple[int, tuple[Factor, ...]]"
"""A factor times a product of dimensions."""

EXACT = 2**53
"""Up to here float64 holds every integer, so that BLAS counts exactly."""


@dataclass(frozen=True)
class Polynomial:
    """An integer polynomial of the widths.

    With ``f = (1, w_1, …, w_G)`` its value is ``f Q f`` plus the sum of ``factor * (u f)(v f)(t f) …`` over
    ``higher``, the rare terms in which three or more widths meet.

    ``branches`` are what vanishes where all of some groups have width 0: their columns, and a part of the
    polynomial. What is left of such a branch are zeros in the shape of width 1.
    """

    quadratic: Floats
    higher: tuple[tuple[int, tuple[Floats, ...]], ...] = ()
    branches: tuple[tuple[Columns, Polynomial], ...] = ()

    def __call__(self, widths: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the values at ``widths``, ``(..., G) -> (...)``."""
        if self.branches and not np.all(widths):
            return self._without_branches(widths)
        f = _with_one(widths)
        value = ((f @ self.quadratic) * f).sum(-1)
        for factor, forms in self.higher:
            value = value + factor * np.prod([f @ form for form in forms], axis=0)
        if np.max(value, initial=0) >= EXACT:
            raise OverflowError("a count above 2^53 is not exact")
        rounded: npt.NDArray[np.int64] = np.rint(value).astype(np.int64)
        return rounded

    def _without_branches(self, widths: npt.ArrayLike) -> npt.NDArray[np.int64]:
        left, gone = _left_of_branches(widths, [columns for columns, _ in self.branches])
        value = np.asarray(replace(self, branches=())(left))
        for (_, part), where in zip(self.branches, gone, strict=True):
            if where.any():
                value -= np.where(where, part(left), 0)
        return value

    @classmethod
    def of(cls, terms: Iterable[tuple[int, tuple[Floats, ...]]], groups: int) -> Polynomial:
        """Sum terms, each a factor times linear forms ``(1 + groups,)``."""
        linear = np.zeros(1 + groups)
        lefts, rights, higher = [], [], []
        for factor, forms in terms:
            varying = [form for form in forms if form[1:].any()]
            for form in forms:
                if not form[1:].any():
                    factor *= int(form[0])
            if not varying:
                linear[0] += factor
            elif len(varying) == 1:
                linear += factor * varying[0]
            elif len(varying) == 2:
                lefts.append(factor * varying[0])
                rights.append(varying[1])
            else:
                higher.append((factor, tuple(varying)))
        quadratic = np.stack(lefts).T @ np.stack(rights) if lefts else np.zeros((1 + groups,) * 2)
        quadratic[0] += linear
        return cls(quadratic, tuple(higher))


def _left_of_branches(
    widths: npt.ArrayLike, branches: Iterable[Columns]
) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.bool_]]]:
    """Return widths ``(..., G)`` with 1 in the place of 0 where a branch is gone, and where each is."""
    left = np.array(widths, dtype=np.int64)
    gone = [(left[..., columns] == 0).all(-1) for columns in branches]
    for columns, where in zip(branches, gone, strict=True):
        left[..., columns] += where[..., None]
    return left, gone


def _with_one(widths: npt.ArrayLike) -> Floats:
    w = np.asarray(widths, dtype=np.float64)
    return np.concatenate([np.ones((*w.shape[:-1], 1)), w], axis=-1)


@dataclass(frozen=True)
class Cost:
    """What one network costs.

    Attributes:
        macs: Multiply-adds of convolutions, linear layers and attention for the example input.
        params: Trainable parameters, shared ones once.
        peak_activation_bytes: Largest sum of the tensors that ops have made and that are still to be read,
            in an eval forward of the example input; the input and the parameters are not counted.
        published_flops: FLOPs as Liu et al. (ICLR 2019, released code) count them: 2 per multiply-add, plus
            biases, 2 per element of a 2-D batch norm, 1 of a ReLU, and the window of a pooling per output.
    """

    macs: int
    params: int
    peak_activation_bytes: int
    published_flops: int

    def of_training(self, published: bool) -> int:
        """Return what Scratch-B counts: MACs, or FLOPs as published."""
        return self.published_flops if published else self.macs


@dataclass(frozen=True)
class Latency:
    """How long a network takes on some device, as far as a table tells.

    Attributes:
        upper_ns: Upper bound in nanoseconds at widths ``(..., G) -> (...)``; it never falls when widths grow.
        reference_ns: What the reference takes, as measured.
    """

    upper_ns: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]
    reference_ns: int


class CostModel:
    """The costs of a network as functions of its widths.

    Args:
        model: The traced model.
        graph: Its channel groups.
        latency: Of the network on the device that it is for, if that is known.

    Attributes:
        names: The groups, in the order of the columns of every ``(..., G)`` array of widths.
        sizes: Their sizes in the reference, ``(G,)``.
        branches: The columns of each residual branch that may vanish: all are 0, or none is.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, latency: Latency | None = None) -> None:
        self.latency = latency
        self.names: tuple[str, ...] = tuple(graph.groups)
        self.sizes = np.array([group.size for group in graph.groups.values()], dtype=np.int64)
        self._graph = graph
        self._tally = graph.trace.tally
        self._group_of_unit = np.repeat(np.arange(1, 1 + len(self.names)), self.sizes)
        self._known: dict[int, Floats] = {}
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        column = {name: number for number, name in enumerate(self.names)}
        self.branches: tuple[Columns, ...] = tuple(
            np.array([column[name] for name in branch.groups]) for branch in graph.branches
        )

    @cached_property
    def params(self) -> Polynomial:
        """Parameters."""
        gone = [{name for name in branch.tensors if name in self._shapes} for branch in self._graph.branches]
        return self._with_branches(self._params_of(self._shapes), map(self._params_of, gone))

    @cached_property
    def macs(self) -> Polynomial:
        """Multiply-adds."""
        return self._counted(self._tally.macs, self._op_of_macs)

    @cached_property
    def published_flops(self) -> Polynomial:
        """FLOPs as Liu et al. count them."""
        counted = [op.counted[1] for op in self._graph.trace.ops]
        return self._counted(self._tally.published, _op_of_terms(self._tally.published, counted))

    def array(self, widths: Mapping[str, int]) -> npt.NDArray[np.int64]:
        """Return widths by group as ``(G,)``."""
        return np.array([widths[name] for name in self.names], dtype=np.int64)

    def mapping(self, widths: npt.ArrayLike) -> dict[str, int]:
        """Return widths ``(G,)`` by group."""
        return dict(zip(self.names, np.asarray(widths).tolist(), strict=True))

    def of(self, widths: Mapping[str, int]) -> Cost:
        """Return what a network of these widths costs."""
        w = self.array(widths)
        peak = int(self.peak_activation_bytes(w))
        return Cost(int(self.macs(w)), int(self.params(w)), peak, int(self.published_flops(w)))

    @property
    def reference(self) -> Cost:
        """What the reference model costs."""
        return self.of(self.mapping(self.sizes))

    def peak_activation_bytes(self, widths: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the peak activation memory at ``widths``, ``(..., G) -> (...)``; see ``Cost``."""
        living, tensors, branch_of = self._activations
        if not tensors:
            return np.zeros(np.shape(widths)[:-1], dtype=np.int64)
        left, gone = _left_of_branches(widths, self.branches)
        sizes = np.stack([tensor(left) for tensor in tensors], axis=-1).astype(np.float64)
        for number, where in enumerate(gone, 1):
            sizes[..., branch_of == number] *= ~where[..., None]
            sizes[..., branch_of == -number] *= where[..., None]
        peak: npt.NDArray[np.int64] = np.rint((sizes @ living).max(-1)).astype(np.int64)
        return peak

    def macs_by_layer(self, widths: Mapping[str, int]) -> list[int]:
        """Return the MACs of each convolution, linear layer and attention product, in execution order."""
        w = self.array(widths)
        terms = zip(self._tally.macs, self._op_of_macs, strict=True)
        return [int(self._counted([term], [op])(w)) for term, op in terms]

    @cached_property
    def _activations(self) -> tuple[Floats, list[Polynomial], npt.NDArray[np.int64]]:
        """How many tensors of each kind live at each op, ``(kinds, ops)``, each kind's size and branch.

        Tensors of one kind have one size. They are not made when their branch is gone, the first being 1;
        or (-1) they live longer then; or (0) no branch matters.
        """
        trace = self._graph.trace
        numbered = list(enumerate(self._graph.branches, 1))
        branch_of_op = {op: number for number, branch in numbered for op in branch.unmade}
        held: dict[int, dict[int, int]] = {}
        for number, branch in numbered:
            for made, until in branch.held:
                ends = held.setdefault(made, {})
                ends[-number] = max(until, ends.get(-number, until))
        rows: dict[tuple[object, ...], int] = {}
        terms: list[Term] = []
        branches: list[int] = []
        living: list[Floats] = []

        def live(activation: Activation, first: int, last: int, kind: int) -> None:
            labels = activation.labels
            fixed = activation.itemsize
            for dim, size in enumerate(activation.shape):
                fixed *= 1 if dim in labels else size
            key = (kind, fixed, *sorted(map(id, labels.values())))
            if key not in rows:
                rows[key] = len(terms)
                terms.append((fixed, tuple(labels.values())))
                branches.append(kind)
                living.append(np.zeros(len(trace.ops) + 1))
            living[rows[key]][first : last + 1] += 1

        for activation in trace.activations:
            live(activation, activation.born, activation.last_read, branch_of_op.get(activation.born, 0))
            for kind, last in held.get(activation.born, {}).items():
                live(activation, activation.last_read + 1, last, kind)
        return np.array(living), [self._polynomial([term]) for term in terms], np.array(branches)

    @cached_property
    def _op_of_macs(self) -> list[int]:
        return _op_of_terms(self._tally.macs, [op.counted[0] for op in self._graph.trace.ops])

    def _params_of(self, names: Iterable[str]) -> Polynomial:
        dims = self._graph.units
        return Polynomial.of(
            (
                (1, tuple(self._form_of_units(dims[name, dim]) for dim, size in enumerate(shape) if size > 1))
                for name, shape in ((name, self._shapes[name]) for name in names)
            ),
            len(self.names),
        )

    def _counted(self, terms: Sequence[Term], ops: Sequence[int]) -> Polynomial:
        """Sum the terms of some ops, less those of the branches that are gone."""
        parts = (
            self._polynomial(term for term, op in zip(terms, ops, strict=True) if op in branch.ops)
            for branch in self._graph.branches
        )
        return self._with_branches(self._polynomial(terms), parts)

    def _with_branches(self, whole: Polynomial, parts: Iterable[Polynomial]) -> Polynomial:
        return replace(whole, branches=tuple(zip(self.branches, parts, strict=True)))

    def _polynomial(self, terms: Iterable[Term]) -> Polynomial:
        return Polynomial.of(
            ((factor, tuple(self._form(dim) for dim in dims)) for factor, dims in terms), len(self.names)
        )

    def _form(self, dim: Factor) -> Floats:
        """Return the size of a dimension as a linear form of the widths, ``(1 + G,)``."""
        if isinstance(dim, int):
            form = np.zeros(1 + len(self.names))
            form[0] = dim
            return form
        if id(dim) not in self._known:  # the trace keeps the arrays alive
            self._known[id(dim)] = self._form_of_units(self._graph.unit_of_atom[dim])
        return self._known[id(dim)]

    def _form_of_units(self, units: npt.NDArray[np.int64]) -> Floats:
        staying = units == STAYS
        form = np.bincount(self._group_of_unit[units[~staying]], minlength=1 + len(self.names)).astype(float)
        form[1:] /= self.sizes
        form[0] = np.count_nonzero(staying)
        return form


def _op_of_terms(terms: Sequence[Term], counted: Sequence[int]) -> list[int]:
    """Return the number of the op behind each term, from how many terms there are up to each op."""
    ops: list[int] = np.searchsorted(counted, np.arange(len(terms)), side="right").tolist()
    return ops
