"""An MLflow run's place, data and model; against a server, all that a user does with a run."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient
from modules import FAST, Net, loader, quiet_trainer
from rules import mask_callback
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from maskpro_lightning.catalog import resolve
from maskpro_lightning.cli import main
from maskpro_lightning.modules.language import TextData
from maskpro_lightning.tracking.loggers import Tracking
from maskpro_lightning.tracking.mlflow_run import PARENT, MLflowRun

# MLflow on SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


class MLFlowLogger:
    """Remembers what it is told, under the name that is looked for."""

    run_id, experiment_id, tracking_uri = "own", "7", ""

    def __init__(self) -> None:
        self.experiment = self
        self.tags: dict[str, str] = {}
        self.kinds = {"mlflow.experimentKind": "chosen"}
        self.ended: list[tuple[str, str]] = []
        self.inputs: list[Any] = []

    def set_tag(self, run_id: str, name: str, value: str) -> None:
        assert run_id == self.run_id
        self.tags[name] = value

    def get_experiment(self, number: str) -> Any:
        assert number == self.experiment_id
        return SimpleNamespace(tags=self.kinds)

    def set_experiment_tag(self, number: str, name: str, value: str) -> None:
        assert number == self.experiment_id
        self.kinds[name] = value

    def set_terminated(self, run_id: str, status: str) -> None:
        self.ended.append((run_id, status))

    def log_inputs(self, run_id: str, datasets: list[Any]) -> None:
        assert run_id == self.run_id
        self.inputs += datasets


class Trainer:
    """A trainer as far as a run looks at it."""

    fast_dev_run, default_root_dir = False, "."

    def __init__(self, datamodule: Any = None, rank: int = 0) -> None:
        self.loggers = [MLFlowLogger()]
        self.datamodule, self.is_global_zero = datamodule, rank == 0
        self.strategy = self
        self.told: Any = None

    def broadcast(self, found: Any) -> Any:
        return found if self.is_global_zero else self.told


def begun(trainer: Trainer) -> MLFlowLogger:
    run = MLflowRun(trainer, Tracking(trainer, "raise"))
    run.begin({"maskpro.pattern": "2:4"})
    run.end()
    return trainer.loggers[0]


@pytest.mark.parametrize("by", ["environment", "active", "itself", "nothing"])
def test_a_run_is_nested_under_the_parent_it_is_given(
    by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PARENT, raising=False)
    active = type("Run", (), {"info": type("Info", (), {"run_id": "sweep"})})
    if by == "environment":
        monkeypatch.setenv(PARENT, "sweep")
    elif by == "itself":
        monkeypatch.setenv(PARENT, "own")
    elif by == "active":
        monkeypatch.setattr(mlflow, "active_run", lambda: active)
    nested = {"mlflow.parentRunId": "sweep"} if by in ("environment", "active") else {}
    assert begun(Trainer()).tags == {"maskpro.pattern": "2:4"} | nested


def test_the_data_is_logged_if_it_tells_where_it_is_from(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words")
    files = dict.fromkeys(("train", "validation"), str(tmp_path / "text.txt"))
    data = TextData(
        resolve("quickstart/model"), "text", data_files=files, length=2, train_sequences=1
    )
    data.setup("fit")
    (logged,) = begun(Trainer(data)).inputs
    assert (logged.dataset.name, logged.dataset.source_type) == ("text", "hugging_face")
    assert logged.dataset.digest == data.provenance()["digest"]
    assert [(tag.key, tag.value) for tag in logged.tags] == [("mlflow.data.context", "training")]
    assert begun(Trainer(object())).inputs == []


@pytest.mark.parametrize("before", [{}, {"mlflow.experimentKind": "chosen"}])
def test_an_experiment_without_a_kind_is_one_that_trains_models(before: dict[str, str]) -> None:
    trainer = Trainer()
    trainer.loggers[0].kinds = dict(before)
    kind = begun(trainer).kinds["mlflow.experimentKind"]
    assert kind == before.get("mlflow.experimentKind", "custom_model_development")


class Observer(threading.Thread):
    """Lightning's, which kills all when a rank has died, as far as that is looked at."""

    def __init__(self, logger: MLFlowLogger) -> None:
        super().__init__(daemon=True, name="child-process-observer")
        self.seen: list[Any] = []
        self.logger, self.done = logger, threading.Event()

    def run(self) -> None:
        self.done.wait()

    def _terminate_all(self) -> None:
        self.seen.append(list(self.logger.ended))


@pytest.mark.parametrize("away", [False, True])
def test_before_lightning_kills_this_process_the_run_has_failed(
    away: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer()
    (logger,) = trainer.loggers
    observer = Observer(logger)
    observer.start()
    if away:  # a server that does not answer must not keep the others from dying
        monkeypatch.setattr(logger, "set_terminated", lambda *_: observer.done.wait())
        monkeypatch.setattr("maskpro_lightning.tracking.mlflow_run._PATIENCE", 0.01)
    run = MLflowRun(trainer, Tracking(trainer, "raise"))
    run.begin({})
    observer._terminate_all()
    assert observer.seen == [[] if away else [("own", "FAILED")]]
    run.end()
    observer._terminate_all()
    assert observer.seen[1:] == [observer.seen[0]], "one run fails once"
    observer.done.set()
    observer.join()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_does_not_log_ends_the_run_when_it_fails(rank: int, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    run_id = client.create_run("0").info.run_id
    trainer = Trainer(rank=rank)
    trainer.told = [(uri, run_id)]
    (logger,) = trainer.loggers
    vars(logger).update(run_id=run_id, tracking_uri=uri)
    run = MLflowRun(trainer, Tracking(trainer, "raise"))
    run.begin({})
    run.fail()
    assert client.get_run(run_id).info.status == ("FAILED" if rank else "RUNNING")
    assert logger.ended == [], "the logger does so itself"


def test_other_ranks_log_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PARENT, "sweep")
    assert begun(Trainer(rank=1)).tags == {}


# --- A server -------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with serving(tmp_path, free_port()) as uri:
        yield uri


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@contextmanager
def serving(tmp_path: Path, port: int) -> Iterator[str]:
    """A tracking server on a database; starting it takes half a minute."""
    store = ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    files = ["--artifacts-destination", str(tmp_path / "artifacts")]
    where = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *store, *files, *where],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def wait_for(uri: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(240):
        assert process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server did not start")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:mlflow", "ignore::UserWarning:mlflow")
def test_a_server_holds_a_run_that_is_resumed_and_its_model(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["maskpro"])
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
    client = MlflowClient(server)
    sweep = client.create_run(client.create_experiment("sweeps"), run_name="sweep")
    monkeypatch.setenv(PARENT, sweep.info.run_id)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=1024, **sizes, **heads)).save_pretrained("tiny")
    AutoTokenizer.from_pretrained(resolve("quickstart/model")).save_pretrained("tiny")
    options = [
        "--config=quickstart",
        f"--model.model={tmp_path / 'tiny'}",
        f"--data.tokenizer={tmp_path / 'tiny'}",
        "--data.train_sequences=32",
        "--data.val_sequences=4",
        "--data.length=16",
        "--data.batch_size=4",
        "--trainer.val_check_interval=2",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.logger.experiment_name=sweeps",
        f"--trainer.logger.tracking_uri={server}",
    ]
    main(["fit", *options, "--trainer.max_steps=4", "--trainer.logger.run_name=a fit"])
    (run,) = [r for r in client.search_runs(["1"]) if r.info.run_id != sweep.info.run_id]
    run_id = run.info.run_id
    assert (run.info.run_name, run.info.status) == ("a fit", "FINISHED")
    assert run.data.params["maskpro/pattern"] == "2:4"
    assert run.data.tags["mlflow.parentRunId"] == sweep.info.run_id
    assert run.data.tags["maskpro.estimator"] == "straight_through"
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.tags[0].value) == ("python-docs", "training")
    assert any(name.startswith("system/") for name in run.data.metrics)
    kept = {item.path for item in client.list_artifacts(run_id, "maskpro")}
    assert {f"maskpro/{n}" for n in ("masks.safetensors", "loss.png", "step=4")} <= kept

    # A resumed fit goes on in its run.
    (checkpoint,) = tmp_path.glob("runs/**/*.ckpt")
    resumed = [f"--trainer.logger.run_id={run_id}", f"--ckpt_path={checkpoint}"]
    main(["fit", *options, *resumed, "--trainer.max_steps=6"])
    points = client.get_metric_history(run_id, "maskpro/distillation_loss")
    assert [point.step for point in points] == list(range(6))
    assert len(client.search_runs(["1"])) == 2

    # The sparse model is logged to it, registered, and loads back.
    (checkpoint,) = set(tmp_path.glob("runs/**/*.ckpt")) - {checkpoint}
    resumed = [f"--trainer.logger.run_id={run_id}", f"--ckpt_path={checkpoint}"]
    main(["export", *options, *resumed, "--output=out", "--registered_name=tiny"])
    assert "MLflow model: models:/m-" in capsys.readouterr().out
    (version,) = client.search_model_versions("name='tiny'")
    assert version.run_id == run_id
    assert version.tags["maskpro.pattern"] == "2:4"
    assert [m.name for m in client.search_logged_models(["1"])] == ["a-fit-sparse-2-4"]
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(server)
    try:
        found = mlflow.transformers.load_model("models:/tiny/1", return_type="components")
    finally:
        mlflow.set_tracking_uri(before)
    exported = LlamaForCausalLM.from_pretrained("out").state_dict()
    assert exported.keys() == found["model"].state_dict().keys()
    assert all(torch.equal(v, exported[n]) for n, v in found["model"].state_dict().items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:mlflow", "ignore::FutureWarning:mlflow")
def test_any_module_is_logged_as_a_model_of_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.pytorch.loggers import MLFlowLogger as Logger

    from maskpro_lightning.tracking.mlflow_model import log_model

    logger = Logger(
        "any",
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
        artifact_location=(tmp_path / "artifacts").as_uri(),
    )
    module = Net()
    quiet_trainer(tmp_path, mask_callback(lr=FAST), max_steps=2).fit(module, loader())
    for name, step, value in (
        ("val_loss", 0, 4.0),
        ("val_loss", 2, 3.0),
        ("maskpro/best_step", 2, 2),
    ):
        logger.experiment.log_metric(logger.run_id, name, value, step=step)
    logger.experiment.set_tag(logger.run_id, "mlflow.note.content", "| a table |")
    before = mlflow.get_tracking_uri()
    # As after mlflow.set_experiment, with which no run of another experiment can be started.
    monkeypatch.setattr("mlflow.tracking.fluent._active_experiment_id", "another")
    uri = log_model(logger, module, registered_name="net", pattern="2:4")
    assert mlflow.tracking.fluent._active_experiment_id == "another"
    assert mlflow.get_tracking_uri() == before
    assert mlflow.active_run() is None
    (logged,) = logger.experiment.search_logged_models([logger.experiment_id])
    numbers = {metric.key: metric.value for metric in logged.metrics}
    assert numbers == {"val_loss": 3.0, "maskpro/best_step": 2.0}, "of the mask that is deployed"
    (version,) = logger.experiment.search_model_versions("name='net'")
    assert version.description == "| a table |"
    mlflow.set_tracking_uri(logger._tracking_uri)
    try:
        found = mlflow.pytorch.load_model(uri)
    finally:
        mlflow.set_tracking_uri(before)
    assert isinstance(found, Net)
    assert all(torch.equal(v, module.state_dict()[n]) for n, v in found.state_dict().items())


def test_a_run_without_psutil_goes_on_without_system_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lightning.pytorch.loggers import MLFlowLogger as Logger

    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    for name in [name for name in sys.modules if name.startswith("mlflow.system_metrics")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "psutil", None)
    logger = Logger("bare", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    # Where it makes the database, an older MLflow replaces the root's handlers.
    monkeypatch.setattr(logging.getLogger("maskpro_lightning"), "handlers", [caplog.handler])
    trainer = quiet_trainer(tmp_path, mask_callback(lr=FAST), max_steps=2, logger=logger)
    trainer.fit(Net(), loader())
    assert "without system metrics: pip install psutil." in caplog.text
    assert MlflowClient(logger._tracking_uri).get_run(logger.run_id).info.status == "FINISHED"
