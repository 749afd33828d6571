"""The mask step of a block of groups: one pure function, which a compiler makes one loop of.

Run as it is, each of its operations goes over the block once. ``torch.compile`` makes of it a
vectorized loop on a CPU and a kernel on a GPU, in which all but the block itself stays in
registers.

Shape suffix: ``M`` group size; lists over ``M`` hold columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import mul, or_

import torch
from torch import Tensor

from maskpro_lightning.masks import columns, distribution, philox
from maskpro_lightning.masks.pattern import NMPattern

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
        logits: Of float32, or of bfloat16, which are rounded at random; see :func:`logits_of`.
        masks: The words of bytes with a bit for each of ``INITIAL``, ``DRAWN`` and ``PREVIOUS``.
        key: What draws depend on besides, see :func:`philox.exponential`.
        step: int64 scalar, the number of the draw.
        sharpness: Masks are drawn from softmax(sharpness * logits).
        change: Scalar; the logits move against it along grad log P(drawn mask).
        direction: (..., M); the logits move against it.

    Returns:
        The words of the masked weights, the next logits and masks.
    """
    masks_M = _bits(masks, pattern.m)
    drawn_M = [mask >> 1 & 1 for mask in masks_M]
    logits_M = _logits(logits, pattern.m)
    if change is not None or direction is not None:
        logits_M = _learned(pattern, logits_M, drawn_M, sharpness, change, direction)
        logits_M = _rounded(logits_M, logits, groups, key, step)
    kept_M = _drawn(pattern, logits_M, groups, key, step, sharpness)
    next_M = [
        mask & INITIAL | (mask & DRAWN) << 1 | kept << 1
        for mask, kept in zip(masks_M, kept_M, strict=True)
    ]
    bits_M = [bits & -kept for bits, kept in zip(_bits(words, pattern.m), kept_M, strict=True)]
    return _words(bits_M, words), _stored(logits_M, logits), _words(next_M, masks)


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
    direction: Tensor | None = None,
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
        direction: How they move besides.

    Returns:
        The words of the masked weights and of the pruned ones, the next logits and masks, and
        int32 (...), 1 for each group whose mask has changed.
    """
    initial_M, held_M = flags_of(masks, pattern.m)
    logits_M = _logits(logits, pattern.m)
    if change is not None or direction is not None:
        logits_M = _learned(pattern, logits_M, held_M, sharpness, change, direction)
        logits_M = _rounded(logits_M, logits, groups, key, step)
    next_M = _drawn(pattern, logits_M, groups, key, step, sharpness)
    stays = reduce(mul, [1 - (old ^ new) for old, new in zip(held_M, next_M, strict=True)])
    words, pruned = exchange(pattern, words, pruned, held_M, next_M)
    return (
        words,
        pruned,
        _stored(logits_M, logits),
        masks_of(initial_M, next_M),
        1 - stays,
    )


def flags_of(masks: Tensor, m: int) -> tuple[list[Tensor], list[Tensor]]:
    """The columns of an initial and of a drawn mask, int32, from two bits per weight (..., B)."""
    octets = [octet.int() for octet in masks.unbind(-1)]
    flags = [octets[bit // 8] >> bit % 8 & 1 for bit in range(2 * m)]
    return flags[:m], flags[m:]


def masks_of(initial_M: Sequence[Tensor], drawn_M: Sequence[Tensor]) -> Tensor:
    """Two bits per weight, of which :func:`flags_of` gives the columns: uint8 (..., B)."""
    bits = [flag << bit % 8 for bit, flag in enumerate((*initial_M, *drawn_M))]
    octets = [reduce(or_, bits[first : first + 8]) for first in range(0, len(bits), 8)]
    return torch.stack(octets, dim=-1).to(torch.uint8)


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
    bits_M = _bits(words, pattern.m)
    left_out = _bits(pruned, pattern.m - pattern.n)
    if held_M is not None:
        places = _places(held_M)
        bits_M = [
            torch.where(kept > 0, bits, _at(place, left_out, last=j, number=pattern.n))
            for j, (kept, bits, place) in enumerate(zip(held_M, bits_M, places, strict=True))
        ]
    if next_M is None:
        return _words(bits_M, words), pruned
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
    return _words(kept_bits, words), _words(gone, pruned)


def integers_of(block: Tensor, *alike: Tensor) -> Tensor:
    """A view of a block (..., M) as integers of 64 or 32 bits, each of as many values as fit.

    A group's values are then read and written at once, not one by one. And PyTorch's compiler
    vectorizes integers of 32 and 64 bits, not of 16. Where no such view exists, one value each.

    Args:
        block: The block.
        alike: Others of its size and dtype, whose view is to have the same shape.
    """
    each, blocks = block.element_size(), (block, *alike)
    fitting = (size for size in (8, 4) if size > each and all(_holds(b, size) for b in blocks))
    return block.view(_INTEGER[next(fitting, each)])


def _holds(block: Tensor, size: int) -> bool:
    """Whether a block can be seen as integers of so many bytes."""
    *strides, last = block.stride()
    sizes = (block.shape[-1], *strides, block.storage_offset())
    number = size // block.element_size()
    return last == 1 and not any(n % number for n in sizes) and block.data_ptr() % size == 0


def words_of(block: Tensor, *alike: Tensor) -> Tensor:
    """A block's bits as int32 or int64 (..., M / V), V values to a word or one, see above."""
    integers = integers_of(block, *alike)
    return integers.int() if integers.element_size() < 4 else integers


def logits_of(block: Tensor) -> Tensor:
    """A block of logits as a step takes it: words, or float32 that cannot be seen as pairs."""
    return words_of(block) if block.dtype == torch.bfloat16 else logits_to(block)


def logits_to(block: Tensor) -> Tensor:
    """The view of a block of logits that what a step gives is written to."""
    pairs = block.dtype == torch.bfloat16 or _holds(block, 8)
    return integers_of(block) if pairs else block


def _bits(words: Tensor, m: int) -> list[Tensor]:
    """The M columns of bits that words hold; what is above a value's bits is anything."""
    number = m // words.shape[-1]
    if number == 1:
        return list(words.unbind(-1))
    width = 8 * words.element_size() // number
    if not torch.compiler.is_compiling():  # a view does it in fewer passes, but is no loop
        return [value.int() for value in words.view(_INTEGER[width // 8]).unbind(-1)]
    return [(word >> width * k).int() for word in words.unbind(-1) for k in range(number)]


def _words(bits_M: Sequence[Tensor], like: Tensor) -> Tensor:
    """Columns of bits in words of a shape and dtype."""
    number = len(bits_M) // like.shape[-1]
    if number == 1:
        return torch.stack(list(bits_M), dim=-1)
    width = 8 * like.element_size() // number
    if not torch.compiler.is_compiling():
        narrow = [bits.to(_INTEGER[width // 8]) for bits in bits_M]
        return torch.stack(narrow, dim=-1).view(like.dtype)
    low = 2**width - 1
    parts = [(bits.to(like.dtype) & low) << width * (j % number) for j, bits in enumerate(bits_M)]
    words = [reduce(or_, parts[first : first + number]) for first in range(0, len(parts), number)]
    return torch.stack(words, dim=-1)


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


def _logits(logits: Tensor, m: int) -> Sequence[Tensor]:
    """Columns of float32."""
    if logits.dtype == torch.float32:
        return logits.unbind(-1)
    up = 16 if _are_low(logits, m) else 0
    return [(bits << up).view(torch.float32) for bits in _bits(logits, m)]


def _stored(logits_M: Sequence[Tensor], like: Tensor) -> Tensor:
    """Columns as a block of logits is stored."""
    if like.dtype == torch.float32:
        return torch.stack(list(logits_M), dim=-1)
    down = 16 if _are_low(like, len(logits_M)) else 0
    return _words([logit.view(torch.int32) >> down for logit in logits_M], like)


def _are_low(logits: Tensor, m: int) -> bool:
    """Whether logits are stored as bfloat16: not as they are, nor in pairs of 64 bits."""
    pairs = logits.dtype == torch.int64 and 2 * logits.shape[-1] == m
    return not pairs and logits.dtype != torch.float32


def _rounded(
    logits_M: Sequence[Tensor], like: Tensor, groups: Tensor, key: philox.Key, step: Tensor
) -> Sequence[Tensor]:
    """Columns rounded, if stored as bfloat16, up or down, to their own value on average.

    Rounded to the nearest, a logit would never notice steps below half of its last bit.
    """
    if not _are_low(like, len(logits_M)):
        return logits_M
    noise_M = philox.words(key, step, groups, len(logits_M), stream=1)
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
