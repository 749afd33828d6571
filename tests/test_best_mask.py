"""Laws of the mask that is deployed: the last one, or the one that did best in validation."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from modules import (
    FAST,
    Net,
    equal,
    fit,
    identical,
    learned,
    loader,
    logits,
    same_bits,
    versions_held,
)
from rules import mask_callback, mask_optimizer
from torch import Tensor, nn

from maskpro_lightning import MaskProCallback, load_masks
from maskpro_lightning.tracking import plots
from maskpro_lightning.tracking.runs import read_run


class Told(Net):
    """Logs losses that it is told, one for each validation."""

    def __init__(self, *losses: float) -> None:
        super().__init__()
        self.told = list(losses)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == 0:
            self.log("val_loss", self.told.pop(0))


class Keeps(pl.Callback):
    """Keeps the most likely masks of each validation within the fit."""

    def __init__(self, callback: MaskProCallback) -> None:
        self.callback = callback
        self.masks: list[dict[str, Tensor]] = []

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.masks.append(learned(self.callback))


# Of the dense weights, and better than any other: it shall count for nothing.
DENSE = -1.0


def told_fit(
    folder: Path, *losses: float, dense: float = DENSE, **kwargs: Any
) -> tuple[Told, MaskProCallback, list[dict[str, Tensor]]]:
    """Three epochs after validations of the dense weights and the initial mask; masks change."""
    module, callback = Told(dense, *losses), mask_callback(lr=FAST, **kwargs)
    keeps = Keeps(callback)
    end = ModelCheckpoint(folder)
    fit(module, callback, keeps, end, folder=folder, max_epochs=3, logger=CSVLogger(folder))
    for one, next_ in zip(keeps.masks[:-1], keeps.masks[1:], strict=True):
        assert not equal(one, next_)
    return module, callback, keeps.masks


def held(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight != 0 for name, weight in module.named_parameters() if weight.dim() > 1}


@pytest.mark.parametrize(
    ("losses", "kept", "message"),
    [
        ((4.0, 3.0, 2.0, 1.0), 3, None),
        ((4.0, 2.0, 1.0, 3.0), 2, "The mask of step 8 is deployed: its val_loss was 1, that"),
        ((1.0, 4.0, 3.0, 2.0), 0, "The initial mask is deployed: its val_loss was 1, that"),
        ((4.0, 2.0, float("nan"), float("nan")), 1, "The mask of step 4 is deployed"),
        ((float("nan"), 3.0, 2.0, 5.0), 2, "The mask of step 8 is deployed"),
    ],
    ids=["falling", "rising at the end", "never below the start", "not finite", "not finite first"],
)
def test_the_mask_of_the_best_validation_is_deployed(
    losses: tuple[float, ...],
    kept: int,
    message: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "maskpro_lightning"):
        module, callback, masks = told_fit(tmp_path, *losses)
    assert equal(held(module), masks[kept])
    assert callback.result is not None
    assert callback.result.dense == DENSE
    assert callback.result.initial == pytest.approx(losses[0], nan_ok=True)
    told = [r.getMessage() for r in caplog.records if "is deployed" in r.getMessage()]
    assert len(told) == (message is not None)
    assert message is None or told[0].startswith(message)
    assert message is None or ("Learn longer" in told[0]) == (kept == 0)
    assert callback.optimizer is not None
    assert equal(load_masks(next(tmp_path.rglob("masks.safetensors")), "2:4"), masks[kept])
    callback.optimizer.write("dense")
    assert same_bits(module.net[0].weight, Net().net[0].weight)


@pytest.mark.parametrize(("last", "deployed"), [(4.0, 4.0), (6.0, 5.0)])
def test_a_mask_found_after_the_last_validation_is_validated(
    last: float, deployed: float, tmp_path: Path
) -> None:
    module, callback = Told(DENSE, 7.0, 5.0, last), mask_callback(lr=FAST)
    saver = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = fit(module, callback, saver, folder=tmp_path, max_steps=3, val_check_interval=2)
    assert module.told == []
    assert trainer.global_step == 3
    assert callback.result is not None
    assert callback.result.deployed == deployed
    assert callback.result.best_step == (3 if deployed == last else 2)
    assert equal(held(module), learned(callback, "mode" if deployed == last else "best"))
    assert float(saver.best_model_score) == deployed  # type: ignore[arg-type]


def test_a_fit_that_ends_with_a_validation_has_no_other(tmp_path: Path) -> None:
    module, callback = Told(DENSE, 7.0, 5.0), mask_callback(lr=FAST)
    fit(module, callback, folder=tmp_path, max_steps=2, val_check_interval=2)
    assert module.told == []


def test_a_higher_value_can_be_the_better_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, callback, masks = told_fit(tmp_path, 1, 4, 3, 2, dense=5, monitor_mode="max")
    assert (
        "was 4, that of the last validation 2, and by monitor_mode higher is better" in caplog.text
    )
    assert equal(held(module), masks[1])
    assert callback.result is not None
    assert callback.result.gap_closed == 0.75


@pytest.mark.parametrize("monitor", [None, "no_such_metric"])
def test_without_the_metric_the_last_mask_is_deployed(monitor: str | None, tmp_path: Path) -> None:
    module, callback = Told(0.0, 1.0, 2.0, 3.0, 4.0), mask_callback(lr=FAST, monitor=monitor)
    fit(module, callback, folder=tmp_path, max_epochs=3)
    assert equal(held(module), learned(callback))
    # Nothing asks for the dense weights' and the initial mask's values; unless they may come, when
    # nobody has seen one.
    assert len(module.told) == (2 if monitor is None else 0)
    assert callback.result is not None
    assert callback.result.dense is None


def test_a_sanity_check_tells_whether_the_initial_mask_is_worth_a_validation(
    tmp_path: Path,
) -> None:
    module, callback = Told(*[0.0] * 5), mask_callback(lr=FAST, monitor="no_such_metric")
    fit(module, callback, folder=tmp_path, max_epochs=3, num_sanity_val_steps=1)
    assert len(module.told) == 1


class Accurate(Net):
    """Logs an accuracy, of which the initial mask loses nearly all, and a loss."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        assert isinstance(self.trainer.callbacks[0], MaskProCallback)
        is_dense = versions_held(self, self.trainer.callbacks[0]) == {"dense"}
        self.log("score" if self.plain else "val_acc", 0.9 if is_dense else 0.2)
        self.log("distance", 1.0 if is_dense else 2.0)

    plain = False


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What this package has warned of."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("maskpro_lightning")]


class Trained(pl.Callback):
    """Keeps what was said before the first training step."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.caplog = caplog
        self.before: list[str] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 1:
            self.before = said(self.caplog)


@pytest.mark.parametrize(
    ("monitor", "mode", "told"),
    [
        ("val_acc", "min", "as its name says, set monitor_mode='max'; else"),
        ("score", "min", "If that is upside down, set monitor_mode='max'; else"),
        ("distance", "max", "If that is upside down, set monitor_mode='min'; else"),
        ("val_acc", "max", None),
        ("distance", "min", None),
    ],
)
def test_a_mode_by_which_the_dense_weights_are_worse_is_told_at_once(
    monitor: str, mode: Any, told: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, before = Accurate(), Trained(caplog)
    module.plain = monitor == "score"
    callback = mask_callback(monitor=monitor, monitor_mode=mode)
    fit(module, callback, before, folder=tmp_path, max_steps=1)
    assert len(before.before) == (told is not None)
    if told is not None:
        assert told in before.before[0]
        assert f"by monitor_mode='{mode}'" in before.before[0]


def test_an_end_at_the_initial_mask_speaks_of_a_mode_by_which_the_dense_weights_are_worse(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Rising(Net):
        seen = 0.0

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            assert isinstance(self.trainer.callbacks[0], MaskProCallback)
            is_dense = versions_held(self, self.trainer.callbacks[0]) == {"dense"}
            self.seen += 0.01
            self.log("score", 0.9 if is_dense else 0.2 + self.seen)

    fit(Rising(), mask_callback(monitor="score"), folder=tmp_path, max_epochs=2)
    assert "The initial mask is deployed" in said(caplog)[-1]
    assert said(caplog)[-1].endswith("That the dense weights are worse speaks against 'min'.")


def test_where_numbers_do_not_tell_the_name_of_a_metric_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Even(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log_dict({"val/f1": 0.5, "facc": 0.5})

    for monitor in ("val/f1", "facc"):
        fit(Even(), mask_callback(monitor=monitor), folder=tmp_path, max_steps=1)
    assert said(caplog) == [
        "By monitor_mode='min' a lower val/f1 is better, against its name: set monitor_mode='max'."
    ]


@pytest.mark.parametrize("checks", [0, 1])
def test_a_monitor_that_is_not_logged_is_told_before_the_first_step_and_at_the_end(
    checks: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback, before = mask_callback(monitor="val_los"), Trained(caplog)
    fit(Accurate(), callback, before, folder=tmp_path, max_epochs=2, num_sanity_val_steps=checks)
    (told,) = before.before
    assert "validation logs no 'val_los'" in told
    assert told.endswith("set monitor to one of 'val_acc', 'distance'.")
    assert said(caplog) == [told, "The last mask is deployed: validation logged no 'val_los'."]


class Counts(pl.Callback):
    """Counts validations as callbacks do that keep to Lightning's ways."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.steps.append(trainer.global_step)


def test_what_is_measured_of_the_dense_weights_is_nobody_elses(tmp_path: Path) -> None:
    counts, best = Counts(), ModelCheckpoint(tmp_path, monitor="val_loss")
    stops = EarlyStopping("val_loss", patience=1)
    module, callback = Told(DENSE, 4.0, 3.0, 2.0, 1.0), mask_callback(lr=FAST)
    logger = CSVLogger(tmp_path)
    trainer = fit(
        module, callback, counts, best, stops, folder=tmp_path, max_epochs=3, logger=logger
    )
    assert trainer.global_step == 12
    assert counts.steps == [0, 4, 8, 12]
    assert best.best_model_score == stops.best_score == 1.0
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        logged = [row["val_loss"] for row in csv.DictReader(file)]
    assert [float(value) for value in logged if value] == [4.0, 3.0, 2.0, 1.0]
    assert trainer.num_sanity_val_steps == 0
    assert counts in trainer.callbacks


@pytest.mark.parametrize("batches", [0, 1])
def test_the_dense_weights_are_seen_whole_and_without_harm_to_the_bar(
    batches: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Told(*[DENSE] * (batches + 1), 4.0, 3.0)
    callback = mask_callback(lr=FAST)
    kept: list[Any] = []

    class Sees(pl.Callback):
        def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            kept.append((trainer.sanity_checking, versions_held(module, callback)))

    kwargs: dict[str, Any] = {"num_sanity_val_steps": batches, "enable_progress_bar": True}
    fit(module, callback, Sees(), TQDMProgressBar(), folder=tmp_path, max_epochs=1, **kwargs)
    # After Lightning's own check, which looks at fewer.
    assert kept[: batches + 2] == [(True, {"dense"})] * (batches + 2)
    assert [sanity for sanity, _ in kept] == [True] * (batches + 2) + [False] * 4
    assert "4/4" in capsys.readouterr().out


def test_the_run_keeps_what_dense_weights_and_initial_mask_reached(tmp_path: Path) -> None:
    told_fit(tmp_path, 4.0, 1.0, 2.0, 3.0)
    run = read_run(next(tmp_path.rglob("comparison.csv")).parent)
    assert run.comparison == {"dense": {"val_loss": DENSE}, "initial": {"val_loss": 4.0}}
    assert run.validation[0] == {"step": 0, "val_loss": 4.0}
    figure = plots.figures(run)["validation"]
    assert {"dense -1", "initial 4"} <= {text.get_text() for text in figure.axes[0].texts}


class Staged(Net):
    """Names its metrics after the trainer's stage, as pytorch-forecasting does."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        stage = "sanity_check" if self.trainer.sanity_checking else "val"
        self.log(f"{stage}_loss", self.loss(batch))


def test_a_sanity_check_with_names_of_its_own_tells_nothing(tmp_path: Path) -> None:
    callback = mask_callback(lr=FAST)
    fit(Staged(), callback, folder=tmp_path, max_epochs=1, num_sanity_val_steps=1)
    assert callback.result is not None
    assert callback.result.initial is not None


def test_a_checkpoint_holds_what_would_be_deployed_and_the_fit_goes_on(tmp_path: Path) -> None:
    _, callback, masks = told_fit(tmp_path, 4.0, 1.0, 2.0, 3.0)
    (path,) = tmp_path.rglob("*.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    kept = {name: weight != 0 for name, weight in state.items() if weight.dim() > 1}
    assert equal(kept, masks[1])
    resumed, again = Told(5.0), mask_callback(lr=FAST)
    logger = CSVLogger(tmp_path / "resumed")
    fit(resumed, again, folder=tmp_path, max_epochs=4, ckpt_path=path, logger=logger)
    assert equal(held(resumed), masks[1])
    assert again.result is not None
    assert (again.result.dense, again.result.initial) == (DENSE, 4.0)
    run = read_run(next((tmp_path / "resumed").rglob("comparison.csv")).parent)
    assert run.comparison == {"dense": {"val_loss": DENSE}, "initial": {"val_loss": 4.0}}
    assert not equal(logits(again), logits(callback))  # it has learned on
    assert identical(again._best.value, 1.0)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, 'export_sparse(module, "sparse-model")'),
        (
            {"pattern": "1:4", "include": ["n*"], "exclude": ["net.0"]},
            """export_sparse(module, "sparse-model", "1:4", include=['n*'], exclude=['net.0'])""",
        ),
    ],
)
def test_the_end_of_a_fit_tells_what_exports_this_mask(
    given: Any, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = mask_callback(**given)
    fit(Net(), callback, folder=tmp_path, max_steps=1)
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == f"To export it: {line}"  # and no folder, as nothing is kept
    assert callback.result is not None
    assert callback.result.folder is None


def test_values_of_another_metric_are_not_compared_with(tmp_path: Path) -> None:
    told_fit(tmp_path, 4.0, 1.0, 2.0, 3.0)
    (path,) = tmp_path.rglob("*.ckpt")

    class Other(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("distance", 9.0)

    resumed, again = Other(), mask_callback(lr=FAST, monitor="distance")
    fit(resumed, again, folder=tmp_path, max_epochs=4, ckpt_path=path)
    assert equal(held(resumed), learned(again))
    assert again._best.value == 9.0


def test_the_initial_mask_is_validated_without_a_trace_in_training(tmp_path: Path) -> None:
    fits = []
    for monitor in ("not_logged", None):
        torch.manual_seed(0)
        callback = mask_callback(lr=FAST, monitor=monitor)
        fit(Net(), callback, folder=tmp_path, data=loader(shuffle=True), max_epochs=2)
        fits.append(callback)
    assert identical(*(callback.optimizer.state_dict() for callback in fits if callback.optimizer))


def test_an_optimizer_without_a_memory_of_its_own_writes_the_initial_mask() -> None:
    weight = nn.Parameter(Net().net[0].weight.detach().clone())
    optimizer = mask_optimizer([("w", weight)], lr=FAST, logit_scale=0.5)
    optimizer.begin()
    assert torch.equal(optimizer.masks("best")["w"], optimizer.masks("initial")["w"])
    for _ in range(5):
        optimizer.step(lambda: weight.square().sum())
    assert torch.equal(optimizer.masks("best")["w"], optimizer.masks("initial")["w"])
    optimizer.remember()
    remembered = optimizer.masks("mode")["w"]
    for _ in range(5):
        optimizer.step(lambda: weight.square().sum())
    assert torch.equal(optimizer.masks("best")["w"], remembered)
    assert not torch.equal(optimizer.masks("mode")["w"], remembered)
