"""The distribution over N:M masks for N <= 2, column by column: what the mask step computes with.

A column holds one place of every group, so the M columns of a block are M tensors of one shape.
Nothing here mixes places within a tensor, which lets a compiler turn a whole step into one loop
over groups, and runs over contiguous memory without one. Flags are floats, 1 for yes, because
vector units have no use for bytes. See ``distribution`` for the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor

Columns = Sequence[Tensor]

# A ratio above e^27 changes a score by less than e^-27, but a larger one could overflow.
LARGEST_LOG_RATIO = 27.0


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


def score(logits: Columns, kept: Columns, n: int) -> list[Tensor]:
    """The exact gradient of log P(kept) with respect to the logits, M columns.

    Args:
        logits: M real columns.
        kept: M columns of flags, n of them set in each group.
        n: 1 or 2.
    """
    log_ratios, shares = against_the_rest(logits, kept)
    gain_of = _single_gains if n == 1 else _pair_gains
    gains = gain_of([x.clamp(max=LARGEST_LOG_RATIO).exp() for x in log_ratios], kept)
    total = _sum(gains)
    return [gain - share * total for gain, share in zip(gains, shares, strict=True)]


def against_the_rest(logits: Columns, kept: Columns) -> tuple[list[Tensor], list[Tensor]]:
    """log(w_i / q) for every weight, and w_j / q for those outside the kept set (else zero)."""
    outside = [1 - flag for flag in kept]
    # Multiplications, since selecting costs several times as much on a CPU.
    others = [x - flag * 1e30 for x, flag in zip(logits, kept, strict=True)]
    log_q = reduce(torch.maximum, others)
    shares = [(x - log_q).clamp(max=0).exp() * o for x, o in zip(logits, outside, strict=True)]
    total = _sum(shares)
    log_total = total.log()
    return [x - log_q - log_total for x in logits], [share / total for share in shares]


def _single_gains(ratios: Columns, kept: Columns) -> list[Tensor]:
    """d log P / d logit of the kept weight for N = 1: what the others have."""
    return [(1 - 1 / (1 + a) * a) * flag for a, flag in zip(ratios, kept, strict=True)]


def _pair_gains(ratios: Columns, kept: Columns) -> list[Tensor]:
    """d log P / d logit of the kept weights for N = 2.

    The derivative of P = ab (2 + a + b) / ((1 + a) (1 + b) (1 + a + b)), over one denominator.
    """
    pair = [ratio * flag for ratio, flag in zip(ratios, kept, strict=True)]
    total = _sum(pair)
    return [
        (2 + 2 * a + b * (3 + 2 * a + b)) / ((1 + a) * ((1 + total) * (2 + total))) * flag
        for a, flag in zip(pair, kept, strict=True)
        for b in (total - a,)
    ]


def _flag(condition: Tensor) -> Tensor:
    return condition.float()


def _sum(columns: Columns) -> Tensor:
    return reduce(add, columns)
