"""What an estimator of the loss's gradient in the logits is told, and where its logits start.

An estimator is a record: its numbers go into the optimizer's parameter groups, where learning rate
schedulers and checkpoints find them. The policy's way with losses is in ``tracker``, the other's
way with gradients in ``straight_through``.
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

# Typical gap of the logits that a Llama of 35 weights learns best from; what it grows by where
# there are e times as many, since SmolLM2, of 210, learns best from 20 to 32; and the largest.
_GAP, _GAP_GROWTH, _FEW, _LARGEST_GAP = 3.0, 13.0, 35, 30.0
# Step sizes that both bear, in units of that gap; larger ones are for no model.
_STEP, _MOST = 0.5, 2 / 15
# Standard deviations of a random walk between a typical choice and a change of mind. The walk
# widens as a gap closes, and close calls start nearer: chance flips about 1 % of the groups.
_WALK_MARGIN = 24.0


@dataclass(frozen=True)
class StraightThrough:
    """Learn from gradients: a forward and a backward pass a step. The best masks for the compute.

    Args:
        lr: Step size of the logits, in units of logits; no logit moves further in a step. By
            default it follows from the number of weights, see :func:`straight_through_lr`.
        logit_scale: How far apart the logits of a kept and of a pruned weight start where the
            choice between them was typical, in units of logits; it is less where it was a close
            one, and more where it was easy, see :func:`graded`. The larger, the less is explored:
            the initial mask of a 2:4 group whose gaps are all alike is drawn with probability 0.87
            at 3, 0.98 at 5 and 0.9999 at 10. By default it follows from the number of weights,
            see :func:`straight_through_scale`.

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
        """The estimator of a fit of so many weights and steps, if they are known."""
        scale = self.logit_scale
        scale = straight_through_scale(weights) if scale is None else scale
        lr = straight_through_lr(weights, scale) if self.lr is None else self.lr
        return replace(self, lr=lr, logit_scale=scale)

    def initial_logits(
        self, weight: Tensor, mask: Tensor, pattern: NMPattern, input_dim: int, scale: float
    ) -> Tensor:
        """Where the logits of a whole weight start, float32, in its shape."""
        return graded(weight, mask, pattern, input_dim, scale)


@dataclass(frozen=True)
class Policy:
    """Learn from the loss alone: forward passes only, no gradients. The paper's estimator.

    Args:
        lr: Step size of the logits. By default it follows from the length of a fit, see
            :func:`policy_lr`, and is 0.1 where that is not known.
        logit_scale: See :class:`StraightThrough`.
        momentum: Decay of the tracker of residuals, alpha in [0, 1).
        published: The paper's rule to the letter: the advantage is not divided by its running
            spread, all kept weights start at ``logit_scale`` and the others at 0, and the rate is
            constant. Its ``lr`` has to be found for each model (Llama-2 7B: lr 50, logit_scale 10).
        baseline_cache: Batches whose baseline a fit remembers; 0 measures it at every step.

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
        """The estimator of a fit of so many weights and steps, if they are known."""
        if self.lr is not None or self.published or steps is None:
            return self
        return replace(self, lr=policy_lr(pattern, self.logit_scale, steps))

    def initial_logits(
        self, weight: Tensor, mask: Tensor, pattern: NMPattern, input_dim: int, scale: float
    ) -> Tensor:
        """Where the logits of a whole weight start, float32, in its shape."""
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
    """Where straight-through starts logits for a model of so many masked weights, one a layer.

    What draws cost adds up over layers: in a deep network, gradients taken among many changes say
    little about any of them. So the logits of a deep one start further apart, which leaves draws
    the closest calls.
    """
    return min(_LARGEST_GAP, _GAP + _GAP_GROWTH * math.log(max(1.0, weights / _FEW)))


def straight_through_lr(weights: int, logit_scale: float) -> float:
    """The step size of straight-through for a model of so many masked weights, one a layer.

    Each batch moves the masks of all layers by chance, too, and what that costs adds up over
    layers: it grows with the number of layers times the square of the step. So the step that a
    model bears falls with the root of that number. What a step means is up to the logits' scale.
    """
    return logit_scale * min(_MOST, _STEP / math.sqrt(weights))


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
