"""Silences warnings of Lightning that do not apply to masks; lets this package's own through."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_AS_IT_SHOULD_BE = (
    r"Found \d+ module\(s\) in eval mode",  # as a fit of masks recommends
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own, with newer PyTorch
)


def be_heard() -> None:
    """Let warnings of this package through, unless its own logger was set to be silent.

    ``mlflow.pytorch.autolog()`` sets the root logger, and so all loggers, to errors only.
    """
    ours = logging.getLogger("maskpro_lightning")
    if ours.level == logging.NOTSET and not ours.isEnabledFor(logging.WARNING):
        ours.setLevel(logging.WARNING)


def silence() -> None:
    """Silence warnings that do not apply, from now on."""
    for message in _AS_IT_SHOULD_BE:
        warnings.filterwarnings("ignore", message)


@contextmanager
def quiet(trainer: Any) -> Iterator[None]:
    """Within a ``with`` block, silence warnings that do not apply, and an epoch "0/-2".

    Lightning's Rich bar shows that epoch if ``max_steps`` is given instead of a number of epochs.
    """
    bar = trainer.progress_bar_callback
    describe: Any = getattr(bar, "_get_train_description", None)
    endless = trainer.max_epochs == -1 and describe is not None
    with warnings.catch_warnings():
        silence()
        if endless:
            bar._get_train_description = lambda epoch: describe(epoch).replace("/-2", "")
        try:
            yield
        finally:
            if endless:
                vars(bar).pop("_get_train_description", None)
