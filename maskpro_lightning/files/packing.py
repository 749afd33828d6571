"""Packs masks into whole bytes: 0.667 bits a weight at 2:4, where log2(6) / 4 = 0.646 is the least.

The mask of a group is one of C(M, N) sets. Its number, in the order of ``NMPattern.sets``, is a
digit to the base C(M, N). A word of one to eight bytes holds as many digits as fit (three in a byte
at 2:4), that of the first group the least significant; words are stored lowest byte first. Patterns
for which no word is smaller than plain bits, such as 16:32, take a bit per weight, highest bit
first. Unused digits and bits are zero, so equal masks have equal bytes.

Shape suffixes: ``G`` groups, ``M`` group size, ``W`` words, ``K`` groups of a word, ``B`` bytes of
a word, ``N`` weights still to keep.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from maskpro_lightning.masks.pattern import NMPattern

# Words are computed in int64.
_LARGEST_WORD = 2**63
# Words of a block, whose temporaries fit in the processor's cache.
_BLOCK = 2**13
_NO_MASK = "These bytes hold a number that stands for no {} mask."


class _Word(NamedTuple):
    groups: int
    size: int  # in bytes


def packed_size(groups: int, pattern: NMPattern) -> int:
    """The number of bytes that :func:`pack` needs for a number of groups."""
    word = _word(pattern)
    if word is None:
        return -(-groups * pattern.m // 8)
    return -(-groups // word.groups) * word.size


def pack(mask_GM: Tensor, pattern: NMPattern) -> Tensor:
    """Pack masks of groups, on their device.

    Args:
        mask_GM: bool (G, M), exactly N kept per group.
        pattern: The pattern.

    Returns:
        uint8, one dimension of :func:`packed_size` bytes.

    Raises:
        TypeError: the mask is not bool.
        ValueError: a group does not keep exactly N.
    """
    pattern.check(mask_GM)
    word = _word(pattern)
    if word is None:
        return _to_bits(mask_GM)
    unused = -len(mask_GM) % word.groups
    if unused:
        mask_GM = torch.cat([mask_GM, _first_set(pattern, mask_GM.device).expand(unused, -1)])
    to_bytes = _look_up_bytes if _has_table(pattern, word) else _compute_bytes
    blocks = [to_bytes(block, pattern, word) for block in mask_GM.split(_BLOCK * word.groups)]
    return torch.cat(blocks)


def unpack(packed: Tensor, groups: int, pattern: NMPattern) -> Tensor:
    """Unpack what :func:`pack` packed, on its device.

    Args:
        packed: uint8, one dimension.
        groups: Number of groups, G.
        pattern: The pattern.

    Returns:
        bool (G, M), exactly N kept per group.

    Raises:
        ValueError: another dtype or size, or bytes that :func:`pack` does not write.
    """
    expected = packed_size(groups, pattern)
    if packed.dtype != torch.uint8 or packed.shape != (expected,):
        raise ValueError(
            f"{groups} groups of {pattern} are packed into {expected} bytes (uint8), not into "
            f"{packed.dtype} of shape {tuple(packed.shape)}."
        )
    word = _word(pattern)
    if word is None:
        return _from_bits(packed, groups, pattern)
    to_masks = _look_up_masks if _has_table(pattern, word) else _compute_masks
    blocks = [to_masks(block, pattern, word) for block in packed.split(_BLOCK * word.size)]
    mask_GM = torch.cat(blocks)
    if (mask_GM[groups:] != _first_set(pattern, packed.device)).any():
        raise ValueError(_NO_MASK.format(pattern))
    return mask_GM[:groups]


def _look_up_bytes(mask_GM: Tensor, pattern: NMPattern, word: _Word) -> Tensor:
    bits = word.groups * pattern.m
    powers = 2.0 ** torch.arange(bits, device=mask_GM.device)  # a float product is the fastest
    code_W = (mask_GM.reshape(-1, bits).float() @ powers).int()
    return _codes(pattern, mask_GM.device).index_select(0, code_W)


def _look_up_masks(packed: Tensor, pattern: NMPattern, word: _Word) -> Tensor:
    masks = _words(pattern, packed.device)
    if packed.numel() and int(packed.max()) >= len(masks):
        raise ValueError(_NO_MASK.format(pattern))
    return masks.index_select(0, packed.int()).view(-1, pattern.m)


def _compute_bytes(mask_GM: Tensor, pattern: NMPattern, word: _Word) -> Tensor:
    rank_G = torch.zeros(len(mask_GM), dtype=torch.long, device=mask_GM.device)
    left_G = torch.full_like(rank_G, pattern.n)
    before_MN = _sets_before(pattern, mask_GM.device)
    for kept_G, before_N in zip(mask_GM.unbind(-1), before_MN, strict=True):
        rank_G += before_N[left_G] * ~kept_G
        left_G -= kept_G.long()
    powers_K = pattern.num_sets ** torch.arange(word.groups, device=mask_GM.device)
    word_W = (rank_G.view(-1, word.groups) * powers_K).sum(-1)
    shifts_B = 8 * torch.arange(word.size, device=mask_GM.device)
    return (word_W[:, None] >> shifts_B & 255).to(torch.uint8).flatten()


def _compute_masks(packed: Tensor, pattern: NMPattern, word: _Word) -> Tensor:
    shifts_B = 8 * torch.arange(word.size, device=packed.device)
    word_W = (packed.view(-1, word.size).long() << shifts_B).sum(-1)
    # Eight bytes can come out negative, and the bound is at most the largest int64.
    if ((word_W < 0) | (word_W > pattern.num_sets**word.groups - 1)).any():
        raise ValueError(_NO_MASK.format(pattern))
    powers_K = pattern.num_sets ** torch.arange(word.groups, device=packed.device)
    rank_G = (word_W[:, None] // powers_K % pattern.num_sets).flatten()
    left_G = torch.full_like(rank_G, pattern.n)
    columns = []
    for before_N in _sets_before(pattern, packed.device):
        before_G = before_N[left_G]
        kept_G = rank_G < before_G
        rank_G -= before_G * ~kept_G
        left_G -= kept_G.long()
        columns.append(kept_G)
    return torch.stack(columns, dim=-1)


def _to_bits(mask_GM: Tensor) -> Tensor:
    bits = mask_GM.flatten().to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    packed = torch.zeros_like(bits[:, 0])
    for place, column in enumerate(bits.unbind(-1)):
        packed |= column << (7 - place)
    return packed


def _from_bits(packed: Tensor, groups: int, pattern: NMPattern) -> Tensor:
    columns = [(packed >> place & 1).bool() for place in range(7, -1, -1)]
    bits = torch.stack(columns, dim=-1).flatten()
    size = groups * pattern.m
    mask_GM = bits[:size].view(groups, pattern.m)
    if bits[size:].any() or (mask_GM.sum(-1) != pattern.n).any():
        raise ValueError(_NO_MASK.format(pattern))
    return mask_GM


@cache
def _word(pattern: NMPattern) -> _Word | None:
    """The smallest word that needs the fewest bytes for a group; None for plain bits."""
    if min(pattern.n, pattern.m - pattern.n) > 33:  # C(68, 34) is above the largest word
        return None
    best: tuple[Fraction, _Word | None] = (Fraction(pattern.m, 8), None)
    for size in range(1, 9):
        limit = min(256**size, _LARGEST_WORD)
        groups = 0
        while pattern.num_sets ** (groups + 1) <= limit:
            groups += 1
        if groups and Fraction(size, groups) < best[0]:
            best = (Fraction(size, groups), _Word(groups, size))
    return best[1]


def _has_table(pattern: NMPattern, word: _Word) -> bool:
    return word.size == 1 and word.groups * pattern.m <= 16


@cache
def _words(pattern: NMPattern, device: torch.device) -> Tensor:
    """The masks of each word that has a table, bool (words, K * M)."""
    word = _word(pattern)
    assert word is not None
    every_word = torch.arange(pattern.num_sets**word.groups, dtype=torch.uint8, device=device)
    return _compute_masks(every_word, pattern, word).view(len(every_word), -1)


@cache
def _codes(pattern: NMPattern, device: torch.device) -> Tensor:
    """The word for each row of K * M bits, the first the lowest, uint8."""
    masks = _words(pattern, device)
    code_W = (masks * 2 ** torch.arange(masks.shape[-1], device=device)).sum(-1)
    found = torch.zeros(2 ** masks.shape[-1], dtype=torch.uint8, device=device)
    return found.scatter(0, code_W, torch.arange(len(masks), dtype=torch.uint8, device=device))


@cache
def _sets_before(pattern: NMPattern, device: torch.device) -> Tensor:
    """The number of sets that keep place j, of those that have ``left`` more to keep from j on.

    In the order of sets these come before the ones that do not keep it.

    Returns:
        int64 (M, N + 1), C(M - 1 - j, left - 1) at [j, left]. Entries that no mask reaches may be
        clipped.
    """
    most, places = _LARGEST_WORD - 1, range(pattern.m - 1, -1, -1)
    left = range(pattern.n)
    rows = [[0] + [min(math.comb(after, others), most) for others in left] for after in places]
    return torch.tensor(rows, device=device)


def _first_set(pattern: NMPattern, device: torch.device) -> Tensor:
    return torch.arange(pattern.m, device=device) < pattern.n
