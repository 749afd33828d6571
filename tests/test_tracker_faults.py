"""Laws of trackers that are down, die, are slow or full, and of what must not be told to them."""

from __future__ import annotations

import errno
import logging
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger
from mlflow.tracking import MlflowClient
from modules import (
    FAST,
    Net,
    assert_masked,
    equal,
    fit,
    learned,
    linear,
    loader,
    logits,
    quiet_trainer,
    same_weights,
)
from rich.console import Console
from rules import mask_callback, mask_optimizer
from test_mlflow import FIGURES, FILES, Store, told
from torch import nn

from maskpro_lightning import NMPattern, save_masks
from maskpro_lightning.cli import main
from maskpro_lightning.commands.advice import tell_mlflow
from maskpro_lightning.files.export import save_distributions
from maskpro_lightning.tracking.configuration import SaveConfig
from maskpro_lightning.tracking.credentials import without_credentials
from maskpro_lightning.tracking.delivery import send
from maskpro_lightning.tracking.runs import UNSENT

# MLflow on SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes longer than all else in these tests."""
    monkeypatch.setattr("maskpro_lightning.tracking.plots.figures", lambda run: {})


def logged_fit(folder: Path, logger: Any, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    settings = {"max_steps": 8, "log_every_n_steps": 2} | kwargs
    return fit(Net(), *callbacks, folder=folder, logger=logger, **settings)


def points(store: Store, experiment: str) -> list[tuple[str, int, float]]:
    """Name, step and value of every point of every metric in an experiment's run."""
    run = store.only_run(experiment)
    return [
        (name, point.step, point.value)
        for name in sorted(run.data.metrics)
        for point in store.client.get_metric_history(run.info.run_id, name)
    ]


# --- a server that is away ----------------------------------------------------------------------


def test_what_a_dead_server_missed_is_sent_later(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("the server is gone")

    class Unplugs(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                for name in ("log_batch", "log_artifact", "set_terminated", "get_run"):
                    patch.setattr(MlflowClient, name, refuse)

    logged_fit(tmp_path / "whole", store.logger("whole"), mask_callback(lr=FAST))
    with monkeypatch.context() as patch:
        logger = store.logger("dead")
        logged_fit(tmp_path, logger, mask_callback(lr=FAST), Unplugs())
    run = store.only_run("dead")
    assert store.artifacts(run) == {"parameters.json"}  # of the start
    assert max(step for _, step, _ in points(store, "dead")) == 1
    (folder,) = tmp_path.glob("[0-9]*/*/maskpro")
    assert send(folder, store.uri, run.info.run_id) == run.info.run_id
    sent = points(store, "dead")
    assert set(sent) == set(points(store, "whole"))
    send(folder, store.uri, run.info.run_id)  # again does no harm
    assert points(store, "dead") == sent
    run = store.only_run("dead")
    assert store.artifacts(run) == FILES | FIGURES | {UNSENT, "parameters.json"}
    assert run.data.params == store.only_run("whole").data.params
    assert run.info.status == "FINISHED"


@pytest.mark.usefixtures("no_figures")
def test_a_run_without_a_server_is_sent_to_one_from_the_command_line(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = CSVLogger(tmp_path, name="alone", version="")
    logged_fit(tmp_path, logger, mask_callback(lr=FAST, seed=4))
    folder = tmp_path / "alone" / "maskpro"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["maskpro"])
        main(["send", str(folder), f"--tracking_uri={store.uri}", "--experiment=late"])
    run = store.only_run("late")
    assert f"Sent to run {run.info.run_id}" in capsys.readouterr().out
    assert run.info.run_name == "alone"
    assert run.data.params["maskpro/seed"] == "4"
    assert store.steps(run, "maskpro/residual") == [1, 3, 5, 7]
    assert store.artifacts(run) == FILES | {"parameters.json"}


def test_a_folder_that_holds_no_run_is_not_sent(store: Store, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no files of a run: give its folder"):
        send(tmp_path, store.uri)
    assert store.client.get_experiment_by_name("maskpro") is None


@pytest.mark.usefixtures("no_figures")
def test_a_slow_logger_changes_nothing_and_is_called_as_seldom_as_any(tmp_path: Path) -> None:
    class Slow(CSVLogger):
        calls = 0

        def log_metrics(self, *args: Any, **kwargs: Any) -> None:
            Slow.calls += 1
            time.sleep(0.02)
            super().log_metrics(*args, **kwargs)

    callbacks = [mask_callback(lr=FAST) for _ in range(2)]
    logged_fit(tmp_path, CSVLogger(tmp_path), callbacks[0])
    logged_fit(tmp_path, Slow(tmp_path), callbacks[1])
    assert equal(*map(logits, callbacks))
    # Four updates; of each epoch a mean and a validation, one of the initial mask, and the result.
    assert Slow.calls == 4 + 2 * 2 + 1 + 1


# --- a disk that is full ------------------------------------------------------------------------


def fill_the_disk_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file's temporary name lead to a device without space."""
    monkeypatch.setattr("maskpro_lightning.files.atomic.uuid4", lambda: UUID(int=0))
    path.with_name(f".{path.name}.{'0' * 8}.partial").symlink_to("/dev/full")


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    "full",
    ["save_masks", "save_distributions", "history.csv", "parameters.json", "figures", "folder"],
)
def test_a_full_disk_costs_no_fit_and_is_told_once(
    full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path / "run" / "maskpro"
    if full == "folder":
        folder.parent.mkdir()
        folder.touch()  # a file where the folder should be
    elif full == "figures":
        monkeypatch.setattr("maskpro_lightning.tracking.plots.figures", fail)
    elif full.startswith("save"):
        monkeypatch.setattr(f"maskpro_lightning.tracking.journal.{full}", fail)
    else:
        folder.mkdir(parents=True)
        fill_the_disk_for(folder / full, monkeypatch)
    callback, logger = mask_callback(lr=FAST), CSVLogger(tmp_path, name="run", version="")
    save = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=2, save_top_k=-1)
    module = Net()
    fit(module, callback, save, folder=tmp_path, logger=logger, max_steps=8, log_every_n_steps=2)
    assert_masked(module, Net())
    (message,) = told(caplog)
    assert "could not be written, and the fit goes on: " in message
    if full != "folder":
        assert message.endswith("No space left on device")


@pytest.mark.usefixtures("no_figures")
def test_a_full_disk_ends_the_fit_if_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run" / "maskpro"
    folder.mkdir(parents=True)
    fill_the_disk_for(folder / "history.csv", monkeypatch)
    module, callback = Net(), mask_callback(lr=FAST, on_logger_error="raise")
    logger = CSVLogger(tmp_path, name="run", version="")
    trainer = quiet_trainer(tmp_path, callback, logger=logger, max_steps=4, log_every_n_steps=2)
    with pytest.raises(OSError, match="No space left on device"):
        trainer.fit(module, loader(), loader(16))
    assert same_weights(module, Net())
    assert learned(callback)  # nothing learned is lost


# --- secrets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:secret@host:5000/x", "http://***@host:5000/x"),
        ("postgresql+psycopg2://me:s@cret@host/db", "postgresql+psycopg2://***@host/db"),
        ("to https://me:a@h and https://you:b@h", "to https://***@h and https://***@h"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("http://host:5000 by me@host", "http://host:5000 by me@host"),
        ("password hush!, token hash", "password ***, token ***"),
    ],
)
def test_urls_are_shown_without_users_and_passwords(
    text: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hush!")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hash")
    assert without_credentials(text) == shown


@pytest.mark.usefixtures("no_figures")
def test_no_secret_is_logged_printed_or_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Broken(CSVLogger):
        def log_metrics(self, *_: Any, **__: Any) -> None:
            raise ConnectionError(f"{uri} refused me and s3cr3t-password")

    uri = "https://me:s3cr3t@host:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cr3t-password")
    caplog.set_level(logging.DEBUG)
    trainer = logged_fit(tmp_path, Broken(tmp_path), mask_callback())
    config = SaveConfig(SimpleNamespace(dump=lambda *_, **__: f"tracking_uri: {uri}"), None)
    config.save_config(trainer, None, "fit")
    mlflow = MLFlowLogger("secret", tracking_uri=uri)
    tell_mlflow([mlflow], Console(), {}, "")
    printed = capsys.readouterr().out
    assert "backend-store-uri https://***@host:5000" in printed
    written = [path.read_text(errors="ignore") for path in tmp_path.rglob("*") if path.is_file()]
    assert any("tracking_uri: https://***@host:5000" in text for text in written)
    assert told(caplog)
    for text in (caplog.text, printed, *written):
        assert "s3cr3t" not in text


# --- names --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_figures")
def test_layers_may_be_named_like_paths(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential()
            for number, name in enumerate(("/etc", "a//b")):
                self.net.add_module(name, linear(16, number))

    fit(Odd(), mask_callback(), folder=tmp_path, logger=store.logger("odd"), max_steps=4)
    assert told(caplog) == []
    run = store.only_run("odd").info.run_id
    layers = store.client.download_artifacts(run, "maskpro/layers.csv", str(tmp_path))
    assert "net./etc.weight" in Path(layers).read_text()


def test_no_name_of_a_weight_leaves_the_folder(tmp_path: Path) -> None:
    weights = {name: nn.Parameter(torch.ones(4, 4)) for name in ("../../x", "/tmp/y", "..")}
    optimizer = mask_optimizer(weights.items())
    optimizer.begin()
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    save_masks(optimizer.masks(), NMPattern(2, 4), folder / "masks.safetensors")
    save_distributions(optimizer, folder / "distributions.safetensors")
    files = {path.relative_to(folder).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"masks.safetensors", "distributions.safetensors"}
    assert not os.path.lexists("/tmp/y")
