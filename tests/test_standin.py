"""Laws of a tracker that is away when a fit starts: nothing is lost, and all is sent later."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import process_fit
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from modules import (
    FAST,
    Net,
    assert_masked,
    equal,
    fit,
    loader,
    logits,
    quiet_trainer,
    same_weights,
    traces,
)
from rules import mask_callback
from test_cli import tiny_options
from test_mlflow import FIGURES, FILES, Store, told
from test_mlflow_run import free_port, serving

from maskpro_lightning.cli import main
from maskpro_lightning.tracking.delivery import send
from maskpro_lightning.tracking.runs import UNSENT
from maskpro_lightning.tracking.standin import StandIn

# MLflow on SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")


@pytest.fixture
def down() -> str:
    """The address of no server."""
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes longer than all else in these tests."""
    monkeypatch.setattr("maskpro_lightning.tracking.plots.figures", lambda run: {})


class Configured(Net):
    """Has parameters of its own, too."""

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.save_hyperparameters()


def logged_fit(
    folder: Path, logger: Any, *callbacks: pl.Callback, module: Net | None = None, **kwargs: Any
) -> pl.Trainer:
    settings = {"max_steps": 8, "log_every_n_steps": 2} | kwargs
    module = Configured() if module is None else module
    return fit(module, *callbacks, folder=folder, logger=logger, **settings)


def points(store: Store, run: Run) -> set[tuple[str, int, float]]:
    return {
        (name, point.step, point.value)
        for name in run.data.metrics
        for point in store.client.get_metric_history(run.info.run_id, name)
    }


def run_folder(root: Path) -> Path:
    (folder,) = root.glob("unsent/*/maskpro")
    return folder


# --- the fit ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_figures")
def test_a_fit_whose_server_is_down_at_the_start_learns_the_same(
    down: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone, callback, module = mask_callback(lr=FAST), mask_callback(lr=FAST), Configured()
    logged_fit(tmp_path / "alone", False, alone)
    logger, save = MLFlowLogger("late", run_name="a/b", tracking_uri=down), ModelCheckpoint()
    trainer = logged_fit(tmp_path, logger, callback, save, module=module)
    assert equal(logits(alone), logits(callback))
    assert_masked(module, Net())
    assert trainer.loggers == [logger]
    folder = run_folder(tmp_path)
    assert folder.parent.name.startswith("a_b_")
    assert Path(save.best_model_path).parent == folder.parent / "checkpoints"
    (message,) = told(caplog)
    assert message.startswith("MLFlowLogger could not be opened, and the fit goes on without it: ")
    command = f"maskpro send {folder} --tracking_uri={down} --experiment=late"
    assert message.endswith(f". To send MLflow later what is missing: {command}")


@pytest.mark.usefixtures("no_figures")
def test_a_fit_without_its_server_leaves_nothing_behind_on_the_trainer(
    down: str, tmp_path: Path
) -> None:
    class Fails(pl.Callback):
        def __init__(self, hook: str) -> None:
            setattr(self, hook, self.fail)

        def fail(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
            seen.append(type(trainer.logger))
            raise RuntimeError("boom")

    def failed(hook: str, logger: Any) -> list[object]:
        callbacks, module = [Fails(hook), mask_callback(lr=FAST)], Net()
        trainer = quiet_trainer(tmp_path / hook, *callbacks, logger=logger, max_steps=4)
        with pytest.raises(RuntimeError, match="boom"):
            trainer.fit(module, loader(), loader(16))
        assert trainer.loggers == [logger]
        assert "setup_environment" not in vars(trainer.strategy)
        assert same_weights(module, Net()) == (hook != "on_fit_end")
        return traces(trainer, module)[:-1]

    seen: list[type] = []
    for hook in ("setup", "on_fit_start", "on_train_batch_end", "on_train_end", "on_fit_end"):
        absent = failed(hook, MLFlowLogger("late", tracking_uri=down))
        assert absent == failed(hook, CSVLogger(tmp_path))
    assert seen == [StandIn, CSVLogger] * 5


def test_a_server_that_is_down_at_the_start_ends_the_fit_if_asked_to(
    down: str, tmp_path: Path
) -> None:
    def failed(*callbacks: pl.Callback) -> list[object]:
        logger, module = MLFlowLogger("down", tracking_uri=down), Net()
        trainer = quiet_trainer(tmp_path, *callbacks, logger=logger, max_steps=8)
        with pytest.raises(Exception, match=r"127\.0\.0\.1"):
            trainer.fit(module, loader(), loader(16))
        assert same_weights(module, Net())
        return traces(trainer, module)

    assert failed(mask_callback(on_logger_error="raise")) == failed()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_figures")
def test_a_logger_beside_one_that_is_away_gets_all_and_has_the_folder(
    down: str, tmp_path: Path
) -> None:
    class Asks(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
            folders.extend(logger.log_dir for logger in trainer.loggers)

    folders: list[str | None] = []
    sound = CSVLogger(tmp_path, name="sound", version="")
    loggers = [sound, MLFlowLogger("late", tracking_uri=down)]
    trainer = logged_fit(tmp_path, loggers, mask_callback(lr=FAST), Asks())
    assert trainer.loggers == loggers
    assert folders == [sound.log_dir, None]
    assert (tmp_path / "sound" / "maskpro" / UNSENT).exists()
    assert not list(tmp_path.glob("unsent"))
    logged_fit(tmp_path, CSVLogger(tmp_path, name="alone", version=""), mask_callback(lr=FAST))
    texts = [(tmp_path / name / "metrics.csv").read_text() for name in ("sound", "alone")]
    assert texts[0] == texts[1]
    assert "maskpro/entropy" in texts[0]


@pytest.mark.usefixtures("no_figures")
def test_any_logger_may_be_away_and_is_asked_for_what_it_may_have(tmp_path: Path) -> None:
    class Away(CSVLogger):
        @property
        def experiment(self) -> Any:
            raise OSError("no route to host")

    class Early(pl.Callback):
        def setup(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
            trainer.loggers[0].log_hyperparams({"early": True})

    class Draws(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.logger.experiment.add_image("x", batch)
            self.logger.log_image("x", [batch])
            self.logger.log_metrics({"told": "a word", "own": torch.tensor(2.0)}, step=batch_idx)
            return super().training_step(batch, batch_idx)

    logged_fit(tmp_path, Away(tmp_path), Early(), mask_callback(lr=FAST), module=Draws())
    text = (run_folder(tmp_path) / UNSENT).read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert {row["logger"] for row in rows} == {"Away"}
    assert rows[0]["parameters"] == {"early": "True"}
    own = [row for row in rows if "own" in row.get("metrics", {})]
    # Once for each of two epochs of four batches, and not by the baseline's pass.
    assert [row["step"] for row in own] == [0, 1, 2, 3] * 2
    assert all(row["metrics"] == {"own": 2.0} for row in own)


@pytest.mark.usefixtures("no_figures")
def test_the_next_fit_finds_the_server_that_is_back(
    down: str, store: Store, tmp_path: Path
) -> None:
    logger = store.logger("back")
    client = logger._mlflow_client
    logger._mlflow_client = MLFlowLogger(tracking_uri=down)._mlflow_client
    trainer = logged_fit(tmp_path, logger, mask_callback(lr=FAST))
    logger._mlflow_client = client
    trainer.fit_loop.epoch_loop.max_steps = 12
    trainer.fit(Configured(), loader(), loader(16))
    assert store.steps(store.only_run("back"), "maskpro/loss") == [9, 11]


def ranks_do(task: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, process_fit.__file__, task, str(folder), "2"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_two_ranks_agree_on_a_folder_and_go_on(tmp_path: Path) -> None:
    done = ranks_do("away", tmp_path)
    assert (done.stdout + done.stderr).count("could not be opened") == 1
    told = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert all(each["kept"] for each in told)
    assert equal(told[0]["logits"], told[1]["logits"])
    folder = run_folder(tmp_path)
    assert {Path(each["saved"]).parent for each in told} == {folder.parent / "checkpoints"}
    rows = [json.loads(line) for line in (folder / UNSENT).read_text().splitlines()]
    steps = [row["step"] for row in rows if "maskpro/entropy" in row.get("metrics", {})]
    assert steps == [1, 3]


@pytest.mark.slow
def test_ranks_that_learn_late_which_one_they_are_open_one_run(tmp_path: Path) -> None:
    ranks_do("spawned", tmp_path)
    assert Store(tmp_path).only_run("ranks").info.status == "FINISHED"


def test_in_the_other_lightning_too(down: str, tmp_path: Path) -> None:
    other: Any = pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.loggers import MLFlowLogger as OtherLogger

    class Other(other.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net().net

        training_step, configure_optimizers = Net.training_step, Net.configure_optimizers
        loss = Net.loss

    logger, callback = OtherLogger("late", tracking_uri=down), mask_callback(lr=FAST)
    trainer = other.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[callback],
        default_root_dir=tmp_path,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=4,
        log_every_n_steps=2,
    )
    trainer.fit(Other(), loader())
    assert trainer.loggers == [logger]
    assert (run_folder(tmp_path) / UNSENT).exists()


# --- sent later ---------------------------------------------------------------------------------


def test_what_was_kept_is_sent_and_the_run_is_as_if_nothing_had_happened(
    down: str, store: Store, tmp_path: Path
) -> None:
    for name, uri in (("live", store.uri), ("late", down)):
        logger = MLFlowLogger(name, tracking_uri=uri, artifact_location=str(tmp_path / "files"))
        pl.seed_everything(0, verbose=False)
        logged_fit(tmp_path / name, logger, mask_callback(lr=FAST))
    folder = run_folder(tmp_path / "late")
    run_id = send(folder, store.uri, experiment="late")
    assert send(folder, store.uri, run_id) == run_id  # again does no harm
    late = store.only_run("late")
    live = store.only_run("live")
    assert live.data.params.keys() > {"rate", "maskpro/pattern"}
    assert late.data.params == live.data.params
    ours = {name: value for name, value in live.data.tags.items() if name.startswith("maskpro")}
    assert ours.items() <= late.data.tags.items()
    assert points(store, late) == points(store, live)
    assert len(points(store, live)) > 50
    assert store.artifacts(late) == FILES | FIGURES | {UNSENT, "parameters.json"}
    assert (late.info.status, late.info.run_name) == ("FINISHED", folder.parent.name)
    (kept,) = (tmp_path / "live").rglob("result.json")  # with nothing that was not sent
    send(kept.parent, store.uri, experiment="again")
    again = store.only_run("again")
    described = [run.data.tags["mlflow.note.content"] for run in (again, live)]
    assert described[0] == described[1]
    results = {name for name in live.data.metrics if name.endswith(("sparsity", "best_step"))}
    assert len(results) == 2
    assert {name: again.data.metrics[name] for name in results} == {
        name: live.data.metrics[name] for name in results
    }


@pytest.mark.slow
def test_a_run_of_the_command_line_is_sent_by_the_command_it_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["maskpro"])
    port, options = free_port(), tiny_options(tmp_path, monkeypatch)
    main(["fit", *options, f"--trainer.logger.tracking_uri=http://127.0.0.1:{port}"])
    assert list(tmp_path.glob("runs/unsent/*/checkpoints/*.ckpt"))
    (message,) = told(caplog)
    command = shlex.split(message.rpartition(": ")[2])
    with serving(tmp_path, port) as uri:
        main(command[1:])
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name("maskpro")
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id])
        names = {item.path for item in client.list_artifacts(run.info.run_id)}
        assert names == {"config.yaml", "maskpro"}
        config = client.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path))
        assert "estimator: straight_through" in Path(config).read_text()
        points = client.get_metric_history(run.info.run_id, "maskpro/distillation_loss")
        assert [point.step for point in points] == [0, 1, 2, 3]
        assert "val_loss" in run.data.metrics
        assert run.data.params["maskpro/pattern"] == "2:4"
        assert run.data.params["model"] == str(tmp_path / "tiny")
        assert run.info.run_name.startswith("quickstart_")
