"""Laws of modules that optimize manually: masks learn from what their optimizers would step by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from modules import (
    FAST,
    Net,
    assert_masked,
    equal,
    every_estimator,
    fit,
    linear,
    logits,
    same_weights,
    traces,
)
from rules import mask_callback
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus
from torch.optim.lr_scheduler import StepLR

from maskpro_lightning import Distillation
from maskpro_lightning.fit import strategies


class Manual(Net):
    """Net, with a training step that does all by itself.

    Args:
        way: How it calls for its gradients.
        every: Batches after which it steps.
    """

    def __init__(self, way: str = "manual_backward", every: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.way, self.every = way, every

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers(use_pl_optimizer=self.way != "plain optimizer")
        loss = self.loss(batch)

        def closure() -> Tensor:
            if self.way != "accumulating":
                optimizer.zero_grad()
            if self.way == "backward":
                loss.backward()
            else:
                self.manual_backward(loss / self.every)
            return loss

        if self.way == "closure":
            optimizer.step(closure)
            return None
        closure()
        if (batch_idx + 1) % self.every == 0:
            self.clip_gradients(optimizer, 1e6, "norm")
            optimizer.step()
            if self.way == "accumulating":
                optimizer.zero_grad()
            scheduler: Any = self.lr_schedulers()
            scheduler.step()
        return None

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        return [optimizer], [StepLR(optimizer, 1)]


@pytest.mark.parametrize("way", ["manual_backward", "closure", "plain optimizer", "backward"])
@every_estimator
def test_masks_learn_as_with_automatic_optimization(
    estimator: str, way: str, tmp_path: Path
) -> None:
    rule = {"estimator": estimator, "lr": FAST, "init": "wanda", "monitor": "held_out_loss"}
    one, other = mask_callback(**rule), mask_callback(**rule)
    module = Manual(way)
    trainer = fit(module, one, folder=tmp_path / "manual", max_steps=6)
    fit(Net(), other, folder=tmp_path / "automatic", max_steps=6)
    assert trainer.global_step == 6
    assert equal(logits(one), logits(other))
    assert_masked(module, Net())
    assert one.optimizer is not None
    assert other.optimizer is not None
    assert one.optimizer.last["loss"] == other.optimizer.last["loss"]
    assert one.optimizer.param_groups[0]["lr"] == other.optimizer.param_groups[0]["lr"]
    assert one._best.value == other._best.value  # the same validations


def test_a_step_that_waits_for_several_batches_learns_once_from_them(tmp_path: Path) -> None:
    module, callback = (
        Manual("accumulating", every=2),
        mask_callback(estimator="straight_through", lr=FAST),
    )
    trainer = fit(module, callback, folder=tmp_path, max_epochs=2)
    assert trainer.global_step == 4
    assert callback.optimizer is not None
    assert callback.optimizer.param_groups[0]["step"] == 4
    assert_masked(module, Net())


class Adversaries(Net):
    """Two parts with losses and optimizers of their own, as in Lightning's example of a GAN.

    Args:
        trained: Which of them are trained, by their first letters.
        fails: Whether the training step fails while a part is switched off.
    """

    def __init__(self, trained: str = "gd", *, fails: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.judge = nn.Sequential(linear(16, 3), nn.ReLU(), linear(16, 4))
        self.trained, self.fails = trained, fails

    def training_step(self, batch: Any, batch_idx: int) -> None:
        inputs, real = batch
        generator, judge = self.optimizers()  # type: ignore[misc]
        if "g" in self.trained:
            self.toggle_optimizer(generator)
            self.manual_backward(softplus(-self.judge(self.net(inputs))).mean())
            generator.step()
            generator.zero_grad()
            self.untoggle_optimizer(generator)
        if "d" in self.trained:
            self.toggle_optimizer(judge)
            if self.fails:
                raise ValueError("on purpose")
            fake = softplus(self.judge(self.net(inputs).detach())).mean()
            self.manual_backward(fake + softplus(-self.judge(real)).mean())
            judge.step()
            judge.zero_grad()
            self.untoggle_optimizer(judge)

    def configure_optimizers(self) -> Any:
        parts = (self.net, self.judge)
        return [torch.optim.Adam(part.parameters()) for part in parts], []


def after_a_step(folder: Path, trained: str) -> dict[str, Tensor]:
    callback = mask_callback(estimator="straight_through", lr=FAST)
    trainer = fit(Adversaries(trained), callback, folder=folder, max_steps=1, validate=False)
    assert trainer.global_step == 1
    return logits(callback)


def test_each_of_several_optimizers_teaches_its_own_masks(tmp_path: Path) -> None:
    both, one, other = (after_a_step(tmp_path, trained) for trained in ("gd", "g", "d"))
    for name, found in both.items():
        own, foreign = (one, other) if name.startswith("net") else (other, one)
        assert torch.equal(found, own[name])
        assert not torch.equal(found, foreign[name])


def test_a_fit_that_fails_gives_back_what_was_switched_off(tmp_path: Path) -> None:
    module = Adversaries(fails=True)
    callback = mask_callback(estimator="straight_through")
    with pytest.raises(ValueError, match="on purpose"):
        fit(module, callback, folder=tmp_path, max_steps=1)
    assert all(weight.requires_grad for weight in module.parameters())
    assert same_weights(module, Adversaries())
    assert "step" not in vars(module)
    assert {"optimizers", "manual_backward", "toggle_optimizer"} & set(vars(module)) == set()


def test_nothing_stays_behind(tmp_path: Path) -> None:
    module, callback = Manual(), mask_callback(lr=FAST)
    fresh = Manual()
    trainer = fit(module, callback, folder=tmp_path, max_steps=2, validate=False)
    plain = fit(fresh, folder=tmp_path, max_steps=2, validate=False)
    known = {name for _, names, *_ in traces(plain, fresh) for name in names}
    assert {name for _, names, *_ in traces(trainer, module) for name in names} <= known


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, "Adversaries has 2 optimizers, each with a loss of its own, and estimator='policy'"),
        (
            {"estimator": "straight_through", "distillation": Distillation("net", "mse")},
            "Adversaries optimizes manually .* distillation has no place",
        ),
    ],
)
def test_what_cannot_be_learned_from_is_refused(
    rule: dict[str, Any], message: str, tmp_path: Path
) -> None:
    module = Adversaries()
    with pytest.raises(ValueError, match=message):
        fit(module, mask_callback(**rule), folder=tmp_path, max_steps=1)
    assert same_weights(module, Adversaries())


def test_a_strategy_that_takes_no_backward_pass_within_a_step_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert strategies.wraps_steps(FSDPStrategy())
    assert not strategies.wraps_steps(ModelParallelStrategy())
    monkeypatch.setattr(strategies, "wraps_steps", lambda _: True)
    message = "Manual optimizes manually .*, and FSDP1 takes no .* or strategy=.ddp."
    with pytest.raises(ValueError, match=message):
        fit(Manual(), mask_callback(), folder=tmp_path, max_steps=1)


class Own(Manual):
    """Steps an optimizer that Lightning does not know."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        self.manual_backward(self.loss(batch) + mse_loss(self.net[0].weight, torch.ones(16, 16)))
        optimizer.step()


def test_an_optimizer_that_nobody_knows_of_is_refused_at_once(tmp_path: Path) -> None:
    module = Own()
    with pytest.raises((RuntimeError, ValueError), match=r"'net\.0\.weight'"):
        fit(module, mask_callback(estimator="straight_through"), folder=tmp_path, max_steps=4)
