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
from matplotlib.ticker import MaxNLocator, PercentFormatter

_Rows = Sequence[Mapping[str, float]]
_Layers = Mapping[str, Mapping[str, float]]

_INK, _GREY, _BLUE, _GREEN, _ORANGE = "#797979", "#868686", "#0b76b8", "#0a9670", "#d55e00"
_COLOURS = {"baseline": _GREY, "entropy": _GREEN, "churn": _ORANGE, "baseline_hit_rate": _GREEN}
# By key: name, meaning, what it is a share of.
_SHARES = {
    "changed": ("Left the initial mask", "another one is the most likely now", "of groups"),
    "entropy": ("Undecided (entropy)", "at 100% all masks are equally likely", "of log C(M, N)"),
    "churn": ("Redrawn (churn)", "the latest two draws differ", "of groups"),
}
_MOST_LAYERS = 40
# What only a run that compares with the initial mask logs.
_OF_BASELINE = {"baseline", "residual", "delta", "advantage"}


def figures(rows: _Rows, layers: _Layers) -> dict[str, Figure]:
    """Draw what a run logged.

    Args:
        rows: The history: ``step`` and any of ``loss``, ``baseline``, ``residual``, ``advantage``,
            ``delta``, ``entropy``, ``changed``, ``churn``, ``baseline_hit_rate``.
        layers: ``entropy``, ``changed`` and ``churn`` of each layer by parameter name.

    Returns:
        By name: "loss", the drawn masks against the initial one; "exploration", how much masks
        move; "signal", what draws taught and cost, where there was a baseline; "layers", where
        masks changed. The first three need rows, the last layers. A series is a line, or bars,
        whose gid is its key.
    """
    over_steps = {"loss": _loss, "exploration": _exploration}
    if any(row.keys() & _OF_BASELINE for row in rows):
        over_steps["signal"] = _signal
    drawn = {name: draw(rows) for name, draw in over_steps.items() if rows}
    return drawn | ({"layers": _layers(layers)} if layers else {})


def read_history(path: Path) -> list[dict[str, float]]:
    """Read the rows of a ``history.csv``; what a row does not have is left out of it."""
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def _loss(rows: _Rows) -> Figure:
    if not any(row.keys() & _OF_BASELINE for row in rows):  # learned from gradients
        figure, (top,) = _over_steps({"Training loss of the drawn masks": "loss"}, (1,))
        _series(top, rows, "loss", "{:.4g}", mean=True)
        return figure
    title = "Training loss of the drawn masks and, on the same batches, of the initial mask"
    below = "Drawn minus initial: below zero, the drawn masks are better"
    figure, (top, bottom) = _over_steps({title: "loss", below: "difference"}, (2, 1))
    _series(top, rows, "baseline", "initial mask\n{:.4g}", mean=True)
    _series(top, rows, "loss", "drawn masks\n{:.4g}", mean=True)
    labels = sorted(top.texts, key=lambda text: text.get_position()[1])
    for label, align in zip(labels, ("top", "bottom"), strict=False):
        label.set(va=align)  # not over each other, however close the lines end
    bottom.axhline(0, color=_GREY, linewidth=1, linestyle="--")
    _series(bottom, rows, "residual")
    _series(bottom, rows, "delta", "tracker δ\n{:.3g}")
    return figure


def _exploration(rows: _Rows) -> Figure:
    titles = {f"{name}: {meaning}": unit for name, meaning, unit in _SHARES.values()}
    figure, panels = _over_steps(titles, (1, 1, 1))
    for axes, key in zip(panels, _SHARES, strict=True):
        _share(axes, rows, key)
    panels[-1].set_xlabel("step")
    return figure


def _signal(rows: _Rows) -> Figure:
    title = "Advantage: above zero, a drawn mask was worse than expected and becomes less likely"
    below = "Initial mask's losses that were remembered; each of the others cost a forward pass"
    unit = "running spreads\n(loss, if not normalized)"
    figure, (top, bottom) = _over_steps({title: unit, below: "of batches so far"}, (2, 1))
    top.axhline(0, color=_GREY, linewidth=1, linestyle="--")
    _series(top, rows, "advantage", mean=True)
    _share(bottom, rows, "baseline_hit_rate")
    return figure


def _layers(layers: _Layers) -> Figure:
    names = dict(zip(layers, _shortened(list(layers)), strict=True))
    title = "Where the masks changed, by layer in the model's order"
    if len(layers) > _MOST_LAYERS:
        title = f"The {_MOST_LAYERS} of {len(layers)} layers whose masks changed most"
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
        axes.xaxis.set_major_formatter(PercentFormatter(1))
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
    shorts = enumerate(map(".".join, parts))
    return [short if len(short) <= 32 else f"#{n} …{short[-26:]}" for n, short in shorts]


def _over_steps(titles: Mapping[str, str], heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """A figure of panels below each other, given as titles and units, with one axis of steps."""
    figure = Figure((8, 4.5), dpi=150, facecolor="none", layout="constrained")
    grid = figure.subplots(len(titles), sharex=True, squeeze=False, height_ratios=heights)
    panels = list(grid[:, 0])
    for axes, (title, unit) in zip(panels, titles.items(), strict=True):
        _dress(axes, title)
        axes.set(ylabel=unit, xmargin=0.01)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panels[-1].set_xlabel("step (light: single steps, solid: averages)")
    return figure, panels


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", color=_INK, fontsize=9, fontweight="bold")
    axes.set(facecolor="none", axisbelow=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(colors=_INK, labelsize=8)
    axes.grid(visible=True, color=_INK, alpha=0.2, linewidth=0.6)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=_INK, fontsize=8)


def _series(axes: Axes, rows: _Rows, key: str, label: str = "", mean: bool = False) -> None:
    """Draw a series, or its average over a tenth of the steps on top, and label where it ends."""
    points = [(row["step"], row[key]) for row in rows if key in row]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    colour, marker = _COLOURS.get(key, _BLUE), "." if len(points) < 20 else None
    width, alpha = (1.6, None) if label and not mean else (0.7, 0.4)
    axes.plot(steps, values, color=colour, linewidth=width, alpha=alpha, marker=marker, gid=key)
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if mean and len(values):
        half = 0.05 * np.ptp(steps)
        values = np.array([values[abs(steps - step) <= half].mean() for step in steps])
        axes.plot(steps, values, color=colour, linewidth=1.6, marker=marker)
    if label and len(values):
        style = {"color": colour, "fontsize": 8, "va": "center"}
        text = label.format(values[-1]).replace("-", "\N{MINUS SIGN}")
        axes.text(1.01, values[-1], text, style, transform=axes.get_yaxis_transform())


def _share(axes: Axes, rows: _Rows, key: str) -> None:
    _series(axes, rows, key, "{:.2%}")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
