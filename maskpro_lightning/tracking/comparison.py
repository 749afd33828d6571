"""Logs a comparison of masks to MLflow: a run for each mask, nested under one with the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from maskpro_lightning.tracking.mlflow_run import parent_run

_PREFIX = "compare"


def log_comparison(
    logger: Any, rows: Mapping[str, Mapping[str, float]], pattern: str, name: str, learned: str
) -> str:
    """Log each row as metrics ``compare/…`` of a run, so that they can be sorted and drawn.

    The parent run has the metrics of the learned mask, to sort comparisons by, and the table.

    Args:
        logger: An MLFlowLogger, whose run is that of the learned mask.
        rows: What was measured, by the mask's name.
        pattern: The pattern.
        name: The parent run's name.
        learned: The name of the learned mask, whose run is the logger's.

    Returns:
        The id of the parent run.
    """
    client, experiment = logger.experiment, logger.experiment_id
    tags = {"mlflow.runName": name, "maskpro.pattern": pattern, "maskpro.command": "compare"}
    above = parent_run()
    tags |= {} if above in (None, logger.run_id) else {"mlflow.parentRunId": above}
    tags["mlflow.note.content"] = markdown(rows)
    fit = client.get_run(logger.run_id)
    start, inputs = fit.info.start_time, fit.inputs
    parent = client.create_run(experiment, start_time=start, tags=tags).info.run_id
    _log_data(client, parent, inputs)
    for mask, numbers in rows.items():
        about = {"mlflow.parentRunId": parent, "maskpro.mask": mask, "maskpro.pattern": pattern}
        if mask == learned:
            run = logger.run_id
            for key, value in about.items():
                client.set_tag(run, key, value)
        else:
            run = client.create_run(experiment, tags={"mlflow.runName": mask, **about}).info.run_id
            _log_data(client, run, inputs)
        for key, value in numbers.items():
            client.log_metric(run, f"{_PREFIX}/{key}", value)
            if mask == learned:
                client.log_metric(parent, f"{_PREFIX}/{key}", value)
        if mask != learned:
            client.set_terminated(run)
    client.set_terminated(parent)
    return str(parent)


def _log_data(client: Any, run: str, inputs: Any) -> None:
    if inputs is not None and inputs.dataset_inputs:
        client.log_inputs(run, datasets=inputs.dataset_inputs)


def markdown(rows: Mapping[str, Mapping[str, float]]) -> str:
    """The rows as a table in Markdown."""
    names = list(next(iter(rows.values())))
    lines = [_line(["mask", *names]), _line(["---", *["---:"] * len(names)])]
    for mask, numbers in rows.items():
        lines.append(_line([mask, *(_shown(name, numbers[name]) for name in names)]))
    return "\n".join(lines)


def _shown(name: str, value: float) -> str:
    return f"{value:.2%}" if name == "sparsity" else f"{value:.4g}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
