"""The mask step of a block of groups: one pure function, which a compiler makes one loop of.

Run as it is, each of its operations goes over the block once. ``torch.compile`` makes of it a
vectorized loop on a CPU and a kernel on a GPU, in which all but the block itself stays in
registers.

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
    are_low,
    columns_in,
    flags_of,
    in_words,
    logits_as,
    logits_in,
    masks_of,
)

# One byte per weight holds four masks, a bit each.
INITIAL, DRAWN, PREVIOUS, BEST = 1, 2, 4, 8


def transition(
    pattern: NMPattern,
    groups: Tensor,
    words: Tensor,
    logits: Tensor,
    masks: Tensor,
    key: philox.Key,
    step: Tensor,
    sharpness: float | Tensor,
    change: Tensor | None = None,
    direction: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Move a block's logits, draw its next masks and apply them.

    Args:
        pattern: The pattern.
        groups: int64 (...), the groups' numbers.
        words: The dense weights, see :func:`words_of`.
        logits: Of float32, or of bfloat16, which are rounded at random; see :func:`logits_of`.
        masks: The words of bytes with a bit for each of ``INITIAL``, ``DRAWN``, ``PREVIOUS`` and
            ``BEST``.
        key: What draws depend on besides, see :func:`philox.exponential`.
        step: int64 scalar, the number of the draw.
        sharpness: Masks are drawn from softmax(sharpness * logits).
        change: Scalar; the logits move against it along grad log P(drawn mask).
        direction: (..., M); the logits move against it.

    Returns:
        The words of the masked weights, the next logits and masks.
    """
    masks_M = columns_in(masks, pattern.m)
    drawn_M = [mask >> 1 & 1 for mask in masks_M]
    logits_M = logits_in(logits, pattern.m)
    if change is not None or direction is not None:
        logits_M = _learned(pattern, logits_M, drawn_M, sharpness, change, direction)
        logits_M = _rounded(logits_M, logits, groups, key, step)
    kept_M = _drawn(pattern, logits_M, groups, key, step, sharpness)
    next_M = [
        mask & (INITIAL | BEST) | (mask & DRAWN) << 1 | kept << 1
        for mask, kept in zip(masks_M, kept_M, strict=True)
    ]
    bits_M = [bits & -kept for bits, kept in zip(columns_in(words, pattern.m), kept_M, strict=True)]
    return in_words(bits_M, words), logits_as(logits_M, logits), in_words(next_M, masks)


def lean_transition(
    pattern: NMPattern,
    groups: Tensor,
    words: Tensor,
    pruned: Tensor,
    logits: Tensor,
    masks: Tensor,
    key: philox.Key,
    step: Tensor,
    sharpness: float | Tensor,
    change: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What :func:`transition` does where a weight holds what is kept, and ``pruned`` the rest.

    Args:
        pattern: The pattern.
        groups: int64 (...), the groups' numbers.
        words: The weights under the drawn mask, see :func:`words_of`.
        pruned: The words of the pruned weights (..., M - N).
        logits: As for :func:`transition`.
        masks: uint8 (..., B), the initial and the drawn mask, see :func:`flags_of`.
        key: As for :func:`transition`, like all that follow.
        step: The number of the draw.
        sharpness: Its sharpness.
        change: How the logits move along the score.

    Returns:
        The words of the masked weights and of the pruned ones, the next logits and masks, and
        int32 (...), 1 for each group whose mask has changed.
    """
    initial_M, held_M = flags_of(masks, pattern.m)
    logits_M = logits_in(logits, pattern.m)
    if change is not None:
        logits_M = _learned(pattern, logits_M, held_M, sharpness, change, None)
        logits_M = _rounded(logits_M, logits, groups, key, step)
    next_M = _drawn(pattern, logits_M, groups, key, step, sharpness)
    stays = reduce(mul, [1 - (old ^ new) for old, new in zip(held_M, next_M, strict=True)])
    words, pruned = exchange(pattern, words, pruned, held_M, next_M)
    return (
        words,
        pruned,
        logits_as(logits_M, logits),
        masks_of(initial_M, next_M),
        1 - stays,
    )


def directed(
    pattern: NMPattern,
    groups: Tensor,
    gradient: Tensor,
    dense: Tensor,
    logits: Tensor,
    sharpness: float | Tensor,
) -> tuple[Tensor]:
    """The gradient of the expected loss in a block's logits, from that in its weights.

    To first order: with c the gradient with respect to the mask (that in the weights times the
    dense weights), that of sum_j c_j P(j kept).

    Args:
        pattern: The pattern.
        groups: int64 (...), the groups' numbers, for their shape.
        gradient: (..., M).
        dense: The dense weights, (..., M).
        logits: As for :func:`transition`.
        sharpness: Masks are drawn from softmax(sharpness * logits).

    Returns:
        float32 (..., M).
    """
    pairs = zip(gradient.unbind(-1), dense.unbind(-1), strict=True)
    worth_M = [slope.float() * weight.float() for slope, weight in pairs]
    logits_M = [logit * sharpness for logit in logits_in(logits, pattern.m)]
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
    scale: Tensor,
    part: int | Tensor,
) -> tuple[Tensor]:
    """Move a block's logits against a direction.

    Args:
        pattern: The pattern.
        groups: int64 (...), the groups' numbers.
        logits: As for :func:`transition`.
        direction: (..., M) of any dtype.
        key: What rounding depends on besides, see :func:`philox.exponential`.
        step: int64 scalar, the number of the draw that follows.
        scale: Scalar, how far to go along the direction; at 0 it may be anything.
        part: Number of the move before that draw, from 0.

    Returns:
        The next logits.
    """
    moves_M = [torch.where(scale > 0, scale * move.float(), 0) for move in direction.unbind(-1)]
    logits_M: Sequence[Tensor] = _minus(logits_in(logits, pattern.m), moves_M)
    logits_M = _rounded(logits_M, logits, groups, key, step, stream=1 + part)
    return (logits_as(logits_M, logits),)


def exchange(
    pattern: NMPattern,
    words: Tensor,
    pruned: Tensor,
    held_M: Sequence[Tensor] | None,
    next_M: Sequence[Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """The words of weights and of pruned weights, brought from one mask (None: dense) to another.

    The pruned ones are those that the mask of a group leaves out, in their order.
    """
    bits_M = columns_in(words, pattern.m)
    left_out = columns_in(pruned, pattern.m - pattern.n)
    if held_M is not None:
        places = _places(held_M)
        bits_M = [
            torch.where(kept > 0, bits, _at(place, left_out, last=j, number=pattern.n))
            for j, (kept, bits, place) in enumerate(zip(held_M, bits_M, places, strict=True))
        ]
    if next_M is None:
        return in_words(bits_M, words), pruned
    places = [
        torch.where(kept > 0, -1, place)
        for kept, place in zip(next_M, _places(next_M), strict=True)
    ]
    gone = []
    for k in range(len(left_out)):
        value = bits_M[k]
        for j in range(k + 1, k + pattern.n + 1):
            value = torch.where(places[j] == k, bits_M[j], value)
        gone.append(value)
    kept_bits = [bits & -kept for bits, kept in zip(bits_M, next_M, strict=True)]
    return in_words(kept_bits, words), in_words(gone, pruned)


def _places(kept_M: Sequence[Tensor]) -> list[Tensor]:
    """How many of its group's pruned weights come before each weight."""
    places = [torch.zeros_like(kept_M[0])]
    for kept in kept_M[:-1]:
        places.append(places[-1] + 1 - kept)
    return places


def _at(place: Tensor, columns: Sequence[Tensor], *, last: int, number: int) -> Tensor:
    """The column at a place, which lies in ``[last - number, last]``."""
    first = max(0, last - number)
    found = columns[min(first, len(columns) - 1)]
    for k in range(first + 1, min(last, len(columns) - 1) + 1):
        found = torch.where(place == k, columns[k], found)
    return found


def _learned(
    pattern: NMPattern,
    logits_M: Sequence[Tensor],
    drawn_M: Sequence[Tensor],
    sharpness: float | Tensor,
    change: Tensor | None,
    direction: Tensor | None,
) -> Sequence[Tensor]:
    """The columns of logits, moved."""
    if direction is not None:
        logits_M = _minus(logits_M, [move.float() for move in direction.unbind(-1)])
    if change is not None:
        kept_M = [flag.float() for flag in drawn_M]
        score_M = _score([logit * sharpness for logit in logits_M], kept_M, pattern)
        logits_M = _minus(logits_M, [change * score for score in score_M])
    return logits_M


def _rounded(
    logits_M: Sequence[Tensor],
    like: Tensor,
    groups: Tensor,
    key: philox.Key,
    step: Tensor,
    stream: int | Tensor = 1,
) -> Sequence[Tensor]:
    """Columns rounded, if stored as bfloat16, up or down, to their own value on average.

    Rounded to the nearest, a logit would never notice steps below half of its last bit.
    """
    if not are_low(like, len(logits_M)):
        return logits_M
    noise_M = philox.words(key, step, groups, len(logits_M), stream=stream)
    return [
        ((logit.view(torch.int32) + (word >> 16).int()) & -0x10000).view(torch.float32)
        for logit, word in zip(logits_M, noise_M, strict=True)
    ]


def _drawn(
    pattern: NMPattern,
    logits_M: Sequence[Tensor],
    groups: Tensor,
    key: philox.Key,
    step: Tensor,
    sharpness: float | Tensor,
) -> list[Tensor]:
    """Columns of flags, int32."""
    noise_M = philox.exponential_columns(key, step, groups, pattern.m)
    flags_M = columns.winners([x * sharpness for x in logits_M], noise_M, pattern.n)
    return [flag.int() for flag in flags_M]


def _minus(values: Sequence[Tensor], moves: Sequence[Tensor]) -> list[Tensor]:
    return [value - move for value, move in zip(values, moves, strict=True)]


def _score(logits_M: list[Tensor], kept_M: list[Tensor], pattern: NMPattern) -> Sequence[Tensor]:
    if pattern.n <= 2:
        return columns.score(logits_M, kept_M, pattern.n)
    kept_GM = torch.stack(kept_M, dim=-1).bool()
    return distribution.score(torch.stack(logits_M, dim=-1), kept_GM, pattern).unbind(-1)
