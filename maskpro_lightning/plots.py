"""Figures of a run, drawn from its history: did it help, what drove it, where did masks change.

The figures are transparent, in colours that keep a contrast of 3:1 on white and on dark pages and
that colour-blind readers tell apart. They are made without pyplot, so in any thread.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

_Rows = Sequence[Mapping[str, float]]
_Points = tuple[NDArray[Any], NDArray[Any]]

_INK, _GREY, _BLUE, _GREEN, _ORANGE = "#797979", "#868686", "#0b76b8", "#0a9670", "#d55e00"
# Shares of groups by key: colour, title over the steps, title over the layers.
_SHARES = {
    "changed": (_BLUE, "Groups whose most likely mask is not the initial one", "changed"),
    "entropy": (_GREEN, "Indecision: entropy of a group's mask, 100 % = all masks alike", "entropy"),
    "churn": (_ORANGE, "Groups whose drawn mask differs from the draw before", "churn"),
}
_AVERAGED = 0.06  # width of the moving average, as a share of the steps
_MOST_LAYERS = 40
_LONGEST_NAME = 32


def figures(rows: _Rows, layers: Mapping[str, Mapping[str, float]]) -> dict[str, Figure]:
    """Draw what a run logged.

    Args:
        rows: The history: ``step`` and any of ``loss``, ``baseline``, ``residual``, ``advantage``,
            ``delta``, ``entropy``, ``changed``, ``churn``, ``baseline_hit_rate``.
        layers: ``entropy``, ``changed`` and ``churn`` of each layer by parameter name.

    Returns:
        By name: "loss", the drawn masks against the initial one; "exploration", how much masks
        move; "signal", what each draw taught and cost; "layers", where masks changed. No rows,
        none of the first three; no layers, no "layers". A series is a line whose gid is its key.
    """
    drawn = {}
    if rows:
        drawn |= {"loss": _loss(rows), "exploration": _exploration(rows), "signal": _signal(rows)}
    if layers:
        drawn["layers"] = _layers(layers)
    return drawn


def read_history(path: Path) -> list[dict[str, float]]:
    """Read the rows of a ``history.csv``; what a row does not have is left out of it."""
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def _loss(rows: _Rows) -> Figure:
    figure, (top, bottom) = _over_steps(
        "Training loss under the drawn masks and, on the same batches, under the initial mask",
        "Drawn masks minus initial mask: below zero they are better",
        heights=(2, 1),
    )
    _line(top, rows, "baseline", _GREY, alpha=0.35)
    _line(top, rows, "loss", _BLUE, alpha=0.35)
    baseline = _last(top.plot(*_average(_series(rows, "baseline")), color=_GREY, linewidth=1.8))
    loss = _last(top.plot(*_average(_series(rows, "loss")), color=_BLUE, linewidth=1.8))
    _label(top, baseline, f"initial mask\n{baseline:.4g}", _GREY, below=baseline <= loss)
    _label(top, loss, f"drawn masks\n{loss:.4g}", _BLUE, below=loss < baseline)
    top.set_ylabel("loss")
    bottom.axhline(0, color=_GREY, linewidth=1, linestyle=(0, (5, 3)))
    _line(bottom, rows, "residual", _BLUE, alpha=0.35)
    delta = _line(bottom, rows, "delta", _BLUE)
    _label(bottom, delta, f"tracker δ\n{delta:+.3g}", _BLUE)
    bottom.set_ylabel("difference")
    return figure


def _exploration(rows: _Rows) -> Figure:
    figure, panels = _over_steps(*(title for _, title, _ in _SHARES.values()))
    for axes, (name, (colour, _, label)) in zip(panels, _SHARES.items(), strict=True):
        last = _line(axes, rows, name, colour)
        _label(axes, last, f"{label}\n{last:.3%}", colour)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylim(bottom=0)
    return figure


def _signal(rows: _Rows) -> Figure:
    ...


def _layers(layers: Mapping[str, Mapping[str, float]]) -> Figure:
    ...


def _over_steps(*titles: str, heights: Sequence[float] | None = None) -> tuple[Figure, list[Axes]]:
    ...
