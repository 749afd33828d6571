"""What an MLflow run gets beside numbers and files: its place, its data, and its model."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from importlib import import_module
from inspect import signature
from typing import Any

from torch import nn

from maskpro_lightning.tracking.loggers import Tracking

_log = logging.getLogger(__name__)

#: The environment variable that names the run under which the runs of a sweep are shown.
PARENT = "MLFLOW_PARENT_RUN_ID"


class MLflowRun:
    """The part of a fit that only MLflow understands; without its logger, nothing happens.

    - The run is nested under the active MLflow run, or that of ``MLFLOW_PARENT_RUN_ID``.
    - The data set is logged, if the trainer's datamodule has a ``provenance()`` that returns name,
      digest, source_type and source, see :class:`mlflow.entities.Dataset`.
    - The machine's use is logged where MLflow is told to: ``MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING``.

    Args:
        trainer: The trainer.
        tracking: Guards against a server that fails.
    """

    def __init__(self, trainer: Any, tracking: Tracking) -> None:
        self._data: Any = getattr(trainer, "datamodule", None)
        self._tracking = tracking
        self._monitors: list[Any] = []

    def begin(self, tags: Mapping[str, str]) -> None:
        """Log tags and data, and start watching the machine."""
        self._tracking.each("MLFlowLogger", lambda logger: self._tag(logger, tags))
        if hasattr(self._data, "provenance"):
            self._tracking.each("MLFlowLogger", self._log_data)
        self._tracking.each("MLFlowLogger", self._watch)

    def end(self) -> None:
        """Stop watching the machine."""
        while self._monitors:
            self._monitors.pop().finish()

    def _tag(self, logger: Any, tags: Mapping[str, str]) -> None:
        for name, value in tags.items():
            logger.experiment.set_tag(logger.run_id, name, value)
        parent = _parent()
        if parent not in (None, logger.run_id):
            logger.experiment.set_tag(logger.run_id, "mlflow.parentRunId", parent)

    def _log_data(self, logger: Any) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        tags = [InputTag("mlflow.data.context", "training")]
        logged = DatasetInput(Dataset(**self._data.provenance()), tags)
        logger.experiment.log_inputs(logger.run_id, datasets=[logged])

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
                tracking_uri=logger._tracking_uri,
            )
        except ModuleNotFoundError as error:  # MLflow itself does not ask for psutil
            _log.warning("The run goes on without system metrics: pip install %s.", error.name)
            return
        monitor.start()
        self._monitors.append(monitor)


def log_model(
    logger: Any, model: nn.Module, tokenizer: Any = None, registered_name: str | None = None
) -> str:
    """Log a sparse model to the run of an MLFlowLogger, zeros included.

    A Hugging Face model that generates text, with its tokenizer, is of the flavour
    ``mlflow.transformers``; anything else is pickled, of the flavour ``mlflow.pytorch``, and needs
    its class where it is loaded.

    Args:
        logger: The logger, whose run may have ended.
        model: The model.
        tokenizer: Its tokenizer.
        registered_name: Name under which the model is also registered.

    Returns:
        The model's URI, for ``mlflow.transformers.load_model`` or ``mlflow.pytorch.load_model``.
    """
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(logger._tracking_uri)
    # MLflow starts no run of another experiment than the active one, for which there is no getter.
    fluent: Any = import_module("mlflow.tracking.fluent")
    active = fluent._active_experiment_id
    fluent._active_experiment_id = None
    kwargs: dict[str, Any] = {"name": "sparse", "registered_model_name": registered_name}
    try:
        with mlflow.start_run(logger.run_id, nested=True, log_system_metrics=False):
            if tokenizer is not None and getattr(model, "can_generate", lambda: False)():
                parts = {"model": model, "tokenizer": tokenizer}
                # Named, since MLflow would else look for what image models need.
                kwargs |= {"task": "text-generation", "pip_requirements": ["torch", "transformers"]}
                info = mlflow.transformers.log_model(parts, **kwargs)
            else:
                kwargs["pip_requirements"] = ["torch"]
                if "serialization_format" in signature(mlflow.pytorch.log_model).parameters:
                    # Newer MLflows would trace the model, which takes an example of its input.
                    kwargs["serialization_format"] = "pickle"
                info = mlflow.pytorch.log_model(model, **kwargs)
    finally:
        mlflow.set_tracking_uri(before)
        fluent._active_experiment_id = active
    return str(info.model_uri)


def _parent() -> str | None:
    if parent := os.environ.get(PARENT):
        return parent
    import mlflow

    active = mlflow.active_run()
    return None if active is None else str(active.info.run_id)
