"""How surprising a residual is: the moving average that the policy gradient takes as its baseline.

A tracker is a dict of scalars: ``delta``, the moving average of residuals; ``unit``, the size of
the first residual that was not zero, a power of two; ``variance``, the moving average of squared
deviations from delta, in units; ``count``, the number of finite residuals so far; ``skipped``, of
the updates that were not made, by the share of weights for which they were not, and
``skipped_in_a_row``, of those made for no weight since the last one that was for some.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maskpro_lightning.optim.units import unit_of

Tracker = dict[str, Tensor]
# In units; the square of a larger residual would not fit into float32.
_LARGEST = 1e18


def new() -> Tracker:
    """A tracker that has seen nothing."""
    names = ("delta", "variance", "unit", "count", "skipped", "skipped_in_a_row")
    return {name: torch.zeros(()) for name in names}


def judge(
    tracker: Tracker, residual: Tensor, momentum: float, *, published: bool
) -> tuple[Tensor, Tracker]:
    """How much worse than expected a drawn mask was, and the tracker after it.

    The expectation is the tracker *before* this residual enters it, so that it does not depend on
    the mask that it judges. Divided by its spread, an advantage is at most 1 / sqrt(1 - momentum).

    Args:
        tracker: The tracker before.
        residual: Scalar; the loss of the drawn mask minus that of the initial one on a batch.
        momentum: Decay of the moving averages, alpha in [0, 1).
        published: Leave the advantage as it is, and the average's start from zero. Otherwise divide
            it by its running spread, and correct that start.

    Returns:
        The advantage, zero where the residual is not finite (or above 1e18 units), and the new
        tracker, in which such a residual is only counted.
    """
    before = {k: v.to(residual.device, residual.dtype) for k, v in tracker.items()}
    unit = before["unit"]
    if published:  # its advantages are residuals
        unit = torch.ones_like(unit)
    unit = unit.where(unit > 0, unit_of(residual.abs().float()).to(unit.dtype))
    finite = residual.abs() / unit <= _LARGEST
    seen = finite & (residual != 0)
    residual = residual.where(finite, 0) / unit
    delta, variance, count = (before[name] for name in ("delta", "variance", "count"))
    delta = delta / unit
    expected = delta
    if not published:
        # Started from zero, a moving average lags behind; Adam's correction undoes that.
        expected = (delta / _correction(momentum, count)).where(count > 0, residual)
    advantage = residual - expected
    after = {
        "delta": momentum * delta + (1 - momentum) * residual,
        "variance": momentum * variance + (1 - momentum) * advantage.square(),
        "count": count + 1,
    }
    if not published:
        spread = (after["variance"] / _correction(momentum, after["count"])).sqrt()
        # Equal residuals differ by rounding; that is no spread.
        rounding = 16 * torch.finfo(residual.dtype).eps * residual.abs()
        advantage = (advantage / spread).where(spread > rounding, 0)
    after["delta"] = after["delta"] * unit
    after["unit"] = unit.where(seen, before["unit"])
    after = {name: value.where(finite, before[name]) for name, value in after.items()}
    return advantage.where(finite, 0), after | skips(before, (~finite).float())


def skips(tracker: Tracker, share: Tensor) -> Tracker:
    """The tracker's counts after an update that was skipped for a share of weights, in [0, 1]."""
    before = {name: tracker[name].to(share.device) for name in ("skipped", "skipped_in_a_row")}
    return {
        "skipped": before["skipped"] + share,
        "skipped_in_a_row": (before["skipped_in_a_row"] + 1) * (share == 1),
    }


def _correction(momentum: float, count: Tensor) -> Tensor:
    """1 - momentum ** count, without losing digits where that is small."""
    if momentum == 0:
        return torch.ones_like(count)
    return -torch.expm1(count * math.log(momentum))
