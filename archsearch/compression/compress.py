"""Deep Compression of a trained network, stage by stage (Han et al., ICLR 2016)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from archsearch import files
from archsearch.compression.container import Compressed, read_compressed, write_compressed
from archsearch.compression.outcome import Compression, Layer, Stage
from archsearch.compression.shared import Shared, Stages
from archsearch.compression.tied import TiedTraining, digest, tied_weights
from archsearch.errors import ArchsearchError, UsageError
from archsearch.recipe import BUDGETS, Recipe
from archsearch.sparsity.masks import MaskedTraining, Masks, magnitude, weight_names
from archsearch.trainer import Say, Trainer, is_main
from archsearch.training.evaluation import evaluate

CENTROID_LR_DIVISOR = 10


@dataclass(frozen=True)
class Coding:
    """How far a network is compressed, and how it is trained on the way.

    Attributes:
        conv_keep: Share of the weights of each convolution that survives, in ``(0, 1]``.
        linear_keep: The same of linear and recurrent layers.
        layer_keep: Shares of single parameters, by name.
        steps: In how many steps the network is pruned; shares fall geometrically, each step is trained.
        conv_bits: Bits of a shared weight of a convolution: at most ``2 ** bits - 1`` values, and zero.
        linear_bits: The same of linear and recurrent layers.
        conv_index_bits: Bits of a relative index in convolutions.
        linear_index_bits: The same in linear and recurrent layers.
        recipe: How the network was trained; the budget says how it is trained again.
        budget: Of the training after each step and of the centroids: ``"finetune"``,
            ``"finetune-published"`` or ``"none"``.
        tune_epochs: Epochs of each of these trainings, instead of the budget's.
        centroid_lr: Learning rate of the centroids; by default a tenth of the budget's, since a centroid's
            gradient is the sum of many.
        seed: Of the order of the images.
    """

    conv_keep: float = 0.35
    linear_keep: float = 0.1
    layer_keep: Mapping[str, float] = field(default_factory=dict)
    steps: int = 1
    conv_bits: int = 8
    linear_bits: int = 5
    conv_index_bits: int = 8
    linear_index_bits: int = 5
    recipe: Recipe = field(default_factory=Recipe)
    budget: str = "finetune"
    tune_epochs: int | None = None
    centroid_lr: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for option in ("conv_bits", "linear_bits", "conv_index_bits", "linear_index_bits"):
            if not 1 <= getattr(self, option) <= 8:
                name = option.replace("_", "-")
                raise UsageError(f"--{name} {getattr(self, option)}: must be from 1 to 8")
        shares = {"--conv-keep": self.conv_keep, "--linear-keep": self.linear_keep}
        for name, share in {**shares, **{f"--layer-keep {n}": s for n, s in self.layer_keep.items()}}.items():
            if not 0 < share <= 1:
                raise UsageError(f"{name}: {share:g} must be a share in (0, 1]")
        if self.steps < 1:
            raise UsageError(f"--steps {self.steps}: at least 1")
        if self.centroid_lr is not None and not self.centroid_lr > 0:
            raise UsageError(f"--centroid-lr {self.centroid_lr:g}: must be above 0")
        if not BUDGETS[self.budget].inherits:
            raise UsageError(f"--budget {self.budget}: trains from scratch; give finetune or none")

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return bool(BUDGETS[self.budget].epochs_divisor)


def compress(
    model: nn.Module,
    coding: Coding,
    trainer: Trainer | None,
    *,
    out: Path,
    architecture: str = "",
    conditions: Mapping[str, Any] | None = None,
    say: Say = lambda line: None,
) -> Compression:
    """Prune a trained network, share its weights, code them, and write the file ``weights.dc``.

    Args:
        model: Trained; not changed.
        coding: How far, and how to train on the way.
        trainer: Trains and measures; ``None`` with a budget of ``"none"``.
        out: Directory of the file and the results.
        architecture: Key of the architecture, for the file.
        conditions: What else to record about the run.
        say: Takes lines for the user.

    Raises:
        UsageError: If the network has no weights to prune, a layer is unknown, or data is missing.
        ArchsearchError: If the file does not hold the very weights that were written.
    """
    if trainer is None and coding.trains:
        raise UsageError(f"--budget {coding.budget} trains the network: give --data, or --budget none")
    model = copy.deepcopy(model).cpu()
    shares = _shares(model, coding)
    files.probe(out, _nbytes(model))
    run = _Run(coding, trainer)
    stages = [Stage("weights", _nbytes(model), run.accuracy(model))]

    masks = magnitude(model, shares, "layer")
    pruned = run.accuracy(masks.applied(model))
    model, masks = run.prune(model, shares)
    first = _shared(model, masks, coding)
    sizes = _sizes(model, first)
    stages.append(Stage("pruned", sizes.pruned / 8, pruned))
    if coding.trains:
        stages.append(Stage("pruned and trained", sizes.pruned / 8, run.accuracy(model)))
    _fill(model, first)
    stages.append(Stage("weights shared", sizes.shared / 8, run.accuracy(model)))
    shared = run.train_centroids(model, first)
    _fill(model, shared)
    if coding.trains:
        stages.append(Stage("centroids trained", sizes.shared / 8, run.accuracy(model)))
    sizes = _sizes(model, shared)
    stages.append(Stage("with relative indices", sizes.indexed / 8, stages[-1].accuracy))
    stages.append(Stage("Huffman coded", sizes.coded / 8, stages[-1].accuracy))

    path = out / "weights.dc"
    content = _content(model, shared, architecture)
    if is_main():
        written = write_compressed(path, content)
        decoded = read_compressed(path).state_dict()
        _check_same(decoded, model, path)
        model.load_state_dict(decoded)
        stages.append(Stage("the file, decoded", written, run.accuracy(model)))
    layers = [Layer.of(name, weights) for name, weights in shared.items()]
    found = Compression(model, stages, layers, dict(conditions or {}))
    if not is_main():
        return found
    say(f"{path}: {found.ratio:.2f} times smaller, and decodes to the very weights")
    return replace(found, files=[path, *found.write(out)])


class _Run:
    """The trainings and measurements of one compression."""

    def __init__(self, coding: Coding, trainer: Trainer | None) -> None:
        self._coding, self._trainer = coding, trainer

    def accuracy(self, model: nn.Module) -> float | None:
        """Return the test accuracy in percent, if there is data."""
        if self._trainer is None:
            return None
        size = self._coding.recipe.batch_size
        measured = evaluate(model, self._trainer.data.test, size, self._trainer.device)
        model.cpu()
        return measured.accuracy

    def prune(self, model: nn.Module, shares: Mapping[str, float]) -> tuple[nn.Module, Masks]:
        """Prune to the shares in steps, training after each, in place."""
        masks: Masks | None = None
        for step in range(1, self._coding.steps + 1):
            now = {name: share ** (step / self._coding.steps) for name, share in shares.items()}
            masks = magnitude(model, now, "layer", within=masks)
            masks.apply(model)
            if self._coding.trains and self._trainer is not None:
                label = f"pruned to {masks.share:.3f} of the weights"
                callbacks, identity = [MaskedTraining(masks)], {"masks": masks.digest}
                self._trainer.train(
                    label, model, self._recipe, self._coding.seed, callbacks=callbacks, identity=identity
                )
                model.cpu()
        assert masks is not None  # noqa: S101  there is at least one step
        return model, masks

    def train_centroids(self, model: nn.Module, shared: Mapping[str, Shared]) -> Mapping[str, Shared]:
        """Return the sharing with trained centroids; the network is trained in place."""
        if not self._coding.trains or self._trainer is None:
            return shared
        recipe = self._recipe
        lr = self._coding.centroid_lr or recipe.lr / CENTROID_LR_DIVISOR
        self._trainer.train(
            "shared weights",
            model,
            recipe.with_(lr=lr),
            self._coding.seed,
            callbacks=[TiedTraining(shared)],
            identity={"shared": digest(shared)},
        )
        return tied_weights(model.cpu(), shared)

    @property
    def _recipe(self) -> Recipe:
        recipe = BUDGETS[self._coding.budget].recipe(self._coding.recipe)
        return recipe if self._coding.tune_epochs is None else recipe.with_(epochs=self._coding.tune_epochs)


def _shares(model: nn.Module, coding: Coding) -> dict[str, float]:
    names = weight_names(model)
    convolutions = _convolutions(model)
    if unknown := [name for name in coding.layer_keep if name not in names]:
        raise UsageError(f"--layer-keep {unknown[0]}: the network has {', '.join(names)}")
    shares = {name: coding.conv_keep if name in convolutions else coding.linear_keep for name in names}
    return {**shares, **coding.layer_keep}


def _convolutions(model: nn.Module) -> frozenset[str]:
    try:
        return frozenset(weight_names(model, "conv"))
    except UsageError:  # it has none
        return frozenset()


def _shared(model: nn.Module, masks: Masks, coding: Coding) -> dict[str, Shared]:
    """Cluster each pruned layer."""
    parameters, convolutions = dict(model.named_parameters()), _convolutions(model)
    found = {}
    for name, mask in masks.items():
        conv = name in convolutions
        bits = coding.conv_bits if conv else coding.linear_bits
        index_bits = coding.conv_index_bits if conv else coding.linear_index_bits
        found[name] = Shared.share(parameters[name], mask, bits, index_bits)
    return found


def _fill(model: nn.Module, shared: Mapping[str, Shared]) -> None:
    """Give a network the shared weights."""
    parameters = dict(model.named_parameters())
    for name, weights in shared.items():
        parameters[name].data.copy_(weights.dense())


def _content(model: nn.Module, shared: Mapping[str, Shared], architecture: str) -> Compressed:
    """Return what the file holds; a tensor with several names stands in it once."""
    state = model.state_dict(keep_vars=True)
    names: dict[int, str] = {id(tensor): name for name, tensor in reversed(state.items())}
    names |= {id(state[name]): name for name in shared}
    same = {name: names[id(tensor)] for name, tensor in state.items() if names[id(tensor)] != name}
    raw = {name: tensor for name, tensor in state.items() if name not in same and name not in shared}
    return Compressed(dict(shared), raw, same, tuple(state), architecture)


def _nbytes(model: nn.Module) -> int:
    """Return the bytes of all weights and statistics, each once."""
    return sum(
        tensor.nbytes for tensor in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values()
    )


def _sizes(model: nn.Module, shared: Mapping[str, Shared]) -> Stages:
    """Return the bits of each stage, with everything that is not compressed."""
    sizes = sum((weights.stage_bits() for weights in shared.values()), Stages())
    rest = 8 * _nbytes(model) - sizes.original
    return sizes + Stages(*[rest] * len(sizes.bits()))


def _check_same(decoded: Mapping[str, Any], model: nn.Module, path: Path) -> None:
    """Raise unless a file holds the weights of a network to the last bit."""
    for name, tensor in model.state_dict().items():
        if not (tensor == decoded[name]).all() or tensor.dtype != decoded[name].dtype:
            raise ArchsearchError(
                f"{path}: {name} does not decode to what was coded; this is a bug of archsearch"
            )
