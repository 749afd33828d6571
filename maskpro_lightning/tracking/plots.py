"""Draws a run's figures from its numbers: did it help, what drove it, where did masks change?

Colours are such that colour-blind readers tell them apart. Figures are made without pyplot, so that
any thread can make them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from maskpro_lightning.tracking.runs import DISTILLED, Run

_Rows = Sequence[Mapping[str, float]]
_Layers = Mapping[str, Mapping[str, float]]
_Groups = Mapping[str, _Rows]

_TITLE, _INK, _GREY, _RULE = "#1b1f24", "#57606a", "#868686", "#d0d7de"
_BLUE, _GREEN, _ORANGE = "#0b76b8", "#0a9670", "#d55e00"
# Lines beside the validations: those of the dense weights and of other masks.
_REFERENCES = {
    "dense": (_TITLE, "-"),
    "initial": (_GREY, "--"),
    "magnitude": ("#8250df", ":"),
    "wanda": ("#9a6700", "--"),
    "sparsegpt": ("#bf3989", "-."),
}
_COLOURS = {"baseline": _GREY, "entropy": _GREEN, "churn": _ORANGE, "baseline_hit_rate": _GREEN}
# By key: name, meaning, and the whole that it is a share of.
_SHARES = {
    "changed": ("Left the initial mask", "another one is the most likely now", "of groups"),
    "entropy": ("Undecided (entropy)", "at 100% all masks are equally likely", "of log C(M, N)"),
    "churn": ("Redrawn (churn)", "the latest two draws differ", "of groups"),
}
_MOST_LAYERS = 40
_MOST_METRICS = 3
# A share of fewer groups than this is mostly noise.
_FEW_GROUPS = 100
# Metrics that only a run with baselines logs.
_OF_BASELINE = {"baseline", "residual", "delta", "advantage"}


def figures(run: Run) -> dict[str, Figure]:
    """Draw the figures of a run; those of metrics that it did not log are left out.

    Returns:
        By name: "loss", the loss of the drawn masks and, with baselines, of the initial one;
        "exploration", how much masks move; "signal", with baselines, the advantages and how often a
        baseline was remembered; "validation", the most likely masks beside the dense weights and
        other masks; "layers" and "groups", where masks changed; "confidence", how decided they are.
        The gid of a line, or of bars, is the key of its series.
    """
    rows = run.history
    drawn: dict[str, Figure] = {}
    if rows:
        drawn |= {"loss": _loss(rows), "exploration": _exploration(rows)}
    if any(row.keys() & _OF_BASELINE for row in rows):
        drawn["signal"] = _signal(rows)
    if any(row.keys() - {"step"} for row in run.validation):  # a module may log nothing
        drawn["validation"] = _validation(run.validation, run.comparison)
    if run.layers:
        drawn["layers"] = _layers(run.layers)
    if run.groups:
        drawn |= {"groups": _groups(run.groups), "confidence": _confidence(run.groups)}
    for figure in drawn.values():
        _head(figure, run.title)
    return drawn


def save(drawn: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write figures as PNG and as SVG, the same bytes for the same figure; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with rc_context({"svg.hashsalt": "maskpro"}):
        for name, figure in drawn.items():
            for ending, metadata in (("png", {}), ("svg", {"Date": None})):
                files.append(folder / f"{name}.{ending}")
                figure.savefig(files[-1], metadata=metadata)
    return files


def _loss(rows: _Rows) -> Figure:
    distilled = any(DISTILLED in row for row in rows)
    key, of = ("loss", "Training loss")
    if distilled:
        key, of = (DISTILLED, "Distance to the dense outputs")
    if not any(row.keys() & _OF_BASELINE for row in rows):  # learned from gradients
        figure, (top,) = _over_steps({f"{of} of the drawn masks": "loss"}, (1,))
        _series(top, rows, key, "{:.4g}", mean=True)
        return figure
    title = f"{of} of the drawn masks and, on the same batches, of the initial mask"
    below = "Drawn minus initial: below zero, the drawn masks are better"
    figure, (top, bottom) = _over_steps({title: "loss", below: "difference"}, (2, 1))
    _series(top, rows, "baseline", "initial mask\n{:.4g}", mean=True)
    _series(top, rows, key, "drawn masks\n{:.4g}", mean=True)
    labels = sorted(top.texts, key=lambda text: text.get_position()[1])
    for label, align in zip(labels, ("top", "bottom"), strict=False):
        label.set(va=align)  # apart, even if the lines end close to each other
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


def _validation(rows: _Rows, comparison: Mapping[str, Mapping[str, float]]) -> Figure:
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "step"))
    keys = _different(sorted(keys, key=lambda key: "loss" not in key), rows)[:_MOST_METRICS]
    titles = {f"{key} of the most likely masks": "" for key in keys}
    figure, panels = _over_steps(titles, [1] * len(titles))
    for axes, key in zip(panels, keys, strict=True):
        _series(axes, rows, key, "MaskPro\n{:.4g}")
        others = {mask: row[key] for mask, row in comparison.items() if key in row}
        others.pop("maskpro", None)
        for mask, value in others.items():
            colour, dashes = _REFERENCES.get(mask, (_GREY, (0, (1, 3))))
            axes.axhline(value, color=colour, linewidth=1.2, linestyle=dashes, gid=f"{mask} {key}")
            _label(axes, value, f"{mask} {value:.4g}", colour)
        _spread_labels(axes)
    panels[-1].set_xlabel("step")
    return figure


def _different(keys: Sequence[str], rows: _Rows) -> list[str]:
    """Keys without those that are the exponential of an earlier one, as perplexity of the loss."""
    kept: list[str] = []
    for key in keys:
        pairs = [[(row[one], row[key]) for row in rows if {one, key} <= row.keys()] for one in kept]
        if not any(
            pair and np.allclose(np.exp(a), b, rtol=0.02)
            for pair in pairs
            for a, b in [np.array(pair).T]
        ):
            kept.append(key)
    return kept


def _groups(layers: _Groups) -> Figure:
    title = "Groups that left the initial mask, by how much of their squared weights it keeps"
    below = "How many groups there are of each kind"
    figure, (top, bottom) = _over_bins({title: "of such groups", below: "of all groups"}, (2, 1))
    changed_LB, kept_LB = _counts(layers, "changed"), _counts(layers, "retained")
    _ranges(top, _share_of(changed_LB, kept_LB))
    changed_B, kept_B = changed_LB.sum(0), kept_LB.sum(0)
    middles = (np.arange(len(kept_B)) + 0.5) / len(kept_B)
    top.plot(middles, _share_of(changed_B, kept_B), color=_BLUE, marker=".", gid="changed")
    top.set_ylim(0, max(1.05 * top.dataLim.y1, 0.01))
    _bars(bottom, kept_B / max(1, kept_B.sum()), "retained")
    note = "grey: from the least to the most of any layer"
    bottom.set_xlabel(f"share of squared weights that the initial mask keeps ({note})")
    return figure


def _confidence(layers: _Groups) -> Figure:
    titles = {"How decided the groups are: the probability of their most likely mask": "of groups"}
    figure, (axes,) = _over_bins(titles, (1,))
    counts_LB = _counts(layers, "confidence")
    _bars(axes, counts_LB.sum(0) / max(1, counts_LB.sum()), "confidence")
    _ranges(axes, counts_LB / np.maximum(1, counts_LB.sum(1, keepdims=True)))
    nines = ["0%", "90%", "99%", "99.9%", "99.99%", "99.999%"]
    axes.set_xticks(np.linspace(0, 1, len(nines)), nines)
    note = "grey: from the least to the most of any layer"
    axes.set_xlabel(f"probability of the most likely mask ({note})")
    return figure


def _counts(layers: _Groups, key: str) -> np.ndarray:
    """The counts of every layer in every bin, (layers, bins)."""
    return np.array([[row.get(key, 0) for row in rows] for rows in layers.values()])


def _share_of(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Shares, NaN where there are too few groups."""
    return part / np.where(whole >= min(_FEW_GROUPS, whole.max()), whole, np.nan)


def _over_bins(titles: Mapping[str, str], heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """A figure of panels, one below the other, with a common axis of shares from 0 to 1."""
    figure, panels = _over_steps(titles, heights)
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(10))
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlim(0, 1)
    return figure, panels


def _bars(axes: Axes, shares_B: np.ndarray, key: str) -> None:
    count = len(shares_B)
    middles = (np.arange(count) + 0.5) / count
    axes.bar(middles, shares_B, width=0.9 / count, color=_BLUE, gid=key)


def _ranges(axes: Axes, shares_LB: np.ndarray) -> None:
    """A line from the lowest to the highest layer in each bin."""
    known = np.isfinite(shares_LB)
    low_B = np.where(known, shares_LB, np.inf).min(0)
    high_B = np.where(known, shares_LB, -np.inf).max(0)
    seen = known.any(0)
    middles = (np.arange(len(seen)) + 0.5) / len(seen)
    axes.vlines(middles[seen], low_B[seen], high_B[seen], color=_GREY, linewidth=1.6, gid="range")


def _layers(layers: _Layers) -> Figure:
    names = dict(zip(layers, _shortened(list(layers)), strict=True))
    title = "Where the masks changed, by layer in the model's order"
    if len(layers) > _MOST_LAYERS:
        title = f"The {_MOST_LAYERS} of {len(layers)} layers whose masks changed most"
        ranked = sorted(layers, key=lambda layer: -np.nan_to_num(layers[layer].get("changed", 0)))
        names = {layer: names[layer] for layer in ranked[:_MOST_LAYERS]}
    figure = Figure((8, 1.6 + 0.13 * len(names)), dpi=150, facecolor="white", layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", color=_TITLE, fontsize=9)
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
    """Names without their common first and last parts; long ones as a number and an ending."""
    parts = [name.split(".") for name in names]
    for end, rest in ((-1, slice(-1)), (0, slice(1, None))):
        while len(parts) > 1 and min(map(len, parts)) > 1 and len({p[end] for p in parts}) == 1:
            parts = [p[rest] for p in parts]
    shorts = enumerate(map(".".join, parts))
    return [short if len(short) <= 32 else f"#{n} …{short[-26:]}" for n, short in shorts]


def _over_steps(titles: Mapping[str, str], heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """A figure of panels (titles with units), one below the other, with a common axis of steps."""
    figure = Figure((8, 4.8), dpi=150, facecolor="white", layout="constrained")
    grid = figure.subplots(len(titles), sharex=True, squeeze=False, height_ratios=heights)
    panels = list(grid[:, 0])
    for axes, (title, unit) in zip(panels, titles.items(), strict=True):
        _dress(axes, title)
        axes.set(ylabel=unit, xmargin=0.01)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panels[-1].set_xlabel("step (light: single steps, solid: averages)")
    return figure, panels


def _head(figure: Figure, title: str) -> None:
    """Put the run's title on top, above a title that is there."""
    below = figure.get_suptitle()
    text = f"{title}\n{below}" if title and below else title or below
    if text:
        figure.suptitle(text, x=0.01, ha="left", color=_TITLE, fontsize=10, fontweight="bold")


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", color=_TITLE, fontsize=9)
    axes.set(facecolor="white", axisbelow=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_RULE)
    axes.tick_params(colors=_RULE, labelcolor=_INK, labelsize=8)
    axes.grid(visible=True, color=_RULE, linewidth=0.6)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=_INK, fontsize=8)


def _series(axes: Axes, rows: _Rows, key: str, label: str = "", mean: bool = False) -> None:
    """Draw a series and label its end; with ``mean`` also its average over a tenth of the steps."""
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
        text = label.format(values[-1]).replace("-", "\N{MINUS SIGN}")
        _label(axes, values[-1], text, colour)


def _label(axes: Axes, height: float, text: str, colour: str) -> None:
    """Write a text beside the end of a line."""
    style = {"color": colour, "fontsize": 8, "va": "center"}
    axes.text(1.01, height, text, style, transform=axes.get_yaxis_transform())


def _spread_labels(axes: Axes) -> None:
    """Move labels up that overlap others, from the lowest on."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    to_pixels, free = axes.transData, -math.inf
    for text in sorted(axes.texts, key=lambda text: text.get_position()[1]):
        box, (_, height) = text.get_window_extent(), text.get_position()
        lift = max(0.0, free - box.y0)
        _, pixels = to_pixels.transform((0, height))
        text.set_y(to_pixels.inverted().transform((0, pixels + lift))[1])
        free = box.y1 + lift


def _share(axes: Axes, rows: _Rows, key: str) -> None:
    _series(axes, rows, key, "{:.2%}")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
