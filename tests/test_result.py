"""Laws of a fit's result: its numbers, whom it is told to, and what it says of what is unknown."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from maskpro_lightning.tracking.loggers import Tracking
from maskpro_lightning.tracking.result import Result, read_result, report

FOUND = Result(
    pattern="2:4",
    metric="val_loss",
    dense=3.0,
    initial=4.0,
    deployed=3.25,
    sparsity=0.5,
    masked_weights=983040,
    changed=0.25,
    steps=200,
    best_step=150,
    seconds=125.4,
    folder="runs/a",
    to_do='export_sparse(module, "sparse-model")',
)


def but(**changes: Any) -> Result:
    return dataclasses.replace(FOUND, **changes)


class MLFlowLogger:
    """Remembers what it is told, under the name that is looked for."""

    run_id = "run"

    def __init__(self) -> None:
        self.experiment = self
        self.metrics: dict[str, float] = {}
        self.tags: dict[str, str] = {}
        self.files: list[str] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        assert step == 200
        self.metrics |= metrics

    def set_tag(self, run_id: str, name: str, value: str) -> None:
        self.tags[name] = value

    def log_artifact(self, run_id: str, path: str, folder: str) -> None:
        self.files.append(f"{folder}/{Path(path).name}")


@pytest.mark.parametrize(
    ("result", "closed"),
    [
        (FOUND, 0.75),
        (but(deployed=3.0), 1.0),
        (but(deployed=4.5), -0.5),
        (but(dense=0.9, initial=0.5, deployed=0.8, mode="max"), 0.75),  # an accuracy
        (but(dense=0.5, initial=0.9, deployed=0.8, mode="max"), None),
        (but(dense=4.5, deployed=2.0), None),  # the initial mask is better, and got better still
        (but(initial=3.0), None),
        (but(dense=None), None),
        (but(initial=math.nan), None),
        (but(initial=math.inf), None),
    ],
)
def test_the_gap_is_that_between_the_initial_mask_and_the_dense_weights(
    result: Result, closed: float | None
) -> None:
    assert result.gap_closed == pytest.approx(closed)
    assert ("maskpro/gap_closed" in result.metrics()) == (closed is not None)
    shown = dict(result.rows())["share of the gap closed"]
    measured = None not in (result.dense, result.initial) and math.isfinite(result.initial or 0)
    no_gap = (
        "none: the dense weights are not better than the initial mask (by monitor_mode "
        f"{'lower' if result.mode == 'min' else 'higher'} is better)"
    )
    assert shown == (f"{closed:.0%}" if closed is not None else no_gap if measured else "unknown")


def test_a_mask_better_than_the_dense_weights_is_called_so_and_not_a_share_of_a_small_gap() -> None:
    result = but(initial=3.01, deployed=2.8)
    assert result.metrics()["maskpro/gap_closed"] == pytest.approx(21)
    closed = dict(result.rows())["share of the gap closed"]
    assert closed == "all of it: better than the dense weights"


def test_what_was_not_measured_is_no_metric_and_named_so() -> None:
    result = but(dense=None, deployed=None)
    assert result.metrics() == {
        "maskpro/initial": 4.0,
        "maskpro/sparsity": 0.5,
        "maskpro/best_step": 150.0,
    }
    assert dict(result.rows())["val_loss, dense"] == "not measured"


@pytest.mark.parametrize(
    ("best", "said"),
    [
        (0, "the initial one: no later one was better"),
        (150, "that of step 150, better than the last one"),
        (200, "the last one (step 200)"),
    ],
)
def test_it_says_which_mask_is_deployed(best: int, said: str) -> None:
    assert dict(but(best_step=best).rows())["deployed mask"] == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (125.4, "2 min 05 s"), (7384, "2 h 03 min")],
)
def test_times_are_for_readers(seconds: float, said: str) -> None:
    assert dict(but(seconds=seconds).rows())["time"] == said


def test_every_form_holds_every_value() -> None:
    console = Console(file=io.StringIO(), width=60)
    console.print(FOUND)
    shown = console.file.getvalue()
    for name, value in FOUND.rows():
        for form in (str(FOUND), FOUND.markdown(), FOUND._repr_html_()):
            assert name in form
            assert value in form
        assert name in shown
        assert "".join(value.split()) in "".join(shown.split())
    assert but(to_do="a < b")._repr_html_().count("a &lt; b") == 1


def test_what_is_copied_is_on_lines_of_its_own_and_not_for_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    result = but(folder="runs/" + "long-name/" * 12 + "maskpro")
    result.show()
    lines = [f"Files: {result.folder}", f"To export it: {result.to_do}"]
    assert capsys.readouterr().out.splitlines()[-2:] == lines
    assert str(result).splitlines()[-2:] == lines
    assert "runs/" not in result.markdown()
    assert "export_sparse" not in result.markdown()
    nothing = but(folder=None, to_do=None)
    assert nothing.notes() == but(folder=None, to_do="").notes() == []
    assert len(str(nothing).splitlines()) == len(str(result).splitlines()) - 2


def test_it_is_told_to_screen_loggers_and_folder_and_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = MLFlowLogger()
    trainer = SimpleNamespace(
        loggers=[logger], global_step=200, is_global_zero=True, log_dir=str(tmp_path)
    )
    report(FOUND, Tracking(trainer, "raise"))
    assert "share of the gap closed" in capsys.readouterr().out
    assert logger.metrics == FOUND.metrics()
    assert logger.tags == {"mlflow.note.content": FOUND.markdown()}
    assert logger.files == ["maskpro/result.json"]
    assert read_result(tmp_path / "maskpro") == FOUND


def test_without_rich_it_is_plain(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    FOUND.show()
    assert capsys.readouterr().out == f"{FOUND}\n"


@pytest.mark.parametrize("text", [None, "", "[]", "{}", json.dumps({"pattern": "2:4"})])
def test_a_folder_without_a_whole_result_has_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "result.json").write_text(text)
    assert read_result(tmp_path) is None
