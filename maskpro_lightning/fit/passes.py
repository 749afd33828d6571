"""The forward passes of a training step: the dense teacher's, the baseline's, the drawn mask's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from maskpro_lightning.fit.baseline import (
    BaselineCache,
    fingerprint,
    notices_random_numbers,
    traceless,
)
from maskpro_lightning.fit.distillation import Distillation, Teacher
from maskpro_lightning.optim.optimizer import MaskPro
from maskpro_lightning.weights.admission import check_loss


class Passes:
    """Runs a module's training step under one version of the weights after the other.

    Args:
        trainer: The trainer.
        module: The module.
        training_step: The strategy's own training step.
        baselines: What is known of the initial mask's losses.
        distillation: What to learn from instead of the step's loss, if anything.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        training_step: Callable[..., Any],
        baselines: BaselineCache,
        distillation: Distillation | None,
    ) -> None:
        self._trainer, self._module = trainer, module
        self._training_step, self._baselines = training_step, baselines
        self._distillation = distillation
        self._teacher: Teacher | None = None

    def plain(self, *args: Any) -> None:
        """The training step with the weights as they are, without a trace."""
        with traceless(self._trainer, self._module):
            self._training_step(*args)

    def ask_teacher(self, optimizer: MaskPro, *args: Any, **kwargs: Any) -> None:
        """Let the dense weights put out what is to be distilled, if anything is."""
        if self._distillation is None:
            return
        if self._teacher is None:
            self._teacher = Teacher(self._distillation, self._module)
        with (
            torch.no_grad(),
            optimizer.applied("dense"),
            traceless(self._trainer, self._module),
            self._teacher.teaching(),
        ):
            self._training_step(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor | None]:
        """The training step with the weights as they are: its output, and what to learn from."""
        if self._teacher is None:
            output = self._training_step(*args, **kwargs)
            return output, _loss_of(output)
        with self._teacher.asking() as losses:
            output = self._training_step(*args, **kwargs)
        if _loss_of(output) is None:
            return output, None
        output = {**output, "loss": losses[0]} if isinstance(output, Mapping) else losses[0]
        return output, losses[0]

    def baseline(self, optimizer: MaskPro, batch: Any, *args: Any, **kwargs: Any) -> Tensor | None:
        """The initial mask's loss on a batch, remembered or measured."""
        strategy = self._trainer.strategy
        key = fingerprint(batch) if self._baselines.size else None
        known = self._baselines.get(key)
        # Ranks measure together, since a forward pass may communicate.
        if strategy.reduce_boolean_decision(known is not None, all=True):
            assert known is not None
            return known.to(strategy.root_device)
        with (
            optimizer.applied("initial"),
            traceless(self._trainer, self._module),
            notices_random_numbers() as random,
        ):
            _, loss = self.evaluate(batch, *args, **kwargs)
        if loss is None:
            return None
        loss = loss.detach().float()
        if not random[0]:  # with dropout, both losses need the same random numbers
            self._baselines.put(key, loss)
        return loss


def _loss_of(output: Any) -> Tensor | None:
    """The loss in what a training step returned, the same way as Lightning finds it."""
    if isinstance(output, Mapping):
        output = output.get("loss")
    if output is not None:
        check_loss(output, "training_step")
    loss: Tensor | None = output
    return loss
