"""Leaves out of a fit the Trainer's other callbacks that would change the weights."""

from __future__ import annotations

import logging
from typing import Any

from maskpro_lightning.fit.patches import Patches

_log = logging.getLogger(__name__)

# Lightning's classes and what they would do. By name, since ``lightning.pytorch`` and
# ``pytorch_lightning`` have different classes of one name.
_RIVALS = {
    "WeightAveraging": "averages weights, and an average of masks is no mask",
    "StochasticWeightAveraging": "averages weights, and an average of masks is no mask",
    "ModelPruning": "prunes weights in its own way",
    "BaseFinetuning": "freezes and unfreezes weights, which all stay as they are",
    "LearningRateFinder": "looks for a learning rate of weights",
}
# What mlflow.pytorch.autolog() adds to a Trainer.
_AUTOLOG = "__MlflowPLCallback"


def leave_out_rivals(trainer: Any, patches: Patches) -> None:
    """Leave callbacks that work against masks out of a fit, with a warning for each.

    So is MLflow's autologging if an MLFlowLogger logs the same numbers; without a warning if both
    log to the same run.
    """
    loggers = [each for each in trainer.loggers if type(each).__name__ == "MLFlowLogger"]
    kept = []
    for callback in trainer.callbacks:
        kinds = [kind.__name__ for kind in type(callback).__mro__]
        told = None
        if reason := next((_RIVALS[kind] for kind in kinds if kind in _RIVALS), None):
            told = (
                f"{kinds[0]} is left out of this fit: it {reason}. Use it in the training that "
                f"follows."
            )
        elif loggers and _AUTOLOG in kinds:
            told = (
                "mlflow.pytorch.autolog() logs nothing of this fit, of which MLFlowLogger gets "
                "every number: leave one of them out, or give the logger autolog's run (run_id)."
            )
            if _active_run() in [logger._run_id for logger in loggers]:
                told = ""
        if told is None:
            kept.append(callback)
        else:
            if told:
                _log.warning(told)
            # A trainer that is setting up callbacks goes on with the old list.
            patches.put(callback, "setup", lambda *args, **kwargs: None)
    patches.put(trainer, "callbacks", kept)


def _active_run() -> str | None:
    """The run that autologging writes to."""
    import mlflow

    run = mlflow.active_run()
    return None if run is None else str(run.info.run_id)
