"""A model dense, under one-shot masks, under the learned one, and trained on, in one table."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from rich.table import Table
from torch import nn

from maskpro_lightning.fit.callback import MaskProCallback
from maskpro_lightning.fit.distillation import Distillation, dense_part
from maskpro_lightning.fit.finetuning import SparseFinetuning
from maskpro_lightning.fit.traceless import traceless
from maskpro_lightning.initial import calibration
from maskpro_lightning.optim.optimizer import MaskPro
from maskpro_lightning.progress import progress
from maskpro_lightning.weights.targets import Target, find_targets, parameter_groups


@dataclass(frozen=True)
class Row:
    """One way to mask a model.

    Attributes:
        mask: The method's name.
        metrics: What validation logged.
        sparsity: Share of zeros among the masked weights, in [0, 1].
        seconds: Time to find the mask.
    """

    mask: str
    metrics: dict[str, float]
    sparsity: float
    seconds: float


def compare(
    trainer: Any,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    methods: Sequence[calibration.Method] = ("magnitude", "wanda", "sparsegpt"),
) -> list[Row]:
    """Validate the dense model, one-shot masks, then fit and validate what the fit has found.

    :class:`SparseFinetuning` of a sparse model adds a row of that model. Dense and one-shot rows
    come from the dense weights that it learns from; without them there are none.

    Args:
        trainer: A trainer on one device with one :class:`MaskProCallback` or
            :class:`SparseFinetuning`, whose pattern, choice of layers and calibration batches hold
            for all rows. Its fit is run once.
        module: The model; holds what the fit has found afterwards.
        data: The data; the calibration uses its training batches.
        methods: One-shot masks to compare with, see :func:`calibration.initial_masks`.

    Raises:
        ValueError: the trainer has no callback, or more than one device.
    """
    callback = masked_by(trainer)
    if trainer.world_size > 1:
        raise ValueError(f"A comparison runs on one device, not {trainer.world_size}.")
    targets = find_targets(module, callback.pattern, callback.include, callback.exclude)
    given = trainer, module, data, targets
    rows: list[Row] = []
    if isinstance(callback, MaskProCallback) or callback.init != "nonzeros":
        rows += _one_shot(callback, methods, *given)
    else:
        if callback.distillation is not None:
            with _dense(callback, callback.distillation, module):
                rows += _one_shot(callback, methods, *given)
        rows.append(_row("sparse", *given, seconds=0))
    start = time.perf_counter()
    trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - start
    rows.append(_row(row_of(callback), *given, seconds))
    return rows


def row_of(callback: MaskProCallback | SparseFinetuning) -> str:
    """The name of the row that a fit makes."""
    return "maskpro" if isinstance(callback, MaskProCallback) else "finetuned"


@contextmanager
def _dense(
    callback: SparseFinetuning, distillation: Distillation, module: nn.Module
) -> Iterator[None]:
    """Let a sparse module hold the dense weights that it will learn from."""
    part = distillation.part_of(module)
    sparse = {name: value.clone() for name, value in part.state_dict().items()}
    part.load_state_dict(dense_part(distillation, module, callback.dense).state_dict())
    try:
        yield
    finally:
        part.load_state_dict(sparse)


def _one_shot(
    callback: MaskProCallback | SparseFinetuning,
    methods: Sequence[calibration.Method],
    trainer: Any,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    targets: Sequence[Target],
) -> list[Row]:
    """The module as it is, and under the mask of each method."""
    rows = [_row("dense", trainer, module, data, targets, seconds=0)]
    for method in methods:
        start = time.perf_counter()
        optimizer = MaskPro(parameter_groups(targets), callback.pattern)
        module.to(trainer.strategy.root_device)
        optimizer.begin(
            calibration.initial_masks(
                method,
                targets,
                callback.pattern,
                seed=getattr(callback, "seed", 0),
                batches=partial(_calibrate, trainer, module, data, callback.calibration_batches),
            )
        )
        with optimizer.applied("initial"):
            seconds = time.perf_counter() - start
            rows.append(_row(method, trainer, module, data, targets, seconds))
        optimizer.write("dense")
    return rows


def masked_by(trainer: Any) -> MaskProCallback | SparseFinetuning:
    """The one callback of a trainer that learns masks, or trains under them.

    Raises:
        ValueError: there is none, or more than one.
    """
    kinds = MaskProCallback, SparseFinetuning
    callbacks: list[Any] = [c for c in trainer.callbacks if isinstance(c, kinds)]
    if len(callbacks) != 1:
        raise ValueError(
            f"The Trainer needs one MaskProCallback or SparseFinetuning, but has {len(callbacks)}."
        )
    found: MaskProCallback | SparseFinetuning = callbacks[0]
    return found


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows for a terminal."""
    found = Table(title=title)
    found.add_column("mask")
    names = list(rows[0].metrics)
    for name in (*names, "zeros", "seconds"):
        found.add_column(name, justify="right")
    for row in rows:
        best = row is rows[-1]
        found.add_row(
            row.mask,
            *(f"{row.metrics[name]:.4g}" for name in names),
            f"{row.sparsity:.2%}",
            f"{row.seconds:.1f}",
            style="bold" if best else None,
        )
    return found


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """The rows as a CSV file, in a folder that is made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["mask", *rows[0].metrics, "sparsity", "seconds"])
        for row in rows:
            writer.writerow([row.mask, *row.metrics.values(), row.sparsity, row.seconds])


def _row(
    mask: str,
    trainer: Any,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    targets: Sequence[Target],
    seconds: float,
) -> Row:
    # These numbers are no part of the fit's curve; and a callback that saves checkpoints would
    # settle on a folder while there is no logger to name it.
    loggers, callbacks = trainer.loggers, trainer.callbacks
    trainer.loggers = []
    trainer.callbacks = [each for each in callbacks if not isinstance(each, Checkpoint)]
    try:
        (metrics,) = trainer.validate(module, datamodule=data, verbose=False)
    finally:
        trainer.loggers, trainer.callbacks = loggers, callbacks
    zeros = sum(int((target.parameter == 0).sum()) for target in targets)
    weights = sum(target.parameter.numel() for target in targets)
    return Row(mask, dict(metrics), zeros / weights, seconds)


def _calibrate(
    trainer: Any, module: pl.LightningModule, data: pl.LightningDataModule, count: int
) -> Iterator[Callable[[], None]]:
    def run(batch: Any, number: int) -> None:
        with traceless(trainer, module):
            module.training_step(batch, number)

    batches = islice(data.train_dataloader(), count)
    for number, batch in enumerate(progress(batches, "Calibrating", count)):
        yield partial(run, trainer.strategy.batch_to_device(batch), number)
