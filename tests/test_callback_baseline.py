"""Laws of the baseline, which nobody notices, and of what a fit logs."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from modules import CERTAIN, FAST, Net, equal, fit, learned, loader, logits
from rules import mask_callback
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanSquaredError, MetricCollection, R2Score

from maskpro_lightning import Distillation, MaskProCallback

pytestmark = pytest.mark.usefixtures("no_figures")

PER_STEP = {"loss", "baseline", "residual", "advantage", "delta"}
PER_ROW = {"entropy", "changed", "churn", "baseline_hit_rate"}
AT_THE_END = {"sparsity", "best_step"}  # and by a monitored metric, what it was


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes longer than all else in these tests."""
    monkeypatch.setattr("maskpro_lightning.tracking.plots.figures", lambda run: {})


def logged(folder: Path) -> list[dict[str, str]]:
    """The rows that a CSVLogger has written."""
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def column(folder: Path, name: str) -> list[float]:
    return [float(row[name]) for row in logged(folder) if row.get(name)]


def logging_fit(
    folder: Path, module: Net, *callbacks: pl.Callback, **kwargs: Any
) -> list[dict[str, str]]:
    logger = CSVLogger(folder, name="", version="")
    settings = {"max_epochs": 3, "log_every_n_steps": 1, "logger": logger} | kwargs
    fit(module, *callbacks, folder=folder, **settings)
    return logged(folder)


class Witness(pl.Callback):
    """Measures, by hand and from a pristine Net, what each step should have measured."""

    def __init__(self, callback: MaskProCallback) -> None:
        self.callback = callback
        self.losses: list[tuple[Tensor, Tensor]] = []
        self.draws: list[dict[str, Tensor]] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        drawn, initial = (learned(self.callback, version) for version in ("drawn", "initial"))
        self.draws.append(drawn)
        self.losses.append((self.loss(drawn, batch), self.loss(initial, batch)))

    @torch.no_grad()
    def loss(self, masks: dict[str, Tensor], batch: Any) -> Tensor:
        net, (inputs, targets) = Net(), batch
        weights = {name: net.get_parameter(name).where(mask, 0.0) for name, mask in masks.items()}
        predicted = functional_call(
            net.net, {n.removeprefix("net."): w for n, w in weights.items()}, inputs
        )
        return (predicted - targets).square().mean()


# --- the baseline -------------------------------------------------------------------------------


def test_the_residual_is_the_drawn_masks_loss_minus_the_initial_ones(tmp_path: Path) -> None:
    witness = Witness(callback := mask_callback(lr=FAST))
    logging_fit(tmp_path, Net(), callback, witness)
    assert len(witness.losses) == 12
    for name, expected in {
        "loss": [drawn for drawn, _ in witness.losses],
        "baseline": [initial for _, initial in witness.losses],
        "residual": [drawn - initial for drawn, initial in witness.losses],
    }.items():
        found = torch.tensor(column(tmp_path, f"maskpro/{name}"))
        # Losses near 1, whose summands may be added in another order.
        torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-6)
    assert max(abs(drawn - initial) for drawn, initial in witness.losses) > 1e-2


def test_a_batch_is_measured_once_and_then_remembered(tmp_path: Path) -> None:
    logging_fit(tmp_path, Net(), mask_callback())
    rates = column(tmp_path, "maskpro/baseline_hit_rate")
    expected = [0.0] * 4 + [hits / (4 + hits) for hits in range(1, 9)]
    assert rates == pytest.approx(expected, abs=1e-6)


def test_shuffling_into_the_same_batches_is_no_obstacle(tmp_path: Path) -> None:
    data = loader(shuffle=True, batch_size=1)
    logging_fit(tmp_path, Net(), mask_callback(), data=data, max_epochs=2)
    assert column(tmp_path, "maskpro/baseline_hit_rate")[-1] == pytest.approx(0.5)


def test_a_remembered_baseline_is_the_one_that_would_be_measured(tmp_path: Path) -> None:
    remembering, measuring = (mask_callback(lr=FAST, baseline_cache=size) for size in (99, 0))
    for callback, name in ((remembering, "remembering"), (measuring, "measuring")):
        logging_fit(tmp_path / name, Net(), callback)
    found, expected = (
        column(tmp_path / n, "maskpro/baseline") for n in ("remembering", "measuring")
    )
    assert found == expected
    assert set(column(tmp_path / "measuring", "maskpro/baseline_hit_rate")) == {0.0}
    assert equal(logits(remembering), logits(measuring))


def test_a_cache_that_is_too_small_forgets_what_it_has_not_seen_for_longest(tmp_path: Path) -> None:
    logging_fit(tmp_path, Net(), mask_callback(baseline_cache=3))
    assert column(tmp_path, "maskpro/baseline_hit_rate")[-1] == 0


class Noisy(Net):
    """Multiplies its loss by a random number."""

    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.draw = draw

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) * (1 + self.draw())


NOISE = {
    "torch": lambda: float(torch.rand(())),
    "numpy": lambda: float(np.random.random()),  # noqa: NPY002
    "python": random.random,
}


@pytest.mark.parametrize("draw", NOISE.values(), ids=NOISE)
def test_with_random_numbers_each_baseline_sees_those_of_its_draw(
    draw: Any, tmp_path: Path
) -> None:
    pl.seed_everything(0, verbose=False)
    logging_fit(tmp_path, Noisy(draw), mask_callback(logit_scale=CERTAIN))
    assert column(tmp_path, "maskpro/residual") == [0.0] * 12
    assert len(set(column(tmp_path, "maskpro/baseline"))) == 12


# --- the baseline leaves no trace ---------------------------------------------------------------


class Chatty(Net):
    """Leaves a trace of every pass wherever a training step can."""

    def __init__(self, *inside: nn.Module) -> None:
        super().__init__(*inside)
        self.error = MeanSquaredError()
        self.more = MetricCollection([MeanSquaredError(), R2Score()], prefix="more_")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        predicted, targets = self.net(batch[0]), batch[1]
        loss = (predicted - targets).square().mean()
        self.log("logged", loss, on_step=True, on_epoch=True)
        self.log_dict({"summed": loss}, on_step=False, on_epoch=True, reduce_fx="sum")
        self.error(predicted, targets)
        self.log("metric", self.error, on_step=True, on_epoch=True)
        self.more.update(predicted.flatten(), targets.flatten())
        self.log_dict(self.more, on_step=False, on_epoch=True)
        self.logger.log_metrics({"direct": float(loss.detach())}, step=self.global_step)
        self.loggers[0].log_metrics({"random": float(torch.rand(()))}, step=self.global_step)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def batch_norm_and_dropout() -> Chatty:
    return Chatty(nn.BatchNorm1d(16), nn.Dropout(0.3))


@pytest.mark.parametrize("cache", [0, 99])
@pytest.mark.parametrize("make", [Chatty, batch_norm_and_dropout])
def test_a_fit_whose_masks_stay_logs_what_lightning_logs_of_the_masked_module(
    make: Callable[[], Chatty], cache: int, tmp_path: Path
) -> None:
    # The reference has the masks in its weights and an optimizer whose learning rate is zero.
    callback = mask_callback(logit_scale=CERTAIN, baseline_cache=cache, monitor=None)
    masked, plain = make(), make()
    pl.seed_everything(0, verbose=False)
    data = loader(shuffle=True)
    rows = logging_fit(tmp_path / "masked", masked, callback, data=data)
    random_numbers = torch.get_rng_state()

    for name, mask in learned(callback).items():
        plain.get_parameter(name).data[~mask] = 0
    pl.seed_everything(0, verbose=False)
    expected = logging_fit(tmp_path / "plain", plain, data=data)
    assert theirs(rows) == theirs(expected)
    assert equal(dict(masked.named_buffers()), dict(plain.named_buffers()))
    assert torch.equal(random_numbers, torch.get_rng_state())


def theirs(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """What is logged that is not ours; of rows that hold nothing else nothing."""
    kept = [{k: v for k, v in row.items() if v and not k.startswith("maskpro/")} for row in rows]
    return [row for row in kept if row.keys() - {"step", "epoch"}]


# --- what is logged -----------------------------------------------------------------------------


def test_every_number_is_logged_under_its_name(tmp_path: Path) -> None:
    rows = logging_fit(tmp_path, Net(), mask_callback(lr=FAST))
    names = {name.removeprefix("maskpro/") for name in rows[0] if name.startswith("maskpro/")}
    assert names == PER_STEP | PER_ROW | AT_THE_END
    for name in PER_STEP | PER_ROW:
        assert len(column(tmp_path, f"maskpro/{name}")) == 12
    for name in AT_THE_END:
        assert len(column(tmp_path, f"maskpro/{name}")) == 1


def test_with_gradients_there_is_no_baseline_to_log(tmp_path: Path) -> None:
    callback = mask_callback(lr=FAST, estimator="straight_through")
    rows = logging_fit(tmp_path, Net(), callback)
    names = {name.removeprefix("maskpro/") for name in rows[0] if name.startswith("maskpro/")}
    assert names == {"loss", "entropy", "changed", "churn"} | AT_THE_END
    assert column(tmp_path, "maskpro/loss") == column(tmp_path, "train_loss_step")


def test_the_loss_says_so_if_it_is_the_distance_to_the_dense_outputs(tmp_path: Path) -> None:
    callback = mask_callback(
        lr=FAST,
        estimator="straight_through",
        distillation=Distillation("net", "mse"),
        lr_scheduler=ReduceLROnPlateau,
    )
    rows = logging_fit(tmp_path, Net(), callback)
    assert "maskpro/loss" not in rows[0]
    assert column(tmp_path, "maskpro/distillation_loss") != column(tmp_path, "train_loss_step")
    (history,) = tmp_path.rglob("history.csv")
    assert "distillation_loss" in history.read_text().splitlines()[0].split(",")
    assert callback.optimizer is not None


def test_logged_shares_count_the_groups_that_changed(tmp_path: Path) -> None:
    witness = Witness(callback := mask_callback(lr=FAST))
    logging_fit(tmp_path, Net(), callback, witness)
    modes, last = learned(callback), learned(callback, "drawn")

    def share(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        """Both layers have 64 groups."""
        different = [(one[n] != other[n]).unflatten(-1, (-1, 4)).any(-1).flatten() for n in one]
        return float(torch.cat(different).float().mean())

    changed, churn = (column(tmp_path, f"maskpro/{name}") for name in ("changed", "churn"))
    assert changed[-1] == pytest.approx(share(modes, learned(callback, "initial")), abs=1e-6)
    draws = [*witness.draws, last]
    expected = [share(one, other) for one, other in pairwise(draws)]
    assert churn == pytest.approx(expected, abs=1e-6)
    assert 0 < changed[-1] < 1


def test_delta_is_the_tracker_and_entropy_falls_from_that_of_the_start(tmp_path: Path) -> None:
    callback = mask_callback(lr=FAST, momentum=0.5)
    logging_fit(tmp_path, Net(), callback)
    delta, residuals = 0.0, column(tmp_path, "maskpro/residual")
    for found, residual in zip(column(tmp_path, "maskpro/delta"), residuals, strict=True):
        delta = 0.5 * delta + 0.5 * residual
        assert found == pytest.approx(delta, abs=1e-6)
    assert all(0 < entropy < 1 for entropy in column(tmp_path, "maskpro/entropy"))


def test_numbers_that_cost_are_logged_as_often_as_the_trainer_says(tmp_path: Path) -> None:
    rows = logging_fit(tmp_path, Net(), mask_callback(), log_every_n_steps=3)
    # Lightning counts steps from zero.
    assert [row["step"] for row in rows if row["maskpro/entropy"]] == ["2", "5", "8", "11"]


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_each_update_is_one_row_of_the_history(accumulate: int, tmp_path: Path) -> None:
    logging_fit(tmp_path, Net(), mask_callback(), accumulate_grad_batches=accumulate)
    with (tmp_path / "maskpro" / "history.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == list(range(1, 12 // accumulate + 1))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # once in a process
def test_a_batch_without_a_loss_adds_no_row_to_the_history(tmp_path: Path) -> None:
    class Sometimes(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None if batch_idx == 1 else self.loss(batch)

    logging_fit(tmp_path, Sometimes(), mask_callback())
    with (tmp_path / "maskpro" / "history.csv").open() as file:
        losses = [row["loss"] for row in csv.DictReader(file)]
    assert len(losses) == len(set(losses)) == 9
