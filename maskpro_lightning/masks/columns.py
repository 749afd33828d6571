"""The distribution over N:M masks for N <= 2, computed column by column, for the mask step.

A column holds the same place of every group, so a block is M columns of one shape. No operation
here mixes places within a column. So a compiler can turn a whole step into one loop over groups;
without a compiler, each operation runs over contiguous memory. Flags are floats, 1 for yes, since
vector units are slow with bytes. ``distribution`` has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add, mul

import torch
from torch import Tensor

Columns = Sequence[Tensor]

# Kept weights are cut off at e^29 times the largest pruned one: a larger ratio changes a score by
# less than e^-27 and could overflow.
_LARGEST_LOG_WEIGHT = 29.0
# A logit that is ahead by more wins for certain: the ratio of two noises is at most e^26.
_DECIDED = 30.0


def top(scores: Columns, n: int) -> list[Tensor]:
    """Flags of the n highest of each group's scores; of equal scores the first is kept.

    Args:
        scores: M columns of any real dtype, no NaN.
        n: Scores to keep in each group.
    """
    rivals: list[list[Tensor]] = [[] for _ in scores]
    for i, score in enumerate(scores):
        for j in range(i + 1, len(scores)):
            ahead = _flag(scores[j] > score)
            rivals[i].append(ahead)
            rivals[j].append(1 - ahead)
    return [_flag(_sum(columns) < n) for columns in rivals]


def winners(logits: Columns, noise: Columns, n: int) -> list[Tensor]:
    """Flags of the n clocks that ring first; clock i rings after noise_i / exp(logit_i).

    This draws n without replacement from softmax(logits).

    Args:
        logits: M real columns.
        noise: M columns of standard exponential noise, see :func:`philox.exponential`.
        n: Clocks to wait for.
    """
    # A logit far above the n-th highest wins whatever the noise, and one far below loses. So their
    # difference can be clamped, and no exponential overflows or ties at zero.
    bar = _highest(logits, n)
    times = [
        (bar - logit).clamp(-_DECIDED, _DECIDED).exp() * clock
        for logit, clock in zip(logits, noise, strict=True)
    ]
    return top([-time for time in times], n)


def score(logits: Columns, kept: Columns, n: int) -> list[Tensor]:
    """The exact gradient of log P(kept) with respect to the logits, M columns.

    Args:
        logits: M real columns.
        kept: M columns of flags, n of them set in each group.
        n: 1 or 2.
    """
    ratios, shares = _against_the_rest(logits, kept)
    gains = (_single_gains if n == 1 else _pair_gains)(ratios, kept)
    total = _sum(gains)
    return [gain - share * total for gain, share in zip(gains, shares, strict=True)]


def inclusion_gradient(logits: Columns, values: Columns, n: int) -> list[Tensor]:
    """The exact gradient of sum_j values_j P(j kept) with respect to the logits, M columns.

    This is the walk over sets of ``inclusion``, written out.

    Args:
        logits: M real columns.
        values: M real columns, the value of keeping each weight.
        n: 1 or 2.
    """
    first = _highest(logits, 1)
    weights = [(x - first).exp() for x in logits]
    shares = _shares(weights)
    if n == 1:
        worth = _dot(shares, values)
        return [p * (c - worth) for p, c in zip(shares, values, strict=True)]
    # Once the leading weight is drawn, the others are measured against the second highest logit, or
    # all of them could underflow.
    second = _highest(logits, 2)
    behind = [(x - second).clamp(max=0).exp() for x in logits]
    later: list[list[Tensor]] = [[] for _ in values]
    worths = []
    for i, (x, value) in enumerate(zip(logits, values, strict=True)):
        leads = _flag(x > second)
        others = [j for j in range(len(values)) if j != i]
        follow = _shares([weights[j] + leads * (behind[j] - weights[j]) for j in others])
        after = _dot(follow, [values[j] for j in others])
        worths.append(value + after)
        for j, share in zip(others, follow, strict=True):
            later[j].append(shares[i] * share * (values[j] - after))
    worth = _dot(shares, worths)
    return [
        _sum([p * (c - worth), *moves]) for p, c, moves in zip(shares, worths, later, strict=True)
    ]


def _shares(weights: Columns) -> list[Tensor]:
    scale = 1 / _sum(weights)
    return [weight * scale for weight in weights]


def _dot(one: Columns, other: Columns) -> Tensor:
    return _sum([a * b for a, b in zip(one, other, strict=True)])


def _against_the_rest(logits: Columns, kept: Columns) -> tuple[list[Tensor], list[Tensor]]:
    """w_i / q of the kept weights, and of the pruned ones, whose sum is q; zero elsewhere."""
    # By products, since selecting takes several times as long on a CPU.
    outside = [x - flag * 1e30 for x, flag in zip(logits, kept, strict=True)]
    largest = reduce(torch.maximum, outside)
    weights = [(x - largest).clamp(max=_LARGEST_LOG_WEIGHT).exp() for x in logits]
    rest = [weight * (1 - flag) for weight, flag in zip(weights, kept, strict=True)]
    scale = 1 / _sum(rest)
    ratios = [weight * flag * scale for weight, flag in zip(weights, kept, strict=True)]
    return ratios, [weight * scale for weight in rest]


def _single_gains(ratios: Columns, kept: Columns) -> list[Tensor]:
    """d log P / d logit of the kept weight for N = 1: the probability of the others."""
    others = 1 / (1 + _sum(ratios))
    return [others * flag for flag in kept]


def _pair_gains(ratios: Columns, kept: Columns) -> list[Tensor]:
    """d log P / d logit of the kept weights for N = 2.

    The derivative of P = ab (2 + a + b) / ((1 + a) (1 + b) (1 + a + b)), over one denominator, in
    two halves so that it does not overflow.
    """
    total = _sum(ratios)
    each = 1 / reduce(mul, [1 + ratio for ratio in ratios])
    both = 1 / ((1 + total) * (2 + total))
    # Summed anew, since subtracting a large ratio from the total would lose the other's digits.
    partners = [_sum([*ratios[:i], *ratios[i + 1 :]]) for i in range(len(ratios))]
    return [
        (2 + 2 * a + b * (3 + a + total)) * each * ((1 + b) * both) * flag
        for a, b, flag in zip(ratios, partners, kept, strict=True)
    ]


def _highest(scores: Columns, n: int) -> Tensor:
    """The n-th highest of each group's scores."""
    highest: list[Tensor] = []
    for score in scores:
        for k, held in enumerate(highest):
            highest[k], score = torch.maximum(held, score), torch.minimum(held, score)
        if len(highest) < n:
            highest.append(score)
    return highest[-1]


def _flag(condition: Tensor) -> Tensor:
    return condition.float()


def _sum(columns: Columns) -> Tensor:
    return reduce(add, columns)
