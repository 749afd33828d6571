"""The two estimators of the loss's gradient in the logits: their settings and initial logits.

An estimator is a record. Its numbers go into the optimizer's parameter groups, where learning rate
schedulers and checkpoints find them. What the policy does with a loss is in ``tracker``, what
straight-through does with gradients in ``straight_through`` and ``lessons``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from maskpro_lightning.initial.logits import graded
from maskpro_lightning.masks import distribution
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.weights.admission import LARGEST, check_rule

EstimatorName = Literal["straight_through", "policy"]

# The typical gap between a kept and a pruned logit at the start: for _FEW weights (a Llama of 35
# learns best from 3), its growth for e times as many (SmolLM2, of 210, learns best from 20 to 32),
# and its maximum.
_GAP, _GAP_GROWTH, _FEW, _LARGEST_GAP = 3.0, 13.0, 35, 30.0
# Step sizes at which both learn, in units of that gap: the first is divided by the root of the
# number of weights, the second is the maximum.
_STEP, _MOST = 0.5, 2 / 15
# The typical gap in standard deviations of a fit's random walk. Chance still flips about 1 % of the
# groups, since the walk widens as a gap closes, and since some choices start closer.
_WALK_MARGIN = 24.0


@dataclass(frozen=True)
class StraightThrough:
    """Learn from gradients: a forward and a backward pass a step. The best masks for the compute.

    Args:
        lr: Step size of the logits, in units of logits; no logit moves further in a step. By
            default it follows from the number of weights, see :func:`straight_through_lr`.
        logit_scale: The initial gap between the logits of a kept and a pruned weight where the
            choice between them was typical, in units of logits. It is smaller where the choice was
            close and larger where it was clear, see :func:`graded`. A larger scale explores less: a
            2:4 group with all gaps alike draws its initial mask with probability 0.87 at 3, 0.98 at
            5 and 0.9999 at 10. By default it follows from the number of weights, see
            :func:`straight_through_scale`.

    Raises:
        TypeError: what should be a number is none.
        ValueError: a number is out of range.
    """

    lr: float | None = None
    logit_scale: float | None = None

    name: ClassVar[EstimatorName] = "straight_through"
    needs_gradients: ClassVar[bool] = True
    #: Whether the learning rate falls to 0 over a fit, unless a scheduler is given.
    rate_falls: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_rule(self.rule())

    def rule(self) -> dict[str, Any]:
        """The numbers that a parameter group holds."""
        scale = _GAP if self.logit_scale is None else self.logit_scale
        return {"lr": 0.1 if self.lr is None else self.lr, "logit_scale": scale}

    def for_fit(
        self, pattern: NMPattern, weights: int, steps: int | None = None
    ) -> StraightThrough:
        """The estimator with defaults filled in for a fit of so many masked weights."""
        scale = self.logit_scale
        scale = straight_through_scale(weights) if scale is None else scale
        lr = straight_through_lr(weights, scale) if self.lr is None else self.lr
        return replace(self, lr=lr, logit_scale=scale)

    def initial_logits(
        self, weight: Tensor, mask: Tensor, pattern: NMPattern, input_dim: int, scale: float
    ) -> Tensor:
        """The initial logits of a whole weight, float32, in its shape."""
        return graded(weight, mask, pattern, input_dim, scale)


@dataclass(frozen=True)
class Policy:
    """Learn from the loss alone: forward passes only, no gradients. The paper's estimator.

    Args:
        lr: Step size of the logits. By default it follows from the length of the fit, see
            :func:`policy_lr`; it is 0.1 if that is not known.
        logit_scale: See :class:`StraightThrough`.
        momentum: Decay of the residual tracker's averages, alpha in [0, 1).
        published: The paper's rule to the letter: advantages are not divided by their running
            spread, logits start at ``logit_scale`` if kept and at 0 if pruned, and the rate is
            constant. Its ``lr`` has to be tuned for each model (Llama-2 7B: lr 50, logit_scale 10).
        baseline_cache: The number of batches whose baseline (loss under the initial mask) a fit
            remembers; 0 measures it at every step.

    Raises:
        TypeError: what should be a number is none.
        ValueError: a number is out of range.
    """

    lr: float | None = None
    logit_scale: float = 4.0
    momentum: float = 0.99
    published: bool = False
    baseline_cache: int = 2**16

    name: ClassVar[EstimatorName] = "policy"
    needs_gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_rule(self.rule())
        if self.baseline_cache < 0:
            raise ValueError(
                f"baseline_cache is {self.baseline_cache}, but baseline_cache >= 0 must hold."
            )

    @property
    def rate_falls(self) -> bool:
        """Whether the learning rate falls to 0 over a fit, unless a scheduler is given."""
        return not self.published

    def rule(self) -> dict[str, Any]:
        """The numbers that a parameter group holds."""
        return {
            "lr": 0.1 if self.lr is None else self.lr,
            "logit_scale": self.logit_scale,
            # Not "momentum", which some learning rate schedulers would change.
            "tracker_momentum": self.momentum,
            "published": self.published,
        }

    def for_fit(self, pattern: NMPattern, weights: int, steps: int | None = None) -> Policy:
        """The estimator with defaults filled in for a fit of so many steps, if that is known."""
        if self.lr is not None or self.published or steps is None:
            return self
        return replace(self, lr=policy_lr(pattern, self.logit_scale, steps))

    def initial_logits(
        self, weight: Tensor, mask: Tensor, pattern: NMPattern, input_dim: int, scale: float
    ) -> Tensor:
        """The initial logits of a whole weight, float32, in its shape."""
        if self.published:
            return mask.float().mul_(scale)
        return graded(weight, mask, pattern, input_dim, scale)


Estimator = StraightThrough | Policy

_BY_NAME: dict[str, type[Estimator]] = {kind.name: kind for kind in (StraightThrough, Policy)}


def estimator_of(given: Estimator | EstimatorName) -> Estimator:
    """An estimator itself, or that of a name with its defaults.

    Raises:
        ValueError: no estimator has this name.
        TypeError: neither an estimator nor a name.
    """
    if isinstance(given, StraightThrough | Policy):
        return given
    if not isinstance(given, str):
        raise TypeError(
            f"estimator is a {type(given).__name__}: give Policy(...), StraightThrough(...) or one "
            f"of their names, {', '.join(map(repr, _BY_NAME))}."
        )
    if given not in _BY_NAME:
        raise ValueError(f"estimator is one of {', '.join(_BY_NAME)}; got {given!r}.")
    return _BY_NAME[given]()


def straight_through_scale(weights: int) -> float:
    """The default ``logit_scale`` of straight-through for so many masked weights, one a layer.

    The damage of random draws adds up over layers: in a deep network, gradients taken amid many
    changes say little about any one of them. So a deep network's logits start further apart, and
    draws change only the closest choices.
    """
    return min(_LARGEST_GAP, _GAP + _GAP_GROWTH * math.log(max(1.0, weights / _FEW)))


def straight_through_lr(weights: int, logit_scale: float) -> float:
    """The default ``lr`` of straight-through for so many masked weights, one a layer.

    Noise of the batches moves the masks of all layers. Its cost adds up over layers: it grows with
    their number times the square of the step. So the step falls with the root of their number. It
    is in proportion to the initial gap of the logits.
    """
    return logit_scale * min(_MOST, _STEP / math.sqrt(weights))


def policy_lr(pattern: NMPattern, logit_scale: float, steps: int) -> float:
    """The default ``lr`` of the policy, at which the noise of a whole fit hardly changes a mask.

    A step moves the gap between a kept and a pruned logit by ``lr * advantage * (s_i - s_j)``, with
    s the score. An advantage that does not depend on the group has variance 1. So T steps, at a
    rate that falls linearly to 0, are a random walk of variance
    ``lr^2 * T / 3 * E (s_i - s_j)^2``. The default keeps its standard deviation small against the
    initial gap, so that evidence flips groups, and not chance.

    Args:
        pattern: The pattern.
        logit_scale: The typical initial gap, in units of logits.
        steps: T, the steps of the fit.
    """
    information = distribution.gap_information(pattern, logit_scale)
    rate = logit_scale / (_WALK_MARGIN * math.sqrt(information * steps / 3))
    return min(rate, LARGEST)  # the information vanishes where draws hardly ever differ
