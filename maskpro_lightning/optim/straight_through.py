"""Learning from one gradient: a step's share of it, as soon as it is there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from maskpro_lightning.optim.fusion import Fusion
from maskpro_lightning.optim.masked_weight import Draw, MaskedWeight
from maskpro_lightning.weights.layout import sums


def learn(
    masked: MaskedWeight,
    gradient: Tensor,
    group: Mapping[str, Any],
    fusion: Fusion,
    *,
    share: float,
    part: int,
) -> Tensor:
    """Move a weight's logits by ``lr * share`` along the gradient of the expected loss in them.

    The gradient is divided by its root mean square over the whole weight, so that one step size
    fits all weights, and no element counts for more than that. Gradients of deep networks are
    heavy-tailed: without the bound, a step moves a handful of decisive groups by many units in all
    layers together, and the loss runs away. Where the root mean square is not finite or zero
    nothing is learned. A collective for shards.

    Args:
        masked: The weight, or this rank's part of it.
        gradient: That of the loss in the part, whose memory is used.
        group: The weight's parameter group.
        fusion: Runs the step of a block.
        share: This gradient's share of the step, in (0, 1].
        part: Number of the backward pass in the step, from 0.

    Returns:
        Whether the gradient is finite, a bool scalar.
    """
    layout = masked.layout
    (square,) = sums([layout], [masked.direction(gradient, fusion)])
    size = (square / math.prod(layout.shape)).sqrt()
    finite = size.isfinite()
    bound = group["lr"] * share
    scale = (bound / size).where(finite & (size > 0), 0)
    masked.move(Draw(group["seed"], group["step"] + 1), gradient, scale, bound, part, fusion)
    return finite
