"""Chooses the mask that a fit deploys: the last one, or an earlier one with a better validation."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from maskpro_lightning.optim.masked_weight import Version
from maskpro_lightning.optim.optimizer import MaskPro

_log = logging.getLogger(__name__)

MonitorMode = Literal["min", "max"]

# Words in the names of metrics of which a higher value is better.
_HIGHER_IS_BETTER = re.compile(
    r"(?<![a-z])(acc|accuracy|f1|f1score|auc|auroc|auprc|precision|recall|iou|miou|dice|bleu|rouge"
    r"|psnr|ssim|r2|r2score)(?![a-z])"
)


class BestMask:
    """Remembers the most likely mask of the best validation, and the module's buffers at that time.

    The validation has measured the mask together with the buffers, such as BatchNorm's running
    statistics, which were gathered under it.

    Args:
        monitor: The metric that validations are compared by; None compares nothing.
        mode: "min" if a lower value is better, "max" if a higher one is.

    Attributes:
        value: The best value so far, or None.
        dense: The value of the dense weights, or None.
        initial: The value of the initial mask, or None.
        step: The step of the best validation.
        last_step: The step of the last validation.
        expected: Whether validations may log the metric.
    """

    def __init__(self, monitor: str | None, mode: MonitorMode) -> None:
        self.monitor, self._sign = monitor, {"min": 1, "max": -1}[mode]
        self.value: float | None = None
        self.dense: float | None = None
        self.initial: float | None = None
        self.step = self.last_step = 0
        self.expected = monitor is not None
        self._mode = mode
        self._last: float | None = None
        self._told_of_monitor = False
        self._buffers: dict[str, Tensor] = {}
        self._last_buffers: dict[str, Tensor] = {}

    def expect(self, logged: Mapping[str, Any], trainer: Any) -> None:
        """Learn from the sanity check whether validations log the metric."""
        elsewhere = _are_of_a_stage(logged)
        self.expected = self.monitor in logged or (elsewhere and self.monitor is not None)
        self._tell_if_missing(logged, trainer)

    def compare_with(self, logged: Mapping[str, Any], trainer: Any) -> None:
        """Take the dense weights' value from what their validation has logged; a collective."""
        self.dense = self._value(logged, trainer)
        self._tell_if_missing(logged, trainer)

    def judge(
        self, logged: Mapping[str, Any], trainer: Any, module: nn.Module, optimizer: MaskPro
    ) -> None:
        """Compare a validation with the best one by what it has logged; a collective."""
        last = self._value(logged, trainer)
        self._tell_if_missing(logged, trainer)
        if last is None:
            return
        self._last, self.last_step = last, trainer.global_step
        if not optimizer.param_groups[0]["step"]:
            self.initial = last
            if trainer.is_global_zero:
                self._tell_if_upside_down()
        better = self.value is None or self._sign * last < self._sign * self.value
        if better and math.isfinite(last):
            self.value, self.step = last, trainer.global_step
            self._buffers = {name: value.clone() for name, value in module.named_buffers()}
            optimizer.remember()

    def _value(self, logged: Mapping[str, Any], trainer: Any) -> float | None:
        metric = None if self.monitor is None else logged.get(self.monitor)
        if metric is None:
            return None
        metric = torch.as_tensor(metric, device=trainer.strategy.root_device).float()
        # Ranks may have validated on different data, and have to agree.
        return float(trainer.strategy.reduce(metric, reduce_op="mean"))

    def is_behind(self, step: int) -> bool:
        """Whether masks have been compared, but not the mask of this step."""
        return self.value is not None and self.last_step != step

    @property
    def version(self) -> Version:
        """The version of the weights to deploy if the fit ended now."""
        return "best" if self._worse else "mode"

    @property
    def _worse(self) -> bool:
        """Whether the last validation was not the best one, or not finite."""
        return self.value is not None and self._last != self.value

    def put_buffers(self, module: nn.Module) -> None:
        """Give a module the buffers that belong to the mask to deploy."""
        if self._worse:
            _put(self._buffers, module)

    def with_buffers(self, state: dict[str, Any]) -> dict[str, Any]:
        """A module's state dict with the buffers that belong to the mask to deploy."""
        if not self._worse:
            return state
        return {
            name: self._buffers[name].to(value.device) if name in self._buffers else value
            for name, value in state.items()
        }

    def tell(self) -> None:
        """Warn if an earlier mask was better than the last one."""
        if self._worse:
            which, remedy = f"the mask of step {self.step}", ""
            if self.step == 0:
                which, remedy = "the initial mask", " Learn longer, from more data or distilling."
            if self._is_upside_down:
                remedy = f" That the dense weights are worse speaks against {self._mode!r}."
            _log.warning(
                f"{which.capitalize()} is deployed: its {self.monitor} was {self.value:.4g}, that "
                f"of the last validation {self._last:.4g}, and by monitor_mode "
                f"{'lower' if self._sign > 0 else 'higher'} is better.{remedy}"
            )
        elif self._told_of_monitor:
            _log.warning(f"The last mask is deployed: validation logged no {self.monitor!r}.")

    @property
    def _is_upside_down(self) -> bool:
        """Whether the dense weights count as worse than the initial mask."""
        if self.dense is None or self.initial is None:
            return False
        return self._sign * self.dense > self._sign * self.initial

    def _tell_if_missing(self, logged: Mapping[str, Any], trainer: Any) -> None:
        """Say once that validations log other metrics than the one to compare by."""
        if self._told_of_monitor or self.monitor is None or self.value is not None:
            return
        if logged and self.monitor not in logged and not _are_of_a_stage(logged):
            self._told_of_monitor = True
            if trainer.is_global_zero:
                _log.warning(
                    f"The last mask will be deployed, since validation logs no {self.monitor!r}, "
                    f"by which masks are compared: set monitor to one of "
                    f"{', '.join(map(repr, logged))}."
                )

    def _tell_if_upside_down(self) -> None:
        """Say so if the dense weights count as worse than the initial mask."""
        dense, initial, monitor, mode = self.dense, self.initial, self.monitor, self._mode
        if monitor is None or initial is None:
            return
        named = mode == "min" and _HIGHER_IS_BETTER.search(monitor.lower()) is not None
        better, other = ("lower", "max") if mode == "min" else ("higher", "min")
        if self._is_upside_down:
            name = ", as its name says" if named else ""
            _log.warning(
                f"The dense weights' {monitor} is {dense:.6g}, the initial mask's {initial:.6g}, "
                f"and by monitor_mode={mode!r} {better} is better, so the dense model is the worse "
                f"one. If that is upside down{name}, set monitor_mode={other!r}; else see whether "
                f"the module holds trained weights."
            )
        elif named and (dense is None or dense == initial):
            _log.warning(
                f"By monitor_mode='min' a lower {monitor} is better, against its name: set "
                f"monitor_mode='max'."
            )

    def state_dict(self, module: nn.Module | None) -> dict[str, Any]:
        """Values and buffers; also the last step's buffers, if the checkpoint deploys others."""
        numbers = {"value": self.value, "step": self.step, "last": self._last}
        numbers |= {"initial": self.initial, "dense": self.dense, "last_step": self.last_step}
        state: dict[str, Any] = numbers | {"monitor": self.monitor}
        state["buffers"] = {"best": self._buffers}
        if self._worse and module is not None:
            last = {name: value.clone() for name, value in module.named_buffers()}
            state["buffers"]["last"] = last
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state, unless that compared by another metric."""
        buffers = state.get("buffers", {})
        self._last_buffers = dict(buffers.get("last", {}))
        if state["monitor"] != self.monitor:
            return
        self.value, self._last, self.initial, self.dense = (
            None if state.get(name) is None else float(state[name])
            for name in ("value", "last", "initial", "dense")
        )
        self.step = int(state["step"])
        self.last_step = int(state.get("last_step", 0))
        self._buffers = dict(buffers.get("best", {}))

    def put_last_buffers(self, module: nn.Module) -> None:
        """After a checkpoint was loaded, give a module the buffers of the step of its saving."""
        _put(self._last_buffers, module)
        self._last_buffers = {}


def _are_of_a_stage(logged: Mapping[str, Any]) -> bool:
    """Whether a module names metrics after the trainer's stage, as in "sanity_check_loss"."""
    return any("sanity" in name.lower() for name in logged)


@torch.no_grad()
def _put(buffers: Mapping[str, Tensor], module: nn.Module) -> None:
    for name, buffer in module.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])
