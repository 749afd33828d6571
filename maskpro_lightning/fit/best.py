"""Which mask a fit deploys: its last one, or an earlier one that did better in validation."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch

from maskpro_lightning.optim.masked_weight import Version
from maskpro_lightning.optim.optimizer import MaskPro

_log = logging.getLogger(__name__)

MonitorMode = Literal["min", "max"]


class BestMask:
    """Remembers the most likely mask of the best validation.

    Args:
        monitor: The metric that validations are compared by; None compares nothing.
        mode: Whether a lower or a higher one is better.
        keeps: Whether the optimizer has a place for a mask; or else a better one is only told of.

    Attributes:
        value: The best value so far, or None.
        step: The step of that validation.
        expected: Whether validations may log the metric.
    """

    def __init__(self, monitor: str | None, mode: MonitorMode, *, keeps: bool) -> None:
        self.monitor, self._sign = monitor, {"min": 1, "max": -1}[mode]
        self._keeps = keeps
        self.value: float | None = None
        self.step = 0
        self.expected = monitor is not None
        self._last: float | None = None
        self._kept = keeps

    def expect(self, trainer: Any) -> None:
        """Learn from the sanity check whether validations log the metric."""
        self.expected = self.monitor in trainer.callback_metrics

    def judge(self, trainer: Any, optimizer: MaskPro) -> None:
        """Look at what a validation has logged; a collective call."""
        metric = trainer.callback_metrics.get(self.monitor)
        if metric is None:
            return
        metric = torch.as_tensor(metric, device=trainer.strategy.root_device).float()
        # Ranks that validate on data of their own have to agree.
        last = float(trainer.strategy.reduce(metric, reduce_op="mean"))
        self._last = last
        better = self.value is None or self._sign * last < self._sign * self.value
        if better and math.isfinite(last):
            self.value, self.step = last, trainer.global_step
            self._kept = self._keeps
            if self._keeps:
                optimizer.remember()

    @property
    def version(self) -> Version:
        """What to deploy if the fit ended now."""
        return "best" if self._worse and self._kept else "mode"

    @property
    def _worse(self) -> bool:
        """Whether the last validation was not the best one; also if it was not finite."""
        return self.value is not None and self._last != self.value

    def tell(self) -> None:
        """Say so if later masks were worse than an earlier one."""
        if not self._worse:
            return
        which = "the initial mask" if self.step == 0 else f"the mask of step {self.step}"
        done = "is deployed" if self._kept else "is gone, since memory='lean' keeps none"
        _log.warning(
            f"{which.capitalize()} {done}: its {self.monitor} was {self.value:.4g}, that of the "
            f"last validation {self._last:.4g}."
        )

    def state_dict(self) -> dict[str, Any]:
        numbers = {"value": self.value, "step": self.step, "last": self._last, "kept": self._kept}
        return numbers | {"monitor": self.monitor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue, unless by another metric."""
        if state["monitor"] != self.monitor:
            return
        self.value, self._last = (
            None if state[name] is None else float(state[name]) for name in ("value", "last")
        )
        self.step = int(state["step"])
        self._kept = self._keeps and bool(state["kept"])
