"""What an MLflow run gets beside numbers and files: its parent, its data set, its final status."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

from maskpro_lightning.tracking.loggers import Tracking

_log = logging.getLogger(__name__)

#: The environment variable that names the run under which the runs of a sweep are shown.
PARENT = "MLFLOW_PARENT_RUN_ID"
# The tag by which MLflow 3 chooses an experiment's pages.
_KIND = "mlflow.experimentKind"
# Seconds to wait for a server to record a failure.
_PATIENCE = 10.0


class MLflowRun:
    """The MLflow run of a fit; without an MLFlowLogger, nothing happens.

    - The run is nested under the active MLflow run, or that of ``MLFLOW_PARENT_RUN_ID``.
    - The data set is logged, if the trainer's datamodule has a ``provenance()`` that returns name,
      digest, source_type and source, see :class:`mlflow.entities.Dataset`.
    - MLflow's pages show the experiment as one that trains models, not as generative AI.
    - The run ends as failed if Lightning kills this process since another rank has died, or if
      another rank ends with an error.
    - System metrics are logged if ``MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING`` is set.

    Args:
        trainer: The trainer.
        tracking: Handles a server that fails.
    """

    def __init__(self, trainer: Any, tracking: Tracking) -> None:
        self._data: Any = getattr(trainer, "datamodule", None)
        self._strategy: Any = trainer.strategy
        self._logs: bool = trainer.is_global_zero
        self._tracking = tracking
        self._monitors: list[Any] = []
        self._observers: list[threading.Thread] = []
        self._runs: list[tuple[str, str]] = []

    def begin(self, tags: Mapping[str, str]) -> None:
        """Log tags and data, and start to log system metrics; a collective."""
        self._tracking.each("MLFlowLogger", lambda logger: self._tag(logger, tags))
        if hasattr(self._data, "provenance"):
            self._tracking.each("MLFlowLogger", self._log_data)
        self._tracking.each("MLFlowLogger", self._watch)
        self._tracking.each("MLFlowLogger", self._observe)
        self._tracking.each("MLFlowLogger", self._remember)
        self._runs = self._strategy.broadcast(self._runs)

    def fail(self) -> None:
        """End the runs as failed, from ranks that do not log: the one that does may be dead."""
        for uri, run_id in () if self._logs else self._runs:
            _end_as_failed(partial(_client, uri), run_id)

    def end(self) -> None:
        """Stop watching the system and the ranks."""
        while self._monitors:
            self._monitors.pop().finish()
        while self._observers:
            vars(self._observers.pop()).pop("_terminate_all", None)

    def _tag(self, logger: Any, tags: Mapping[str, str]) -> None:
        for name, value in tags.items():
            logger.experiment.set_tag(logger.run_id, name, value)
        client, number = logger.experiment, logger.experiment_id
        if _KIND not in client.get_experiment(number).tags:
            client.set_experiment_tag(number, _KIND, "custom_model_development")
        parent = parent_run()
        if parent not in (None, logger.run_id):
            logger.experiment.set_tag(logger.run_id, "mlflow.parentRunId", parent)

    def _log_data(self, logger: Any) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        tags = [InputTag("mlflow.data.context", "training")]
        logged = DatasetInput(Dataset(**self._data.provenance()), tags)
        logger.experiment.log_inputs(logger.run_id, datasets=[logged])

    def _remember(self, logger: Any) -> None:
        self._runs.append((logger.experiment.tracking_uri, logger.run_id))

    def _observe(self, logger: Any) -> None:
        """Let Lightning's thread end the run as failed before it kills this process by SIGKILL."""
        for thread in threading.enumerate():
            kill = getattr(thread, "_terminate_all", None)
            if thread.name == "child-process-observer" and kill is not None:
                vars(thread)["_terminate_all"] = partial(_fail_and, kill, logger)
                self._observers.append(thread)

    def _watch(self, logger: Any) -> None:
        settings: Any = import_module("mlflow.environment_variables")
        if not settings.MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get():
            return
        samples = settings.MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING.get() or 1
        try:
            system: Any = import_module("mlflow.system_metrics.system_metrics_monitor")
            monitor = system.SystemMetricsMonitor(
                logger.run_id,
                sampling_interval=settings.MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or 10,
                samples_before_logging=samples,
                tracking_uri=logger.experiment.tracking_uri,
            )
        except ModuleNotFoundError as error:  # MLflow itself does not ask for psutil
            _log.warning("The run goes on without system metrics: pip install %s.", error.name)
            return
        monitor.start()
        self._monitors.append(monitor)


def parent_run() -> str | None:
    """The id of the run to nest new runs under, or None."""
    if parent := os.environ.get(PARENT):
        return parent
    import mlflow

    active = mlflow.active_run()
    return None if active is None else str(active.info.run_id)


def _fail_and(kill: Callable[[], None], logger: Any) -> None:
    """End a run as failed and go on to kill."""
    _end_as_failed(lambda: logger.experiment, logger.run_id)
    kill()


def _end_as_failed(client: Callable[[], Any], run_id: str) -> None:
    """End a run as failed; waits no longer than ``_PATIENCE`` for the server."""
    end = threading.Thread(target=lambda: client().set_terminated(run_id, "FAILED"), daemon=True)
    end.start()
    end.join(_PATIENCE)


def _client(tracking_uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri)
