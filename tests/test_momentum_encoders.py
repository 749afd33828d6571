"""Laws of modules with a second copy of a part, the moving average of the first."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import oracle
import pytest
import torch
from modules import Net, every_estimator, fit, same_weights
from rules import mask_callback
from torch import Tensor, nn
from torch.nn.functional import mse_loss

MOMENTUM = 0.9


@torch.no_grad()
def in_place(student: nn.Module, teacher: nn.Module) -> None:
    """As in MoCo and BYOL."""
    for fresh, slow in zip(student.parameters(), teacher.parameters(), strict=True):
        slow.mul_(MOMENTUM).add_(fresh, alpha=1 - MOMENTUM)


@torch.no_grad()
def anew(student: nn.Module, teacher: nn.Module) -> None:
    """As in lightly and DINO: with new tensors."""
    for fresh, slow in zip(student.parameters(), teacher.parameters(), strict=True):
        slow.data = slow.data * MOMENTUM + fresh.data * (1 - MOMENTUM)


@torch.no_grad()
def towards(student: nn.Module, teacher: nn.Module) -> None:
    """Copies that are equal stay so to the bit."""
    for fresh, slow in zip(student.parameters(), teacher.parameters(), strict=True):
        slow.lerp_(fresh, 1 - MOMENTUM)


class Momentum(Net):
    """Learns to put out what a slower copy of itself does.

    Args:
        update: Moves the copy.
        hook: Where that happens.
    """

    def __init__(self, update: Any, hook: str = "training_step") -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.update, self.hook = update, hook
        self.updates = [0]

    def move(self) -> None:
        self.updates[0] += 1
        self.update(self.net, self.teacher)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.hook == "training_step":
            self.move()
        inputs, _ = batch
        with torch.no_grad():
            aims = self.teacher(inputs)
        return mse_loss(self.net(inputs + 0.1), aims)

    def on_train_batch_end(self, *args: Any) -> None:
        if self.hook == "on_train_batch_end":
            self.move()

    def on_before_zero_grad(self, optimizer: Any) -> None:
        if self.hook == "on_before_zero_grad":
            self.move()


HOOKS = ("training_step", "on_train_batch_end", "on_before_zero_grad")
every_way = pytest.mark.parametrize("update", [in_place, anew, towards])
every_hook = pytest.mark.parametrize("hook", HOOKS)


@every_way
@every_hook
@every_estimator
def test_a_moving_copy_is_refused_by_name_after_a_step_at_most(
    estimator: str, hook: str, update: Any, tmp_path: Path
) -> None:
    module = Momentum(update, hook)
    callback = mask_callback(estimator=estimator, lr=3.0)
    steps: list[int] = []

    class Count(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            steps.append(trainer.global_step)

    with pytest.raises((ValueError, RuntimeError), match=r"'teacher\.0\.weight'.*exclude=\[.teach"):
        fit(module, callback, Count(), folder=tmp_path, max_epochs=2, validate=False)
    assert len(steps) <= 1
    if hook == "training_step":
        assert same_weights(module, Momentum(update))


@every_way
@every_hook
@every_estimator
def test_a_moving_copy_that_is_left_out_moves_as_it_would(
    estimator: str, hook: str, update: Any, tmp_path: Path
) -> None:
    module = Momentum(update, hook)
    callback = mask_callback(estimator=estimator, lr=3.0, exclude=["teacher"])
    fit(module, callback, folder=tmp_path, max_steps=4, validate=False)
    assert module.updates == [4]
    for name, weight in Net().net.named_parameters():
        found, slow = module.net.get_parameter(name), module.teacher.get_parameter(name)
        if weight.dim() > 1:
            kept = found != 0
            assert oracle.keeps_exactly(2, 4, kept)
            assert torch.equal(found, weight.where(kept, 0))
            share = (slow / weight).mean()  # of each pruned weight a part has gone, at most four
            assert MOMENTUM**4 < share < 1 - (1 - MOMENTUM) / 4
        else:
            torch.testing.assert_close(slow, weight)
