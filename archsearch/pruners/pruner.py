"""The seam between pruning methods and everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import nn

from archsearch.allocation import Scores
from archsearch.errors import UsageError
from archsearch.graph import ChannelGraph, Selection
from archsearch.registry import Registry
from archsearch.surgery import shrink
from archsearch.training.callbacks import Callback

__all__ = [
    "PRUNERS",
    "Batches",
    "Context",
    "Inheriting",
    "Need",
    "Pruner",
    "Scores",
    "SparseTraining",
    "Sparsifying",
    "inherit_weights",
]

Batches: TypeAlias = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]]
"""Returns batches of training images and labels, not augmented, always the same."""

Need: TypeAlias = Literal["images", "labels", "gradients", "sparse training"]
"""What a method needs beside the trained weights."""


@dataclass(frozen=True)
class Context:
    """What a pruner may look at; it changes none of it.

    Attributes:
        model: The trained reference, in eval mode.
        graph: Its channel groups.
        seed: For methods that draw.
        batches: Training images and labels; ``None`` without data.
        sparse: What a method's own sparse training trained, with its factors; ``None`` without one.
    """

    model: nn.Module
    graph: ChannelGraph
    seed: int = 0
    batches: Batches | None = None
    sparse: nn.Module | None = None

    def calibration(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Return the calibration batches, on the model's device and in its precision.

        Raises:
            UsageError: If there are none.
        """
        if self.batches is None:
            raise UsageError("this method looks at training images: give --data")
        like = next(self.model.parameters())
        empty = True
        for images, labels in self.batches():
            empty = False
            yield (
                images.to(like) if images.is_floating_point() else images.to(like.device),
                labels.to(like.device),
            )
        if empty:
            raise UsageError(
                "this method looks at training images, and --data has none: take another data set"
            )


class Pruner(Protocol):
    """A method that scores channel units.

    Attributes:
        source: The paper, and what in it.
        allocation: The allocation that the method is published with.
        needs: What it needs beside the trained weights.
    """

    source: ClassVar[str]
    allocation: ClassVar[str]
    needs: ClassVar[tuple[Need, ...]]

    def score(self, context: Context) -> Scores:
        """Return what each unit of each group is worth, ``(size,)``; larger is kept.

        The pipeline calls it once, after the reference is trained. The same context gives the same scores.
        """
        ...


@runtime_checkable
class Inheriting(Protocol):
    """A pruner that adapts the weights that stay, where others just cut."""

    def inherit(self, context: Context, selection: Selection) -> nn.Module:
        """Return the small network with adapted weights.

        The pipeline calls it where weights are inherited, with the context that was scored.
        """
        ...


@dataclass(frozen=True)
class SparseTraining:
    """How a method trains the reference, so that what it will remove fades.

    Attributes:
        network: What is trained: the reference itself, or a wrapper with factors beside it. All that changes
            during the training is a parameter or a buffer of it, so that checkpoints hold it.
        callbacks: Change gradients and weights during the training; they keep nothing themselves.
        plain: Returns the reference with everything merged into its weights; called after the training.
        identity: What decides the training beside the pruner's hyper-parameters, as plain values.
    """

    network: nn.Module
    callbacks: Sequence[Callback]
    plain: Callable[[], nn.Module]
    identity: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Sparsifying(Protocol):
    """A pruner that trains the reference its own way before it scores."""

    def sparse_training(
        self, model: nn.Module, graph: ChannelGraph, widths: Mapping[str, int]
    ) -> SparseTraining:
        """Return what to train.

        The pipeline calls it before the training, trains with the recipe of the reference, and scores
        ``plain()`` with the trained ``network`` as ``Context.sparse``.

        Args:
            model: The reference, fresh or with the weights that were given; may be trained in place.
            graph: Its channel groups.
            widths: Uniform widths that meet the target, for methods that aim at some while they train.
        """
        ...


def inherit_weights(pruner: Pruner, context: Context, selection: Selection) -> nn.Module:
    """Return the small network with the weights that a method leaves: the kept slices, or its own fit."""
    if isinstance(pruner, Inheriting):
        return pruner.inherit(context, selection)
    return shrink(context.model, context.graph, selection)


PRUNERS: Registry[type[Pruner]] = Registry("pruner")
