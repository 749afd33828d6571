"""Validations before the first step: of the dense weights, and of the initial mask."""

from __future__ import annotations

import math
from itertools import count
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.seed import isolate_rng

from maskpro_lightning.fit.patches import Patches
from maskpro_lightning.progress import progress


def validate(trainer: Any) -> None:
    """Run a validation in the middle of an epoch, as Lightning does."""
    trainer.validating = True
    _run(trainer)


def check_sanity(trainer: Any) -> None:
    """Run a validation of the whole set that passes for Lightning's sanity check.

    So loggers get nothing of it, and checkpoints, early stopping and other callbacks that compare
    validations ignore it.
    """
    patches = Patches()
    patches.put(trainer, "num_sanity_val_steps", math.inf)
    shown = trainer.progress_bar_callback
    if shown is not None:
        # Lightning's bars cannot show a sanity check in the middle of a fit. They stay in the list,
        # as a thread of Rich may draw them at any time.
        for hook in (name for name in dir(shown) if name.startswith("on_validation_")):
            patches.put(shown, hook, lambda *args, **kwargs: None)
        patches.put(trainer, "callbacks", [*trainer.callbacks, _Progress()])
    trainer.sanity_checking = True
    try:
        _run(trainer)
    finally:
        patches.undo()


def _run(trainer: Any) -> None:
    connector, val_loop = trainer._logger_connector, trainer.fit_loop.epoch_loop.val_loop
    first_loop_iter = connector._first_loop_iter
    with isolate_rng():
        val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first_loop_iter


class _Progress(pl.Callback):
    """Shows the progress of the validation of the dense weights."""

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        total = sum(trainer.num_val_batches)
        known = math.isfinite(total)
        self._batches = progress(
            range(int(total)) if known else count(),
            "Validating the dense weights",
            int(total) if known else None,
            visible=trainer.is_global_zero,
        )

    def on_validation_batch_start(self, *args: Any) -> None:
        next(self._batches, None)

    def on_validation_end(self, *args: Any) -> None:
        del self._batches
