"""What a run kept on disk while its tracker was away, sent to MLflow later."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskpro_lightning.tracking.journal import PARAMETERS
from maskpro_lightning.tracking.loggers import UNSENT
from maskpro_lightning.tracking.runs import HISTORY

# MLflow takes no more metrics in one request.
_MOST_METRICS = 1000


def send(
    folder: str | os.PathLike[str],
    tracking_uri: str | None = None,
    run_id: str | None = None,
    experiment: str = "maskpro",
) -> str:
    """Send a run's folder to MLflow: parameters, history, what a broken logger missed, files.

    Sending twice does no harm: what the run has already is left alone, files are replaced by
    themselves.

    Args:
        folder: The folder ``maskpro`` of the run.
        tracking_uri: MLflow's server or database; by default the one that MLflow is set up for.
        run_id: The run to complete; a new one by default.
        experiment: Where a new run goes.

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
    for path in files:
        client.log_artifact(run_id, str(path), "maskpro")
    client.set_terminated(run_id)
    return run_id


def _new_run(client: Any, experiment: str, name: str) -> str:
    found = client.get_experiment_by_name(experiment)
    number = found.experiment_id if found else client.create_experiment(experiment)
    return str(client.create_run(number, run_name=name).info.run_id)


def _send_parameters(client: Any, run_id: str, folder: Path) -> None:
    path = folder / PARAMETERS
    parameters = json.loads(path.read_text()) if path.exists() else {}
    known = client.get_run(run_id).data.params
    for name, value in parameters.items():
        if f"maskpro/{name}" not in known:
            client.log_param(run_id, f"maskpro/{name}", value)


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
                # Counted after the update, where Lightning logs under the number before it.
                step = int(row.pop("step")) - 1
                yield from ((f"maskpro/{name}", step, float(v)) for name, v in row.items() if v)
    if (folder / UNSENT).exists():
        for line in (folder / UNSENT).read_text().splitlines():
            row = json.loads(line)
            yield from ((name, row["step"], v) for name, v in row["metrics"].items())
