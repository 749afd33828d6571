"""Laws of what a fit tells its loggers, MLflow before all, and of loggers that fail."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import process_fit
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from modules import FAST, Net, fit, learned, loader, quiet_trainer, versions_held
from process_group import run_group
from rules import mask_callback

from maskpro_lightning import NMPattern, load_masks

# MLflow on SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

FILES = {"masks.safetensors", "history.csv", "layers.csv", "groups.csv", "validation.csv"}
FILES |= {"comparison.csv", "parameters.json", "result.json"}
FIGURES = {
    f"{name}.png"
    for name in ("loss", "exploration", "signal", "validation", "layers", "groups", "confidence")
}


class Store:
    """A tracking database in a file, and the runs in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.client = MlflowClient(self.uri)

    def logger(self, experiment: str, **kwargs: Any) -> MLFlowLogger:
        artifacts = (self.folder / experiment).as_uri()
        return MLFlowLogger(
            experiment, tracking_uri=self.uri, artifact_location=artifacts, **kwargs
        )

    def only_run(self, experiment: str) -> Run:
        found = self.client.get_experiment_by_name(experiment)
        assert found is not None
        (run,) = self.client.search_runs([found.experiment_id])
        return run

    def steps(self, run: Run, metric: str) -> list[int]:
        return [point.step for point in self.client.get_metric_history(run.info.run_id, metric)]

    def artifacts(self, run: Run, folder: str = "maskpro") -> set[str]:
        found = set()
        for item in self.client.list_artifacts(run.info.run_id, folder):
            inside = self.artifacts(run, item.path) if item.is_dir else {item.path}
            found |= {path.removeprefix("maskpro/") for path in inside}
        return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("mlflow"))


def logged_fit(folder: Path, logger: Any, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    settings = {"max_steps": 8, "log_every_n_steps": 2} | kwargs
    return fit(Net(), *callbacks, folder=folder, logger=logger, **settings)


# --- MLflow -------------------------------------------------------------------------------------


def test_one_run_holds_parameters_metrics_and_files(store: Store, tmp_path: Path) -> None:
    callback = mask_callback("2:4", lr=FAST, init="random", seed=3)
    save = ModelCheckpoint(tmp_path, every_n_train_steps=4)
    logged_fit(tmp_path, store.logger("one"), callback, save)
    run = store.only_run("one")
    assert run.info.status == "FINISHED"
    assert (
        run.data.params.items()
        >= {
            "maskpro/model": "Net",
            "maskpro/steps": "8",
            "maskpro/precision": "32-true",
            "maskpro/strategy": "SingleDeviceStrategy",
            "maskpro/ranks": "1",
            "maskpro/memory": "plain",
            "maskpro/monitor": "val_loss",
            "maskpro/pattern": "2:4",
            "maskpro/init": "random",
            "maskpro/lr": "3.0",
            "maskpro/seed": "3",
            "maskpro/layers": "2",
            "maskpro/masked_weights": "512",
            "maskpro/masked_share": "0.9412",
        }.items()
    )
    assert not {"None", "[]", "{}"} & set(run.data.params.values()), "what was not given"
    assert store.steps(run, "maskpro/entropy") == [1, 3, 5, 7]
    assert store.steps(run, "maskpro/residual") == [1, 3, 5, 7]
    assert not [name for name in run.data.metrics if "net.0" in name], "a chart for each layer"
    experiment = store.client.get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    distributions = {f"step={step}/distributions.safetensors" for step in (4, 8)}
    assert store.artifacts(run) == FILES | FIGURES | distributions

    path = store.client.download_artifacts(run.info.run_id, "maskpro/masks.safetensors", tmp_path)
    masks = load_masks(path, NMPattern(2, 4))
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        name: mask.tolist() for name, mask in learned(callback).items()
    }


def test_distributions_are_not_kept_unless_asked_for(store: Store, tmp_path: Path) -> None:
    callback = mask_callback(log_distributions=False)
    save = ModelCheckpoint(tmp_path, every_n_train_steps=4)
    logged_fit(tmp_path, store.logger("lean"), callback, save)
    assert store.artifacts(store.only_run("lean")) == FILES | FIGURES


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_fit_goes_on_in_its_run_with_the_parameters_it_had(
    store: Store, tmp_path: Path
) -> None:
    class Status(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            statuses.add(store.only_run("resumed").info.status)

    statuses: set[str] = set()
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    logged_fit(tmp_path, store.logger("resumed"), mask_callback(lr=0.5), save, max_steps=4)
    run_id = store.only_run("resumed").info.run_id
    logger = store.logger("resumed", run_id=run_id)
    again, path = mask_callback(lr=0.25), tmp_path / "step=4.ckpt"
    logged_fit(tmp_path, logger, again, save, Status(), ckpt_path=path)
    run = store.only_run("resumed")
    assert (statuses, run.info.status) == ({"RUNNING"}, "FINISHED")
    assert run.data.params["maskpro/lr"] == "0.5"
    assert store.steps(run, "maskpro/entropy") == [1, 3, 5, 7]
    history = store.client.download_artifacts(run.info.run_id, "maskpro/history.csv", tmp_path)
    rows = Path(history).read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "2", "4", "6", "8"]


def test_a_fit_that_fails_leaves_a_failed_run(store: Store, tmp_path: Path) -> None:
    class Fails(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        logged_fit(tmp_path, store.logger("failed"), mask_callback(), Fails())
    assert store.only_run("failed").info.status == "FAILED"


def test_a_fit_outlives_its_mlflow_server(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def log_batch(*_: Any, **__: Any) -> None:
        raise ConnectionError("the server is gone")

    class Unplugs(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                monkeypatch.setattr(MlflowClient, "log_batch", log_batch)

    trainer = logged_fit(tmp_path, store.logger("gone"), mask_callback(lr=FAST), Unplugs())
    assert trainer.global_step == 8
    assert store.steps(store.only_run("gone"), "maskpro/entropy") == [1]
    assert told(caplog) == [
        "MLFlowLogger failed and gets nothing more of this fit, which goes on: the server is gone"
    ]


@pytest.mark.slow
def test_two_ranks_log_one_run(store: Store) -> None:
    command = [sys.executable, process_fit.__file__, "mlflow", str(store.folder), "2"]
    done = subprocess.run(
        command, cwd=store.folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = store.only_run("ranks")
    assert run.info.status == "FINISHED"
    assert run.data.params["maskpro/pattern"] == "2:4"
    assert store.steps(run, "maskpro/entropy") == [1, 3]
    logits = {f"step={step}/distributions.safetensors" for step in (2, 4)}
    assert store.artifacts(run) == FILES | FIGURES | logits


@pytest.mark.slow
@pytest.mark.parametrize("task", ["first_dies", "second_dies"])
def test_a_rank_that_is_killed_ends_the_other_and_fails_the_run(task: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    command = [sys.executable, process_fit.__file__, task, str(tmp_path), "2"]
    status, told = run_group(command)
    assert status != 0
    survivor = {"first_dies": 1, "second_dies": 0}[task]
    assert f"[rank{survivor}]: RuntimeError: " in told
    assert store.only_run("ranks").info.status == "FAILED"


# --- loggers that fail --------------------------------------------------------------------------


def broken(folder: Path, method: str) -> tuple[CSVLogger, list[str]]:
    """A logger one of whose methods raises, and the calls that it got."""
    calls: list[str] = []

    def fail(*_: Any, **__: Any) -> None:
        calls.append(method)
        raise OSError(f"no space left for {method}")

    return type("Broken", (CSVLogger,), {method: fail})(folder, name="broken"), calls


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes longer than all else in these tests."""
    monkeypatch.setattr("maskpro_lightning.tracking.plots.figures", lambda run: {})


METHODS = ["log_metrics", "log_hyperparams", "save", "after_save_checkpoint", "finalize"]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "maskpro_lightning.tracking.loggers" and record.levelno == logging.WARNING
    ]


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("method", METHODS)
def test_a_logger_that_fails_is_told_once_and_left_alone(
    method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad, calls = broken(tmp_path, method)
    sound = CSVLogger(tmp_path, name="sound", version="")
    save = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=4)
    trainer = logged_fit(tmp_path, [bad, sound], mask_callback(lr=FAST), save)
    assert trainer.global_step == 8
    assert calls == [method]
    (message,) = told(caplog)
    assert message.startswith("Broken failed and gets nothing more of this fit, which goes on: ")
    assert message.endswith(f"no space left for {method}")
    rows = (tmp_path / "sound" / "metrics.csv").read_text().splitlines()
    assert "maskpro/entropy" in rows[0]
    # A header, four updates; of each epoch a mean and a validation, one of the initial mask, and
    # the result.
    assert len(rows) == 1 + 4 + 2 * 2 + 1 + 1


@pytest.mark.parametrize("method", METHODS)
def test_a_logger_that_fails_ends_the_fit_if_asked_to(method: str, tmp_path: Path) -> None:
    module, callback = Net(), mask_callback(lr=FAST, on_logger_error="raise")
    save = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=4)
    logger, _ = broken(tmp_path, method)
    trainer = quiet_trainer(
        tmp_path, callback, save, max_steps=8, log_every_n_steps=2, logger=logger
    )
    with pytest.raises(OSError, match=f"no space left for {method}"):
        trainer.fit(module, loader(), loader(16))
    # A logger that fails in its last call finds the fit done.
    held = {"mode"} if method == "finalize" else {"dense"}
    assert versions_held(module, callback) == held


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_nothing_is_left_on_loggers(on_error: Any, tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, name=str(number)) for number in range(2)]
    before = [sorted(vars(logger)) for logger in loggers]
    logged_fit(tmp_path, loggers, mask_callback(on_logger_error=on_error))
    assert [sorted(vars(logger)) for logger in loggers] == before
