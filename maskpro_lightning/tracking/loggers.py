"""Sends numbers, files and figures to the loggers of a Trainer; MLflow gets the most.

Loggers are recognized by class name, since ``lightning.pytorch`` and ``pytorch_lightning`` have
different classes of the same name.
"""

from __future__ import annotations

import functools
import json
import logging
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from maskpro_lightning.tracking.credentials import without_credentials
from maskpro_lightning.tracking.runs import UNSENT
from maskpro_lightning.tracking.standin import Row, StandIn, row_of_metrics, row_of_parameters

_log = logging.getLogger(__name__)

OnError = Literal["raise", "warn"]
_GUARDED = ("log_metrics", "log_hyperparams", "save", "after_save_checkpoint", "finalize")


class Tracking:
    """Everything that one fit sends to its loggers.

    Args:
        trainer: The trainer whose loggers are used.
        on_error: What happens if a logger fails. "raise" raises its error. "warn" warns once, goes
            on without the logger and keeps its numbers and parameters in the run's folder. The same
            holds for the folder itself, whose disk may be full.
    """

    def __init__(self, trainer: Any, on_error: OnError) -> None:
        self._trainer = trainer
        self._on_error = on_error
        self._broken: set[int] = set()
        self._folder: Path | None = None
        if on_error == "warn":
            for logger in trainer.loggers:
                if not isinstance(logger, StandIn):
                    self._guard(logger)

    def circumstances(self) -> dict[str, Any]:
        """Parameters of a fit from its trainer: the model, and how it is trained."""
        trainer, module = self._trainer, self._trainer.lightning_module
        return {
            "model": str(module.hparams.get("model") or type(module).__name__),
            "steps": trainer.estimated_stepping_batches,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "precision": str(trainer.precision),
            "strategy": type(trainer.strategy).__name__,
            "ranks": trainer.world_size,
        }

    def parameters(self, parameters: Mapping[str, Any]) -> None:
        """Log hyperparameters under ``maskpro/``; a resumed run keeps those that it has."""
        if self._trainer.is_global_zero:
            for logger in self._trainer.loggers:
                self._send(logger, self._parameters, logger, parameters)

    def metrics(self, metrics: Mapping[str, float]) -> None:
        """Log numbers at the current step."""
        for logger in self._trainer.loggers:
            logger.log_metrics(dict(metrics), step=self._trainer.global_step)

    def write(self, path: Path, write: Callable[[], Any]) -> bool:
        """Write a file of the run by calling ``write``; returns whether that worked."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write()
        except Exception as error:  # noqa: BLE001, _fail warns or raises it
            self._fail(path.parent, f"{path} could not be written, and the fit goes on", error)
            return False
        return True

    def file(self, path: Path, subfolder: str = "") -> None:
        """Hand a file to MLflow, in a folder ``maskpro``."""
        folder = f"maskpro/{subfolder}".rstrip("/")
        for logger in self._trainer.loggers:
            if type(logger).__name__ == "MLFlowLogger":
                self._send(logger, _log_artifact, logger, path, folder)

    def figure(self, path: Path, figure: Any) -> None:
        """Save a matplotlib figure and hand it to the loggers that show figures."""
        figure.savefig(path)
        self.file(path)
        for logger in self._trainer.loggers:
            if type(logger).__name__ == "TensorBoardLogger":
                figure.set_facecolor("white")  # TensorBoard drops transparency, lines turn ragged
                add, step = logger.experiment.add_figure, self._trainer.global_step
                self._send(logger, add, f"maskpro/figures/{path.stem}", figure, step)
            elif type(logger).__name__ == "WandbLogger":
                self._send(logger, logger.log_image, f"maskpro/figures/{path.stem}", [str(path)])

    def describe(self, text: str) -> None:
        """Give MLflow's run a description in Markdown."""
        self.each(
            "MLFlowLogger", lambda lg: lg.experiment.set_tag(lg.run_id, "mlflow.note.content", text)
        )

    def each(self, kind: str, call: Callable[[Any], None]) -> None:
        """On rank 0, call ``call`` with every logger whose class has the name ``kind``."""
        for logger in self._trainer.loggers if self._trainer.is_global_zero else ():
            if type(logger).__name__ == kind:
                self._send(logger, call, logger)

    def resume(self) -> None:
        """Mark the MLflow run of a resumed fit as running, which MLFlowLogger does not do."""
        self.each("MLFlowLogger", lambda lg: lg.experiment.update_run(lg.run_id, status="RUNNING"))

    def folder(self) -> Path:
        """The folder of the run's files, the same throughout a fit; a collective."""
        if self._folder is None:
            self._folder = self._find_folder()
            for logger in self._trainer.loggers:
                if isinstance(logger, StandIn):
                    self._tell_of(logger, self._folder)
        return self._folder

    def _find_folder(self) -> Path:
        trainer = self._trainer
        if trainer.log_dir is not None:
            return Path(trainer.log_dir) / "maskpro"
        if trainer.logger is None or trainer.logger.name is None:
            return Path(trainer.default_root_dir) / "maskpro"
        # MLFlowLogger on a database or a server has no folder; ModelCheckpoint uses this one.
        run = (str(trainer.logger.name), str(trainer.logger.version))
        return Path(trainer.default_root_dir, *run, "maskpro")

    def _tell_of(self, stand_in: StandIn, folder: Path) -> None:
        _log.warning(
            "%s could not be opened, and the fit goes on without it: %s. To send MLflow later what "
            "is missing: %s",
            *(stand_in.kind, stand_in.error, stand_in.command(folder)),
        )
        stand_in.keep_by(self._keep)

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
                special: dict[str, Callable[..., Any]] = {
                    "finalize": self._finalize,
                    "log_metrics": self._metrics,
                    "log_hyperparams": self._hyperparameters,
                }
                send = special.get(name, self._send)
                vars(logger)[name] = functools.wraps(bound)(functools.partial(send, logger, bound))

    def _finalize(self, logger: Any, finalize: Callable[..., Any], *args: Any) -> None:
        """Finalize a logger, which ends the fit, and give it back its own methods."""
        self._send(logger, finalize, *args)
        for name in _GUARDED:
            vars(logger).pop(name, None)

    def _metrics(
        self,
        logger: Any,
        log_metrics: Callable[..., Any],
        metrics: Mapping[str, Any],
        step: int | None = None,
    ) -> None:
        """Log numbers, or keep them on disk if the logger fails."""
        if not self._send(logger, log_metrics, metrics, step=step):
            self._keep(row_of_metrics(type(logger).__name__, metrics, step))

    def _hyperparameters(
        self, logger: Any, log_hyperparams: Callable[..., Any], params: Any, *args: Any
    ) -> None:
        """Log hyperparameters that say something, or keep them on disk if the logger fails."""
        params = _telling(params)
        if not self._send(logger, log_hyperparams, params, *args):
            self._keep(row_of_parameters(type(logger).__name__, params))

    def _keep(self, row: Row) -> None:
        if self._folder is None or not self._trainer.is_global_zero:
            return
        path = self._folder / UNSENT

        def append() -> None:
            with path.open("a") as file:
                file.write(without_credentials(json.dumps(row)) + "\n")

        self.write(path, append)

    def _send(self, logger: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
        """Call a logger unless it has failed before; returns whether that worked."""
        if id(logger) in self._broken:
            return False
        try:
            call(*args, **kwargs)
        except Exception as error:  # noqa: BLE001, _fail warns or raises it
            what = f"{type(logger).__name__} failed and gets nothing more of this fit"
            self._fail(logger, f"{what}, which goes on", error)
            return False
        return True

    def _fail(self, culprit: Any, what: str, error: Exception) -> None:
        """Raise a failure, or warn of it, once for each logger and for the folder."""
        if self._on_error == "raise":
            raise error
        key = hash(culprit) if isinstance(culprit, Path) else id(culprit)
        if key not in self._broken:
            self._broken.add(key)
            _log.warning("%s: %s", what, without_credentials(str(error)))


def _telling(params: Any) -> Any:
    """Parameters without those that are None, and without LightningCLI's own."""
    given = vars(params) if isinstance(params, Namespace) else params
    if not isinstance(given, Mapping):
        return params
    return {k: v for k, v in given.items() if v is not None and k != "_instantiator"}


def _log_artifact(logger: Any, path: Path, folder: str) -> None:
    logger.experiment.log_artifact(logger.run_id, str(path), folder)
