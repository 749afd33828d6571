"""A logger that cannot be opened when a fit starts, and what takes its place in that fit."""

from __future__ import annotations

import re
import shlex
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from lightning.fabric.utilities.logger import _convert_params, _flatten_dict
from lightning.pytorch.loggers.logger import DummyLogger

from maskpro_lightning.tracking.credentials import without_credentials

Row = dict[str, Any]


class StandIn(DummyLogger):
    """Keeps the numbers and parameters that a logger should have got; all else it lets pass.

    The fit's last call to it, after a success or a failure, gives its place back.

    Args:
        absent: The logger.
        trainer: The trainer that uses the logger.
        error: Why the logger could not be opened.
    """

    def __init__(self, absent: Any, trainer: Any, error: Exception) -> None:
        super().__init__()
        self.kind = type(absent).__name__
        self.error = without_credentials(str(error))
        self._absent, self._trainer = absent, trainer
        # As MLflow's, so that runs that start together have folders of their own.
        self._version = f"{_safe(getattr(absent, '_run_name', None) or 'run')}_{uuid4().hex[:8]}"
        self._keep: Callable[[Row], None] | None = None
        self._early: list[Row] = []

    def keep_by(self, keep: Callable[[Row], None]) -> None:
        """Hand over what there is to keep, so far and from now on."""
        self._keep = keep
        while self._early:
            keep(self._early.pop(0))

    def command(self, folder: Path) -> str:
        """What a user types once the server is back."""
        given = {"tracking_uri": "_tracking_uri", "experiment": "_experiment_name"}
        given |= {"run_id": "_run_id"}
        options = {name: getattr(self._absent, private, None) for name, private in given.items()}
        words = [f"--{name}={value}" for name, value in options.items() if value is not None]
        return without_credentials(shlex.join(["maskpro", "send", str(folder), *words]))

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self._take(row_of_metrics(self.kind, metrics, step))

    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *_: Any) -> None:
        self._take(row_of_parameters(self.kind, params))

    def finalize(self, status: str) -> None:
        loggers, trainer = self._trainer.loggers, self._trainer
        trainer.loggers = [self._absent if logger is self else logger for logger in loggers]

    @property
    def log_dir(self) -> str | None:
        """The run's folder, unless that is another logger's."""
        if self._trainer.logger is not self:
            return None
        return str(Path(self._trainer.default_root_dir, self.name, self.version))

    @property
    def name(self) -> str:
        return "unsent"

    @property
    def version(self) -> str:
        return self._version

    def _take(self, row: Row) -> None:
        if self._keep is None:
            self._early.append(row)
        else:
            self._keep(row)


def watch_loggers(trainer: Any) -> None:
    """For the fit that begins, let stand-ins take the places of loggers that cannot be opened.

    Lightning opens all loggers before any hook of a callback. It opens them after the strategy has
    set up its environment, from which on a rank knows that it is one; that is when they are tried.
    On other ranks than the first, loggers do nothing, and cannot fail.
    """
    strategy = trainer.strategy
    before, set_up = vars(strategy).get("setup_environment"), strategy.setup_environment

    def set_up_and_try() -> None:
        vars(strategy).pop("setup_environment")
        if before is not None:
            vars(strategy)["setup_environment"] = before
        set_up()
        trainer.loggers = [_opened(logger, trainer) for logger in trainer.loggers]

    vars(strategy)["setup_environment"] = set_up_and_try


def row_of_metrics(kind: str, metrics: Mapping[str, Any], step: int | None) -> Row:
    """Numbers that a logger did not get, for the file of what was not sent."""
    numbers = {name: float(v) for name, v in metrics.items() if not isinstance(v, str)}
    return {"logger": kind, "step": step, "metrics": numbers}


def row_of_parameters(kind: str, parameters: Mapping[str, Any] | Namespace) -> Row:
    """Parameters that a logger did not get, named as MLFlowLogger would."""
    flat = _flatten_dict(_convert_params(parameters))  # type: ignore[arg-type]
    return {"logger": kind, "parameters": {name: str(value) for name, value in flat.items()}}


def _opened(logger: Any, trainer: Any) -> Any:
    try:
        getattr(logger, "experiment", None)
    except Exception as error:  # noqa: BLE001, a tracker raises what it likes
        return StandIn(logger, trainer, error)
    return logger


def _safe(name: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", name)
