"""What a single weight is worth: the criteria of unstructured pruning."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archsearch.errors import UsageError
from archsearch.registry import Registry
from archsearch.sparsity.masks import Masks
from archsearch.training.determinism import derive_seed, stream
from archsearch.training.evaluation import main_output

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Images ``(N, C, H, W)`` and labels ``(N,)`` of the train split."""


class Criterion(Protocol):
    """A rule that scores single weights.

    Attributes:
        source: The paper, and what in it.
        trained: Whether it scores trained weights; if not, it scores those of the initialisation.
        needs_batch: Whether it looks at training images.
    """

    source: ClassVar[str]
    trained: ClassVar[bool]
    needs_batch: ClassVar[bool]

    def score(
        self, model: nn.Module, names: Sequence[str], batch: Batch | None, seed: int
    ) -> dict[str, Tensor]:
        """Return what each weight of the named parameters is worth, not negative; larger is kept.

        The model is not changed. The same arguments give the same scores.
        """
        ...


CRITERIA: Registry[type[Criterion]] = Registry("criterion", "criteria")


@CRITERIA.register("magnitude")
class Magnitude:
    """Keep the weights of largest absolute value."""

    source: ClassVar = "Han et al., NeurIPS 2015, section 3"
    trained: ClassVar = True
    needs_batch: ClassVar = False

    def score(
        self, model: nn.Module, names: Sequence[str], batch: Batch | None, seed: int
    ) -> dict[str, Tensor]:
        """Return ``|w|``."""
        parameters = dict(model.named_parameters())
        return {name: parameters[name].detach().abs() for name in names}


@CRITERIA.register("snip")
class Snip:
    """Keep the weights whose removal would change the loss of one batch most, to first order."""

    source: ClassVar = "Lee et al., SNIP, ICLR 2019, section 4.1"
    trained: ClassVar = False
    needs_batch: ClassVar = True

    def score(
        self, model: nn.Module, names: Sequence[str], batch: Batch | None, seed: int
    ) -> dict[str, Tensor]:
        """Return ``|g * w|``, the derivative of the loss by a factor on the weight.

        The network runs in train mode, since at the initialisation batch norms have no statistics yet.
        """
        if batch is None:
            raise UsageError("snip looks at training images: give --data")
        images, labels = batch
        twin = copy.deepcopy(model).cpu().train().requires_grad_(True)
        parameters = dict(twin.named_parameters())
        with stream(seed, "snip"):  # for dropout
            loss = F.cross_entropy(main_output(twin(images.cpu())), labels.cpu())
            used = torch.autograd.grad(loss, [parameters[name] for name in names], materialize_grads=True)
        return {
            name: (gradient * parameters[name]).detach().abs()
            for name, gradient in zip(names, used, strict=True)
        }


@CRITERIA.register("random")
class RandomWeights:
    """Keep weights by chance."""

    source: ClassVar = "chance, the control of every other criterion"
    trained: ClassVar = False
    needs_batch: ClassVar = False

    def score(
        self, model: nn.Module, names: Sequence[str], batch: Batch | None, seed: int
    ) -> dict[str, Tensor]:
        """Return numbers drawn evenly from ``[0, 1)``."""
        parameters = dict(model.named_parameters())
        return {name: _uniform(parameters[name].shape, seed, name) for name in names}


def shuffled(masks: Masks, seed: int) -> Masks:
    """Return masks that keep as many weights of each layer, but which ones is chance."""
    found = {}
    for name, mask in masks.items():
        order = _uniform(mask.shape, seed, name).flatten().argsort(stable=True)
        found[name] = mask.flatten()[order].view(mask.shape)
    return Masks(found)


def _uniform(shape: Sequence[int], seed: int, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, "random weights", name))
    return torch.rand(tuple(shape), generator=generator)
