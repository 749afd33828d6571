"""The residual tracker: a moving average of residuals, which the policy takes as its expectation.

A residual is the loss under the drawn mask minus that under the initial mask, on the same batch. A
tracker is a dict of scalars:

- ``delta``: the moving average of residuals;
- ``unit``: a power of two, the size of the first residual that was not zero;
- ``variance``: the moving average of squared deviations from the expectation, in units squared;
- ``count``: the number of finite residuals so far;
- ``skipped``: the number of updates that were skipped since a number was not finite; one that was
  skipped for a share of the weights counts as that share;
- ``skipped_in_a_row``: the number of updates that were skipped for all weights, one after the
  other, until now.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maskpro_lightning.optim.units import unit_of

Tracker = dict[str, Tensor]
# In units; the square of a larger residual would overflow float32.
_LARGEST = 1e18


def new() -> Tracker:
    """A tracker that has seen nothing."""
    names = ("delta", "variance", "unit", "count", "skipped", "skipped_in_a_row")
    return {name: torch.zeros(()) for name in names}


def judge(
    tracker: Tracker, residual: Tensor, momentum: float, *, published: bool
) -> tuple[Tensor, Tracker]:
    """Compute the advantage, how much worse than expected a drawn mask was; update the tracker.

    The expectation comes from the tracker *before* this residual enters it, so it does not depend
    on the mask that it judges. An advantage divided by its spread is at most
    1 / sqrt(1 - momentum).

    Args:
        tracker: The tracker before.
        residual: Scalar; the loss of the drawn mask minus that of the initial one on a batch.
        momentum: Decay of the moving averages, alpha in [0, 1).
        published: The paper's rule: the advantage is the residual minus ``delta``. Otherwise it is
            divided by its running spread, and the averages are corrected for their start at zero.

    Returns:
        The advantage, and the tracker after it. A residual that is not finite (or above 1e18 units)
        gives an advantage of zero, and changes only the tracker's counts of skipped updates.
    """
    before = {k: v.to(residual.device, residual.dtype) for k, v in tracker.items()}
    unit = before["unit"]
    if published:  # whose advantages are in units of the loss
        unit = torch.ones_like(unit)
    unit = unit.where(unit > 0, unit_of(residual.abs().float()).to(unit.dtype))
    finite = residual.abs() / unit <= _LARGEST
    seen = finite & (residual != 0)
    residual = residual.where(finite, 0) / unit
    delta, variance, count = (before[name] for name in ("delta", "variance", "count"))
    delta = delta / unit
    expected = delta
    if not published:
        # A moving average that starts at zero lags behind; this is Adam's correction.
        expected = (delta / _correction(momentum, count)).where(count > 0, residual)
    advantage = residual - expected
    after = {
        "delta": momentum * delta + (1 - momentum) * residual,
        "variance": momentum * variance + (1 - momentum) * advantage.square(),
        "count": count + 1,
    }
    if not published:
        spread = (after["variance"] / _correction(momentum, after["count"])).sqrt()
        # Equal residuals differ by rounding, which is no spread.
        rounding = 16 * torch.finfo(residual.dtype).eps * residual.abs()
        advantage = (advantage / spread).where(spread > rounding, 0)
    after["delta"] = after["delta"] * unit
    after["unit"] = unit.where(seen, before["unit"])
    after = {name: value.where(finite, before[name]) for name, value in after.items()}
    return advantage.where(finite, 0), after | skips(before, (~finite).float())


def skips(tracker: Tracker, share: Tensor) -> Tracker:
    """The counts of skipped updates after one that was skipped for a share of weights, 0 to 1."""
    before = {name: tracker[name].to(share.device) for name in ("skipped", "skipped_in_a_row")}
    return {
        "skipped": before["skipped"] + share,
        "skipped_in_a_row": (before["skipped_in_a_row"] + 1) * (share == 1),
    }


def _correction(momentum: float, count: Tensor) -> Tensor:
    """1 - momentum ** count, without a loss of digits where that is small."""
    if momentum == 0:
        return torch.ones_like(count)
    return -torch.expm1(count * math.log(momentum))
