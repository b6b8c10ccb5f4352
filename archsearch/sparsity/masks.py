"""Masks: which single weights of a network stay, how the best are chosen, and how the rest stay zero.

A mask is decided by position, never by ``weight != 0``: a kept weight may pass through zero while it trains.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, TypeVar

import torch
from torch import Tensor, nn

from archsearch.errors import IntegrityError, UsageError
from archsearch.tensor_files import read_tensors, write_tensors
from archsearch.training.callbacks import Callback, State
from archsearch.training.directory import fingerprint

SCOPES: Final = ("all", "conv")
ALLOCATIONS: Final = ("global", "layer")

Network = TypeVar("Network", bound=nn.Module)


class Masks(Mapping[str, Tensor]):
    """Which weights stay: parameter name to a boolean tensor of its shape, on the CPU.

    Args:
        tensors: ``True`` where the weight stays. Parameters without a mask stay whole.
        lifted: Layers that one threshold for all would have emptied; their best weight stays.
    """

    def __init__(self, tensors: Mapping[str, Tensor], lifted: tuple[str, ...] = ()) -> None:
        self._tensors = {name: mask.detach().cpu().bool() for name, mask in tensors.items()}
        self.lifted = lifted

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def total(self) -> int:
        """Number of weights that have a mask."""
        return sum(mask.numel() for mask in self.values())

    @property
    def kept(self) -> int:
        """Number of them that stay."""
        return sum(int(mask.sum()) for mask in self.values())

    @property
    def share(self) -> float:
        """Share of them that stays."""
        return self.kept / self.total

    @property
    def shares(self) -> dict[str, float]:
        """Share that stays of each parameter."""
        return {name: int(mask.sum()) / mask.numel() for name, mask in self.items()}

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of names and masks: the part of a training's identity."""
        return fingerprint(dict(sorted(self._tensors.items())))

    def apply(self, model: Network) -> Network:
        """Set the weights that do not stay to zero, in place, and return the network.

        Raises:
            UsageError: If a mask does not fit it.
        """
        self.check(model)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, mask in self.items():
                parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)
        return model

    def applied(self, model: Network) -> Network:
        """Return a copy of a network with zeros where the weights do not stay."""
        return self.apply(copy.deepcopy(model))

    def check(self, model: nn.Module) -> None:
        """Raise UsageError unless each mask has the shape of a parameter of the network."""
        parameters = dict(model.named_parameters())
        for name, mask in self.items():
            if name not in parameters:
                raise UsageError(f"masks: the network has no parameter {name}; they are another network's")
            if mask.shape != parameters[name].shape:
                raise UsageError(
                    f"masks: {name} is {tuple(parameters[name].shape)} in the network, "
                    f"but {tuple(mask.shape)} in the masks; they are another network's"
                )

    def write(self, path: Path) -> None:
        """Write them as safetensors, beside the weights that they belong to."""
        write_tensors(path, self._tensors)

    @classmethod
    def read(cls, path: Path) -> Masks:
        """Read what ``write`` wrote.

        Raises:
            IntegrityError: If the file is missing or damaged, or holds other things than masks.
        """
        tensors = read_tensors(path)
        for name, mask in tensors.items():
            if mask.dtype != torch.bool:
                raise IntegrityError(f"{path}: {name} holds {mask.dtype}, not a mask; give a file of masks")
        return cls(tensors)


class MaskedTraining(Callback):
    """Keep the weights that do not stay exactly zero, whatever the optimiser.

    Their gradients are zeroed, so momentum, second moments and weight decay of zeros stay zero too, and so
    are they themselves after the step. Call ``masks.apply`` on the network before the training: an averaged
    copy of the weights (``ema_decay``) is taken before the first callback runs.
    """

    def __init__(self, masks: Masks) -> None:
        self._masks = masks
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []

    def on_start(self, state: State) -> None:
        """Find the parameters.

        Raises:
            UsageError: If the masks do not fit the network, or were not applied to it.
        """
        self._masks.check(state.model)
        parameters = dict(state.model.named_parameters())
        self._pairs = []
        for name, mask in self._masks.items():
            parameter = parameters[name]
            # In the parameter's own memory layout, which may be channels last: two layouts together are slow.
            dropped = torch.empty_like(parameter, dtype=torch.bool, requires_grad=False).copy_(~mask)
            if bool((parameter.detach()[dropped] != 0).any()):
                raise UsageError(
                    f"masks: {name} is not zero where its mask is: call masks.apply(model) first"
                )
            self._pairs.append((parameter, dropped))

    def after_backward(self, state: State) -> None:
        """Zero the gradients."""
        for parameter, dropped in self._pairs:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(dropped, 0)

    def on_step(self, state: State) -> None:
        """Zero the weights."""
        with torch.no_grad():
            for parameter, dropped in self._pairs:
                parameter.masked_fill_(dropped, 0)


def weight_names(model: nn.Module, scope: str = "all") -> tuple[str, ...]:
    """Return the parameters whose single weights may go, in the order of the network's parameters.

    These are the weights of convolutions and, with the scope ``"all"``, of linear layers, attention
    projections and recurrent layers (``weight_ih``, ``weight_hh``). Biases, norms and embeddings never count.

    Raises:
        UsageError: If the scope is unknown or the network has no such layer.
    """
    if scope not in SCOPES:
        raise UsageError(f"--scope {scope}: give {' or '.join(SCOPES)}")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]
        for module in model.modules()
        for key, parameter in module.named_parameters(recurse=False)
        if _counts(module, key, scope)
    }
    if not found:
        raise UsageError(f"{type(model).__name__} has no weights of scope '{scope}' to prune")
    return tuple(name for name in names.values() if name in found)


def magnitude(
    model: nn.Module,
    keep: float | Mapping[str, float],
    allocation: str = "global",
    *,
    scope: str = "all",
    within: Masks | None = None,
) -> Masks:
    """Keep the weights of largest absolute value.

    Args:
        model: Is not changed.
        keep: Share of the weights that stays, in ``(0, 1]``; or, with the allocation ``"layer"``, the share
            of each parameter by name, where a parameter that is left out stays whole.
        allocation: ``"global"`` for one threshold, ``"layer"`` for the same share of every layer.
        scope: See ``weight_names``.
        within: Earlier masks: what they dropped stays dropped. ``keep`` is still a share of all.
    """
    parameters = dict(model.named_parameters())
    scores = {name: parameters[name].detach().abs() for name in weight_names(model, scope)}
    return choose(scores, keep, allocation, within)


def choose(
    scores: Mapping[str, Tensor],
    keep: float | Mapping[str, float],
    allocation: str,
    within: Masks | None = None,
    apart: Mapping[str, float] | None = None,
) -> Masks:
    """Keep the weights of largest score; of equal ones, those that come first.

    Exactly ``round(keep * n)`` of ``n`` weights stay, and at least one of each layer.

    Args:
        scores: By parameter; not negative.
        keep: As for ``magnitude``.
        allocation: As for ``magnitude``.
        within: As for ``magnitude``.
        apart: Layers that have a share of their own, whatever the allocation, such as the output layer.

    Raises:
        UsageError: If a share is not in ``(0, 1]``, or more is asked for than ``within`` still has.
    """
    if allocation not in ALLOCATIONS:
        raise UsageError(f"--allocation {allocation}: give {' or '.join(ALLOCATIONS)}")
    if isinstance(keep, Mapping) and allocation != "layer":
        raise UsageError("a share for each layer goes with the allocation 'layer'")
    ranked = {name: _ranked(name, score, within) for name, score in scores.items()}
    if isinstance(keep, Mapping):
        own = {**keep, **(apart or {})}
    else:
        own = {**(dict.fromkeys(ranked, keep) if allocation == "layer" else {}), **(apart or {})}
    if unknown := [name for name in own if name not in ranked]:
        raise UsageError(f"{unknown[0]} is not one of the weights that can go: {', '.join(ranked)}")
    chosen = {
        name: _largest(ranked[name], max(1, round(_share(share) * len(ranked[name]))))
        for name, share in own.items()
    }
    joint = {name: score for name, score in ranked.items() if name not in own}
    lifted: tuple[str, ...] = ()
    if joint and not isinstance(keep, Mapping):
        across, lifted = _across(joint, _share(keep))
        chosen |= across
    return Masks({n: chosen[n].view(scores[n].shape) for n in scores if n in chosen}, lifted)


def _across(ranked: Mapping[str, Tensor], keep: float) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Cut all layers by one threshold; the best weight of each layer goes before all others."""
    count = round(keep * sum(score.numel() for score in ranked.values()))
    if count < len(ranked):
        least = len(ranked) / sum(score.numel() for score in ranked.values())
        raise UsageError(
            f"--keep {keep:g}: leaves {count} weights for {len(ranked)} layers; give at least {least:.2g}"
        )
    plain = torch.split(_largest(torch.cat(list(ranked.values())), count), [len(s) for s in ranked.values()])
    empty = tuple(name for name, mask in zip(ranked, plain, strict=True) if not mask.any())
    if not empty:
        return dict(zip(ranked, plain, strict=True)), ()
    raised = {name: score.clone() for name, score in ranked.items()}
    for score in raised.values():
        score[score.argmax()] = torch.inf
    chosen = torch.split(_largest(torch.cat(list(raised.values())), count), [len(s) for s in raised.values()])
    return dict(zip(ranked, chosen, strict=True)), empty


def _largest(scores: Tensor, count: int) -> Tensor:
    """Return a mask ``(n,)`` of the ``count`` largest scores; of equal ones, the first."""
    if count > int((scores > -torch.inf).sum()):
        raise UsageError(
            f"{count} of {len(scores)} weights are to stay, but fewer are left; keep shares only fall"
        )
    threshold = scores.kthvalue(len(scores) - count + 1).values
    above = scores > threshold
    equal = torch.nonzero(scores == threshold)[: count - int(above.sum()), 0]
    above[equal] = True
    return above


def _ranked(name: str, score: Tensor, within: Masks | None) -> Tensor:
    """Return the scores ``(n,)``, below all others where the weight is gone already."""
    flat = score.detach().cpu().flatten().to(torch.float32)
    if not bool(torch.isfinite(flat).all()):
        raise UsageError(f"{name}: its scores are not finite; the network or the batch is not sound")
    if within is None or name not in within:
        return flat
    return flat.masked_fill(~within[name].flatten(), -torch.inf)


def _share(value: float) -> float:
    if not 0 < value <= 1:
        raise UsageError(f"--keep {value:g}: must be a share in (0, 1]")
    return value


def _counts(module: nn.Module, key: str, scope: str) -> bool:
    # _ConvNd is private, but all convolutions and nothing else derive from it.
    if isinstance(module, nn.modules.conv._ConvNd):
        return key == "weight"
    if scope == "conv":
        return False
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return key.startswith("weight_")
    if isinstance(module, nn.MultiheadAttention):
        return key.endswith("proj_weight")
    return isinstance(module, nn.Linear) and key == "weight"
