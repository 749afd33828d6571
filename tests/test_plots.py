"""What a run's figures show, and that they can be read on any page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pytest
import torch
from matplotlib import colors, image
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rules import mask_optimizer

from maskpro_lightning.tracking import plots
from maskpro_lightning.tracking.journal import Journal
from maskpro_lightning.tracking.loggers import Tracking
from maskpro_lightning.tracking.metrics import mask_metrics
from maskpro_lightning.tracking.runs import Run, read_run

Rows = Sequence[Mapping[str, float]]
Figures = dict[str, Figure]
KEYS = ("loss", "baseline", "residual", "advantage", "delta")
KEYS += ("entropy", "changed", "churn", "baseline_hit_rate")
KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def draw(rows: Rows = (), layers: Mapping[str, Mapping[str, float]] | None = None) -> Figures:
    return plots.figures(Run(rows, layers or {}))


def history(count: int) -> list[dict[str, float]]:
    noise = np.random.default_rng(0)
    return [{"step": 10.0 * n} | {key: noise.random() for key in KEYS} for n in range(1, count + 1)]


def llama(blocks: int) -> dict[str, dict[str, float]]:
    noise = np.random.default_rng(0)
    return {
        f"model.layers.{block}.{kind}.weight": {
            key: noise.random() for key in ("entropy", "changed", "churn")
        }
        for block in range(blocks)
        for kind in KINDS
    }


def groups(layers: int = 3) -> dict[str, list[dict[str, float]]]:
    noise = np.random.default_rng(0)
    return {
        f"layers.{layer}.weight": [
            {
                "bin": b,
                "confidence": float(noise.integers(1000)),
                "retained": float(retained := 100 * noise.integers(20)),
                "changed": float(noise.integers(retained + 1)),
            }
            for b in range(20)
        ]
        for layer in range(layers)
    }


VALIDATION = [{"step": 10.0 * n, "val_loss": 4 - n / 10, "accuracy": n / 10} for n in range(1, 6)]
COMPARISON = {
    "dense": {"val_loss": 2.9, "sparsity": 0.0},
    "wanda": {"val_loss": 3.6, "sparsity": 0.5},
    "maskpro": {"val_loss": 3.5, "sparsity": 0.5},
}
WHOLE = Run(history(60), llama(7), groups(), VALIDATION, COMPARISON, "2:4 mask of a model")


def lines(figures: Mapping[str, Figure]) -> dict[str, Line2D]:
    found = [line for figure in figures.values() for axes in figure.axes for line in axes.lines]
    series = [line for line in found if line.get_gid() is not None]
    assert len({line.get_gid() for line in series}) == len(series)
    return {str(line.get_gid()): line for line in series}


def panel(figure: Figure, key: str) -> Axes:
    return next(axes for axes in figure.axes if key in {line.get_gid() for line in axes.lines})


def average(figure: Figure, key: str) -> Line2D:
    """The line in the colour of a series that is not the series."""
    axes, series = panel(figure, key), lines({"": figure})[key]
    others = [line for line in axes.lines if line.get_color() == series.get_color()]
    return next(line for line in others if line is not series)


def bars(figure: Figure, key: str) -> list[float]:
    found = [bar for axes in figure.axes for bar in axes.patches if bar.get_gid() == key]
    return [bar.get_width() for bar in sorted(found, key=lambda bar: bar.get_y())]


def layer_names(figure: Figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def pixels(figure: Figure) -> np.ndarray:
    """A figure without frame and grid as RGBA in [0, 1], (height, width, 4)."""
    for axes in figure.axes:
        axes.patch.set_visible(False)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor="none", edgecolor="none")
    file.seek(0)
    return image.imread(file)


def contrast(rgb: np.ndarray, background: str) -> np.ndarray:
    """The contrast ratio of WCAG 2.2, in [1, 21]."""

    def luminance(rgb: np.ndarray) -> np.ndarray:
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return linear @ np.array([0.2126, 0.7152, 0.0722])

    pair = np.stack(
        np.broadcast_arrays(luminance(rgb), luminance(np.array(colors.to_rgb(background))))
    )
    return (pair.max(0) + 0.05) / (pair.min(0) + 0.05)


def test_each_logged_value_is_a_point_of_its_line() -> None:
    rows = history(300)
    found = lines(draw(rows, {}))
    assert set(found) == set(KEYS)
    for key, line in found.items():
        assert list(line.get_xdata()) == [row["step"] for row in rows]
        assert list(line.get_ydata()) == [row[key] for row in rows]


def test_each_layer_has_a_bar_in_the_models_order() -> None:
    layers = llama(7)
    figure = draw([], layers)["layers"]
    for key in ("changed", "entropy", "churn"):
        assert bars(figure, key) == [found[key] for found in layers.values()]
    assert layer_names(figure) == [f"{block}.{kind}" for block in range(7) for kind in KINDS]
    low, high = figure.axes[0].get_ylim()
    assert low > high, "the first layer is on top"


def test_of_many_layers_those_that_changed_most_are_shown_and_the_title_says_so() -> None:
    layers = llama(50)
    layers["model.layers.0.self_attn.q_proj.weight"]["changed"] = float("nan")
    del layers["model.layers.0.self_attn.o_proj.weight"]["changed"]
    figure = draw([], layers)["layers"]
    known = [found["changed"] for found in list(layers.values())[2:]]
    assert bars(figure, "changed") == sorted(known, reverse=True)[:40]
    assert figure.get_suptitle().startswith("The 40 of 200 layers")
    assert len(layer_names(figure)) == 40


@pytest.mark.parametrize(
    ("rows", "layers", "drawn"),
    [
        ([], {}, set()),
        (history(3), {}, {"loss", "exploration", "signal"}),
        ([], llama(1), {"layers"}),
        ([{"step": 1, "loss": 2.0, "churn": 0.1}], {}, {"loss", "exploration"}),
        (history(3), llama(1), {"loss", "exploration", "signal", "layers"}),
    ],
)
def test_what_was_not_logged_has_no_figure(
    rows: Sequence[Mapping[str, float]], layers: Mapping[str, Mapping[str, float]], drawn: set[str]
) -> None:
    assert set(draw(rows, layers)) == drawn


@pytest.mark.parametrize("missing", KEYS)
def test_a_row_without_a_value_is_no_point(missing: str) -> None:
    rows = history(10)
    for row in rows[::2]:
        del row[missing]
    found = lines(draw(rows, {}))
    assert list(found[missing].get_xdata()) == [row["step"] for row in rows[1::2]]
    assert list(found[missing].get_ydata()) == [row[missing] for row in rows[1::2]]


@pytest.mark.parametrize("missing", KEYS)
def test_a_value_that_was_never_logged_leaves_its_line_empty(missing: str) -> None:
    rows = [{key: value for key, value in row.items() if key != missing} for row in history(10)]
    figures = draw(rows, {})
    found = lines(figures)
    assert {key: len(line.get_xdata()) for key, line in found.items()} == {
        key: 0 if key == missing else 10 for key in KEYS
    }
    for figure in figures.values():
        if missing in lines({"": figure}):
            figure.draw_without_rendering()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_is_a_gap_which_averages_leave_out(number: float) -> None:
    rows = history(40)
    for row in (rows[7], rows[-1]):
        row |= dict.fromkeys(KEYS, number)
    figures = draw(rows, {})
    drawn = lines(figures)["loss"].get_ydata()
    np.testing.assert_array_equal(drawn, [row["loss"] for row in rows])
    smooth = average(figures["loss"], "loss")
    assert list(smooth.get_xdata()) == [row["step"] for row in (*rows[:7], *rows[8:-1])]
    assert np.isfinite(smooth.get_ydata()).all()
    entropy = panel(figures["exploration"], "entropy").texts[0]
    assert entropy.get_text() == f"{rows[-2]['entropy']:.2%}"
    for figure in figures.values():
        figure.draw_without_rendering()


def test_nothing_finite_is_drawn_without_complaint() -> None:
    rows = [row | dict.fromkeys(KEYS, float("nan")) for row in history(3)]
    layers = {"a": dict.fromkeys(("entropy", "changed", "churn"), float("nan"))}
    for figure in draw(rows, layers).values():
        figure.draw_without_rendering()


def test_an_average_covers_a_tenth_of_the_steps_however_the_rows_lie() -> None:
    # As Journal thins a long history: its older rows are farther apart than its newer ones.
    steps = [*range(0, 400, 20), *range(400, 1001, 10)]
    spikes = (300, 700)
    rows = [{"step": step, "loss": float(step in spikes)} for step in steps]
    smooth = average(draw(rows, {})["loss"], "loss")
    inside = [step for step in steps if any(abs(step - spike) <= 50 for spike in spikes)]
    assert [x for x, y in zip(*smooth.get_data(), strict=True) if y > 0] == inside
    # Of rows 20 and 10 apart, a hundred steps around a spike hold 5 and 11.
    values = smooth.get_ydata()
    assert [values[steps.index(spike)] for spike in spikes] == [1 / 5, 1 / 11]


def test_an_average_of_a_constant_is_that_constant_up_to_both_ends() -> None:
    rows = [{"step": step, "loss": 2.5} for step in range(100)]
    smooth = average(draw(rows, {})["loss"], "loss")
    assert list(smooth.get_xdata()) == list(range(100))
    assert set(smooth.get_ydata()) == {2.5}


@pytest.mark.parametrize("gap", [-0.5, -1e-3, 0.0, 1e-3, 0.5])
def test_lines_that_end_close_together_keep_their_labels_apart(gap: float) -> None:
    rows = [{"step": n, "baseline": 3 + n % 2, "loss": 3 + n % 2 + gap} for n in range(40)]
    figure = draw(rows, {})["loss"]
    figure.draw_without_rendering()
    boxes = {text.get_text().split()[0]: text.get_window_extent() for text in figure.axes[0].texts}
    lower, upper = sorted(boxes, key=lambda name: boxes[name].y0)
    assert boxes[lower].y1 <= boxes[upper].y0
    if gap:
        assert lower == ("drawn" if gap < 0 else "initial")


def test_the_tracker_is_drawn_with_the_residuals_over_a_line_at_zero() -> None:
    figure = draw(history(30), {})["loss"]
    axes = panel(figure, "delta")
    assert axes is panel(figure, "residual")
    assert axes is not panel(figure, "loss")
    (zero,) = (line for line in axes.lines if list(line.get_ydata()) == [0, 0])
    assert zero.get_xdata() == [0, 1]
    assert zero.get_transform() == axes.get_yaxis_transform("grid")


def test_labels_give_the_values_at_which_lines_end() -> None:
    rows = [dict.fromkeys(("step", *KEYS), 0.0), dict.fromkeys(KEYS, 0.0) | {"step": 100.0}]
    rows[-1] |= {"loss": 3.25, "baseline": 4, "delta": -0.75, "changed": 0.0625, "entropy": 0.5}
    figures = draw(rows, {})
    texts = {
        t.get_text() for figure in figures.values() for axes in figure.axes for t in axes.texts
    }
    assert texts == {
        "drawn masks\n3.25",
        "initial mask\n4",
        "tracker δ\n\N{MINUS SIGN}0.75",
        "6.25%",
        "50.00%",
        "0.00%",
    }


def test_shares_have_axes_in_percent_that_start_at_zero() -> None:
    rows = [row | dict.fromkeys(KEYS, 0.5 + row["step"] / 1e6) for row in history(30)]
    figures = draw(rows, llama(2))
    for key, name in [("baseline_hit_rate", "signal")] + [
        (key, "exploration") for key in ("changed", "entropy", "churn")
    ]:
        axes = panel(figures[name], key)
        bottom, top = axes.get_ylim()
        assert bottom == 0
        assert top > 1.04 * lines(figures)[key].get_ydata().max(), "the frame cuts into the line"
        assert axes.yaxis.get_major_formatter()(0.25).startswith("25")
    for axes in figures["layers"].axes:
        assert axes.get_xlim()[0] == 0
        assert axes.xaxis.get_major_formatter()(0.25).startswith("25")


def test_every_panel_says_what_it_shows_and_in_which_unit() -> None:
    figures = draw(history(30), llama(2))
    layers = figures.pop("layers")
    for axes in layers.axes:
        assert axes.get_title(loc="left")
        assert axes.get_xlabel().startswith("of ")
    for figure in figures.values():
        assert figure.axes[-1].get_xlabel().startswith("step")
        for axes in figure.axes:
            assert axes.get_title(loc="left")
            assert axes.get_ylabel()


def test_a_single_row_and_a_single_layer_are_seen() -> None:
    figures = draw(history(1), {"fc.weight": dict.fromkeys(("entropy", "changed"), 0.5)})
    for key, line in lines(figures).items():
        assert line.get_marker() == ".", key
    assert layer_names(figures["layers"]) == ["fc.weight"]
    for figure in figures.values():
        figure.draw_without_rendering()
    ticks = figures["loss"].axes[-1].get_xticks()
    assert list(ticks) == list(ticks.round())


@pytest.mark.parametrize(
    ("names", "shortened"),
    [
        (["fc.weight"], ["fc.weight"]),
        (["0", "1"], ["0", "1"]),
        (["net.0.weight", "net.2.weight"], ["0", "2"]),
        (["a.weight", "a.b.weight"], ["a", "a.b"]),
        (["weight", "a.weight"], ["weight", "a.weight"]),
        (["q.weight", "q.bias"], ["weight", "bias"]),
        (["m.attention.q.weight", "m.attention2.q.weight"], ["attention", "attention2"]),
        (
            [f"m.{'x' * 40}.{n}.{'long_name' * 4}" for n in "ab"] + ["m.c"],
            [f"#{n} …{('long_name' * 4)[-26:]}" for n in (0, 1)] + ["c"],
        ),
    ],
)
def test_names_lose_the_parts_that_all_have_in_common(
    names: list[str], shortened: list[str]
) -> None:
    layers = {name: {"changed": 0.1} for name in names}
    assert layer_names(draw([], layers)["layers"]) == shortened


def test_shortened_names_stay_different() -> None:
    parts = ("a", "b", "weight", "x" * 40)
    words = [
        ".".join(p) for n in (1, 2) for p in np.stack(np.meshgrid(*[parts] * n), -1).reshape(-1, n)
    ]
    words += ["a.b.a.weight", "a.a.b.weight", "b.b.a.weight"]
    count = 0
    for size in (1, 2, 3):
        for names in combinations(words, size):
            short = plots._shortened(names)
            assert len(set(short)) == size, names
            assert max(map(len, short)) <= 32
            count += 1
    assert count == 23 + 253 + 1771


@pytest.mark.parametrize("style", ["default", "dark_background"])
@pytest.mark.parametrize(
    "name", ["loss", "exploration", "signal", "validation", "layers", "groups", "confidence"]
)
def test_everything_drawn_stands_out_but_the_grid(name: str, style: str) -> None:
    with matplotlib.style.context(style):
        figure = plots.figures(WHOLE)[name]
        assert figure.get_facecolor() == colors.to_rgba("white")
        rgba = pixels(figure)
    assert rgba.shape[1] == 1200
    drawn = rgba[rgba[..., 3] == 1][:, :3]
    assert len(drawn) > 5000
    # 3:1 is what WCAG 2.2 asks of graphics and of large text, 7:1 of text that stands out.
    assert contrast(drawn, "#ffffff").min() >= 3
    assert contrast(np.array(colors.to_rgb(plots._TITLE)), "#ffffff") > 7


def test_a_title_says_what_the_run_is_above_all_else() -> None:
    for name, figure in plots.figures(WHOLE).items():
        head = figure._suptitle
        assert head.get_text().splitlines()[0] == WHOLE.title
        assert head.get_fontweight() == "bold", name
        sizes = [axes._left_title.get_fontsize() for axes in figure.axes]
        assert head.get_fontsize() > max(sizes)


def test_a_metric_that_repeats_another_has_no_panel() -> None:
    rows = [{"step": n, "val_loss": n, "val_perplexity": np.exp(n), "other": n} for n in (1, 2)]
    figure = plots.figures(Run(validation=rows))["validation"]
    assert {axes.get_title(loc="left").split()[0] for axes in figure.axes} == {"val_loss", "other"}


def test_masks_that_are_compared_are_told_apart() -> None:
    comparison = {mask: {"val_loss": 4.0} for mask in ("dense", "magnitude", "wanda", "sparsegpt")}
    figure = plots.figures(Run(validation=VALIDATION, comparison=comparison))["validation"]
    found = lines({"": figure})
    looks = {
        (found[f"{mask} val_loss"].get_color(), found[f"{mask} val_loss"].get_linestyle())
        for mask in comparison
    }
    assert len(looks) == 4


def test_validations_that_logged_nothing_are_not_drawn() -> None:
    assert "validation" not in plots.figures(Run(validation=[{"step": 1}, {"step": 2}]))


def test_validation_is_drawn_over_steps_beside_other_masks_and_none() -> None:
    figure = plots.figures(Run(validation=VALIDATION, comparison=COMPARISON))["validation"]
    found = lines({"": figure})
    assert set(found) == {"val_loss", "accuracy", "dense val_loss", "wanda val_loss"}
    for key in ("val_loss", "accuracy"):
        assert list(found[key].get_xdata()) == [row["step"] for row in VALIDATION]
        assert list(found[key].get_ydata()) == [row[key] for row in VALIDATION]
    assert set(found["dense val_loss"].get_ydata()) == {2.9}
    top, bottom = figure.axes
    assert top.get_title(loc="left").startswith("val_loss"), "losses come first"
    assert {text.get_text() for text in top.texts} == {"MaskPro\n3.5", "dense 2.9", "wanda 3.6"}
    assert [text.get_text() for text in bottom.texts] == ["MaskPro\n0.5"]


@pytest.mark.parametrize("spread", [0.0, 1e-3, 1e-2, 1.0])
def test_labels_of_masks_that_are_alike_do_not_lie_over_each_other(spread: float) -> None:
    comparison = {f"mask {n}": {"val_loss": 3.5 + n * spread} for n in range(5)}
    figure = plots.figures(Run(validation=VALIDATION, comparison=comparison))["validation"]
    figure.draw_without_rendering()
    boxes = sorted(
        (text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0
    )
    assert len(boxes) == 6
    for lower, upper in pairwise(boxes):
        assert lower.y1 <= upper.y0 + 0.5  # half a pixel


def test_bars_of_bins_are_shares_of_all_groups() -> None:
    layers = groups()
    figures = plots.figures(Run(groups=layers))
    assert set(figures) == {"groups", "confidence"}
    for key, name in (("retained", "groups"), ("confidence", "confidence")):
        counts = np.array([[row[key] for row in rows] for rows in layers.values()]).sum(0)
        found = [bar for axes in figures[name].axes for bar in axes.patches if bar.get_gid() == key]
        assert [bar.get_height() for bar in found] == pytest.approx(counts / counts.sum())
        middles = [bar.get_x() + bar.get_width() / 2 for bar in found]
        assert middles == pytest.approx([(n + 0.5) / 20 for n in range(20)])


def test_change_is_a_share_of_the_groups_of_a_kind_and_ranges_over_layers() -> None:
    layers = groups()
    figure = plots.figures(Run(groups=layers))["groups"]
    changed, kept = (
        np.array([[row[key] for row in rows] for rows in layers.values()])
        for key in ("changed", "retained")
    )
    line = lines({"": figure})["changed"]
    np.testing.assert_allclose(line.get_ydata(), changed.sum(0) / kept.sum(0))
    (ranges,) = (c for c in figure.axes[0].collections if c.get_gid() == "range")
    shares = changed / np.where(kept > 0, kept, np.nan)
    low, high = np.nanmin(shares, 0), np.nanmax(shares, 0)
    np.testing.assert_allclose([path[:, 1] for path in ranges.get_segments()], np.c_[low, high])


def test_a_share_of_few_groups_is_left_out_where_others_are_many() -> None:
    rows = [{"bin": b, "retained": n, "changed": 1} for b, n in enumerate((0, 99, 100, 5000))]
    shown = lines({"": plots.figures(Run(groups={"w": rows}))["groups"]})["changed"].get_ydata()
    np.testing.assert_array_equal(shown, [np.nan, np.nan, 0.01, 0.0002])
    small = [{"bin": b, "retained": n, "changed": 1} for b, n in enumerate((0, 5))]
    shown = lines({"": plots.figures(Run(groups={"w": small}))["groups"]})["changed"].get_ydata()
    np.testing.assert_array_equal(shown, [np.nan, 0.2])


def test_files_are_png_and_svg_and_the_same_at_every_call(tmp_path: Path) -> None:
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        drawn = plots.figures(Run(validation=VALIDATION, comparison=COMPARISON))
        files = plots.save(drawn, folder)
        assert files == [folder / "validation.png", folder / "validation.svg"]
        written.append({path.name: path.read_bytes() for path in files})
    assert written[0] == written[1]


def test_the_contrast_is_the_one_of_wcag() -> None:
    assert contrast(np.array([0.0, 0.0, 0.0]), "#ffffff") == pytest.approx(21)
    assert contrast(np.array([1.0, 1.0, 1.0]), "#ffffff") == pytest.approx(1)
    # https://www.w3.org/TR/WCAG22: the grey that just reaches 4.5:1 on white
    assert contrast(np.array([0x76, 0x76, 0x76]) / 255, "#ffffff") == pytest.approx(4.54, abs=0.005)


def test_drawing_leaves_pyplot_and_settings_alone() -> None:
    before = dict(mpl.rcParams)
    for figure in draw(history(5), llama(2)).values():
        pixels(figure)
    assert plt.get_fignums() == []
    assert dict(mpl.rcParams) == before


def test_the_history_that_a_journal_wrote_is_read_back_and_drawn_in_full(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))
    optimizer = mask_optimizer([("fc.weight", weight)])
    journal, rows = Journal(), []
    journal.open(tmp_path, keeps=True, writes=True)
    for step in range(1, 6):
        optimizer.step(lambda: weight.square().mean())
        values = optimizer.last | {"delta": optimizer.tracker["delta"]}
        values |= mask_metrics(optimizer)[""] | {"baseline_hit_rate": 0.5}
        if step == 2:
            del values["delta"]
            values["loss"] = torch.tensor(torch.inf)
        journal.training(step, values)
        rows.append({"step": float(step)} | {key: float(value) for key, value in values.items()})
    journal.layers(mask_metrics(optimizer))
    journal.close(optimizer, "mode", Tracking(SimpleNamespace(loggers=[], global_step=5), "raise"))
    assert read_run(tmp_path).history == rows
    assert set(lines(draw(rows, {}))) == {key for row in rows for key in row} - {"step"}
    for name in ("loss", "exploration", "signal", "layers"):
        assert image.imread(tmp_path / f"{name}.png").shape[2] == 4
