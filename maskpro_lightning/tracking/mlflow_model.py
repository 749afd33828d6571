"""Logs a sparse model to MLflow, with the metrics, the data and the run that it comes from."""

from __future__ import annotations

import re
from importlib import import_module
from inspect import signature
from typing import Any

from torch import nn

_RESULT = ("dense", "initial", "deployed", "gap_closed", "sparsity", "best_step")


def log_model(
    logger: Any,
    model: nn.Module,
    tokenizer: Any = None,
    registered_name: str | None = None,
    pattern: str | None = None,
) -> str:
    """Log a sparse model to the run of an MLFlowLogger, zeros included.

    A Hugging Face model that generates text is logged, with its tokenizer, in the flavour
    ``mlflow.transformers``. Any other model is pickled, in the flavour ``mlflow.pytorch``, and
    needs its class where it is loaded.

    The model gets the run's metrics at the step of its mask, the fit's result and the data set. A
    registered version gets the run's description, and the pattern and the share of zeros as tags.

    Args:
        logger: The logger, whose run may have ended.
        model: The model.
        tokenizer: Its tokenizer.
        registered_name: The name to register the model under; by default it is not registered.
        pattern: The pattern of its masks.

    Returns:
        The model's URI, for ``mlflow.transformers.load_model`` or ``mlflow.pytorch.load_model``.
    """
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(logger.experiment.tracking_uri)
    # MLflow refuses runs of other experiments than the active one, for which there is no getter.
    fluent: Any = import_module("mlflow.tracking.fluent")
    active = fluent._active_experiment_id
    fluent._active_experiment_id = None
    client = logger.experiment
    run = client.get_run(logger.run_id)
    tags = {} if pattern is None else {"maskpro.pattern": pattern}
    kwargs: dict[str, Any] = {
        "name": _name(run.info.run_name, type(model).__name__, pattern),
        "registered_model_name": registered_name,
        "step": int(run.data.metrics.get("maskpro/best_step", 0)),
        "tags": tags,
    }
    try:
        with mlflow.start_run(logger.run_id, nested=True, log_system_metrics=False):
            if tokenizer is not None and getattr(model, "can_generate", lambda: False)():
                parts = {"model": model, "tokenizer": tokenizer}
                # Named here, or MLflow would look for the requirements of image models, too.
                kwargs |= {"task": "text-generation", "pip_requirements": ["torch", "transformers"]}
                info = mlflow.transformers.log_model(parts, **kwargs)
            else:
                kwargs["pip_requirements"] = ["torch"]
                if "serialization_format" in signature(mlflow.pytorch.log_model).parameters:
                    # Newer versions of MLflow would trace the model, for which they need an input.
                    kwargs["serialization_format"] = "pickle"
                info = mlflow.pytorch.log_model(model, **kwargs)
    finally:
        mlflow.set_tracking_uri(before)
        fluent._active_experiment_id = active
    _log_numbers(client, run, info.model_id, kwargs["step"])
    if registered_name is not None:
        _describe(client, run, registered_name, info.registered_model_version, tags)
    return str(info.model_uri)


def _name(run: str | None, kind: str, pattern: str | None) -> str:
    """A name that tells models apart in a list; MLflow takes no colons, slashes and dots."""
    parts = [run or kind, "sparse" if pattern is None else f"sparse-{pattern}"]
    return re.sub(r"[^\w-]+", "-", "-".join(parts)).strip("-")


def _log_numbers(client: Any, run: Any, model_id: str, best: int) -> None:
    """Give the model the fit's result, and each metric's last value until its mask's step.

    MLflow itself gives it metrics of exactly that step. Lightning counts the step of a validation
    from zero, so validations are not among them.
    """
    from mlflow.entities import Metric

    inputs = run.inputs.dataset_inputs if run.inputs is not None else []
    data: dict[str, Any] = {}
    if inputs:
        data = {"dataset_name": inputs[0].dataset.name, "dataset_digest": inputs[0].dataset.digest}
    found = []
    for name in run.data.metrics:
        result = name.removeprefix("maskpro/") in _RESULT
        if not result and name.startswith(("maskpro/", "compare/", "system/")):
            continue
        points = client.get_metric_history(run.info.run_id, name)
        point = max((p for p in points if result or p.step <= best), key=_when, default=None)
        if point is not None and point.step != best:  # else MLflow has given it
            values = name, point.value, point.timestamp, point.step
            found.append(Metric(*values, model_id=model_id, run_id=run.info.run_id, **data))
    if found:
        client.log_batch(run.info.run_id, metrics=found)


def _when(point: Any) -> tuple[int, int]:
    return point.step, point.timestamp


def _describe(client: Any, run: Any, name: str, version: Any, tags: dict[str, str]) -> None:
    note = run.data.tags.get("mlflow.note.content", f"Logged by run {run.info.run_name}.")
    client.update_model_version(name, str(version), description=note)
    zeros = run.data.metrics.get("maskpro/sparsity")
    shown = tags | ({} if zeros is None else {"maskpro.sparsity": f"{zeros:.2%}"})
    for key, value in shown.items():
        client.set_model_version_tag(name, str(version), key, value)
