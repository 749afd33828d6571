"""Laws of a run's tables: what a fit wrote is read back, and nothing else is taken for it."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger
from modules import FAST, Net, fit
from rules import mask_callback

from maskpro_lightning import MaskProCallback
from maskpro_lightning.tracking.metrics import BINS, histograms
from maskpro_lightning.tracking.runs import Run, read_run

RUN = Run(
    history=[{"step": 1, "loss": 0.1, "delta": -1e-30}, {"step": 2, "loss": float("inf")}],
    layers={"a,b": {"changed": 0.5}, 'c"\nd': {"changed": 1 / 3, "churn": 0.25}},
    groups={"a": [{"bin": 0, "retained": 3}, {"bin": 1, "retained": 4}], "b": [{"bin": 0}]},
    validation=[{"step": 2, "val_loss": 1.5}],
    comparison={"dense": {"val_loss": 1.25}, "initial": {"val_loss": 2.5}},
)
LAST_ROW = (
    *("loss", "baseline", "residual", "advantage", "delta"),
    *("entropy", "changed", "churn", "baseline_hit_rate"),
)
TABLES = ("history.csv", "layers.csv", "groups.csv", "validation.csv", "comparison.csv")


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert [path.name for path in RUN.write(tmp_path)] == list(TABLES)
    assert read_run(tmp_path) == RUN
    assert {path.name for path in tmp_path.iterdir()} == set(TABLES)


def test_what_was_not_logged_is_empty_and_has_no_file(tmp_path: Path) -> None:
    run = Run(history=[{"step": 1.0}])
    assert [path.name for path in run.write(tmp_path)] == ["history.csv"]
    found = read_run(tmp_path)
    assert (list(found.history), found.layers, found.groups) == ([{"step": 1.0}], {}, {})
    assert (list(found.validation), found.comparison) == ([], {})


def test_what_compare_measured_is_part_of_the_run(tmp_path: Path) -> None:
    RUN.write(tmp_path)
    (tmp_path / "comparison.csv").write_text("mask,val_loss,seconds\ndense,2.5,0\nwanda,3,1.5\n")
    assert read_run(tmp_path).comparison == {
        "dense": {"val_loss": 2.5, "seconds": 0},
        "wanda": {"val_loss": 3, "seconds": 1.5},
    }


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    message = (
        f"{str(tmp_path)!r} holds no history.csv: give the folder of a run that has come to its "
        f"end, such as lightning_logs/version_0, or an MLflow run and its --tracking_uri."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("table", "text", "line"),
    [
        ("history.csv", "step,loss\n1,0.5\n2,half\n", 3),
        ("history.csv", "step,loss\n1,0.5,7\n", 2),
        ("history.csv", "step,loss\n\xff", 1),
        ("history.csv", "step\n" + "1" * 200_000, 1),
        ("layers.csv", "changed\n0.5\n", 2),
        ("groups.csv", "layer,bin\na,0,1,2\n", 2),
        ("comparison.csv", "method,val_loss\ndense,1\n", 2),
    ],
)
def test_a_table_that_is_not_of_numbers_is_refused_by_its_line(
    tmp_path: Path, table: str, text: str, line: int
) -> None:
    RUN.write(tmp_path)
    (tmp_path / table).write_text(text, encoding="latin-1")
    where = re.escape(f"{str(tmp_path / table)!r} is no table of numbers")
    with pytest.raises(ValueError, match=f"^{where} at line {line}: "):
        read_run(tmp_path)


@given(content=st.binary(max_size=80), table=st.sampled_from(TABLES))
@settings(deadline=None, derandomize=True, database=None, max_examples=200)
def test_any_bytes_are_numbers_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, table: str
) -> None:
    folder = tmp_path_factory.mktemp("run")
    RUN.write(folder)
    (folder / table).write_bytes(content)
    try:
        found = read_run(folder)
    except ValueError as error:
        assert f"{table}' is no table of numbers" in str(error)  # noqa: PT017
        return
    rows = [*found.history, *found.layers.values(), *found.validation]
    assert all(isinstance(value, float) for row in rows for value in row.values())


def logged(folder: Path, module: pl.LightningModule, **kwargs: Any) -> tuple[Run, MaskProCallback]:
    callback = mask_callback("2:4", lr=FAST)
    logger = CSVLogger(folder, name="", version="")
    fit(module, callback, folder=folder, logger=logger, max_steps=8, log_every_n_steps=2, **kwargs)
    return read_run(folder), callback


def test_a_fit_leaves_what_its_figures_are_drawn_from(tmp_path: Path) -> None:
    class TwoMetrics(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log_dict({"val_loss": self.loss(batch), "five": 5.0})

    run, callback = logged(tmp_path, TwoMetrics())
    assert [row["step"] for row in run.history] == [2, 4, 6, 8]
    # Only what validations logged, which Lightning's own file holds as well.
    assert all(row.keys() == {"step", "val_loss", "five"} for row in run.validation)
    with (tmp_path / "metrics.csv").open() as file:
        losses = [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]]
    assert [row["val_loss"] for row in run.validation] == pytest.approx(losses, rel=1e-6)
    assert [row["step"] for row in run.validation] == [0, 4, 8]
    assert callback.optimizer is not None
    assert run.groups == histograms(callback.optimizer)
    assert all(len(rows) == BINS for rows in run.groups.values())
    assert run.layers.keys() == run.groups.keys() == {"net.0.weight", "net.2.weight"}


@pytest.mark.parametrize(
    ("every", "steps", "rows"),
    [(50, 8, [8]), (0, 8, [8]), (3, 8, [3, 6, 8]), (4, 8, [4, 8])],
    ids=["short", "never", "between", "even"],
)
def test_the_history_ends_with_the_fit(
    every: int, steps: int, rows: list[int], tmp_path: Path
) -> None:
    callback, logger = mask_callback("2:4", lr=FAST), CSVLogger(tmp_path, name="", version="")
    fit(Net(), callback, folder=tmp_path, logger=logger, max_steps=steps, log_every_n_steps=every)
    history = read_run(tmp_path).history
    assert [row["step"] for row in history] == rows
    # A mask that FAST has moved is no longer the initial one; the last row has all numbers.
    assert history[-1].keys() == {"step", *LAST_ROW}
    assert history[-1]["changed"] > 0


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # once in a process
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")  # there was nothing to step
def test_a_fit_without_any_loss_has_no_history(tmp_path: Path) -> None:
    class Skips(Net):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

    logger = CSVLogger(tmp_path, name="", version="")
    fit(Skips(), mask_callback(), folder=tmp_path, logger=logger, max_steps=8, max_epochs=1)
    with pytest.raises(ValueError, match=r"holds no history\.csv"):
        read_run(tmp_path)
