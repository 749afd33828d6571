"""The numbers of a run as CSV files in its folder: written when a fit ends, read for figures."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskpro_lightning.files.atomic import atomic
from maskpro_lightning.tracking.credentials import without_credentials

Row = Mapping[str, float]

HISTORY, PARAMETERS = "history.csv", "parameters.json"
#: The file of what failed loggers have missed, one JSON object a line.
UNSENT = "unsent.jsonl"
#: The name of the loss in a history, where it is the divergence from the dense outputs.
DISTILLED = "distillation_loss"
#: Parameters that become tags, by which MLflow can filter runs.
TAGGED = frozenset({"pattern", "estimator"})


@dataclass(frozen=True)
class Run:
    """The numbers of one run; those that it did not log are empty.

    Attributes:
        history: For training steps: ``step``, ``loss`` (``distillation_loss`` if masks learn from
            that) and the callback's other metrics.
        layers: By parameter name: ``entropy``, ``changed`` and ``churn``, see
            :func:`metrics.mask_metrics`.
        groups: By parameter name, a row for each bin of :func:`metrics.histograms`.
        validation: For validations under the most likely mask: ``step`` and what the module logged.
        comparison: What validations of other weights logged, by their name: "dense" and "initial"
            in every fit, and "magnitude", "wanda" and so on by ``maskpro compare``.
        title: The title of figures.
    """

    history: Sequence[Row] = ()
    layers: Mapping[str, Row] = field(default_factory=dict)
    groups: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    validation: Sequence[Row] = ()
    comparison: Mapping[str, Row] = field(default_factory=dict)
    title: str = ""

    def write(self, folder: Path) -> list[Path]:
        """Write the tables that are not empty; returns the files."""
        tables: dict[str, list[Mapping[str, Any]]] = {
            HISTORY: list(self.history),
            "layers.csv": [{"layer": name, **row} for name, row in self.layers.items()],
            "groups.csv": [
                {"layer": name, **row} for name, rows in self.groups.items() for row in rows
            ],
            "validation.csv": list(self.validation),
            "comparison.csv": [{"mask": name, **row} for name, row in self.comparison.items()],
        }
        return [_write(folder / name, rows) for name, rows in tables.items() if rows]


def folder_of(run: Path) -> Path:
    """The folder of the callback's files: ``maskpro`` in the run's folder, or this one."""
    inside = run / "maskpro"
    return inside if inside.is_dir() else run


def read_run(folder: Path) -> Run:
    """Read a run.

    Args:
        folder: Where the callback wrote its files, or the run's folder around it.

    Raises:
        ValueError: there is no run, or one of its files cannot be read.
    """
    folder = folder_of(folder)
    if not (folder / HISTORY).is_file():
        raise ValueError(
            f"{str(folder)!r} holds no {HISTORY}: give the folder of a run that has come to its "
            f"end, such as lightning_logs/version_0, or an MLflow run and its --tracking_uri."
        )
    groups: dict[str, list[Row]] = {}
    for name, row in _named(folder / "groups.csv", "layer"):
        groups.setdefault(name, []).append(row)
    return Run(
        read_rows(folder / HISTORY),
        dict(_named(folder / "layers.csv", "layer")),
        groups,
        read_rows(folder / "validation.csv"),
        dict(_named(folder / "comparison.csv", "mask")),
        title_of(parameters_of(folder), folder),
    )


def title_of(parameters: Mapping[str, Any], folder: Path) -> str:
    """The title of a run's figures: the pattern, the model, how masks were found, the run."""
    if not parameters:
        return ""
    pattern, model = parameters.get("pattern"), parameters.get("model")
    parts = ["" if pattern is None else f"{pattern} mask" + (f" of {model}" if model else "")]
    parts += [str(parameters[name]) for name in ("estimator", "init") if parameters.get(name)]
    name = folder.absolute().parent.name if folder.name == "maskpro" else folder.name
    parts.append(f"run {name[:8] if len(name) == 32 else name}")
    return " \N{MIDDLE DOT} ".join(filter(None, parts)).replace("_", " ")


def download_run(run_id: str, tracking_uri: str | None, folder: Path) -> None:
    """Download tables, parameters and result of an MLflow run, for :func:`read_run` and others.

    Raises:
        ValueError: the download failed.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri)
    try:
        for item in client.list_artifacts(run_id, "maskpro"):
            if item.path.endswith((".csv", ".json")):
                client.download_artifacts(run_id, item.path, str(folder))
    except MlflowException as error:
        where = without_credentials(f"{tracking_uri}: {error}")
        raise ValueError(f"MLflow run {run_id} could not be read from {where}") from error


def read_rows(path: Path) -> list[Row]:
    """The rows of a table of numbers; empty cells are left out of a row.

    Raises:
        ValueError: names the file and the first line that does not hold numbers.
    """
    return [row for _, row in _named(path, None)]


def parameters_of(folder: Path) -> dict[str, Any]:
    """The parameters in a run's folder; empty if there are none that can be read."""
    try:
        found = json.loads((folder / PARAMETERS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _named(path: Path, name: str | None) -> Iterable[tuple[str, Row]]:
    """The rows of a table, each with its value in the column ``name``; none without the file."""
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                label = "" if name is None else row.pop(name)
                yield label, {key: float(value) for key, value in row.items() if value}
        except (ValueError, KeyError, TypeError, AttributeError, csv.Error):
            raise ValueError(
                f"{str(path)!r} is no table of numbers at line {max(1, reader.line_num)}: write or "
                f"download it again."
            ) from None


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    with atomic(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path
