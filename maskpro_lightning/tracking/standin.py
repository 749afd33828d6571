"""Replaces, for one fit, a logger that cannot be opened when the fit starts."""

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
    """Keeps the numbers and parameters for a logger that is absent, and ignores all else.

    ``finalize``, the fit's last call, puts the logger back into its place.

    Args:
        absent: The logger.
        trainer: The trainer that uses the logger.
        error: The error that opening it raised.
    """

    def __init__(self, absent: Any, trainer: Any, error: Exception) -> None:
        super().__init__()
        self.kind = type(absent).__name__
        self.error = without_credentials(str(error))
        self._absent, self._trainer = absent, trainer
        # Unique, so that runs that start at the same time have folders of their own.
        self._version = f"{_safe(getattr(absent, '_run_name', None) or 'run')}_{uuid4().hex[:8]}"
        self._keep: Callable[[Row], None] | None = None
        self._early: list[Row] = []

    def keep_by(self, keep: Callable[[Row], None]) -> None:
        """Hand over all rows to ``keep``: those so far, and those that come."""
        self._keep = keep
        while self._early:
            keep(self._early.pop(0))

    def command(self, folder: Path) -> str:
        """The command for the user once the server is back."""
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
    """For the fit that begins, replace loggers that cannot be opened by stand-ins.

    Lightning opens loggers before any hook of a callback, but after the strategy has set up its
    environment. So they are tried at the end of that method, when a rank knows its number. On ranks
    other than 0, loggers do nothing and cannot fail.
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
    """Numbers that a logger did not get, as a row of the file :data:`UNSENT`."""
    numbers = {name: float(v) for name, v in metrics.items() if not isinstance(v, str)}
    return {"logger": kind, "step": step, "metrics": numbers}


def row_of_parameters(kind: str, parameters: Mapping[str, Any] | Namespace) -> Row:
    """Parameters that a logger did not get, named as MLFlowLogger names them."""
    flat = _flatten_dict(_convert_params(parameters))  # type: ignore[arg-type]
    return {"logger": kind, "parameters": {name: str(value) for name, value in flat.items()}}


def _opened(logger: Any, trainer: Any) -> Any:
    try:
        getattr(logger, "experiment", None)
    except Exception as error:  # noqa: BLE001, a tracker may raise anything
        return StandIn(logger, trainer, error)
    return logger


def _safe(name: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", name)
