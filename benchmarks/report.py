"""What the finished runs say: tables for a terminal and for a page, and a figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isnan
from pathlib import Path
from statistics import mean

from ledger import METHODS, Ledger, Result, share_closed
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from rich.table import Table

COLUMNS = (
    "mask",
    "seeds",
    "held-out loss",
    "gap closed",
    "other kind of data",
    "forward-equivalents",
    "seconds",
    "extra bytes per weight",
    "setting",
)
# A contrast of 3:1 on white and on dark pages.
_INK = "#797979"
_COLOURS = {
    "published": "#868686",
    "policy_from_sparsegpt": "#0a9670",
    "policy": "#0b76b8",
    "categorical": "#d55e00",
    "straight_through": "#b5489c",
    "distilled": "#6a3d9a",
}
_LEVELS = {
    "dense": "-",
    "sparsegpt": "--",
    "sparsegpt_updated": "-.",
    "reconstruction": (0, (1, 3)),
}


def lines(rows: Mapping[str, Sequence[Result]]) -> list[list[str]]:
    """The cells of a table, one line a method; mean and range where there are several seeds."""
    found = []
    for method, results in rows.items():
        closed = [""]
        if method != "dense" and {"dense", "sparsegpt"} <= rows.keys():
            closed = [spread([share_closed(rows, r) for r in results], "{:.0%}".format)]
        learned = [f"{r.bytes_per_weight:.1f}" for r in results if r.bytes_per_weight]
        found.append(
            [
                METHODS[method],
                str(len(results)),
                spread([r.loss for r in results], "{:.3f}".format),
                *closed,
                elsewhere(results),
                f"{results[0].forwards:,}",
                f"{mean(r.seconds for r in results):.0f}",
                *(learned[:1] or [""]),
                results[0].setting,
            ]
        )
    return found


def table(model: str, pattern: str, rows: Mapping[str, Sequence[Result]]) -> Table:
    """A table for a terminal."""
    found = Table(title=f"{model}, {pattern}")
    for name in COLUMNS:
        found.add_column(name, justify="left" if name in ("mask", "setting") else "right")
    for line in lines(rows):
        found.add_row(line[0].replace("**", ""), *line[1:])
    return found


def markdown(ledger: Ledger) -> str:
    """All tables for a page."""
    parts = []
    for model, pattern, rows in ledger.tables():
        align = ["---" if name in ("mask", "setting") else "---:" for name in COLUMNS]
        cells = [list(COLUMNS), align, *lines(rows)]
        body = "\n".join(f"| {' | '.join(line)} |" for line in cells)
        parts.append(f"### {model}, {pattern}\n\n{body}\n")
    return "\n".join(parts)


def draw(ledger: Ledger, folder: Path) -> None:
    """Write ``quality.png`` and ``quality.svg``: held-out loss against forward-equivalents."""
    tables = list(ledger.tables())
    models, patterns = (list(dict.fromkeys(t[i] for t in tables)) for i in (0, 1))
    size = 1 + 4.2 * len(models), 1.1 + 2.9 * len(patterns)
    figure = Figure(size, dpi=150, facecolor="none", layout="constrained")
    grid = figure.subplots(len(patterns), len(models), squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for model, pattern, rows in tables:
        axes = grid[patterns.index(pattern), models.index(model)]
        axes.set_visible(True)
        _panel(axes, rows)
        axes.set_title(f"{model}, {pattern}", loc="left", color=_INK, fontsize=9, fontweight="bold")
    handles = {label: h for axes in grid.flat for h, label in zip(*_legend(axes), strict=True)}
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=2,
        fontsize=7.5,
        frameon=False,
        labelcolor=_INK,
    )
    for ending in ("png", "svg"):
        figure.savefig(folder / f"quality.{ending}", facecolor="none")


def _panel(axes: Axes, rows: Mapping[str, Sequence[Result]]) -> None:
    ends = {method: [r.loss for r in results] for method, results in rows.items()}
    for method, style in _LEVELS.items():
        if method in rows:
            label = METHODS[method].replace("**", "")
            axes.axhline(mean(ends[method]), color=_INK, linewidth=1, linestyle=style, label=label)
    for method, colour in _COLOURS.items():
        if method in rows:
            _curve(axes, rows[method], colour, METHODS[method].replace("**", ""))
    if "dense" in rows and "sparsegpt" in rows:  # what diverges leaves the picture
        low, high = mean(ends["dense"]), mean(ends["sparsegpt"])
        axes.set_ylim(low - 0.06 * (high - low), high + 0.25 * (high - low))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    low, high = axes.get_xlim()
    axes.set_xticks([at for at in (20, 50, 100, 200, 500, 1000) if low <= at <= high])
    axes.minorticks_off()
    axes.set(facecolor="none", axisbelow=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(colors=_INK, labelsize=8, which="both")
    axes.grid(visible=True, color=_INK, alpha=0.2, linewidth=0.6)
    axes.set_xlabel("forward-equivalents", color=_INK, fontsize=8)
    axes.set_ylabel("held-out loss (nats)", color=_INK, fontsize=8)


def _curve(axes: Axes, results: Sequence[Result], colour: str, label: str) -> None:
    """The mean over seeds, and their range as a band."""
    by_point = list(zip(*(result.points for result in results), strict=True))
    spent = [mean(forwards for forwards, _ in point) for point in by_point]
    losses = [[loss for _, loss in point] for point in by_point]
    axes.plot(spent, list(map(mean, losses)), ".-", color=colour, linewidth=1.6, label=label)
    low, high = list(map(min, losses)), list(map(max, losses))
    axes.fill_between(spent, low, high, color=colour, alpha=0.2, linewidth=0)


def _legend(axes: Axes) -> tuple[Sequence[Artist], Sequence[str]]:
    return axes.get_legend_handles_labels() if axes.get_visible() else ([], [])


def elsewhere(results: Sequence[Result]) -> str:
    """The loss on another kind of data, where it was measured."""
    found = [r.elsewhere for r in results if not isnan(r.elsewhere)]
    return spread(found, "{:.3f}".format) if found else ""


def spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """The mean, and the range if it shows."""
    low, high = show(min(values)), show(max(values))
    return show(mean(values)) + (f" ({low} to {high})" if low != high else "")
