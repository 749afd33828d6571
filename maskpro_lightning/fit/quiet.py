"""What Lightning says in every fit of masks, though it is as it should be: left unsaid.

And what this package says, should others have silenced everybody.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_AS_IT_SHOULD_BE = (
    r"Found \d+ module\(s\) in eval mode",  # what is frozen is not trained
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own, with newer PyTorch
)


def be_heard() -> None:
    """Let warnings of this package through, unless its own logger was told to be silent.

    ``mlflow.pytorch.autolog()`` lets the root logger, and so everybody's, tell errors alone.
    """
    ours = logging.getLogger("maskpro_lightning")
    if ours.level == logging.NOTSET and not ours.isEnabledFor(logging.WARNING):
        ours.setLevel(logging.WARNING)


def silence() -> None:
    """Silence warnings that tell nothing, for good."""
    for message in _AS_IT_SHOULD_BE:
        warnings.filterwarnings("ignore", message)


@contextmanager
def quiet(trainer: Any) -> Iterator[None]:
    """For the length of a fit, silence warnings that tell nothing, and an epoch "0/-2".

    Rich's bar shows that where ``max_steps`` is given, and therefore no number of epochs.
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
