"""Figures of a run, drawn from its history: did it help, what drove it, where did masks change.

The figures are transparent, in colours that keep a contrast of 3:1 on white and on dark pages and
that colour-blind readers tell apart. They are made without pyplot, so in any thread.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_Rows = Sequence[Mapping[str, float]]
_Layers = Mapping[str, Mapping[str, float]]

_INK, _GREY, _BLUE, _GREEN, _ORANGE = "#797979", "#868686", "#0b76b8", "#0a9670", "#d55e00"
_COLOURS = {"baseline": _GREY, "entropy": _GREEN, "churn": _ORANGE, "baseline_hit_rate": _GREEN}
# By key: name, meaning, what it is a share of.
_SHARES = {
    "changed": ("Left the initial mask", "another is the most likely now", "of groups"),
    "entropy": ("Undecided (entropy)", "at 100% all masks are as likely", "of log C(M, N)"),
    "churn": ("Redrawn (churn)", "the latest two draws differ", "of groups"),
}
_AVERAGED = 0.06  # width of the moving average, as a share of all steps
_MOST_LAYERS = 40
_LONGEST_NAME = 32


def figures(rows: _Rows, layers: _Layers) -> dict[str, Figure]:
    """Draw what a run logged.

    Args:
        rows: The history: ``step`` and any of ``loss``, ``baseline``, ``residual``, ``advantage``,
            ``delta``, ``entropy``, ``changed``, ``churn``, ``baseline_hit_rate``.
        layers: ``entropy``, ``changed`` and ``churn`` of each layer by parameter name.

    Returns:
        By name: "loss", the drawn masks against the initial one; "exploration", how much masks
        move; "signal", what draws taught and cost; "layers", where masks changed. The first three
        need rows, the last layers. A series is a line, or bars, whose gid is its key.
    """
    over_steps = {"loss": _loss, "exploration": _exploration, "signal": _signal}
    drawn = {name: draw(rows) for name, draw in over_steps.items() if rows}
    return drawn | ({"layers": _layers(layers)} if layers else {})


def read_history(path: Path) -> list[dict[str, float]]:
    """Read the rows of a ``history.csv``; what a row does not have is left out of it."""
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def _loss(rows: _Rows) -> Figure:
    title = "Training loss of the drawn masks and, on the same batches, of the initial mask"
    below = "Drawn minus initial: below zero, the drawn masks are better"
    figure, (top, bottom) = _over_steps({title: "loss", below: "difference"}, (2, 1))
    baseline = _series(top, rows, "baseline", light=True, mean=True)
    loss = _series(top, rows, "loss", light=True, mean=True)
    near = abs(loss - baseline) < 0.25 * np.ptp(top.get_ylim())
    over, under = ("bottom", "top") if loss < baseline else ("top", "bottom")
    _label(top, "baseline", baseline, f"initial mask\n{baseline:.4g}", over if near else "center")
    _label(top, "loss", loss, f"drawn masks\n{loss:.4g}", under if near else "center")
    bottom.axhline(0, color=_GREY, linewidth=1, linestyle="--")
    _series(bottom, rows, "residual", light=True)
    delta = _series(bottom, rows, "delta")
    _label(bottom, "delta", delta, f"tracker δ\n{delta:.3g}")
    return figure


def _exploration(rows: _Rows) -> Figure:
    titles = {f"{name}: {meaning}": unit for name, meaning, unit in _SHARES.values()}
    figure, panels = _over_steps(titles, (1, 1, 1))
    for axes, key in zip(panels, _SHARES, strict=True):
        _share(axes, rows, key)
    return figure


def _signal(rows: _Rows) -> Figure:
    title = "Advantage: above zero, a drawn mask was worse than expected and becomes less likely"
    below = "Initial mask's losses that were remembered; each of the others cost a forward pass"
    unit = "running spreads\n(loss, if not normalized)"
    figure, (top, bottom) = _over_steps({title: unit, below: "of batches so far"}, (2, 1))
    top.axhline(0, color=_GREY, linewidth=1, linestyle="--")
    _series(top, rows, "advantage", light=True, mean=True)
    _share(bottom, rows, "baseline_hit_rate")
    return figure


def _layers(layers: _Layers) -> Figure:
    names = dict(zip(layers, _shortened(list(layers)), strict=True))
    title = f"Where the masks changed: {len(layers)} layers in the model's order"
    if len(layers) > _MOST_LAYERS:
        title = f"Where the masks changed: the {_MOST_LAYERS} of {len(layers)} layers that did most"
        ranked = sorted(layers, key=lambda layer: -np.nan_to_num(layers[layer].get("changed", 0)))
        names = {layer: names[layer] for layer in ranked[:_MOST_LAYERS]}
    figure = Figure((8, 1.2 + 0.13 * len(names)), dpi=150, facecolor="none", layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", color=_INK, fontsize=9, fontweight="bold")
    panels = figure.subplots(1, len(_SHARES), sharey=True)
    for axes, (key, (name, _, unit)) in zip(panels, _SHARES.items(), strict=True):
        _dress(axes, name)
        shares = [layers[layer].get(key, math.nan) for layer in names]
        axes.barh(range(len(names)), shares, color=_COLOURS.get(key, _BLUE), gid=key)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(_percent)
        axes.set_xlabel(unit)
        axes.tick_params(axis="y", length=0, labelsize=6.5)
        axes.grid(visible=False, axis="y")
    panels[0].set_yticks(range(len(names)), list(names.values()))
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    return figure


def _shortened(names: Sequence[str]) -> list[str]:
    """Names without the parts that all begin or end with; of long ones a number and the end."""
    parts = [name.split(".") for name in names]
    for end, rest in ((-1, slice(-1)), (0, slice(1, None))):
        while len(parts) > 1 and min(map(len, parts)) > 1 and len({p[end] for p in parts}) == 1:
            parts = [p[rest] for p in parts]
    return [
        short if len(short) <= _LONGEST_NAME else f"#{number} …{short[6 - _LONGEST_NAME :]}"
        for number, short in enumerate(map(".".join, parts))
    ]


def _over_steps(titles: Mapping[str, str], heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """A figure of panels below each other, given as titles and units, with one axis of steps."""
    figure = Figure((8, 4.5), dpi=150, facecolor="none", layout="constrained")
    panels = list(figure.subplots(len(titles), sharex=True, height_ratios=heights))
    for axes, (title, unit) in zip(panels, titles.items(), strict=True):
        _dress(axes, title)
        axes.set_ylabel(unit)
        axes.margins(x=0.01)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].set_xlabel("step (light: single steps, solid: averages)")
    return figure, panels


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", color=_INK, fontsize=9, fontweight="bold")
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(colors=_INK, labelsize=8)
    axes.grid(visible=True, color=_INK, alpha=0.2, linewidth=0.6)
    axes.set_axisbelow(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=_INK, fontsize=8)


def _series(axes: Axes, rows: _Rows, key: str, light: bool = False, mean: bool = False) -> float:
    """Draw a series, and its moving average if asked; the value at which the last line ends."""
    points = [(row["step"], row[key]) for row in rows if key in row]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    colour, marker = _COLOURS.get(key, _BLUE), "." if len(points) < 20 else None
    width, alpha = (0.7, 0.4) if light else (1.6, None)
    axes.plot(steps, values, color=colour, linewidth=width, alpha=alpha, marker=marker, gid=key)
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if mean and len(values):
        half = np.ptp(steps) * _AVERAGED / 2
        values = np.array([values[abs(steps - step) <= half].mean() for step in steps])
        axes.plot(steps, values, color=colour, linewidth=1.6)
    return float(values[-1]) if len(values) else math.nan


def _share(axes: Axes, rows: _Rows, key: str) -> None:
    last = _series(axes, rows, key)
    _label(axes, key, last, _percent(last))
    axes.yaxis.set_major_formatter(_percent)
    axes.set_ylim(bottom=0)


def _label(axes: Axes, key: str, y: float, text: str, align: str = "center") -> None:
    """Write at the end of a line, to the right of the axes."""
    if math.isfinite(y):
        style = {"color": _COLOURS.get(key, _BLUE), "fontsize": 8, "va": align}
        axes.text(1.01, y, text, style, transform=axes.get_yaxis_transform())


def _percent(share: float, _: float = 0) -> str:
    return f"{100 * share:.3g}%"
