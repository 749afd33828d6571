"""Brings each batch's loss, or its gradients, to the optimizer of masks within Lightning's fit.

Its methods stand in for those of the module and the strategy. In the order of a step:
``_training_step`` evaluates the drawn mask, ``before_backward`` lets the optimizer take gradients
as they come, and ``_learn`` ends the step with ``MaskPro.learn``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from maskpro_lightning.fit import strategies
from maskpro_lightning.fit.manual import Manual
from maskpro_lightning.fit.passes import Passes
from maskpro_lightning.fit.patches import Patches
from maskpro_lightning.optim.estimators import Estimator
from maskpro_lightning.optim.optimizer import MaskPro

_log = logging.getLogger(__name__)

# A fit ends after so many skipped updates in a row, for which no loss or gradient was finite. As
# reading a number waits for the device, it is checked that rarely, so it can be twice as many.
_PATIENCE = 100


class Learning:
    """Evaluates each batch under a drawn mask, and lets the optimizer of masks learn from it.

    Args:
        trainer: The trainer.
        module: The module.
        estimator: The estimator.
        optimizer: Returns the optimizer of masks, once it is made.
        make_sure: Raises if anybody else has written into the masked weights.

    Attributes:
        steps: The number of steps of this fit so far.
        passes: The forward passes of a training step.
        gradients: Prepares the strategy for gradients of masked weights.
        manual: For a module that optimizes manually, what is between it and its optimizers.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        estimator: Estimator,
        optimizer: Callable[[], MaskPro],
        make_sure: Callable[[], None],
    ) -> None:
        self._trainer, self._module = trainer, module
        self._needs_gradients = estimator.needs_gradients
        self._optimizer = optimizer
        self._make_sure = make_sure
        self.steps = 0
        self.passes: Passes
        self.manual: Manual | None = None
        self.gradients: strategies.Gradients
        # Loss and baseline of each batch that the next step learns from.
        self._window: list[Tensor] = []
        self._backward = ExitStack()
        self._stepped = False

    def stand_in(self, patches: Patches, make_passes: Callable[[Any], Passes]) -> None:
        """Replace methods of the module and the strategy.

        Args:
            patches: Undoes it.
            make_passes: Makes the passes, given the strategy's own training step.
        """
        put, module, strategy = patches.put, self._module, self._trainer.strategy
        put(module, "optimizer_step", self._optimizer_step)
        put(module, "lr_scheduler_step", self._lr_scheduler_step)
        if not self._needs_gradients:
            put(module, "backward", lambda *args, **kwargs: None)
        training_step = put(strategy, "training_step", self._training_step)
        if not module.automatic_optimization:
            self.manual = Manual(
                self._trainer,
                module,
                needs_gradients=self._needs_gradients,
                expect_gradients=self._expect_gradients,
                learns=lambda: self._optimizer().begun,
            )
            self.manual.stand_in(patches)
            training_step = partial(self.manual.evaluate, training_step)
        self.passes = make_passes(training_step)
        self.gradients = strategies.Gradients(strategy, patches)

    # In the order of a step

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the strategy's training step: baseline, then the drawn mask."""
        passes, optimizer, baseline = self.passes, self._optimizer(), None
        with torch.set_grad_enabled(self._needs_gradients):
            passes.ask_teacher(optimizer, *args, **kwargs)
            if not self._needs_gradients:
                baseline = passes.baseline(optimizer, *args, **kwargs)
            output, loss = passes.evaluate(*args, **kwargs)
        if loss is None:
            return output
        if self._needs_gradients and self.manual is None:
            self._expect_gradients(loss)
        losses = [loss] if baseline is None else [loss, baseline]
        self._window.append(torch.stack([value.detach().float() for value in losses]))
        if self.manual is not None:
            self._step_manually(self.manual, optimizer)
        return output

    def _step_manually(self, manual: Manual, masks: MaskPro) -> None:
        """Learn after a manual training step, if its optimizers have stepped."""
        with manual.stepped(masks.layouts) as stepped:
            if (self._needs_gradients and not stepped) or not masks.begun:
                return
            counting = manual.counting_optimizer()
            counting._on_before_step()
            self._learn()
            counting._on_after_step()
        for config in self._trainer.lr_scheduler_configs:
            if config.interval == "step" or self._trainer.is_last_batch:
                self._lr_scheduler_step(config.scheduler, None)

    def before_backward(self) -> None:
        """Let the optimizer take gradients as they come."""
        if self._needs_gradients and self.manual is None:
            passes = self._trainer.accumulate_grad_batches
            self._backward.enter_context(self.gradients.taken_by(self._optimizer(), passes))

    def after_backward(self) -> None:
        """End what :meth:`before_backward` began."""
        self._backward.close()

    def _optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any]
    ) -> None:
        """Stands in for the module's optimizer_step; no gradient clipping, no scaler."""
        optimizer_closure()  # the training step, and the backward pass
        if not self._optimizer().begun:  # a trial run without callbacks, as of a BatchSizeFinder
            self._window.clear()
            self._module.zero_grad()
        if self._window:
            self._learn()
            self._module.zero_grad()

    def _learn(self) -> None:
        """Learn from the losses and gradients since the last step."""
        masks = self._optimizer()
        if not self.steps:  # the next draw would hide what the training step may have written
            self._make_sure()
        losses = torch.stack(self._window).mean(0)
        self._window.clear()
        masks.learn(*self._trainer.strategy.reduce(losses, reduce_op="mean"))
        if self._needs_gradients:
            strategies.lower_scale(self._trainer.precision_plugin, masks)
            self._tell_of_weights_without_gradient(masks)
        self._stepped = True
        self.steps += 1
        if masks.param_groups[0]["step"] % _PATIENCE == 0:
            self._end_if_nothing_is_finite(masks)

    def _lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        masks = self._optimizer()
        if not masks.begun:
            return
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(float(masks.last["loss"]))
        else:
            scheduler.step()

    def has_stepped(self) -> bool:
        """Whether there was a step since the last call."""
        stepped, self._stepped = self._stepped, False
        return stepped

    def end(self) -> None:
        """Clean up after a fit, which may have failed in the middle of a step."""
        self._window.clear()
        self._backward.close()
        if self.manual is not None:
            self.manual.end()

    # What can be wrong with losses and gradients

    def _expect_gradients(self, loss: Tensor) -> None:
        if not loss.requires_grad:
            raise RuntimeError(
                f"The loss of {type(self._module).__name__} has no gradient, which "
                f"estimator='straight_through' learns from: choose estimator='policy'."
            )
        finite = loss.detach().isfinite()
        # A loss that is not finite must teach nothing. Gradients are used before it could be looked
        # at without waiting for the device, so they become NaN.
        loss.register_hook(lambda gradient: gradient.where(finite, torch.nan))

    def _tell_of_weights_without_gradient(self, masks: MaskPro) -> None:
        """Warn after the first step of weights without a gradient."""
        names = masks.without_gradient
        if names and masks.param_groups[0]["step"] == 1:
            _log.warning(
                f"{len(names)} of {len(masks.names)} masked weights got no gradient in the first "
                f"step, such as {names[0]!r}: where that goes on (under torch.no_grad, or unused), "
                f"they keep their initial masks. exclude leaves them dense."
            )

    def _end_if_nothing_is_finite(self, masks: MaskPro) -> None:
        skipped = int(masks.tracker["skipped_in_a_row"])
        if skipped < _PATIENCE:
            return
        losses = {name: float(value) for name, value in masks.last.items()}
        what, seen = "No gradient", f"{losses['loss']:g} under the drawn mask"
        remedy = "look at the batches, the loss and the precision"
        if not self._needs_gradients:
            what = "No loss"
            seen += f" and {losses['baseline']:g} under the initial one"
            if math.isfinite(losses["baseline"]):
                remedy = "a larger logit_scale keeps masks closer to the initial one"
        raise RuntimeError(
            f"{what} was finite in the last {skipped} updates, so nothing is learned any more: at "
            f"step {self._trainer.global_step}, batch {self._trainer.fit_loop.batch_idx}, the loss "
            f"was {seen}. "
            f"{remedy.capitalize()}."
        )
