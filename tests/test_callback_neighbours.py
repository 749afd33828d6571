"""Laws of a fit with MaskProCallback among schedulers, loggers and other callbacks."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from modules import FAST, Net, assert_masked, fit, loader, quiet_trainer
from rules import mask_callback
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, IterableDataset

# --- learning rates -----------------------------------------------------------------------------


class Rates(pl.Callback):
    """Remembers the learning rate of every batch; ends the fit after so many."""

    def __init__(self, last: int = 99) -> None:
        self.seen: list[float] = []
        self.last = last

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])
        trainer.should_stop = len(self.seen) >= self.last


class Stream(IterableDataset[Any]):
    """Rows without a known number."""

    def __iter__(self) -> Iterator[Any]:
        return iter(loader().dataset)


@pytest.mark.parametrize(
    ("rule", "kwargs", "expected"),
    [
        pytest.param({}, {"max_steps": 4}, [1, 0.75, 0.5, 0.25], id="steps"),
        pytest.param({}, {"max_epochs": 1}, [1, 0.75, 0.5, 0.25], id="epochs"),
        pytest.param(
            {}, {"max_epochs": 1, "accumulate_grad_batches": 2}, [1, 1, 0.5, 0.5], id="accumulated"
        ),
        pytest.param({"published": True}, {"max_steps": 4}, [1] * 4, id="the published rule"),
        pytest.param({}, {"max_epochs": -1}, [1] * 6, id="without an end"),
    ],
)
def test_the_default_learning_rate_falls_to_zero_over_the_fit(
    rule: dict[str, Any], kwargs: dict[str, Any], expected: list[float], tmp_path: Path
) -> None:
    rates = Rates(last=6)
    fit(Net(), mask_callback(lr=1.0, **rule), rates, folder=tmp_path, **kwargs)
    assert rates.seen == pytest.approx(expected)


def test_data_of_unknown_length_is_learned_at_a_constant_rate(tmp_path: Path) -> None:
    rates, module = Rates(), Net()
    data = DataLoader(Stream(), batch_size=8)
    fit(module, mask_callback(lr=1.0), rates, folder=tmp_path, data=data, max_epochs=2)
    assert rates.seen == [1.0] * 8
    assert_masked(module, Net())


def test_the_learning_rate_follows_its_scheduler_and_monitor(tmp_path: Path) -> None:
    callback = mask_callback(lr=1.0, lr_scheduler=lambda o: LinearLR(o, 1, 0.5, total_iters=4))
    monitor = LearningRateMonitor()
    logging = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 1}
    fit(Net(), callback, monitor, folder=tmp_path, max_steps=6, **logging)
    assert monitor.lrs == {"lr-MaskPro": pytest.approx([1, 0.875, 0.75, 0.625, 0.5, 0.5])}


def test_a_scheduler_may_come_in_lightnings_dict(tmp_path: Path) -> None:
    def scheduler(optimizer: Any) -> Any:
        return {"scheduler": LinearLR(optimizer, 1, 0.5, total_iters=2), "interval": "epoch"}

    callback, monitor = mask_callback(lr=1.0, lr_scheduler=scheduler), LearningRateMonitor()
    logging = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 1}
    fit(Net(), callback, monitor, folder=tmp_path, max_epochs=3, **logging)
    assert monitor.lrs == {"lr-MaskPro": pytest.approx([1, 0.75, 0.5])}


# --- loggers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loggers", [0, 1, 2])
def test_any_number_of_loggers_gets_everything(loggers: int, tmp_path: Path) -> None:
    logger = [CSVLogger(tmp_path / str(number)) for number in range(loggers)]
    callback, module = mask_callback(lr=FAST), Net()
    fit(module, callback, folder=tmp_path, max_steps=8, logger=logger, log_every_n_steps=4)
    written = [path.read_text() for path in sorted(tmp_path.rglob("metrics.csv"))]
    assert len(written) == loggers
    assert len(set(written)) <= 1
    for text in written:
        assert "maskpro/residual" in text
        assert "maskpro/sparsity" in text
    assert_masked(module, Net())


@pytest.mark.parametrize("quiet", [{"logger": False}, {"fast_dev_run": 3}], ids=str)
def test_a_fit_that_is_not_to_be_logged_leaves_no_files(
    quiet: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"max_steps": 3, "log_every_n_steps": 1, "logger": CSVLogger(tmp_path)} | quiet
    fit(Net(), mask_callback(), folder=tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []


# --- other callbacks -----------------------------------------------------------------------------


def test_early_stopping_watches_the_deployed_mask(tmp_path: Path) -> None:
    stopping = EarlyStopping("held_out_loss", patience=0, min_delta=1e9)
    trainer = fit(Net(), mask_callback(lr=FAST), stopping, folder=tmp_path, max_epochs=9)
    assert trainer.global_step == 8


def test_the_best_checkpoint_is_the_one_of_the_best_validation(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, "{step}", monitor="held_out_loss", save_top_k=1)
    every = ModelCheckpoint(tmp_path / "all", "{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = fit(Net(), mask_callback(lr=FAST), best, every, folder=tmp_path, max_epochs=4)
    (score,) = trainer.validate(Net.load_from_checkpoint(best.best_model_path), loader(16))
    assert score["held_out_loss"] == float(best.best_model_score)
    names = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert names == ["step=12.ckpt", "step=15.ckpt", "step=3.ckpt", "step=6.ckpt", "step=9.ckpt"]


def test_several_validation_loaders_see_the_same_mask(tmp_path: Path) -> None:
    module, callback = Net(), mask_callback(lr=FAST)
    trainer = quiet_trainer(tmp_path, callback, max_steps=4)
    trainer.fit(module, loader(), [loader(16), loader(16)])
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["held_out_loss"] == metrics["held_out_loss/dataloader_idx_1"]
    assert_masked(module, Net())


@pytest.mark.parametrize("kind", [RichProgressBar, TQDMProgressBar])
def test_the_bar_stays_in_its_place_while_the_dense_weights_are_validated(
    kind: type[ProgressBar], tmp_path: Path
) -> None:
    bar, seen = kind(), []

    class Looks(pl.Callback):
        def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            # Rich draws from a thread of its own, which asks for this at any time.
            seen.append((trainer.sanity_checking, trainer.progress_bar_callback is bar))

    steps: dict[str, Any] = {"max_steps": 2, "enable_progress_bar": True}
    fit(Net(), mask_callback(), bar, Looks(), folder=tmp_path, **steps)
    assert (True, True) in seen
    assert all(there for _, there in seen)
    assert not [name for name in vars(bar) if name.startswith("on_validation_")]


def test_the_progress_bar_has_one_line_of_80_columns_with_the_metric_of_the_user(
    tmp_path: Path,
) -> None:
    class Shows(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("shown", float(batch_idx), prog_bar=True)
            return self.loss(batch)

    shown = io.StringIO()
    console = {"width": 80, "file": shown, "force_terminal": True, "color_system": None}
    bar = RichProgressBar(console_kwargs=console)
    steps: dict[str, Any] = {"max_steps": 8, "log_every_n_steps": 1}
    fit(Shows(), mask_callback(), bar, folder=tmp_path, enable_progress_bar=True, **steps)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\n", shown.getvalue())
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    assert lines[-1].startswith("Epoch 1")
    assert lines[-1].endswith("shown: 3.000")
