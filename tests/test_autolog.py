"""Laws of MLflow's autologging beside the callback: one run, and every number in it once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# In a process of its own, since autologging patches the Trainer for good.
FIT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import mlflow
from lightning.pytorch.loggers import MLFlowLogger
from modules import Net, loader, quiet_trainer
from rules import mask_callback

how, folder = sys.argv[1:]
uri = f"sqlite:///{folder}/mlflow.db"
mlflow.set_tracking_uri(uri)
mlflow.set_experiment("x")
mlflow.pytorch.autolog(log_models=False, checkpoint=False)

class Validated(Net):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

def fit(logger):
    how_often = {"max_epochs": 2, "log_every_n_steps": 1}
    trainer = quiet_trainer(folder, mask_callback(), logger=logger, **how_often)
    trainer.fit(Validated(), loader(), loader(16))

if how == "given":
    with mlflow.start_run() as run:
        fit(MLFlowLogger(run_id=run.info.run_id, tracking_uri=uri))
elif how == "beside":
    fit(MLFlowLogger("x", tracking_uri=uri, run_name="ours"))
else:
    fit(False)
client = mlflow.MlflowClient(uri)
print(json.dumps([
    {
        name: [point.step for point in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    for run in client.search_runs(["1"])
]))
"""


def runs(how: str, folder: Path) -> tuple[list[dict[str, list[int]]], str]:
    """The steps of every metric of every run that a fit made, and what it warned of."""
    tests = str(Path(__file__).parent)
    path = os.pathsep.join([tests, *sys.path])
    found = subprocess.run(
        [sys.executable, "-c", FIT, how, str(folder)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    result: Any = json.loads(found.stdout.splitlines()[-1])
    return result, found.stderr


@pytest.mark.slow
def test_a_logger_with_autologs_run_makes_one_run_with_every_number_once(tmp_path: Path) -> None:
    (run,), warned = runs("given", tmp_path)
    assert run["maskpro/loss"] == list(range(8))
    assert run["val_loss"] == [0, 3, 7]
    assert "autolog" not in warned


@pytest.mark.slow
def test_beside_a_logger_of_its_own_autolog_repeats_no_number(tmp_path: Path) -> None:
    found, warned = runs("beside", tmp_path)
    assert min(map(len, found)) == 0
    assert sum("maskpro/loss" in run for run in found) == 1
    assert "mlflow.pytorch.autolog() logs nothing of this fit" in warned


@pytest.mark.slow
def test_autolog_alone_logs_once_an_epoch(tmp_path: Path) -> None:
    (run,), warned = runs("alone", tmp_path)
    assert run["maskpro/loss"] == run["val_loss"] == [0, 1]
    assert "logs nothing" not in warned
