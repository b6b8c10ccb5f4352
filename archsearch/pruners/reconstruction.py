"""Weights that make up for dropped channels, by least squares.

Both fits look for the least change of the weights that stay, not for new weights: where nothing is to make up
for, or where the samples do not tell, nothing changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from archsearch.errors import UsageError
from archsearch.graph import Selection, Units
from archsearch.pruners.additions import Additions, Part, raise_operand, values_at
from archsearch.pruners.calibration import Grams, Matrix, first_images, membership
from archsearch.pruners.pruner import Context
from archsearch.pruners.reading import Reading, Run, watch
from archsearch.surgery import shrink


def check_sampling(method: str, images: int, places: int, ridge: float) -> None:
    """Refuse hyper-parameters that cannot be.

    Raises:
        UsageError: If there are no images or places, or no ridge, without which a fit may have no solution.
    """
    for name, value in (("images", images), ("places", places)):
        if value < 1:
            raise UsageError(f"{method}: {name} is {value}: it must be 1 or more")
    if not ridge > 0:
        raise UsageError(f"{method}: ridge is {ridge:g}: it must be above 0; 1e-9 is as good as none")


def least_change(gram: torch.Tensor, cross: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return the ``change`` that minimises ``|residual - x change|^2 + ridge m |change|^2``.

    Args:
        gram: ``x' x``, ``(..., n, n)``.
        cross: ``x' residual``, ``(..., n, m)``.
        ridge: In units of ``m``, the mean of the diagonal of ``gram``.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    scale = diagonal.mean(-1)
    penalty = ridge * scale + (scale == 0)  # inputs that are always zero ask for no change
    factor = torch.linalg.cholesky(gram + torch.diag_embed(penalty[..., None].expand_as(diagonal)))
    return torch.cholesky_solve(cross, factor)


def scale_kept(context: Context, selection: Selection, grams: Grams, ridge: float) -> nn.Module:
    """Return the small network with one factor on each unit that a layer reads.

    The factors fit the sum of the contributions of all units by those of the kept ones (Luo et al., ICCV
    2017, equation 7).

    Args:
        context: The reference.
        selection: The kept units.
        grams: Of the contributions to each op.
        ridge: See ``least_change``.
    """
    small = shrink(context.model, context.graph, selection)
    readings: dict[int, Reading] = {}

    def see(reading: Reading, run: Run) -> torch.Tensor:
        readings[reading.number] = reading
        return run()

    for number in watch(small, context.graph, first_images(context, 1), see, selection):
        reading = readings[number]
        factors = torch.ones(len(reading.units), dtype=torch.float64)
        for name in context.graph.groups_of(reading.units):
            group = context.graph.groups[name]
            change = np.zeros(group.size)
            change[selection[name]] = factor_changes(grams[name][number].matrix, selection[name], ridge)
            factors += torch.from_numpy(membership(reading.units - group.first_unit, group.size) @ change)
        by_group = factors.reshape(len(reading.weight), 1, -1, 1)
        reading.rewrite(reading.weight * by_group.to(reading.weight.device))
    return small


def factor_changes(gram: Matrix, kept: Units, ridge: float) -> Matrix:
    """Return what to add to a factor of 1 on each kept unit, ``(width,)``."""
    dropped = np.setdiff1d(np.arange(len(gram)), kept)
    among, across = gram[np.ix_(kept, kept)], gram[np.ix_(kept, dropped)].sum(1, keepdims=True)
    return least_change(torch.from_numpy(among), torch.from_numpy(across), ridge)[:, 0].numpy()


def refit_readers(
    context: Context, selection: Selection, images: int, places: int, ridge: float
) -> nn.Module:
    """Return the small network with new weights in each layer that reads prunable channels.

    Layer by layer in the order of execution, a layer's weights are fitted so that from what the small network
    gives it, it computes what the reference computes: later layers make up for what earlier ones miss (He et
    al., ICCV 2017, sections 3.1 and 3.2). The small network runs once: each layer is fitted just before it
    computes.

    A layer at the end of a residual branch is fitted where it is added to the shortcut: the sum becomes what
    it is in the reference, so that the layer makes up for what the shortcut misses, too (section 3.3).

    Args:
        context: The reference.
        selection: The kept units.
        images: Calibration images, all in one batch.
        places: Places of each image and layer.
        ridge: See ``least_change``.
    """
    batch = first_images(context, images)
    noted = _Noted(context, selection, places * len(batch))
    alone = watch(context.model, context.graph, batch, noted.note, follow=noted.additions.follow)
    fit = _Fit({number: noted.targets[number] for number in alone}, noted.shortcuts, ridge)
    small = shrink(context.model, context.graph, selection)
    watch(small, context.graph, batch, fit.see, selection, fit.additions.follow)
    fit.finish()
    return small


@dataclass(frozen=True)
class _Target:
    """What a layer of the reference gives at some places: the kept channels, ``(R, C_out)``."""

    places: torch.Tensor
    values: torch.Tensor


class _Noted:
    """What the layers of the reference give, and what they are added to.

    Args:
        context: The reference.
        selection: Whose channels are noted.
        count: Places of each layer.
    """

    def __init__(self, context: Context, selection: Selection, count: int) -> None:
        self._draw = torch.Generator().manual_seed(context.seed)
        self._kept, self._count = context.graph.kept_units(selection), count
        self._shortcuts: dict[int, torch.Tensor] = {}
        self.targets: dict[int, _Target] = {}
        self.additions = Additions(self._meet)

    @property
    def shortcuts(self) -> dict[int, torch.Tensor]:
        """The values that are added to a layer's output alone, at its places."""
        return {n: values for n, values in self._shortcuts.items() if n not in self.additions.shared}

    def note(self, reading: Reading, run: Run) -> torch.Tensor:
        out = run()
        at = reading.places(self._count, self._draw)
        self.targets[reading.number] = _Target(at, self._of_kept(reading, reading.results(out, at)))
        self.additions.begin(reading, out)
        return out

    def _meet(self, part: Part, operand: torch.Tensor, other: torch.Tensor) -> None:
        at = self.targets[part.reading.number].places
        values = values_at(part.reading, other, at)
        self._shortcuts[part.reading.number] = self._of_kept(part.reading, values)

    def _of_kept(self, reading: Reading, values: torch.Tensor) -> torch.Tensor:
        return values[:, torch.from_numpy(self._kept[reading.outputs])]


class _Fit:
    """Fit the layers of the small network while it runs."""

    def __init__(
        self, targets: Mapping[int, _Target], shortcuts: Mapping[int, torch.Tensor], ridge: float
    ) -> None:
        self._targets, self._shortcuts, self._ridge = dict(targets), shortcuts, ridge
        self._waiting: dict[int, tuple[Reading, Run, torch.Tensor]] = {}
        self.additions = Additions(self._meet)

    def see(self, reading: Reading, run: Run) -> torch.Tensor:
        if reading.number in self._targets:
            if reading.number not in self._shortcuts:
                self._fit(reading, self._targets[reading.number].values)
            out = run()
            if reading.number in self._shortcuts:
                self._waiting[reading.number] = reading, run, out
                self.additions.begin(reading, out)
            return out
        return run()

    def finish(self) -> None:
        """Fit what has met no shortcut, since that branch of the network is gone."""
        for number, (reading, _, _) in self._waiting.items():
            self._fit(reading, self._targets[number].values)

    def _meet(self, part: Part, operand: torch.Tensor, other: torch.Tensor) -> None:
        number = part.reading.number
        reading, run, before = self._waiting.pop(number)
        target = self._targets[number]
        missing = self._shortcuts[number] - values_at(part.reading, other, target.places)
        missing = torch.where(part.scale != 0, missing / part.scale, 0.0)
        self._fit(reading, target.values + missing)
        raise_operand(part, operand, run() - before)

    def _fit(self, reading: Reading, values: torch.Tensor) -> None:
        fit_weight(reading, self._targets[reading.number].places, values, self._ridge)


def fit_weight(reading: Reading, places: torch.Tensor, target: torch.Tensor, ridge: float) -> None:
    """Change a layer's weight and bias, so that it gives ``target`` at some places, ``(R, C_out)``."""
    weight = reading.weight.flatten(2)  # (groups, C_out / groups, C_in / groups * K)
    x = reading.patches(places).transpose(0, 1).flatten(2)  # (groups, R, C_in / groups * K)
    residual = target.unflatten(1, weight.shape[:2]).transpose(0, 1) - x @ weight.mT
    if reading.bias is not None:
        residual -= reading.bias.double().reshape(len(weight), 1, -1)
        x_mean, residual_mean = x.mean(1, keepdim=True), residual.mean(1, keepdim=True)
        x, residual = x - x_mean, residual - residual_mean
    change = least_change(x.mT @ x, x.mT @ residual, ridge)
    if reading.bias is not None:
        reading.bias.add_((residual_mean - x_mean @ change).flatten())
    reading.rewrite(weight + change.mT)
