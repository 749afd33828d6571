"""The arithmetic of a step on one block of groups: pure functions, which can be compiled.

:func:`transition` draws the next masks, after a move of the logits where the policy learned from a
loss. For straight-through, :func:`directed` turns a gradient into a direction for the logits, and
:func:`moved` moves them. ``torch.compile`` makes one vectorized loop of each on a CPU, and one
kernel on a GPU, which keeps temporaries in registers; uncompiled, each operation goes over the
block once.

Shape suffix: ``M`` group size; lists over ``M`` hold columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import mul

import torch
from torch import Tensor

from maskpro_lightning.masks import columns, distribution, inclusion, philox
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.optim.words import (
    columns_in,
    flags_of,
    hold_bfloat16,
    in_words,
    logits_as,
    logits_in,
    masks_of,
)


def transition(
    pattern: NMPattern,
    groups: Tensor,
    words: Tensor,
    rest: Tensor,
    logits: Tensor,
    masks: Tensor,
    key: philox.Key,
    step: Tensor,
    lean: bool,
    change: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Move a block's logits, draw its next masks and apply them.

    Args:
        pattern: The pattern.
        groups: int64 (...), the groups' numbers.
        words: The weights under the drawn mask, see :func:`words_of`.
        rest: What is stored beside the weights, see :func:`exchange`.
        logits: float32, or bfloat16, which is rounded at random; see :func:`logits_of`.
        masks: uint8 (..., B), the initial and the drawn mask, see :func:`flags_of`.
        key: The draw's key, see :func:`philox.exponential`.
        step: int64 scalar, the number of the draw.
        lean: Whether ``rest`` holds the pruned weights alone, see :func:`exchange`.
        change: Scalar; the logits move against it along grad log P(drawn mask).

    Returns:
        The next words, logits and masks; the next ``rest`` if lean (it is the same otherwise); and
        int32 (...), 1 for each group whose mask has changed.
    """
    initial_M, held_M = flags_of(masks, pattern.m)
    logits_M = logits_in(logits, pattern.m)
    if change is not None:
        score_M = _score(list(logits_M), [flag.float() for flag in held_M], pattern)
        logits_M = _minus(logits_M, [change * score for score in score_M])
        logits_M = _rounded(logits_M, logits, groups, key, step)
    noise_M = philox.exponential_columns(key, step, groups, pattern.m)
    next_M = [flag.int() for flag in columns.winners(logits_M, noise_M, pattern.n)]
    stays = reduce(mul, [1 - (old ^ new) for old, new in zip(held_M, next_M, strict=True)])
    words, *rests = exchange(pattern, words, rest, held_M, next_M, lean)
    next_masks = masks_of(initial_M, next_M)
    return (words, logits_as(logits_M, logits), next_masks, *rests, 1 - stays)


def exchange(
    pattern: NMPattern,
    words: Tensor,
    rest: Tensor,
    held_M: Sequence[Tensor] | None,
    next_M: Sequence[Tensor] | None,
    lean: bool,
) -> tuple[Tensor, ...]:
    """Bring weights from one mask (None: dense) to another.

    Decodes the dense weights from ``words`` and ``rest``, and encodes them under the next mask.

    Args:
        pattern: The pattern.
        words: The weights under the mask that they hold now, see :func:`words_of`.
        rest: If lean, the words of the weights that this mask prunes, in order, (..., M - N
            values). Otherwise the words of a copy of the dense weights, (..., M values).
        held_M: The columns of the mask that the weights hold now; looked at only if lean.
        next_M: The columns of the mask that they are to hold.
        lean: What ``rest`` holds.

    Returns:
        The next words; and the next ``rest`` if lean (it is the same otherwise).
    """
    bits_M = _decoded(pattern, words, rest, held_M, lean)
    if next_M is None:
        return (in_words(bits_M, words), rest) if lean else (in_words(bits_M, words),)
    kept = in_words([bits & -flag for bits, flag in zip(bits_M, next_M, strict=True)], words)
    return (kept, in_words(_left_out(pattern, bits_M, next_M), rest)) if lean else (kept,)


def _decoded(
    pattern: NMPattern,
    words: Tensor,
    rest: Tensor,
    held_M: Sequence[Tensor] | None,
    lean: bool,
) -> list[Tensor]:
    """The columns of the dense weights' bits."""
    if not lean:
        return columns_in(rest, pattern.m)
    bits_M = columns_in(words, pattern.m)
    if held_M is None:
        return bits_M
    left_out = columns_in(rest, pattern.m - pattern.n)
    return [
        torch.where(kept > 0, bits, _at(place, left_out, last=j, number=pattern.n))
        for j, (kept, bits, place) in enumerate(zip(held_M, bits_M, _places(held_M), strict=True))
    ]


def _left_out(
    pattern: NMPattern, bits_M: Sequence[Tensor], kept_M: Sequence[Tensor]
) -> list[Tensor]:
    """The M - N columns of the values that a mask prunes, in order."""
    places = [
        torch.where(kept > 0, -1, place)
        for kept, place in zip(kept_M, _places(kept_M), strict=True)
    ]
    gone = []
    for k in range(pattern.m - pattern.n):
        value = bits_M[k]
        for j in range(k + 1, k + pattern.n + 1):
            value = torch.where(places[j] == k, bits_M[j], value)
        gone.append(value)
    return gone


def directed(
    pattern: NMPattern,
    groups: Tensor,
    unit: tuple[Tensor],
    gradient: Tensor,
    dense: Tensor,
    logits: Tensor,
) -> tuple[Tensor]:
    """The gradient of the expected loss in a block's logits, from the gradient in its weights.

    To first order, the expected loss is sum_j c_j P(j kept), where c is the gradient with respect
    to the mask: the gradient in the weights times the dense weights.

    Args:
        pattern: The pattern.
        groups: int64 (...), the groups' numbers; only their shape is used.
        unit: The power of two that the gradient is divided by, a scalar or one for each group.
        gradient: (..., M).
        dense: The dense weights, (..., M).
        logits: As for :func:`transition`.

    Returns:
        float32 (..., M).
    """
    pairs = zip(gradient.unbind(-1), dense.unbind(-1), strict=True)
    share = 1 / unit[0]
    worth_M = [slope.float() * share * weight.float() for slope, weight in pairs]
    logits_M = list(logits_in(logits, pattern.m))
    if pattern.n <= 2:
        return (torch.stack(columns.inclusion_gradient(logits_M, worth_M, pattern.n), dim=-1),)
    logits_GM, worth_GM = torch.stack(logits_M, dim=-1), torch.stack(worth_M, dim=-1)
    return (inclusion.gradient(logits_GM, worth_GM, pattern),)


def moved(
    pattern: NMPattern,
    groups: Tensor,
    logits: Tensor,
    direction: Tensor,
    key: philox.Key,
    step: Tensor,
    scale: tuple[Tensor],
    bound: Tensor,
    part: int | Tensor,
) -> tuple[Tensor]:
    """Move a block's logits against a direction, each by at most a bound.

    Args:
        pattern: The pattern.
        groups: int64 (...), the groups' numbers.
        logits: As for :func:`transition`.
        direction: (..., M) of any dtype.
        key: The key of the rounding, see :func:`philox.exponential`.
        step: int64 scalar, the number of the draw that follows.
        scale: What the direction is multiplied by, a scalar or one for each group. Where it is 0,
            the direction may be NaN.
        bound: Scalar, the largest move of a logit.
        part: The number of this move among those before the draw, from 0.

    Returns:
        The next logits.
    """
    moves_M = [
        torch.where(scale[0] > 0, (scale[0] * move.float()).clamp(-bound, bound), 0)
        for move in direction.unbind(-1)
    ]
    logits_M: Sequence[Tensor] = _minus(logits_in(logits, pattern.m), moves_M)
    logits_M = _rounded(logits_M, logits, groups, key, step, stream=1 + part)
    return (logits_as(logits_M, logits),)


def _places(kept_M: Sequence[Tensor]) -> list[Tensor]:
    """The number of pruned weights of its group before each weight."""
    places = [torch.zeros_like(kept_M[0])]
    for kept in kept_M[:-1]:
        places.append(places[-1] + 1 - kept)
    return places


def _at(place: Tensor, columns: Sequence[Tensor], *, last: int, number: int) -> Tensor:
    """Each group's value in the column of a number that lies in ``[last - number, last]``."""
    first = max(0, last - number)
    found = columns[min(first, len(columns) - 1)]
    for k in range(first + 1, min(last, len(columns) - 1) + 1):
        found = torch.where(place == k, columns[k], found)
    return found


def _rounded(
    logits_M: Sequence[Tensor],
    like: Tensor,
    groups: Tensor,
    key: philox.Key,
    step: Tensor,
    stream: int | Tensor = 1,
) -> Sequence[Tensor]:
    """Columns of logits; stored as bfloat16, they are rounded at random, unbiased.

    Rounded to the nearest, a logit would never move by steps below half of its last bit.
    """
    if not hold_bfloat16(like, len(logits_M)):
        return logits_M
    noise_M = philox.random_words(key, step, groups, len(logits_M), stream=stream)
    return [
        ((logit.view(torch.int32) + (word >> 16).int()) & -0x10000).view(torch.float32)
        for logit, word in zip(logits_M, noise_M, strict=True)
    ]


def _minus(values: Sequence[Tensor], moves: Sequence[Tensor]) -> list[Tensor]:
    return [value - move for value, move in zip(values, moves, strict=True)]


def _score(logits_M: list[Tensor], kept_M: list[Tensor], pattern: NMPattern) -> Sequence[Tensor]:
    if pattern.n <= 2:
        return columns.score(logits_M, kept_M, pattern.n)
    kept_GM = torch.stack(kept_M, dim=-1).bool()
    return distribution.score(torch.stack(logits_M, dim=-1), kept_GM, pattern).unbind(-1)
