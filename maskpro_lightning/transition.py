"""The mask step of a block of groups: one pure function, which a compiler makes one loop of.

Run as it is, each of its operations goes over the block once. ``torch.compile`` makes of it a
vectorized loop on a CPU and a kernel on a GPU, in which all but the block itself stays in
registers.

Shape suffix: ``M`` group size; lists over ``M`` hold columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskpro_lightning import columns, distribution, philox
from maskpro_lightning.pattern import NMPattern

# One byte per weight holds three masks, a bit each.
INITIAL, DRAWN, PREVIOUS = 1, 2, 4

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
        logits: float32 (..., M).
        masks: uint8 (..., M), a bit for each of ``INITIAL``, ``DRAWN`` and ``PREVIOUS``.
        key: What draws depend on besides, see :func:`philox.exponential`.
        step: int64 scalar, the number of the draw.
        sharpness: Masks are drawn from softmax(sharpness * logits).
        change: Scalar; the logits move against it along grad log P(drawn mask).
        direction: (..., M); the logits move against it.

    Returns:
        The words of the masked weights, the next logits and masks.
    """
    logits_M = logits.unbind(-1)
    masks_M = [mask.int() for mask in masks.unbind(-1)]
    if direction is not None:
        logits_M = _minus(logits_M, direction.unbind(-1))
    if change is not None:
        drawn_M = [(mask >> 1 & 1).float() for mask in masks_M]
        score_M = _score([logit * sharpness for logit in logits_M], drawn_M, pattern)
        logits_M = _minus(logits_M, [change * score for score in score_M])
    noise_M = philox.exponential_columns(key, step, groups, pattern.m)
    races_M = [x * sharpness - noise.log() for x, noise in zip(logits_M, noise_M, strict=True)]
    kept_M = [flag.int() for flag in columns.top(races_M, pattern.n)]
    next_M = [
        mask & INITIAL | (mask & DRAWN) << 1 | kept << 1
        for mask, kept in zip(masks_M, kept_M, strict=True)
    ]
    # Bits, since a product would leave negative zeros, and NaN where a pruned weight is infinite.
    bits_M = [bits & -kept for bits, kept in zip(_bits(words, pattern.m), kept_M, strict=True)]
    return (
        _words(bits_M, words.shape[-1]),
        torch.stack(logits_M, dim=-1),
        torch.stack(next_M, dim=-1).to(torch.uint8),
    )


def integers_of(block: Tensor) -> Tensor:
    """A view of a block (..., M) as integers of a value's size, or of two values where it can be.

    Two, since PyTorch's compiler vectorizes integers of 32 and 64 bits, not of 16.
    """
    size = block.element_size()
    *strides, last = block.stride()
    paired = last == 1 and all(
        n % 2 == 0 for n in (block.shape[-1], *strides, block.data_ptr() // 2)
    )
    return block.view(torch.int32 if size == 2 and paired else _INTEGER[size])


def words_of(block: Tensor) -> Tensor:
    """A block's bits as int32 or int64: (..., M), or (..., M / 2) with two values to a word."""
    integers = integers_of(block)
    return integers.int() if integers.element_size() < 4 else integers


def _bits(words: Tensor, m: int) -> list[Tensor]:
    """The M columns of bits that words hold."""
    if words.shape[-1] == m:
        return list(words.unbind(-1))
    return [half for word in words.unbind(-1) for half in (word, word >> 16)]


def _words(bits_M: Sequence[Tensor], number: int) -> Tensor:
    """The words, so many to a group, that hold columns of bits."""
    if number < len(bits_M):
        pairs = zip(bits_M[::2], bits_M[1::2], strict=True)
        bits_M = [low & 0xFFFF | high << 16 for low, high in pairs]
    return torch.stack(list(bits_M), dim=-1)


def _minus(values: Sequence[Tensor], moves: Sequence[Tensor]) -> list[Tensor]:
    return [value - move for value, move in zip(values, moves, strict=True)]


def _score(logits_M: list[Tensor], kept_M: list[Tensor], pattern: NMPattern) -> Sequence[Tensor]:
    if pattern.n <= 2:
        return columns.score(logits_M, kept_M, pattern.n)
    kept_GM = torch.stack(kept_M, dim=-1).bool()
    return distribution.score(torch.stack(logits_M, dim=-1), kept_GM, pattern).unbind(-1)
