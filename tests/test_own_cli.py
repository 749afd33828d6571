"""Laws of a LightningCLI of one's own: patterns without quotes, and MLflow on a database."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from mlflow.tracking import MlflowClient
from modules import Net, loader

from maskpro_lightning import SaveConfig

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

CONFIG = """
seed_everything: 0
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 2
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    class_path: lightning.pytorch.loggers.MLFlowLogger
    init_args:
      tracking_uri: {uri}
  callbacks:
    - class_path: maskpro_lightning.MaskProCallback
      init_args:
        pattern: 1:4
        init: magnitude
"""


class WithData(Net):
    def train_dataloader(self) -> Any:
        return loader()


def own_cli(folder: Path, monkeypatch: pytest.MonkeyPatch, **how: Any) -> LightningCLI:
    """Runs a fit as a program of one's own does."""
    monkeypatch.chdir(folder)
    (folder / "config.yaml").write_text(CONFIG.format(uri=f"sqlite:///{folder}/mlflow.db"))
    monkeypatch.setattr(sys, "argv", ["own.py", "fit", "--config", "config.yaml"])
    return LightningCLI(WithData, **how)


def test_a_run_on_a_database_keeps_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = own_cli(tmp_path, monkeypatch, save_config_callback=SaveConfig)
    assert str(cli.trainer.callbacks[0].pattern) == "1:4"
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("lightning_logs").experiment_id])
    assert (run.info.status, run.data.params["maskpro/pattern"]) == ("FINISHED", "1:4")
    kept = yaml.safe_load(
        Path(client.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path))).read_text()
    )
    assert kept["trainer"]["max_steps"] == 2


def test_lightnings_own_way_to_keep_it_fails_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else there would be no need of ours."""
    with pytest.raises(AssertionError):
        own_cli(tmp_path, monkeypatch)
