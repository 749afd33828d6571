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

_INK, _GREY, _BLUE, _GREEN, _ORANGE = "#797979", "#868686", "#0b76b8", "#0a9670", "#d55e00"
# The shares of groups by key: colour and meaning.
_SHARES = {
    "changed": (_BLUE, "groups whose most likely mask is not the initial one"),
    "entropy": (_GREEN, "how undecided the groups are, 100 % = all masks equally likely"),
    "churn": (_ORANGE, "groups whose mask the last draw changed"),
}
_AVERAGED = 0.06  # width of the moving average, as a share of all steps
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
        move; "signal", what each draw taught and cost; "layers", where masks changed. Without rows
        only the last, without layers all but it. Each series is a line whose gid is its key.
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
        "Training loss of the drawn masks and, on the same batches, of the initial mask",
        "Drawn minus initial: below zero, the drawn masks are better",
        heights=(2, 1),
    )
    baseline = _series(top, rows, "baseline", _GREY, light=True, average=True)
    loss = _series(top, rows, "loss", _BLUE, light=True, average=True)
    _label(top, baseline, f"initial mask\n{baseline:.4g}", _GREY, below=baseline <= loss)
    _label(top, loss, f"drawn masks\n{loss:.4g}", _BLUE, below=loss < baseline)
    top.set_ylabel("loss")
    bottom.axhline(0, color=_GREY, linewidth=1, linestyle=(0, (5, 3)))
    _series(bottom, rows, "residual", _BLUE, light=True)
    delta = _series(bottom, rows, "delta", _BLUE)
    _label(bottom, delta, f"tracker δ\n{delta:+.3g}", _BLUE)
    bottom.set_ylabel("difference")
    bottom.set_xlabel("step (light: single batches, solid: averages)")
    return figure


def _exploration(rows: _Rows) -> Figure:
    figure, panels = _over_steps(
        *(f"{name.capitalize()}: {meaning}" for name, (_, meaning) in _SHARES.items())
    )
    for axes, (name, (colour, _)) in zip(panels, _SHARES.items(), strict=True):
        last = _series(axes, rows, name, colour)
        _label(axes, last, f"{last:.2%}", colour)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylim(bottom=0)
    panels[-1].set_xlabel("step")
    return figure


def _signal(rows: _Rows) -> Figure:
    figure, (top, bottom) = _over_steps(
        "Advantage: above zero, a drawn mask was worse than expected and becomes less likely",
        "Baselines that were remembered; the others cost a forward pass each",
        heights=(2, 1),
    )
    top.axhline(0, color=_GREY, linewidth=1, linestyle=(0, (5, 3)))
    _series(top, rows, "advantage", _BLUE, light=True, average=True)
    top.set_ylabel("running spreads\n(loss, if not normalized)")
    rate = _series(bottom, rows, "baseline_hit_rate", _GREEN)
    _label(bottom, rate, f"{rate:.1%}", _GREEN)
    bottom.yaxis.set_major_formatter(PercentFormatter(1))
    bottom.set_ylim(0, 1.05)
    bottom.set_xlabel("step")
    return figure


def _layers(layers: Mapping[str, Mapping[str, float]]) -> Figure:
    names = dict(zip(layers, _shortened(list(layers)), strict=True))
    title = f"Where the masks changed: {len(layers)} layers in the model's order"
    if len(layers) > _MOST_LAYERS:
        ranks = {layer: found.get("changed", math.nan) for layer, found in layers.items()}
        ranked = sorted(layers, key=lambda layer: (math.isnan(ranks[layer]), -ranks[layer]))
        names = {layer: names[layer] for layer in ranked[:_MOST_LAYERS]}
        title = f"The {_MOST_LAYERS} of {len(layers)} layers whose masks changed most"
    figure = _figure(height=1.2 + 0.13 * len(names))
    panels = figure.subplots(1, len(_SHARES), sharey=True)
    figure.suptitle(title, x=0.01, ha="left", color=_INK, fontsize=9, fontweight="bold")
    for axes, (name, (colour, _)) in zip(panels, _SHARES.items(), strict=True):
        _dress(axes, name)
        values = [layers[layer].get(name, math.nan) for layer in names]
        axes.barh(range(len(names)), values, color=colour, height=0.7, gid=name)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.tick_params(axis="y", length=0, labelsize=6.5)
        axes.grid(visible=False, axis="y")
    panels[0].set_yticks(range(len(names)), list(names.values()))
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    return figure


def _shortened(names: Sequence[str]) -> list[str]:
    """Names without the parts that all begin or end with; of long ones a number and the end."""
    parts = [name.split(".") for name in names]
    for end in (-1, 0):
        while len(parts) > 1 and len({p[end] for p in parts}) == 1 and min(map(len, parts)) > 1:
            parts = [p[1:] if end == 0 else p[:-1] for p in parts]
    short = [".".join(p) for p in parts]
    return [
        name if len(name) <= _LONGEST_NAME else f"#{number} …{name[8 - _LONGEST_NAME :]}"
        for number, name in enumerate(short)
    ]


def _figure(height: float = 4.5) -> Figure:
    return Figure((8, height), dpi=150, layout="constrained", facecolor="none")


def _over_steps(*titles: str, heights: Sequence[float] | None = None) -> tuple[Figure, list[Axes]]:
    """Panels below each other, with one axis of steps."""
    figure = _figure()
    panels = list(figure.subplots(len(titles), sharex=True, height_ratios=heights))
    for axes, title in zip(panels, titles, strict=True):
        _dress(axes, title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, panels


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", color=_INK, fontsize=9, fontweight="bold")
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(colors=_INK, labelsize=8)
    axes.grid(visible=True, color=_INK, alpha=0.2, linewidth=0.6)
    axes.ticklabel_format(useOffset=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=_INK, fontsize=8)


def _series(
    axes: Axes, rows: _Rows, name: str, colour: str, light: bool = False, average: bool = False
) -> float:
    """Draw a series, and its moving average if asked for; returns where the last drawn line ends."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    few = "." if len(points) < 20 else None
    width, alpha = (0.7, 0.4) if light else (1.6, None)
    axes.plot(steps, values, color=colour, linewidth=width, alpha=alpha, marker=few, gid=name)
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if average and len(steps):
        half = np.ptp(steps) * _AVERAGED / 2
        bounds = zip(
            np.searchsorted(steps, steps - half),
            np.searchsorted(steps, steps + half, side="right"),
            strict=True,
        )
        values = np.array([values[first:last].mean() for first, last in bounds])
        axes.plot(steps, values, color=colour, linewidth=1.6)
    return float(values[-1]) if len(values) else math.nan


def _label(axes: Axes, y: float, text: str, colour: str, below: bool | None = None) -> None:
    """Write at the end of a line, to the right of the axes."""
    if math.isfinite(y):
        where = {None: "center", True: "top", False: "bottom"}[below]
        axes.annotate(
            text,
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va=where,
            color=colour,
            fontsize=8,
        )
