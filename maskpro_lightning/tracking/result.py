"""The result of a fit in a few numbers: for a terminal, a notebook, a tracker and a model card."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from maskpro_lightning.files.atomic import write_text

if TYPE_CHECKING:
    from rich.console import Group

#: The file of a result in a run's folder.
RESULT = "result.json"
_GAP = "share of the gap closed"


@dataclass(frozen=True)
class Result:
    """The result of a fit; values that were not measured are None.

    Attributes:
        pattern: The pattern, such as "2:4".
        metric: The metric that masks are compared by, such as "val_loss".
        mode: "min" if a lower value of the metric is better, "max" if a higher one is.
        dense: The metric's value with the dense weights.
        initial: The metric's value under the initial mask.
        deployed: The metric's value under the deployed mask.
        sparsity: Share of zeros among the masked weights, in [0, 1].
        masked_weights: Number of masked weights.
        changed: Share of groups whose deployed mask is not the initial one, in [0, 1].
        steps: The number of steps of the fit.
        best_step: The step of the deployed mask.
        seconds: The time that the fit took.
        folder: The folder of the run's files, if it keeps any.
        to_do: A line of code that exports the model; None where that is told elsewhere.
    """

    pattern: str
    metric: str
    dense: float | None
    initial: float | None
    deployed: float | None
    sparsity: float
    masked_weights: int
    changed: float
    steps: int
    best_step: int
    seconds: float
    folder: str | None = None
    to_do: str | None = None
    mode: Literal["min", "max"] = "min"

    @property
    def gap_closed(self) -> float | None:
        """The share of the gap that learning has closed: (initial - deployed) / (initial - dense).

        1 is as good as the dense weights, 0 as the initial mask, below 0 worse than that. None if a
        value was not measured, or if the dense weights are not better than the initial mask.
        """
        if (found := self._measured) is None:
            return None
        dense, initial, deployed = found
        gap = initial - dense if self.mode == "min" else dense - initial
        return (initial - deployed) / (initial - dense) if gap > 0 else None

    @property
    def _measured(self) -> tuple[float, float, float] | None:
        """The dense, the initial and the deployed value, if all are numbers."""
        values = [
            value
            for value in (self.dense, self.initial, self.deployed)
            if value is not None and math.isfinite(value)
        ]
        return (values[0], values[1], values[2]) if len(values) == 3 else None

    def metrics(self) -> dict[str, float]:
        """The numbers as metrics ``maskpro/…``, by which runs can be sorted."""
        found = {
            "dense": self.dense,
            "initial": self.initial,
            "deployed": self.deployed,
            "gap_closed": self.gap_closed,
            "sparsity": self.sparsity,
            "best_step": float(self.best_step),
        }
        return {f"maskpro/{name}": value for name, value in found.items() if value is not None}

    def rows(self) -> list[tuple[str, str]]:
        """Names and values of the table that is shown."""
        closed = "unknown" if self.gap_closed is None else f"{self.gap_closed:.0%}"
        if self.gap_closed is not None and self.gap_closed > 1:
            closed = "all of it: better than the dense weights"
        elif self.gap_closed is None and self._measured is not None:
            which = "lower" if self.mode == "min" else "higher"
            closed = (
                f"none: the dense weights are not better than the initial mask (by monitor_mode "
                f"{which} is better)"
            )
        return [
            (f"{self.metric}, dense", _number(self.dense)),
            (f"{self.metric}, initial mask", _number(self.initial)),
            (f"{self.metric}, deployed mask", _number(self.deployed)),
            (_GAP, closed),
            ("zeros", f"{self.sparsity:.2%} of {self.masked_weights:,} masked weights"),
            ("changed", f"{self.changed:.1%} of the groups, from the initial mask"),
            ("deployed mask", self._which),
            ("time", duration(self.seconds)),
        ]

    def notes(self) -> list[tuple[str, str]]:
        """What is to be copied, and of this machine: where files are, how to export the model."""
        found = [("Files", self.folder), ("To export it", self.to_do)]
        return [(name, value) for name, value in found if value]

    def markdown(self) -> str:
        """The table in Markdown, for a run's description or a model card."""
        lines = [f"| {self._title} | |", "| --- | ---: |"]
        return "\n".join(lines + [f"| {name} | {value} |" for name, value in self.rows()])

    def write(self, path: Path) -> None:
        """Write the result as JSON, for :func:`read_result`."""
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")

    def show(self) -> None:
        """Print the table, with Rich where that is installed."""
        try:
            from rich.console import Console
        except ModuleNotFoundError:
            print(self)
        else:
            Console().print(self, soft_wrap=True)

    @property
    def _title(self) -> str:
        return f"{self.pattern} mask, {self.steps} steps"

    @property
    def _which(self) -> str:
        if self.best_step == self.steps:
            return f"the last one (step {self.steps})"
        if not self.best_step:
            return "the initial one: no later one was better"
        return f"that of step {self.best_step}, better than the last one"

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows())
        lines = [f"  {name:<{width}}  {value}" for name, value in self.rows()]
        return "\n".join([self._title, *lines, *self._notes()])

    def _notes(self) -> list[str]:
        return [f"{name}: {value}" for name, value in self.notes()]

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self._title, title_justify="left", show_header=False, box=None)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in self.rows():
            table.add_row(name, value, style="bold" if name == _GAP else None)
        return Group(table, *map(Text, self._notes()))

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td>{escape(name)}</td><td style='text-align:left'>{escape(value)}</td></tr>"
            for name, value in (*self.rows(), *self.notes())
        )
        return f"<table><caption>{escape(self._title)}</caption>{cells}</table>"


def report(result: Result, tracking: Any) -> None:
    """Show a result, log it and write it into the run's folder; on one rank.

    The table also becomes the description of MLflow's run.

    Args:
        result: The result.
        tracking: The fit's :class:`Tracking`.
    """
    result.show()
    tracking.metrics(result.metrics())
    path = tracking.folder() / RESULT
    if tracking.write(path, lambda: result.write(path)):
        tracking.file(path)
    tracking.describe(result.markdown())


def read_result(folder: Path) -> Result | None:
    """The result in a run's folder; None if there is no whole one."""
    try:
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        return Result(**{f.name: found[f.name] for f in fields(Result) if f.name in found})
    except (OSError, ValueError, TypeError):
        return None


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def duration(seconds: float) -> str:
    """A time in the units that suit its length."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
