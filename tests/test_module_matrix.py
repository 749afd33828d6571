"""One law for many modules and Trainers: a fit takes its steps, moves masks and keeps N of M."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from modules import (
    FAST,
    ROUNDING,
    Net,
    assert_learned,
    assert_masked,
    equal,
    every_estimator,
    fit,
    learned,
    linear,
    loader,
    logits,
    quiet_trainer,
)
from rules import mask_callback
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader
from torchmetrics import MeanSquaredError

from maskpro_lightning import MaskProCallback, NMPattern
from maskpro_lightning.initial.logits import graded
from maskpro_lightning.optim.estimators import EstimatorName


def run(
    module: pl.LightningModule,
    folder: Path,
    *callbacks: pl.Callback,
    estimator: EstimatorName = "policy",
    **kwargs: Any,
) -> tuple[pl.Trainer, MaskProCallback]:
    """Two epochs of four batches, unless told otherwise, after which every layer has learned."""
    callback = mask_callback(estimator=estimator, lr=FAST)
    trainer = fit(module, callback, *callbacks, folder=folder, **{"max_epochs": 2} | kwargs)
    assert_learned(callback)
    return trainer, callback


def updates(callback: MaskProCallback) -> int:
    assert callback.optimizer is not None
    return callback.optimizer.param_groups[0]["step"]


# --- modules ------------------------------------------------------------------------------------


class Dict(Net):
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"loss": self.loss(batch), "seen": batch[0]}


class Sometimes(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return None if batch_idx == 1 else self.loss(batch)


class NotANumber(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) * (float("nan") if batch_idx == 1 else 1)


class Late(Net):
    """Builds its layers when the Trainer asks for them."""

    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = nn.Sequential(linear(16, 1), nn.ReLU(), linear(16, 2))


class Metrics(Net):
    def __init__(self) -> None:
        super().__init__()
        self.error = MeanSquaredError()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.error(self.net(batch[0]), batch[1])
        self.log("error", self.error, on_step=True, on_epoch=True)
        return self.loss(batch)


class Overriding(Net):
    """Has opinions about optimization, which is not its business for once."""

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        raise AssertionError

    def optimizer_step(self, *_: Any, **__: Any) -> None:
        raise AssertionError

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        raise AssertionError

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        raise AssertionError


class WithoutGradients(Net):
    """Can have no gradients, and says so if asked for them."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert not torch.is_grad_enabled()
        return super().training_step(batch, batch_idx)

    def backward(self, *_: Any, **__: Any) -> None:
        raise AssertionError


def optimized(configure: Callable[[Net], Any]) -> type[Net]:
    class Optimized(Net):
        def configure_optimizers(self) -> Any:
            return configure(self)

    return Optimized


def adam(net: Net) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), 1.0)


def on_plateau(net: Net) -> Any:
    optimizer = adam(net)
    plateau = {"scheduler": ReduceLROnPlateau(optimizer), "monitor": "held_out_loss"}
    return {"optimizer": optimizer, "lr_scheduler": plateau}


def by_step(net: Net) -> Any:
    optimizer = adam(net)
    return {
        "optimizer": optimizer,
        "lr_scheduler": StepLR(optimizer, 1),
        "monitor": "held_out_loss",
    }


def two_lists(net: Net) -> Any:
    optimizer = adam(net)
    return [optimizer], [StepLR(optimizer, 1)]


class Single(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch).reshape(1)


MODULES: dict[str, Callable[[], Net]] = {
    "tensor": Net,
    "dict": Dict,
    "one loss": Single,
    "built in configure_model": Late,
    "dropout": lambda: Net(nn.Dropout(0.5)),
    "batch norm": lambda: Net(nn.BatchNorm1d(16)),
    "torchmetrics": Metrics,
    "overriding": Overriding,
    "no optimizer": optimized(lambda net: None),
    "AdamW": optimized(adam),
    "AdamW and scheduler": optimized(by_step),
    "AdamW and plateau": optimized(on_plateau),
    "two lists": optimized(two_lists),
    "LBFGS": optimized(lambda net: torch.optim.LBFGS(net.parameters())),
}


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@every_estimator
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_every_kind_of_module_learns_masks(
    make: Callable[[], Net], estimator: EstimatorName, tmp_path: Path
) -> None:
    module, dense = make(), make()
    dense.configure_model()
    trainer, callback = run(module, tmp_path, estimator=estimator)
    assert trainer.global_step == updates(callback) == 8
    assert_masked(module, dense)


def test_without_a_backward_pass_nothing_needs_gradients(tmp_path: Path) -> None:
    module = WithoutGradients()
    _, callback = run(module, tmp_path)
    assert updates(callback) == 8
    assert_masked(module, Net())


@pytest.mark.parametrize("frozen", [["net.0"], ["net"]], ids=["a layer", "all"])
def test_masks_of_frozen_weights_learn_and_the_weights_stay_frozen(
    frozen: list[str], tmp_path: Path
) -> None:
    module, callback = Net(), mask_callback(estimator="straight_through", lr=FAST)
    for name in frozen:
        module.get_submodule(name).requires_grad_(False)
    before = {name: p.requires_grad for name, p in module.named_parameters()}
    fit(module, callback, folder=tmp_path, max_epochs=2)
    assert {name: p.requires_grad for name, p in module.named_parameters()} == before
    dense, initial = dict(Net().named_parameters()), learned(callback, "initial")
    moved = {
        name: not torch.equal(values, graded(dense[name], initial[name], NMPattern(2, 4), -1, 3.0))
        for name, values in logits(callback).items()
    }
    assert moved == {"net.0.weight": True, "net.2.weight": True}
    assert_masked(module, Net())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@every_estimator
def test_batches_without_a_loss_are_steps_without_an_update(
    estimator: EstimatorName, tmp_path: Path
) -> None:
    module = Sometimes()
    trainer, callback = run(module, tmp_path, estimator=estimator)
    assert trainer.global_step == 8
    assert updates(callback) == 6
    assert_masked(module, Net())


@every_estimator
def test_losses_that_are_not_numbers_move_nothing(estimator: EstimatorName, tmp_path: Path) -> None:
    class Moves(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.before = {name: values.clone() for name, values in logits(callback).items()}

        def on_train_batch_end(self, *_: Any) -> None:
            moved.append(not equal(self.before, logits(callback)))

    module, callback = NotANumber(), mask_callback(estimator=estimator, lr=FAST)
    moved: list[bool] = []
    fit(module, callback, Moves(), folder=tmp_path, max_epochs=2)
    # Of the policy's first residual nobody can say whether it is high or low.
    assert moved == [estimator != "policy", False, True, True, True, False, True, True]
    assert all(values.isfinite().all() for values in logits(callback).values())
    assert_masked(module, Net())


# --- Trainers -----------------------------------------------------------------------------------

TRAINERS: dict[str, tuple[dict[str, Any], int]] = {
    "max_steps": ({"max_steps": 5, "max_epochs": -1}, 5),
    "max_epochs": ({"max_epochs": 3}, 12),
    "limit_train_batches": ({"limit_train_batches": 3}, 6),
    "overfit_batches": ({"overfit_batches": 2}, 4),
    "accumulate_grad_batches": ({"accumulate_grad_batches": 3}, 4),
    "val_check_interval": ({"val_check_interval": 2}, 8),
    "fast_dev_run": ({"fast_dev_run": 3}, 3),
    "barebones": ({"barebones": True, "num_sanity_val_steps": None}, 8),
    "no log_every_n_steps": ({"log_every_n_steps": 0}, 8),
    "detect_anomaly": ({"detect_anomaly": True}, 8),
    "gradient_clip_val": ({"gradient_clip_val": 1e-9}, 8),
    "gradient_clip_algorithm": (
        {"gradient_clip_val": 1e-9, "gradient_clip_algorithm": "value"},
        8,
    ),
    "no validation": ({"limit_val_batches": 0}, 8),
    "sanity check": ({"num_sanity_val_steps": 1}, 8),
    "reload_dataloaders": ({"reload_dataloaders_every_n_epochs": 1}, 8),
    "32-true": ({"precision": "32-true"}, 8),
    "bf16-mixed": ({"precision": "bf16-mixed"}, 8),
}


@pytest.mark.filterwarnings(
    "ignore:You are trying to `self.log:UserWarning",
    "ignore:You requested to overfit:UserWarning",
    "ignore:.*turned on.*detect_anomaly:UserWarning",
)
@every_estimator
@pytest.mark.parametrize(("kwargs", "steps"), TRAINERS.values(), ids=TRAINERS)
def test_every_kind_of_trainer_learns_masks(
    kwargs: dict[str, Any], steps: int, estimator: EstimatorName, tmp_path: Path
) -> None:
    module = Net()
    trainer, callback = run(module, tmp_path, estimator=estimator, **kwargs)
    assert trainer.global_step == updates(callback) == steps
    assert_masked(module, Net())


@every_estimator
@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64)]
)
def test_weights_of_other_precisions_are_kept_to_the_bit(
    precision: Any, dtype: torch.dtype, estimator: EstimatorName, tmp_path: Path
) -> None:
    module = Net()
    trainer, callback = run(module, tmp_path, estimator=estimator, precision=precision)
    assert trainer.global_step == updates(callback) == 8
    assert {weight.dtype for weight in module.parameters()} == {dtype}
    assert {values.dtype for values in logits(callback).values()} == {torch.float32}
    assert_masked(module, Net().to(dtype))


def test_accumulated_batches_teach_what_one_large_batch_does(tmp_path: Path) -> None:
    # The published rule, whose step is proportional to the residual: rounding stays rounding.
    rule = {"lr": FAST, "published": True}
    small, large = mask_callback(**rule), mask_callback(**rule)
    sizes = {"max_epochs": 2, "limit_val_batches": 0}
    data = loader(48, batch_size=8)
    fit(Net(), small, folder=tmp_path, data=data, accumulate_grad_batches=3, **sizes)
    fit(Net(), large, folder=tmp_path, data=loader(48, batch_size=24), **sizes)
    assert updates(small) == updates(large) == 4
    assert_learned(large)
    for name, values in logits(large).items():
        torch.testing.assert_close(
            logits(small)[name], values, rtol=0, atol=4 * FAST * ROUNDING["policy"]
        )


def test_accumulated_gradients_move_by_their_share_of_the_rate(tmp_path: Path) -> None:
    """Each is divided by its own size, so that three alike together do what one does."""
    rate = 1e-3  # so that logits hardly move between gradients, which depend on them
    once, thrice = (mask_callback(estimator="straight_through", lr=rate) for _ in range(2))
    same = DataLoader([batch for batch in loader() for _ in range(3)], batch_size=None)
    sizes = {"max_epochs": 2, "limit_val_batches": 0}
    fit(Net(), once, folder=tmp_path, data=loader(), **sizes)
    fit(Net(), thrice, folder=tmp_path, data=same, accumulate_grad_batches=3, **sizes)
    assert updates(once) == updates(thrice) == 8
    assert_learned(once)
    for name, values in logits(once).items():
        torch.testing.assert_close(logits(thrice)[name], values, rtol=0, atol=0.1 * rate)


class Counts(Net):
    """Counts the masked weights that have a gradient when a backward pass is over."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[int] = []

    def on_after_backward(self) -> None:
        self.left.append(sum(self.net[i].weight.grad is not None for i in (0, 2)))


@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
@pytest.mark.parametrize(
    ("frozen", "strategy", "left"),
    [
        pytest.param(False, "auto", 0, id="one device"),
        pytest.param(False, "ddp", 0, id="DDP"),
        pytest.param(True, "ddp", 2, id="DDP that has nothing else to look after"),
        pytest.param(False, "ddp_find_unused_parameters_true", 2, id="DDP with idle parameters"),
    ],
)
def test_gradients_of_masked_weights_are_gone_when_a_backward_pass_is_over(
    frozen: bool, strategy: str, left: int, tmp_path: Path
) -> None:
    fits = []
    for kind in ("auto", strategy):
        module = Counts()
        for layer in (module.net[0], module.net[2]):
            layer.bias.requires_grad_(not frozen)
        callback = mask_callback(estimator="straight_through", lr=0.1)
        sizes = {"max_epochs": 2, "devices": 1, "use_distributed_sampler": False}
        trainer = quiet_trainer(tmp_path, callback, strategy=kind, **sizes)
        # Lightning leaves behind what tells later processes that they are ranks.
        with mock.patch.dict(os.environ):
            trainer.fit(module, loader(), loader(16))
        if kind != "auto":
            torch.distributed.destroy_process_group()
        fits.append((module, callback))
    (one, expected), (other, found) = fits
    assert one.left == [0] * 8
    assert other.left == [left] * 8
    assert_learned(found)
    assert all(map(torch.equal, logits(found).values(), logits(expected).values()))
    assert not hasattr(other, "_ddp_params_and_buffers_to_ignore")
    assert not any(hasattr(weight, "_ddp_ignored") for weight in other.parameters())
