"""Laws of long runs, which do not grow, and of runs repeated, which are the same to the byte."""

from __future__ import annotations

import gc
import logging
import resource
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import oracle
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from modules import FAST, Net, every_estimator, fit, identical, loader
from optimizer_cases import one_weight
from rules import mask_callback
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from maskpro_lightning.optim.estimators import EstimatorName
from maskpro_lightning.tracking.journal import Journal
from maskpro_lightning.tracking.runs import Run

# --- long runs ----------------------------------------------------------------------------------


def growth(steps: int) -> int:
    """What a process grows by, in bytes, from the thousandth step to the last."""
    optimizer = one_weight(nn.Parameter(oracle.random(2, 4)))
    losses = torch.rand(steps, generator=torch.Generator().manual_seed(0))
    zero, before = torch.zeros(()), 0
    for number, loss in enumerate(losses):
        optimizer.step(lambda loss=loss: loss, zero)
        if number == 1000:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


@pytest.mark.slow
def test_ten_thousand_steps_take_no_more_memory_than_one_thousand() -> None:
    # In a process of its own: threads that other tests have left would be measured, too.
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        found = process.submit(growth, 10_000).result()
    # 200 bytes a step, less than two of the smallest tensors, would be seen.
    assert found < 200 * 9_000


class Fresh(IterableDataset[Any]):
    """Batches that never come back."""

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(0)
        while True:
            rows = torch.randn(2, 8, 16, generator=generator)
            yield rows[0], rows[1]


class Objects(pl.Callback):
    """Counts Python's objects at some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.counts: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in self.steps:
            gc.collect()
            self.counts.append(len(gc.get_objects()))


@pytest.mark.slow
def test_a_fit_that_has_filled_its_caches_grows_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    callback, objects = mask_callback(baseline_cache=50), Objects(200, 2000)
    data = DataLoader(Fresh(), batch_size=None)
    fit(Net(), callback, objects, folder=tmp_path, data=data, validate=False, max_steps=2000)
    assert len(callback._baselines._losses) == 50
    before, after = objects.counts
    assert after - before < 1800 / 18  # fewer than one object in eighteen steps
    logged = [r.getMessage() for r in caplog.records if r.name.startswith("maskpro")]
    assert sum(len(message.encode()) for message in logged) <= 500  # less than a byte a step


def test_a_journal_keeps_no_more_rows_and_bytes_than_its_bound(tmp_path: Path) -> None:
    journal = Journal()
    most = 0
    for step in range(20_000):
        journal.training(step, {"loss": 1.0})
        most = max(most, len(journal._rows))
    assert most == 4096
    steps = [row["step"] for row in journal._rows]
    assert steps[0] == 0
    assert steps == sorted(steps)
    assert steps[-1] == 19_999
    (path,) = Run(journal._rows).write(tmp_path)
    longest = len("19999,1.0\r\n")
    assert 4096 / 2 * len("1,1.0\r\n") < path.stat().st_size <= (4096 + 1) * longest


# --- runs repeated ------------------------------------------------------------------------------


def run(
    folder: Path, estimator: EstimatorName, **kwargs: Any
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A run's checkpoint and its files."""
    pl.seed_everything(1, verbose=False)
    callback = mask_callback(lr=FAST, estimator=estimator, **kwargs)
    fit(
        Net(nn.Dropout(0.1)),
        callback,
        ModelCheckpoint(folder, "last", every_n_train_steps=6),
        folder=folder,
        data=loader(shuffle=True),
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=1,
        max_steps=6,
    )
    saved: dict[str, Any] = torch.load(folder / "last.ckpt", weights_only=True)
    names = ("masks.safetensors", "distributions.safetensors", "history.csv", "parameters.json")
    files = {name: (folder / "maskpro" / name).read_bytes() for name in names}
    return saved, files | {"metrics.csv": (folder / "metrics.csv").read_bytes()}


@pytest.mark.parametrize("init", ["magnitude", "sparsegpt", "random"])
@every_estimator
def test_the_same_seed_gives_the_same_bytes(
    estimator: EstimatorName, init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskpro_lightning.tracking.plots.figures", lambda run: {})
    runs = [run(tmp_path / name, estimator, init=init) for name in "ab"]
    other, _ = run(tmp_path / "c", estimator, init=init, seed=1)
    for what in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        assert identical(runs[0][0][what], runs[1][0][what]), what
    ours = [saved["callbacks"]["MaskProCallback"] for saved, _ in runs]
    assert identical(*ours)
    assert runs[0][1] == runs[1][1]
    assert not identical(other["optimizer_states"], runs[0][0]["optimizer_states"])
