"""A network with its optimiser: what one training step changes, and what a checkpoint has to hold of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from archsearch.errors import UsageError
from archsearch.recipe import Recipe
from archsearch.training.checkpoint import optimizer_tensors, restore_module, restore_optimizer, section
from archsearch.training.evaluation import batch_totals, main_output

AUXILIARY_WEIGHT = 0.3  # of the loss of each auxiliary head: Szegedy et al., CVPR 2015, section 5

Penalty = Callable[[nn.Module], Tensor]


class Learner:
    """A network that takes training steps.

    Args:
        model: Is moved to the accelerator's device and trained in place.
        recipe: Says how.
        accelerator: Brings device, precision and the other processes.
        penalty: A term of the loss beside the cross-entropy.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, accelerator: Accelerator, penalty: Penalty | None = None
    ) -> None:
        self.model = model.to(accelerator.device)
        self._recipe, self._accelerator, self._penalty = recipe, accelerator, penalty
        if recipe.channels_last:
            model.to(memory_format=torch.channels_last)
        if recipe.sync_batch_norm and accelerator.num_processes > 1:
            if accelerator.device.type == "cpu":
                raise UsageError("recipe: sync_batch_norm needs GPUs; set sync_batch_norm=false on the CPU")
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.average = Average(model, recipe.ema_decay) if recipe.ema_decay else None
        self._optimizer = build_optimizer(model, recipe)
        self._attributes = set(model.__dict__)
        self._wrapped = accelerator.prepare_model(model)
        self._stepper = accelerator.prepare_optimizer(self._optimizer)
        self._forward = torch.compile(self._wrapped) if recipe.compile else self._wrapped

    def step(
        self,
        images: Tensor,
        labels: Tensor,
        lr: float,
        number: int,
        after_backward: Callable[[], None] | None,
    ) -> Tensor:
        """Take one step on this process's slice of a joint batch.

        Args:
            images: ``(N, C, H, W)``, on the device.
            labels: ``(N,)``, on the device.
            lr: Learning rate.
            number: How many steps were taken before.
            after_backward: May change the gradients.

        Returns:
            ``(3,)``: this process's sum of losses, number of right answers and number of images.
        """
        self.model.train()
        outputs = self._forward(images)
        sums = [
            F.cross_entropy(head, labels, reduction="sum", label_smoothing=self._recipe.label_smoothing)
            for head in _heads(outputs)
        ]
        total = sums[0] + AUXILIARY_WEIGHT * sum(sums[1:], start=torch.zeros((), device=sums[0].device))
        # Processes average their gradients. Slices may differ in size, so each divides by the joint batch's.
        count = self._accelerator.reduce(labels.new_tensor(labels.numel()), "sum")
        loss = total * self._accelerator.num_processes / count
        if self._penalty is not None:
            loss = loss + self._penalty(self.model)
        self._optimizer.zero_grad(set_to_none=True)
        self._accelerator.backward(loss)
        clip = self._recipe.clip_grad_norm
        if clip or after_backward is not None:
            self._accelerator.unscale_gradients()
        if after_backward is not None:
            after_backward()
        if clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._stepper.step()
        if self.average is not None:
            self.average.update(number)
        # The penalty is not part of the reported loss; where it is not finite, the report shows that.
        reported = total.detach() if self._penalty is None else total.detach() + 0 * loss.detach()
        return batch_totals(main_output(outputs).detach(), labels, reported)

    @property
    def result(self) -> nn.Module:
        """The network as it is validated: with averaged weights, if the recipe averages."""
        return self.model if self.average is None else self.average.model

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that a step changes, by name; not copied."""
        averaged = {} if self.average is None else self.average.model.state_dict()
        return {
            **{f"model.{name}": value for name, value in self.model.state_dict().items()},
            **{f"optimizer.{name}": value for name, value in optimizer_tensors(self._optimizer).items()},
            **{f"average.{name}": value for name, value in averaged.items()},
        }

    def scaler_state(self) -> dict[str, Any]:
        """Return the numbers of fp16's loss scaler; empty in other precisions."""
        return {} if self._accelerator.scaler is None else dict(self._accelerator.scaler.state_dict())

    def restore(self, tensors: Mapping[str, Tensor], scaler_state: Mapping[str, Any], where: Path) -> None:
        """Take back what ``tensors`` and ``scaler_state`` gave.

        Raises:
            IntegrityError: If they do not fit the network.
        """
        restore_module(self.model, section(tensors, "model."), where)
        restore_optimizer(self._optimizer, section(tensors, "optimizer."))
        if self.average is not None:
            restore_module(self.average.model, section(tensors, "average."), where)
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(dict(scaler_state))

    def adopt_average(self) -> nn.Module:
        """Return the network, with the averaged weights if the recipe averages."""
        if self.average is not None:
            self.model.load_state_dict(self.average.model.state_dict())
        return self.model

    def release(self) -> None:
        """Leave the network as it was given: without wrappers and gradients, contiguous in memory."""
        self._accelerator.unwrap_model(self._wrapped, keep_fp32_wrapper=False)
        # What stays would make Accelerate take the network for prepared and skip it the next time.
        for name in set(self.model.__dict__) - self._attributes:
            delattr(self.model, name)
        self.model.zero_grad(set_to_none=True)
        self.model.to(memory_format=torch.contiguous_format)


class Average:
    """An exponential moving average of a network's weights and statistics.

    The decay grows as ``(1 + n) / (10 + n)`` towards its value, so that the random start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self._decay = decay
        self._pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))

    def update(self, number: int) -> None:
        """Take in the weights after step ``number``, counted from 0."""
        decay = min(self._decay, (1 + number) / (10 + number))
        for mean, value in self._pairs:
            if mean.is_floating_point():
                mean.lerp_(value, 1 - decay)
            else:
                mean.copy_(value)


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimiser of all parameters that are trained."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
        )
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)


def _heads(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [head for head in outputs if head is not None]
