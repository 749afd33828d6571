"""Writes the files of a fit, history, masks, logits and figures, and hands them to the loggers."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskpro_lightning.files.atomic import write_text
from maskpro_lightning.files.export import save_distributions
from maskpro_lightning.files.maskfiles import save_masks
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.optim.masked_weight import Version
from maskpro_lightning.optim.optimizer import MaskPro
from maskpro_lightning.tracking.loggers import Tracking
from maskpro_lightning.tracking.metrics import histograms
from maskpro_lightning.tracking.runs import HISTORY, PARAMETERS, Run, title_of

_log = logging.getLogger(__name__)
# Longer histories keep every other row, so that a run of any length fits in memory.
_MOST_ROWS = 4096


class Journal:
    """Keeps the rows that were logged, and writes a run's files into one folder.

    The history is part of the callback's state, so the figures of a resumed run show all of it.
    """

    def __init__(self) -> None:
        self._folder = Path("maskpro")
        #: Whether this fit keeps files.
        self.keeps = False
        self._writes = False
        self._parameters: dict[str, Any] = {}
        self._rows: list[dict[str, float]] = []
        self._layers: dict[str, dict[str, float]] = {}
        self._validation: list[dict[str, float]] = []
        self._comparison: dict[str, dict[str, float]] = {}

    def open(self, folder: Path, keeps: bool, writes: bool) -> None:
        """Start a run.

        Args:
            folder: The folder of its files.
            keeps: Whether it keeps files.
            writes: Whether this rank writes them.
        """
        self._folder, self.keeps, self._writes = folder, keeps, keeps and writes

    def parameters(self, parameters: Mapping[str, Any], tracking: Tracking) -> None:
        """Log a fit's parameters, and keep them in the folder."""
        found = {**parameters, **tracking.circumstances()}
        self._parameters = {k: v for k, v in found.items() if v is not None and v != []}
        tracking.parameters(self._parameters)
        if self._writes:
            path, text = self._folder / PARAMETERS, json.dumps(self._parameters, indent=2)
            if tracking.write(path, lambda: write_text(path, text)):
                tracking.file(path)

    def training(self, step: int, values: Mapping[str, Any]) -> None:
        """Add a row to the history."""
        self._rows.append({"step": step, **{name: float(v) for name, v in values.items()}})
        if len(self._rows) > _MOST_ROWS:
            self._rows = self._rows[::2]

    def knows(self, step: int) -> bool:
        """Whether the last row of the history is of this step."""
        return bool(self._rows) and self._rows[-1]["step"] == step

    def layers(self, layers: Mapping[str, Mapping[str, float]]) -> None:
        """Remember the latest statistics of each layer."""
        self._layers = {name: dict(values) for name, values in layers.items()}

    def validation(self, step: int, values: Mapping[str, Any]) -> None:
        """Add what the module logged in a validation under the most likely mask."""
        self._validation.append({"step": step, **{name: float(v) for name, v in values.items()}})

    def compare(self, what: str, values: Mapping[str, Any]) -> None:
        """Remember what the module logged in a validation of other weights, such as "dense"."""
        self._comparison[what] = {name: float(v) for name, v in values.items()}

    def distributions(self, optimizer: MaskPro, tracking: Tracking, step: int) -> None:
        """Write the logits and hand them to the loggers, in a folder of the step.

        Logits of sharded weights are not written: no rank is to hold them all, and checkpoints have
        them.
        """
        if self._writes and not optimizer.sharded:
            path = self._folder / "distributions.safetensors"
            if tracking.write(path, lambda: save_distributions(optimizer, path)):
                tracking.file(path, f"step={step}")

    def close(self, optimizer: MaskPro, deployed: Version, tracking: Tracking) -> None:
        """Write the deployed masks, the history and the figures; a collective."""
        if not self.keeps or not optimizer.begun:
            return
        masks = {n: m.cpu() for n, m in optimizer.whole_masks(deployed) if self._writes}
        found = histograms(optimizer)
        if not self._writes:
            return
        pattern = NMPattern.parse(optimizer.param_groups[0]["pattern"])
        path, history = self._folder / "masks.safetensors", self._folder / HISTORY
        if tracking.write(path, lambda: save_masks(masks, pattern, path)):
            tracking.file(path)
        if not self._rows:
            return
        title = title_of(self._parameters, self._folder)
        compared = self._comparison
        run = Run(self._rows, self._layers, found, self._validation, compared, title)
        tables: list[Path] = []
        tracking.write(history, lambda: tables.extend(run.write(self._folder)))
        for path in tables:
            tracking.file(path)
        tracking.write(self._folder / "figures", lambda: self._draw(run, tracking))

    def _draw(self, run: Run, tracking: Tracking) -> None:
        try:
            from maskpro_lightning.tracking import plots
        except ModuleNotFoundError:
            _log.info("No figures without matplotlib: pip install 'maskpro-lightning[plots]'.")
            return
        for name, figure in plots.figures(run).items():
            tracking.figure(self._folder / f"{name}.png", figure)

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": self._rows,
            "layers": self._layers,
            "validation": self._validation,
            "comparison": self._comparison,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._rows = [_numbers(row) for row in state_dict["rows"]][-_MOST_ROWS:]
        self._layers = {str(name): _numbers(found) for name, found in state_dict["layers"].items()}
        self._validation = [_numbers(row) for row in state_dict["validation"]]
        compared = state_dict.get("comparison", {})  # not in the first checkpoints of format 2
        self._comparison = {str(name): _numbers(row) for name, row in compared.items()}


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {str(k): v if isinstance(v, int) else float(v) for k, v in row.items()}
