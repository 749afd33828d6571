"""Sends a run to MLflow later, from the files that it kept while the server was away."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskpro_lightning.tracking.result import read_result
from maskpro_lightning.tracking.runs import HISTORY, PARAMETERS, TAGGED, UNSENT

# The most that MLflow takes in one request, and the longest value that Lightning gives it.
_MOST_METRICS, _MOST_PARAMETERS, _LONGEST = 1000, 100, 250
_DESCRIPTION = "mlflow.note.content"


def send(
    folder: str | os.PathLike[str],
    tracking_uri: str | None = None,
    run_id: str | None = None,
    experiment: str = "maskpro",
) -> str:
    """Send a run's folder to MLflow: parameters, history, what a failed logger missed, files.

    Sending twice does no harm: numbers that the run has already are not sent again.

    Args:
        folder: The folder ``maskpro`` of the run.
        tracking_uri: MLflow's server or database; by default the one in MLflow's own settings.
        run_id: The run to complete; by default a new one.
        experiment: The experiment of a new run.

    Returns:
        The run's id.

    Raises:
        FileNotFoundError: the folder holds no files of a run.
    """
    from mlflow.tracking import MlflowClient

    folder = Path(folder)
    files = [path for path in sorted(folder.glob("*")) if not path.name.startswith(".")]
    if not files:
        raise FileNotFoundError(f"{folder} holds no files of a run: give its folder 'maskpro'.")
    client = MlflowClient(tracking_uri)
    if run_id is None:
        run_id = _new_run(client, experiment, folder.absolute().parent.name)
    _send_parameters(client, run_id, folder)
    _send_points(client, run_id, folder)
    _send_result(client, run_id, folder)
    for path in files:
        client.log_artifact(run_id, str(path), "maskpro")
    config = folder.absolute().parent / "config.yaml"
    if config.exists():
        client.log_artifact(run_id, str(config))
    client.set_terminated(run_id)
    return run_id


def _new_run(client: Any, experiment: str, name: str) -> str:
    found = client.get_experiment_by_name(experiment)
    number = found.experiment_id if found else client.create_experiment(experiment)
    return str(client.create_run(number, run_name=name).info.run_id)


def _send_result(client: Any, run_id: str, folder: Path) -> None:
    result, known = read_result(folder), client.get_run(run_id).data
    if result is None:
        return
    for name, value in result.metrics().items():
        if name not in known.metrics:
            client.log_metric(run_id, name, value, step=result.steps)
    if _DESCRIPTION not in known.tags:
        client.set_tag(run_id, _DESCRIPTION, result.markdown())


def _send_parameters(client: Any, run_id: str, folder: Path) -> None:
    from mlflow.entities import Param

    path = folder / PARAMETERS
    own = json.loads(path.read_text()) if path.exists() else {}
    for name in TAGGED & own.keys():
        client.set_tag(run_id, f"maskpro.{name}", own[name])
    parameters = {f"maskpro/{name}": value for name, value in own.items()}
    for row in _unsent(folder):
        parameters |= row.get("parameters", {})
    known = client.get_run(run_id).data.params
    missing = [Param(k, str(v)[:_LONGEST]) for k, v in parameters.items() if k not in known]
    for first in range(0, len(missing), _MOST_PARAMETERS):
        client.log_batch(run_id, params=missing[first : first + _MOST_PARAMETERS])


def _send_points(client: Any, run_id: str, folder: Path) -> None:
    from mlflow.entities import Metric

    known = {
        (name, point.step)
        for name in client.get_run(run_id).data.metrics
        for point in client.get_metric_history(run_id, name)
    }
    points = {(name, step): value for name, step, value in _points(folder)}
    when = int(folder.stat().st_mtime * 1000)
    missing = [
        Metric(name, value, when, step)
        for (name, step), value in points.items()
        if (name, step) not in known
    ]
    for first in range(0, len(missing), _MOST_METRICS):
        client.log_batch(run_id, metrics=missing[first : first + _MOST_METRICS])


def _points(folder: Path) -> Iterator[tuple[str, int, float]]:
    """Names, steps and values of all numbers in a run's folder."""
    if (folder / HISTORY).exists():
        with (folder / HISTORY).open(newline="") as file:
            for row in csv.DictReader(file):
                # The history counts steps after an update, Lightning's loggers before it.
                step = int(row.pop("step")) - 1
                yield from ((f"maskpro/{name}", step, float(v)) for name, v in row.items() if v)
    for row in _unsent(folder):
        for name, value in row.get("metrics", {}).items():
            # MLflow refuses other characters in names, and step None becomes 0, as in MLFlowLogger.
            yield re.sub(r"[^\w/. -]+", "", name, flags=re.ASCII), row["step"] or 0, value


def _unsent(folder: Path) -> list[dict[str, Any]]:
    """The rows that failed loggers have missed."""
    path = folder / UNSENT
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
