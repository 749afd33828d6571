"""How surprising a residual is: the moving average that the policy gradient takes as its baseline.

A tracker is a dict of three scalars: ``delta``, the moving average of residuals; ``variance``, that
of their squared deviations from it; ``count``, the number of finite residuals so far.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Tracker = dict[str, Tensor]


def new() -> Tracker:
    """A tracker that has seen nothing."""
    return {name: torch.zeros(()) for name in ("delta", "variance", "count")}


def judge(
    tracker: Tracker, residual: Tensor, momentum: float, *, normalize: bool
) -> tuple[Tensor, Tracker]:
    """How much worse than expected a drawn mask was, and the tracker after it.

    The expectation is the tracker *before* this residual enters it, so that it does not depend on
    the mask that it judges. Normalised, an advantage is at most 1 / sqrt(1 - momentum).

    Args:
        tracker: The tracker before.
        residual: Scalar; the loss of the drawn mask minus that of the initial one on a batch.
        momentum: Decay of the moving averages, alpha in [0, 1).
        normalize: Divide by the running spread, and correct the average's start from zero.

    Returns:
        The advantage, zero where the residual is not finite, and the new tracker, which such a
        residual leaves as it was.
    """
    before = {k: v.to(residual.device, residual.dtype) for k, v in tracker.items()}
    finite = residual.isfinite()
    residual = residual.where(finite, 0)
    delta, variance, count = before["delta"], before["variance"], before["count"]
    expected = delta
    if normalize:
        # Started from zero, a moving average lags behind; Adam's correction undoes that.
        expected = (delta / _correction(momentum, count)).where(count > 0, residual)
    advantage = residual - expected
    after = {
        "delta": momentum * delta + (1 - momentum) * residual,
        "variance": momentum * variance + (1 - momentum) * advantage.square(),
        "count": count + 1,
    }
    if normalize:
        spread = (after["variance"] / _correction(momentum, after["count"])).sqrt()
        # Equal residuals differ by rounding; that is no spread.
        rounding = 16 * torch.finfo(residual.dtype).eps * residual.abs()
        advantage = (advantage / spread).where(spread > rounding, 0)
    after = {name: value.where(finite, before[name]) for name, value in after.items()}
    return advantage.where(finite, 0), after


def _correction(momentum: float, count: Tensor) -> Tensor:
    """1 - momentum ** count, without losing digits where that is small."""
    if momentum == 0:
        return torch.ones_like(count)
    return -torch.expm1(count * math.log(momentum))
