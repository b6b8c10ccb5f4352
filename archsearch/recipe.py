"""How a network is trained, as plain data: recipes, schedules and training budgets. Imports no torch.

A schedule depends on the share of the training that is done, never on an epoch's number, so a longer
training (Scratch-B) stretches it and nothing has to be recomputed.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from archsearch.errors import UsageError
from archsearch.registry import Registry

Rule = tuple[Callable[[Any], bool], str]

WARMUP_START = 0.1  # the share of ``lr`` at which a warm-up begins


def _one_of(*names: str) -> Rule:
    return lambda value: value in names, f"one of {', '.join(names)}"


def _whole(least: int) -> Rule:
    return lambda value: type(value) is int and value >= least, f"a whole number of at least {least}"


def _real(low: float, high: float = math.inf, *, low_open: bool = False) -> Rule:
    def holds(value: Any) -> bool:
        return type(value) in (int, float) and low <= value < high and not (low_open and value == low)

    return holds, f"a number in {'(' if low_open else '['}{low:g}, {high:g})"


def _milestones_rise(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and all(type(item) is float and 0 < item < 1 for item in value)
        and all(a < b for a, b in itertools.pairwise(value))
    )


_FLAG: Rule = (lambda value: type(value) is bool, "true or false")
_RULES: dict[str, Rule] = {
    "optimizer": _one_of("sgd", "adam", "adamw"),
    "lr": _real(0, low_open=True),
    "momentum": _real(0, 1),
    "nesterov": _FLAG,
    "weight_decay": _real(0),
    "batch_size": _whole(1),
    "epochs": _whole(1),
    "schedule": _one_of("step", "cosine", "constant"),
    "milestones": (_milestones_rise, "rising shares of the training in (0, 1), such as 0.5,0.75"),
    "gamma": _real(0, 1, low_open=True),
    "warmup": _real(0, 1),
    "label_smoothing": _real(0, 1),
    "ema_decay": _real(0, 1),
    "clip_grad_norm": _real(0),
    "precision": _one_of("fp32", "bf16", "fp16"),
    "channels_last": _FLAG,
    "compile": _FLAG,
    "sync_batch_norm": _FLAG,
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides a training except the network, the data and the seed.

    Attributes:
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        lr: Peak learning rate, for the joint ``batch_size``.
        momentum: Of SGD; Adam keeps its own usual betas.
        nesterov: Whether SGD's momentum is Nesterov's.
        weight_decay: On every parameter, as published; decoupled with ``adamw``.
        batch_size: Images in a step, of all processes together.
        epochs: Passes over the training images.
        schedule: ``"step"``, ``"cosine"`` or ``"constant"``.
        milestones: Shares of the training at which ``"step"`` multiplies the rate by ``gamma``.
        gamma: The factor of ``"step"``.
        warmup: Share of the training, from its start, in which the rate rises linearly to its value.
        label_smoothing: Share of the target that is spread over all classes.
        ema_decay: Decay per step of the averaged weights that are validated and returned; 0 averages none.
        clip_grad_norm: Largest L2 norm of all gradients together; 0 clips none.
        precision: ``"fp32"``, or ``"bf16"`` and ``"fp16"`` for mixed precision.
        channels_last: Whether images and convolution weights lie channels last in memory.
        compile: Whether ``torch.compile`` compiles the network for the training steps.
        sync_batch_norm: Whether BatchNorm sees the joint batch of all GPUs.
    """

    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    batch_size: int = 64
    epochs: int = 160
    schedule: str = "step"
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    warmup: float = 0.0
    label_smoothing: float = 0.0
    ema_decay: float = 0.0
    clip_grad_norm: float = 0.0
    precision: str = "fp32"
    channels_last: bool = True
    compile: bool = False
    sync_batch_norm: bool = False

    def __post_init__(self) -> None:
        for name, (holds, rule) in _RULES.items():
            if not holds(getattr(self, name)):
                raise UsageError(f"recipe: {name} must be {rule}, not {getattr(self, name)!r}")
        if self.nesterov and not self.momentum:
            raise UsageError("recipe: nesterov needs a momentum above 0; set momentum, or nesterov=false")

    def with_(self, **changes: Any) -> Recipe:
        """Return this recipe with some fields changed.

        Args:
            **changes: New values by field. A string, as a command line gives it, is read as the field's type:
                ``"0.05"``, ``"20"``, ``"true"``, ``"0.5,0.75"``.

        Raises:
            UsageError: If a field is unknown or a value breaks its rule; names both.
        """
        for name in changes:
            if name not in _RULES:
                near = difflib.get_close_matches(name, _RULES, n=1)
                known = f"did you mean {near[0]}?" if near else f"known: {', '.join(_RULES)}"
                raise UsageError(f"recipe: unknown field '{name}': {known}")
        read = {
            name: self._read(name, value) if isinstance(value, str) else value
            for name, value in changes.items()
        }
        return dataclasses.replace(self, **read)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, as JSON would give them back."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    def learning_rate(self, epoch: int, epochs: int, done: float = 0.0) -> float:
        """Return the learning rate of one step.

        The drops of ``"step"`` come at the start of the epoch in which their milestone lies, which is how
        published scripts write it: ``epoch >= int(0.5 * epochs)``. The others change with every step.

        Args:
            epoch: Number of the epoch, from 0.
            epochs: Epochs in all; may differ from ``self.epochs``.
            done: Share of this epoch's steps that were taken, in ``[0, 1)``.
        """
        progress = (epoch + done) / epochs
        if progress < self.warmup:
            return self.lr * (WARMUP_START + (1 - WARMUP_START) * progress / self.warmup)
        if self.schedule == "step":
            drops = sum(epoch >= _share_of(epochs, milestone) for milestone in self.milestones)
            return self.lr * self.gamma**drops
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))
        return self.lr

    def _read(self, name: str, text: str) -> Any:
        default = getattr(Recipe, name)
        try:
            if isinstance(default, bool):
                return {"true": True, "false": False}[text.lower()]
            if isinstance(default, tuple):
                return tuple(float(item) for item in text.split(",") if item)
            return type(default)(text)
        except (ValueError, KeyError):
            raise UsageError(f"recipe: {name} must be {_RULES[name][1]}, not '{text}'") from None


def _share_of(epochs: int, share: float) -> int:
    """Return ``int(share * epochs)`` as written in decimals: a third of 90 is 30, whatever the float says."""
    return math.floor(Fraction(share).limit_denominator(10_000) * epochs)


RECIPES: Registry[Recipe] = Registry("recipe")

RECIPES.register("cifar")(Recipe())  # He et al., CVPR 2016; Liu et al., ICLR 2019, section 3
RECIPES.register("imagenet")(Recipe(batch_size=256, epochs=90, milestones=(1 / 3, 2 / 3)))
RECIPES.register("modern")(
    Recipe(
        nesterov=True, weight_decay=5e-4, batch_size=128, schedule="cosine", warmup=0.05, label_smoothing=0.1
    )
)
# For a few thousand small images: tuned on the 8x8 digits with ResNets of full and of halved widths.
RECIPES.register("quick")(
    Recipe(lr=0.05, nesterov=True, weight_decay=5e-4, batch_size=64, epochs=20, schedule="cosine", warmup=0.1)
)


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long the found network is trained, beside its reference.

    Attributes:
        stretch: Whether the epochs grow as the network gets cheaper, so that training costs the same FLOPs.
        cap: Most epochs, in multiples of the recipe's; ``None`` for no limit.
        epochs_divisor: What the recipe's epochs are divided by; 0 trains nothing.
        lr_divisor: What the recipe's learning rate is divided by.
        inherits: Whether training goes on from the kept weights instead of a fresh initialisation.
        changes: Further fields of the recipe that differ.
    """

    stretch: bool = False
    cap: float | None = None
    epochs_divisor: int = 1
    lr_divisor: int = 1
    inherits: bool = False
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.cap is not None and not 1 <= self.cap < math.inf:
            raise UsageError(f"budget: cap must be a number of at least 1, not {self.cap!r}")

    def epochs(self, recipe_epochs: int, reference_cost: float = 1, pruned_cost: float = 1) -> int:
        """Return the number of epochs, computed exactly.

        Scratch-B is ``int(E * reference_cost / pruned_cost)`` (Liu et al., ICLR 2019, section 3). Costs are
        counts of one kind, MACs or the published FLOPs; integers keep it exact.

        Raises:
            UsageError: If a cost is not positive and finite.
        """
        if not self.epochs_divisor:
            return 0
        epochs = Fraction(recipe_epochs, self.epochs_divisor)
        if self.stretch:
            for cost in (reference_cost, pruned_cost):
                if not 0 < cost < math.inf:
                    raise UsageError(f"budget: a cost must be positive and finite, not {cost!r}")
            ratio = Fraction(reference_cost) / Fraction(pruned_cost)
            epochs *= ratio if self.cap is None else min(ratio, Fraction(self.cap))
        return max(1, math.floor(epochs))

    def recipe(self, recipe: Recipe, reference_cost: float = 1, pruned_cost: float = 1) -> Recipe:
        """Return the recipe of the found network, given the one of its reference.

        Raises:
            UsageError: If this budget trains nothing, or a cost is not positive and finite.
        """
        epochs = self.epochs(recipe.epochs, reference_cost, pruned_cost)
        if not epochs:
            raise UsageError("budget: 'none' trains nothing, so there is no recipe; give another --budget")
        return recipe.with_(epochs=epochs, lr=recipe.lr / self.lr_divisor, **self.changes)


BUDGETS: Registry[Budget] = Registry("budget")

BUDGETS.register("scratch-e")(Budget())
BUDGETS.register("scratch-b")(Budget(stretch=True))
# A tenth of the usual rate: .01 with the recipes here. A quarter of the epochs is the published 40 of 160.
BUDGETS.register("finetune")(Budget(epochs_divisor=4, lr_divisor=10, inherits=True))
BUDGETS.register("finetune-published")(
    Budget(epochs_divisor=4, lr_divisor=100, inherits=True, changes={"schedule": "constant", "warmup": 0.0})
)
BUDGETS.register("none")(Budget(epochs_divisor=0, inherits=True))
