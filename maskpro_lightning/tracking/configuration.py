"""Keeps the configuration of a command line's run where its loggers keep files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.cli import SaveConfigCallback

from maskpro_lightning.files.atomic import write_text
from maskpro_lightning.tracking.credentials import without_credentials


class SaveConfig(SaveConfigCallback):
    """Keeps a run's configuration as ``config.yaml`` with every logger that keeps files.

    For a ``LightningCLI`` of your own: ``LightningCLI(Module, save_config_callback=SaveConfig)``.
    Lightning's own ends in an AssertionError if a logger has no folder, such as an ``MLFlowLogger``
    on a database or a server. Users and passwords are not written.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        config = without_credentials(self.parser.dump(self.config, skip_none=False))
        for logger in trainer.loggers:
            if type(logger).__name__ == "MLFlowLogger":
                logger.experiment.log_text(logger.run_id, config, "config.yaml")
            elif logger.log_dir is not None:
                Path(logger.log_dir).mkdir(parents=True, exist_ok=True)
                write_text(Path(logger.log_dir, "config.yaml"), config)
