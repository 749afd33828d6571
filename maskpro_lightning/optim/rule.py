"""What decides a step besides losses and gradients: its choices and numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from maskpro_lightning.masks import distribution
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.weights.admission import LARGEST

Estimator = Literal["policy", "straight_through"]
Exploration = Literal["shared", "per_replica"]
Memory = Literal["plain", "lean"]
LogitsDtype = Literal["float32", "bfloat16"]

#: Step size and distance of initial logits by estimator, where they are not given.
DEFAULTS: dict[Estimator, dict[str, float]] = {
    "policy": {"lr": 0.1, "logit_scale": 4.0},
    "straight_through": {"lr": 0.1, "logit_scale": 3.0},
}

# Standard deviations of a random walk between a typical choice and a change of mind. The walk
# widens as a gap closes, and close calls start nearer: chance flips about 1 % of the groups.
_WALK_MARGIN = 24.0


def policy_lr(pattern: NMPattern, logit_scale: float, steps: int) -> float:
    """The step size of the policy at which a whole fit's noise hardly changes a mask.

    A step moves the gap between a kept and a pruned logit by ``lr * advantage * (s_i - s_j)``, s
    the score. An advantage that knows nothing about the group has variance 1, so T steps at a rate
    that falls linearly to 0 are a random walk of variance ``lr^2 * T / 3 * E (s_i - s_j)^2``. What
    flips a group beyond that is evidence, and more steps can find more of it.

    Args:
        pattern: The pattern.
        logit_scale: The typical gap at the start, in units of logits.
        steps: T.
    """
    information = distribution.gap_information(pattern, logit_scale)
    rate = logit_scale / (_WALK_MARGIN * math.sqrt(information * steps / 3))
    return min(rate, LARGEST)  # what is hardly ever drawn differently tells nothing


def sharpness_of(group: Mapping[str, Any]) -> float:
    """1 at the start, a parameter group's sharpness once a scheduler has taken ``lr`` to 0."""
    done = 1 - min(1, group["lr"] / group["initial_lr"])  # a warm-up may go above
    sharpness: float = 1 + (group["sharpness"] - 1) * done
    return sharpness


def check_lr(group: Mapping[str, Any]) -> None:
    """Refuse a learning rate out of range, which a scheduler may have set."""
    if not 0 <= group["lr"] <= LARGEST:
        raise ValueError(
            f"The learning rate is {group['lr']} at step {group['step']}: a scheduler has "
            f"to keep it in [0, {LARGEST:.0e}]."
        )
