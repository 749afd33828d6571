"""Modules that optimize manually: masks learn from the gradients that their optimizers step with.

The module's training step and its backward passes run as they are. Its optimizers are made by its
own ``configure_optimizers``, but their ``step`` moves no weight: it sets aside the gradients of the
weights, and masks learn from these when the training step is over. So if a module has several
losses, each mask learns from the ones that train its weight; and if it accumulates gradients over
batches, so do the masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch.core.optimizer import (
    LightningOptimizer,
    _configure_optimizers,
    _configure_schedulers_manual_opt,
)
from torch import Tensor
from torch.optim import Optimizer

from maskpro_lightning.fit.patches import Patches


class Manual:
    """Stands between a module that optimizes manually and its optimizers.

    Args:
        trainer: The trainer.
        module: The module.
        needs_gradients: Whether masks learn from gradients; otherwise backward passes are skipped.
        expect_gradients: Raises if a loss has no gradient.
        learns: Whether masks learn from the training step that is running.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        *,
        needs_gradients: bool,
        expect_gradients: Callable[[Tensor], None],
        learns: Callable[[], bool],
    ) -> None:
        self._trainer, self._module = trainer, module
        self._needs_gradients, self._expect_gradients = needs_gradients, expect_gradients
        self._learns = learns
        self._optimizers: list[Any] = []
        self._schedulers: list[Any] = []
        self._losses: list[Tensor] = []
        self._within = False
        self._frozen: dict[Tensor, bool] = {}
        self._aside: dict[Tensor, Tensor] = {}

    def stand_in(self, patches: Patches) -> None:
        """Put methods in the place of the module's; ``patches`` undoes it."""
        put, module = patches.put, self._module
        self._optimizers_inside = put(module, "optimizers", self._give_optimizers)
        put(module, "lr_schedulers", self._give_schedulers)
        put(module, "toggle_optimizer", self._toggle)
        put(module, "untoggle_optimizer", self._untoggle)
        if not self._needs_gradients:
            put(module, "clip_gradients", lambda *args, **kwargs: None)
        self._backward_inside = put(module, "manual_backward", self._backward)

    def counting_optimizer(self) -> Any:
        """Lightning's wrapper of the optimizer of masks, by which the trainer counts steps."""
        return self._optimizers_inside()

    def configure(self, configured: Any) -> None:
        """Take the module's own optimizers and schedulers.

        Args:
            configured: What the module's ``configure_optimizers`` returned.

        Raises:
            ValueError: there are several optimizers, and the estimator learns from one loss.
        """
        optimizers, schedulers, _ = _configure_optimizers([] if configured is None else configured)
        if len(optimizers) > 1 and not self._needs_gradients:
            raise ValueError(
                f"{type(self._module).__name__} has {len(optimizers)} optimizers, each with a loss "
                f"of its own, and estimator='policy' learns from one loss: leave "
                f"estimator='straight_through', the default, whose masks learn each from the loss "
                f"of its weight's optimizer."
            )
        self._schedulers = [each.scheduler for each in _configure_schedulers_manual_opt(schedulers)]
        for optimizer in optimizers:
            wrapped = LightningOptimizer._to_lightning_optimizer(optimizer, self._trainer.strategy)
            step = partial(self._step, wrapped.optimizer)
            vars(step)["_wrapped_by_lr_sched"] = True  # schedulers look for this
            for each in (wrapped, wrapped.optimizer):
                vars(each)["step"] = step
            self._optimizers.append(wrapped)

    def evaluate(self, training_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a training step; its output gets the sum of its losses as its loss."""
        self._losses.clear()
        with torch.set_grad_enabled(self._needs_gradients), self._watching():
            output = training_step(*args, **kwargs)
        if not self._losses:
            return output
        loss = torch.stack([loss.detach().float() for loss in self._losses]).sum()
        self._losses.clear()
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Within a ``with`` block, see losses whose ``backward`` the training step calls itself."""
        inside = torch.Tensor.backward

        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            if self._within:
                inside(loss, *args, **kwargs)  # type: ignore[no-untyped-call]
            else:
                self._backward(loss, *args, take=partial(inside, loss), **kwargs)

        torch.Tensor.backward = backward  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            torch.Tensor.backward = inside  # type: ignore[method-assign]

    @contextmanager
    def stepped(self, weights: Mapping[Tensor, Any]) -> Iterator[bool]:
        """Within a ``with`` block, ``grad`` is what each weight was stepped with, or None.

        Args:
            weights: The masked weights.

        Yields:
            Whether any of them was stepped.
        """
        waiting = {weight: weight.grad for weight in weights}
        for weight in weights:
            weight.grad = self._aside.get(weight)
        found = any(weight in self._aside for weight in weights)
        self._aside.clear()
        try:
            yield found
        finally:
            for weight, gradient in waiting.items():
                weight.grad = gradient

    def end(self) -> None:
        """Clean up after a training step that failed."""
        self._untoggle(None)
        self._aside.clear()

    # What the module calls

    def _backward(self, loss: Tensor, *args: Any, take: Any = None, **kwargs: Any) -> None:
        self._losses.append(loss)
        if not self._needs_gradients or not self._learns():
            return
        self._expect_gradients(loss)
        self._within = True
        try:
            if take is None:
                self._backward_inside(loss, *args, **kwargs)
            else:
                take(*args, **kwargs)
        finally:
            self._within = False

    def _step(self, optimizer: Optimizer, closure: Any = None, **kwargs: Any) -> Any:
        found = closure() if closure is not None else None
        optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers look for this, too
        if self._learns():
            for weight in _weights(optimizer):
                if weight.grad is not None:
                    before = self._aside.get(weight)
                    self._aside[weight] = weight.grad if before is None else before + weight.grad
                    weight.grad = None
        return found

    def _give_optimizers(self, use_pl_optimizer: bool = True) -> Any:
        found = [each if use_pl_optimizer else each.optimizer for each in self._optimizers]
        return found[0] if len(found) == 1 else found

    def _give_schedulers(self) -> Any:
        if not self._schedulers:
            return None
        return self._schedulers[0] if len(self._schedulers) == 1 else list(self._schedulers)

    def _toggle(self, optimizer: Any) -> None:
        """As Lightning does: weights of other optimizers alone require no gradient."""
        own = set(_weights(optimizer))
        for other in self._optimizers:
            for weight in _weights(other):
                if weight not in own and weight not in self._frozen:
                    self._frozen[weight] = weight.requires_grad
                    weight.requires_grad = False

    def _untoggle(self, optimizer: Any) -> None:
        for weight, required in self._frozen.items():
            weight.requires_grad = required
        self._frozen.clear()


def _weights(optimizer: Any) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]
