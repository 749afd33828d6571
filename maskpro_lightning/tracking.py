"""Numbers, files and figures for whatever loggers a Trainer has; MLflow gets the most.

Loggers are told apart by class name, since ``lightning.pytorch`` and ``pytorch_lightning`` hold
different classes of the same name.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

_log = logging.getLogger(__name__)

OnError = Literal["raise", "warn"]
_GUARDED = ("log_metrics", "log_hyperparams", "save", "after_save_checkpoint", "finalize")


class Tracking:
    """Everything that one fit sends to its loggers.

    Args:
        trainer: The trainer whose loggers are used.
        on_error: What a logger that fails does to the fit: "raise" lets the error through;
            "warn" tells it once and goes on without that logger.
    """

    def __init__(self, trainer: Any, on_error: OnError) -> None:
        self._trainer = trainer
        self._on_error = on_error
        self._broken: set[int] = set()
        if on_error == "warn":
            for logger in trainer.loggers:
                self._guard(logger)

    def parameters(self, parameters: Mapping[str, Any]) -> None:
        """Log hyperparameters under ``maskpro/``; a resumed run keeps those it has."""
        if self._trainer.is_global_zero:
            for logger in self._trainer.loggers:
                self._send(logger, self._parameters, logger, parameters)

    def metrics(self, metrics: Mapping[str, float]) -> None:
        """Log numbers at the current step."""
        for logger in self._trainer.loggers:
            if id(logger) not in self._broken:
                logger.log_metrics(dict(metrics), step=self._trainer.global_step)

    def file(self, path: Path, subfolder: str = "") -> None:
        """Hand a file to the loggers that keep files, in a folder ``maskpro``."""
        folder = f"maskpro/{subfolder}".rstrip("/")
        for logger in self._trainer.loggers:
            if type(logger).__name__ == "MLFlowLogger":
                self._send(logger, logger.experiment.log_artifact, logger.run_id, str(path), folder)

    def figure(self, path: Path, figure: Any) -> None:
        """Save a matplotlib figure and hand it to the loggers that show figures."""
        figure.savefig(path)
        self.file(path)
        for logger in self._trainer.loggers:
            if type(logger).__name__ == "TensorBoardLogger":
                figure.set_facecolor("white")  # TensorBoard drops transparency, lines turn ragged
                add, step = logger.experiment.add_figure, self._trainer.global_step
                self._send(logger, add, f"maskpro/{path.stem}", figure, step)
            elif type(logger).__name__ == "WandbLogger":
                self._send(logger, logger.log_image, f"maskpro/{path.stem}", [str(path)])

    def each(self, kind: str, call: Callable[[Any], None]) -> None:
        """Call something with every logger of a class of this name, on one rank."""
        for logger in self._trainer.loggers if self._trainer.is_global_zero else ():
            if type(logger).__name__ == kind:
                self._send(logger, call, logger)

    def resume(self) -> None:
        """Mark an MLflow run that goes on as running; MLFlowLogger leaves it finished."""
        for logger in self._trainer.loggers if self._trainer.is_global_zero else ():
            if type(logger).__name__ == "MLFlowLogger":
                self._send(
                    logger, lambda lg: lg.experiment.update_run(lg.run_id, status="RUNNING"), logger
                )

    def folder(self) -> Path:
        """Where the run keeps its files; the same for every call in a fit."""
        trainer = self._trainer
        if trainer.log_dir is not None:
            return Path(trainer.log_dir) / "maskpro"
        if trainer.logger is None or trainer.logger.name is None:
            return Path(trainer.default_root_dir) / "maskpro"
        # MLFlowLogger on a database or a server has no folder; ModelCheckpoint uses this one.
        run = (str(trainer.logger.name), str(trainer.logger.version))
        return Path(trainer.default_root_dir, *run, "maskpro")

    def _parameters(self, logger: Any, parameters: Mapping[str, Any]) -> None:
        if type(logger).__name__ == "MLFlowLogger":
            # MLflow refuses to change a parameter, and a resumed fit goes on in its run.
            known = logger.experiment.get_run(logger.run_id).data.params
            parameters = {k: v for k, v in parameters.items() if f"maskpro/{k}" not in known}
        logger.log_hyperparams({"maskpro": dict(parameters)})

    def _guard(self, logger: Any) -> None:
        for name in _GUARDED:
            method = getattr(type(logger), name, None)
            if method is not None and name not in vars(logger):
                bound = getattr(logger, name)
                send = self._finalize if name == "finalize" else self._send
                vars(logger)[name] = functools.wraps(bound)(functools.partial(send, logger, bound))

    def _finalize(self, logger: Any, finalize: Callable[..., Any], *args: Any) -> None:
        """The last call of a fit, failed or not, also gives a logger its own methods back."""
        self._send(logger, finalize, *args)
        for name in _GUARDED:
            vars(logger).pop(name, None)

    def _send(self, logger: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if id(logger) in self._broken:
            return
        try:
            call(*args, **kwargs)
        except Exception as error:
            if self._on_error == "raise":
                raise
            self._broken.add(id(logger))
            _log.warning(
                "%s failed and gets nothing more of this fit, which goes on: %s",
                type(logger).__name__,
                error,
            )
