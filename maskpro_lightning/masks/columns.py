"""The distribution over N:M masks for N <= 2, column by column: what the mask step computes with.

A column holds one place of every group, so the M columns of a block are M tensors of one shape.
Nothing here mixes places within a tensor, which lets a compiler turn a whole step into one loop
over groups, and runs over contiguous memory without one. Flags are floats, 1 for yes, because
vector units have no use for bytes. See ``distribution`` for the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add, mul

import torch
from torch import Tensor

Columns = Sequence[Tensor]

# A weight above e^29 times the largest outside changes a score by less than e^-27, but a larger one
# could overflow.
_LARGEST_LOG_WEIGHT = 29.0
# Above the largest logarithm of the ratio of two noises, which is 26.
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
    """Flags of the n that ring first, where clock i rings after noise_i / exp(logit_i).

    Args:
        logits: M real columns.
        noise: M columns of standard exponential noise, see :func:`philox.exponential`.
        n: Clocks to wait for.
    """
    # Whose logit is far above the n-th highest wins and far below loses, whatever the noise, which
    # leaves no exponential to overflow or to tie at zero.
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


def _against_the_rest(logits: Columns, kept: Columns) -> tuple[list[Tensor], list[Tensor]]:
    """w_i / q for the kept weights and for those outside, whose sum is q; else zero."""
    # Multiplications, since selecting costs several times as much on a CPU.
    outside = [x - flag * 1e30 for x, flag in zip(logits, kept, strict=True)]
    largest = reduce(torch.maximum, outside)
    weights = [(x - largest).clamp(max=_LARGEST_LOG_WEIGHT).exp() for x in logits]
    rest = [weight * (1 - flag) for weight, flag in zip(weights, kept, strict=True)]
    scale = 1 / _sum(rest)
    ratios = [weight * flag * scale for weight, flag in zip(weights, kept, strict=True)]
    return ratios, [weight * scale for weight in rest]


def _single_gains(ratios: Columns, kept: Columns) -> list[Tensor]:
    """d log P / d logit of the kept weight for N = 1: what the others have."""
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
    # Added up anew, since subtracting a large ratio from the total would cost the other's digits.
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
