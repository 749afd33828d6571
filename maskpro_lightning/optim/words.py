"""A block's numbers as words of 32 or 64 bits, in which the mask step reads and writes them.

Shape suffix: ``M`` group size; lists over ``M`` hold columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from maskpro_lightning.weights.layout import INTEGERS


def integers_of(block: Tensor, *alike: Tensor) -> Tensor:
    """A view of a block (..., M) as integers of 64 or 32 bits, each holding as many values as fit.

    So several values are read and written at once, and PyTorch's compiler vectorizes integers of 32
    and 64 bits, but not of 16. Where memory allows no such view, each integer holds one value.

    Args:
        block: The block.
        alike: Blocks of the same size and dtype; the view is one that all of them allow.
    """
    each, blocks = block.element_size(), (block, *alike)
    fitting = (size for size in (8, 4) if size > each and all(_holds(b, size) for b in blocks))
    return block.view(INTEGERS[next(fitting, each)])


def _holds(block: Tensor, size: int) -> bool:
    """Whether a block can be viewed as integers of so many bytes."""
    *strides, last = block.stride()
    sizes = (block.shape[-1], *strides, block.storage_offset())
    number = size // block.element_size()
    return last == 1 and not any(n % number for n in sizes) and block.data_ptr() % size == 0


def words_of(block: Tensor, *alike: Tensor) -> Tensor:
    """A block's bits as int32 or int64 (..., M / V), V values to a word: :func:`integers_of`."""
    integers = integers_of(block, *alike)
    return integers.int() if integers.element_size() < 4 else integers


def logits_of(block: Tensor) -> Tensor:
    """A block of logits as a step takes it: words if bfloat16, else pairs or plain float32."""
    return words_of(block) if block.dtype == torch.bfloat16 else logits_to(block)


def logits_to(block: Tensor) -> Tensor:
    """The view of a block of logits that a step's result is copied into."""
    pairs = block.dtype == torch.bfloat16 or _holds(block, 8)
    return integers_of(block) if pairs else block


def one_by_one(logits: Tensor) -> Tensor:
    """The view of a block of logits with one number for each: float32, or int16 if bfloat16."""
    return logits.view(torch.int16) if logits.dtype == torch.bfloat16 else logits


def columns_in(words: Tensor, m: int) -> list[Tensor]:
    """The M columns of bits in words; bits above a value's width can be anything."""
    number = m // words.shape[-1]
    if number == 1:
        return list(words.unbind(-1))
    width = 8 * words.element_size() // number
    if not torch.compiler.is_compiling():  # a view takes fewer passes, but breaks a compiled loop
        return [value.int() for value in words.view(INTEGERS[width // 8]).unbind(-1)]
    return [(word >> width * k).int() for word in words.unbind(-1) for k in range(number)]


def in_words(bits_M: Sequence[Tensor], like: Tensor) -> Tensor:
    """Columns of bits as words of the shape and dtype of others."""
    number = len(bits_M) // like.shape[-1]
    if number == 1:
        return torch.stack(list(bits_M), dim=-1)
    width = 8 * like.element_size() // number
    if not torch.compiler.is_compiling():
        narrow = [bits.to(INTEGERS[width // 8]) for bits in bits_M]
        return torch.stack(narrow, dim=-1).view(like.dtype)
    low = 2**width - 1
    parts = [(bits.to(like.dtype) & low) << width * (j % number) for j, bits in enumerate(bits_M)]
    words = [reduce(or_, parts[first : first + number]) for first in range(0, len(parts), number)]
    return torch.stack(words, dim=-1)


def logits_in(logits: Tensor, m: int) -> Sequence[Tensor]:
    """The M columns of a block of logits in the form that a step takes, float32."""
    if logits.dtype == torch.float32:
        return logits.unbind(-1)
    up = 16 if hold_bfloat16(logits, m) else 0
    return [(bits << up).view(torch.float32) for bits in columns_in(logits, m)]


def logits_as(logits_M: Sequence[Tensor], like: Tensor) -> Tensor:
    """The inverse of :func:`logits_in`: columns in the form of another block of logits."""
    if like.dtype == torch.float32:
        return torch.stack(list(logits_M), dim=-1)
    down = 16 if hold_bfloat16(like, len(logits_M)) else 0
    return in_words([logit.view(torch.int32) >> down for logit in logits_M], like)


def hold_bfloat16(logits: Tensor, m: int) -> bool:
    """Whether logits are words of bfloat16, and not float32, plain or in pairs of 64 bits."""
    pairs = logits.dtype == torch.int64 and 2 * logits.shape[-1] == m
    return not pairs and logits.dtype != torch.float32


def flags_of(masks: Tensor, m: int) -> tuple[list[Tensor], list[Tensor]]:
    """The columns of an initial and of a drawn mask, int32, from two bits per weight (..., B)."""
    octets = [octet.int() for octet in masks.unbind(-1)]
    flags = [octets[bit // 8] >> bit % 8 & 1 for bit in range(2 * m)]
    return flags[:m], flags[m:]


def masks_of(initial_M: Sequence[Tensor], drawn_M: Sequence[Tensor]) -> Tensor:
    """The inverse of :func:`flags_of`: two bits per weight, uint8 (..., B)."""
    bits = [flag << bit % 8 for bit, flag in enumerate((*initial_M, *drawn_M))]
    octets = [reduce(or_, bits[first : first + 8]) for first in range(0, len(bits), 8)]
    return torch.stack(octets, dim=-1).to(torch.uint8)
