"""Laws of losses that are not finite, of losses that say nothing, and of numbers out of bounds."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from modules import (
    FAST,
    Net,
    assert_learned,
    assert_masked,
    equal,
    every_estimator,
    fit,
    learned,
    logits,
    same_weights,
)
from optimizer_cases import one_weight
from rules import mask_callback
from torch import Tensor, nn

from maskpro_lightning import MaskProCallback, NMPattern
from maskpro_lightning.initial.logits import graded
from maskpro_lightning.optim.estimators import EstimatorName

NAN, INFINITE = math.nan, math.inf


class Spoiled(Net):
    """Adds something bad to the loss of some training steps; its gradient stays as good as ever."""

    def __init__(self, spoils: Callable[[int], bool], bad: float = NAN) -> None:
        super().__init__()
        self.spoils, self.bad = spoils, bad

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        bad = self.bad if self.spoils(self.global_step) else 0.0
        return super().training_step(batch, batch_idx) + bad


def masks(estimator: EstimatorName = "policy", **kwargs: Any) -> MaskProCallback:
    return mask_callback(estimator=estimator, lr=FAST, baseline_cache=0, **kwargs)


def skipped(callback: MaskProCallback) -> float:
    assert callback.optimizer is not None
    return float(callback.optimizer.tracker["skipped"])


def unmoved(callback: MaskProCallback) -> dict[str, Tensor]:
    assert callback.optimizer is not None
    scale = callback.optimizer.param_groups[0]["logit_scale"]
    weights = dict(Net().named_parameters())
    return {
        name: graded(weights[name], mask, NMPattern(2, 4), -1, scale)
        for name, mask in learned(callback, "initial").items()
    }


# --- losses that are not finite -----------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INFINITE, -INFINITE])
@every_estimator
def test_updates_without_a_finite_loss_are_skipped_counted_and_logged(
    estimator: EstimatorName, bad: float, tmp_path: Path
) -> None:
    callback, module = masks(estimator), Spoiled(lambda step: step in (1, 4), bad)
    logger = CSVLogger(tmp_path, name="", version="")
    fit(module, callback, folder=tmp_path, max_steps=6, logger=logger, log_every_n_steps=1)
    assert skipped(callback) == 2
    for values in logits(callback).values():
        assert values.isfinite().all()
    assert_learned(callback)
    assert_masked(module, Net())
    with (tmp_path / "metrics.csv").open() as file:
        logged = [row["maskpro/skipped"] for row in csv.DictReader(file)]
    assert [float(value) for value in logged if value] == [1, 1, 1, 2, 2]


@every_estimator
def test_a_step_that_is_skipped_moves_no_logit(estimator: EstimatorName, tmp_path: Path) -> None:
    callback = masks(estimator)
    fit(Spoiled(lambda _: True), callback, folder=tmp_path, max_steps=8)
    assert skipped(callback) == 8
    assert equal(logits(callback), unmoved(callback))


LOOK = "Look at the batches, the loss and the precision."
RAISE = "A larger logit_scale keeps masks closer to the initial one."
BOTH, ONE = "{} under the drawn mask and {} under the initial one.", "{} under the drawn mask."


@pytest.mark.parametrize(
    ("estimator", "where", "message"),
    [
        ("policy", {"initial", "drawn"}, f"{BOTH.format('nan', 'nan')} {LOOK}"),
        ("policy", {"drawn"}, f"{BOTH.format('nan', '1')} {RAISE}"),
        ("straight_through", {"drawn"}, f"{ONE.format('nan')} {LOOK}"),
    ],
)
def test_a_fit_without_any_finite_loss_ends_naming_step_batch_and_cause(
    estimator: EstimatorName, where: set[str], message: str, tmp_path: Path
) -> None:
    class Bad(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert callback.optimizer is not None
            bad = callback.optimizer.holds in where
            return 1 + 0 * super().training_step(batch, batch_idx) * (NAN if bad else 1)

    callback, module = masks(estimator), Bad()
    with pytest.raises(RuntimeError) as info:
        fit(module, callback, folder=tmp_path, max_steps=300, validate=False)
    what = "No loss" if estimator == "policy" else "No gradient"
    assert str(info.value) == (
        f"{what} was finite in the last 100 updates, so nothing is learned any more: at step 99, "
        f"batch 3, the loss was {message}"
    )
    assert same_weights(module, Net())


def test_ninety_nine_skipped_updates_in_a_row_end_nothing(tmp_path: Path) -> None:
    callback, module = masks(), Spoiled(lambda step: step > 0)
    fit(module, callback, folder=tmp_path, max_steps=100, validate=False)
    assert skipped(callback) == 99


# --- losses that say nothing --------------------------------------------------------------------


class Constant(Net):
    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) * 0 + 1


class Aside(Net):
    """Its loss has a gradient, but no masked weight has a part in it."""

    def loss(self, batch: Any) -> Tensor:
        return self.net[0].bias.square().sum()


@pytest.mark.parametrize("make", [Constant, Aside])
def test_a_loss_that_masks_do_not_change_moves_no_logit(make: type[Net], tmp_path: Path) -> None:
    callback, module = masks(), make()
    fit(module, callback, folder=tmp_path, max_steps=8)
    assert equal(logits(callback), unmoved(callback))
    assert_masked(module, Net())


def test_a_constant_loss_has_no_direction(tmp_path: Path) -> None:
    callback = masks("straight_through")
    fit(Constant(), callback, folder=tmp_path, max_steps=8)
    assert equal(logits(callback), unmoved(callback))


def test_a_loss_without_a_masked_weight_has_no_gradient_to_learn_from(tmp_path: Path) -> None:
    module = Aside()
    with pytest.raises(RuntimeError, match="No gradient has reached any masked weight"):
        fit(module, masks("straight_through"), folder=tmp_path, max_steps=8)
    assert same_weights(module, Net())


# --- sizes out of all bounds --------------------------------------------------------------------


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("size", [9e17, 1e30])
@pytest.mark.parametrize("pattern", ["1:4", "2:4", "3:8", "9:16"])
def test_logits_stay_finite_however_large_losses_and_steps_are(
    pattern: str, size: float, published: bool
) -> None:
    weight = nn.Parameter(oracle.random(4, 16))
    rule = {"lr": 1e6, "published": published, "logit_scale": 1e6}
    optimizer = one_weight(weight, pattern, **rule)
    for number, residual in enumerate(oracle.random(30, seed=1).tolist()):
        optimizer.step(lambda r=residual: torch.tensor(r * size), torch.tensor(0.0))
        optimizer.param_groups[0]["lr"] = 1e6 * (1 - number / 30)
    (values,) = optimizer.logits().values()
    assert values.isfinite().all()
    n, m = map(int, pattern.split(":"))
    for version in ("drawn", "mode"):
        assert oracle.keeps_exactly(n, m, optimizer.masks(version)["w"])
    assert all(value.isfinite() for value in optimizer.tracker.values())


def test_a_huge_loss_does_not_silence_those_after_it() -> None:
    optimizer = one_weight(nn.Parameter(oracle.random(8, 8)), lr=FAST)
    for residual in (1.0, 2.0, 3e37, 1.5, 0.5):
        optimizer.step(lambda r=residual: torch.tensor(r), torch.tensor(0.0))
    assert optimizer.last["advantage"] != 0
    assert optimizer.tracker["skipped"] == 1


@pytest.mark.parametrize("lr", [1e3, 1e6])
def test_straight_through_stays_finite_with_huge_steps(lr: float) -> None:
    weight = nn.Parameter(oracle.random(4, 16))
    optimizer = one_weight(weight, estimator="straight_through", lr=lr)

    def closure() -> Tensor:
        loss = (weight * 1e15).square().sum()
        loss.backward()
        return loss.detach()

    for _ in range(30):
        optimizer.step(closure)
    assert optimizer.logits()["w"].isfinite().all()
    assert oracle.keeps_exactly(2, 4, optimizer.masks()["w"])
