"""Laws of packed masks: every mask comes back, in few bits, and other bytes are refused."""

from __future__ import annotations

import math
import re

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import random

from maskpro_lightning.files.packing import pack, packed_size, unpack
from maskpro_lightning.masks.pattern import NMPattern

# With words of one byte, of several, of eight, and plain bits.
PATTERNS = [
    NMPattern.parse(pattern)
    for pattern in (
        *(
            "1:2",
            "1:4",
            "2:4",
            "3:4",
            "2:5",
            "1:8",
            "2:8",
            "4:8",
            "7:8",
            "8:16",
            "1:16",
            "15:16",
            "5:20",
        ),
        *("2:64", "33:66", "16:32", "40:80", "2:300", "299:300"),
    )
]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


@every_pattern
@pytest.mark.parametrize("groups", [0, 1, 2, 3, 23, 24, 25, 1000])
def test_every_mask_comes_back(pattern: NMPattern, groups: int) -> None:
    mask_GM = pattern.top(random(groups, pattern.m))
    packed = pack(mask_GM, pattern)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_size(groups, pattern),)
    assert torch.equal(unpack(packed, groups, pattern), mask_GM)


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_blocks_join_without_a_seam(pattern: str) -> None:
    nm = NMPattern.parse(pattern)
    mask_GM = nm.top(random(200_000, nm.m))
    packed = pack(mask_GM, nm)
    assert torch.equal(unpack(packed, len(mask_GM), nm), mask_GM)
    part = mask_GM[: 9 * 1000]  # whole words of both
    assert torch.equal(pack(part, nm), packed[: packed_size(len(part), nm)])


@given(data=st.data(), m=st.integers(2, 70))
@settings(deadline=None, derandomize=True, database=None, max_examples=150)
def test_any_pattern_packs_any_mask(data: st.DataObject, m: int) -> None:
    pattern = NMPattern(data.draw(st.integers(1, m - 1)), m)
    places = st.sets(st.integers(0, m - 1), min_size=pattern.n, max_size=pattern.n)
    rows = data.draw(st.lists(places, min_size=1, max_size=30))
    mask_GM = torch.tensor([[j in row for j in range(m)] for row in rows])
    packed = pack(mask_GM, pattern)
    assert torch.equal(unpack(packed, len(rows), pattern), mask_GM)
    assert len(packed) <= math.ceil(mask_GM.numel() / 8) + 8


@pytest.mark.parametrize(
    ("pattern", "groups", "size"),
    [("2:4", 3, 1), ("4:8", 9, 7), ("8:16", 4, 7), ("2:5", 12, 5), ("2:8", 13, 8)],
)
def test_a_digit_is_the_number_of_the_set(pattern: str, groups: int, size: int) -> None:
    """Against ``sets`` by enumeration, and the word by Python's integers."""
    nm = NMPattern.parse(pattern)
    sets_CM = oracle.sets(nm.n, nm.m)
    ranks = random(len(sets_CM)).argsort()[:60].tolist()
    groups, size = {"2:4": (3, 1), "4:8": (9, 7), "8:16": (4, 7), "2:5": (12, 5), "2:8": (13, 8)}[
        pattern
    ]
    words = []
    for start in range(0, len(ranks), groups):
        digits = ranks[start : start + groups]
        word = sum(digit * len(sets_CM) ** place for place, digit in enumerate(digits))
        words.append(word.to_bytes(size, "little"))
    assert bytes(pack(sets_CM[ranks], nm).tolist()) == b"".join(words)


@pytest.mark.parametrize(
    ("pattern", "bits"),
    [("2:4", 2 / 3), ("1:4", 1 / 2), ("3:4", 1 / 2), ("4:8", 7 / 9), ("8:16", 7 / 8), ("16:32", 1)],
)
def test_a_mask_takes_few_bits_and_never_less_than_its_entropy(pattern: str, bits: float) -> None:
    nm, groups = NMPattern.parse(pattern), 10**6
    found = 8 * packed_size(groups, nm) / (groups * nm.m)
    assert found == pytest.approx(bits, abs=1e-4)  # a last word of 8 bytes in 4e6 bits
    assert found >= math.log2(nm.num_sets) / nm.m
    assert packed_size(groups, NMPattern(2, 4)) * 8 / (groups * 4) <= 0.68


@every_pattern
def test_no_pattern_takes_more_than_a_bit_for_a_weight(pattern: NMPattern) -> None:
    groups = 10**6
    assert 8 * packed_size(groups, pattern) <= groups * pattern.m


@pytest.mark.parametrize("pattern", ["2:4", "3:4", "2:5", "4:8", "16:32"])
def test_bytes_are_either_refused_or_what_pack_writes(pattern: str) -> None:
    nm, groups = NMPattern.parse(pattern), 10
    packed = pack(nm.top(random(groups, nm.m)), nm)
    problem = f"These bytes hold a number that stands for no {pattern} mask."
    refused = []
    for place in range(8 * len(packed)):
        changed = packed.clone()
        changed[place // 8] ^= 1 << place % 8
        try:
            mask_GM = unpack(changed, groups, nm)
        except ValueError as error:
            refused.append(str(error))
            continue
        assert oracle.keeps_exactly(nm.n, nm.m, mask_GM)
        assert torch.equal(pack(mask_GM, nm), changed), "unused digits are zero"
    assert set(refused) == {problem}


def test_words_beyond_the_last_are_refused() -> None:
    for word in (216, 255):
        with pytest.raises(ValueError, match="stands for no 2:4 mask"):
            unpack(torch.tensor([word], dtype=torch.uint8), 3, NMPattern(2, 4))
    eight = NMPattern(2, 8)
    for last in (0x7F, 0x80, 0xFF):  # large, and negative as an int64
        word = torch.tensor([255] * 7 + [last], dtype=torch.uint8)
        with pytest.raises(ValueError, match="stands for no 2:8 mask"):
            unpack(word, 13, eight)


@pytest.mark.parametrize(
    ("packed", "kind"),
    [
        (torch.zeros(3, dtype=torch.uint8), "torch.uint8 of shape (3,)"),
        (torch.zeros(1, dtype=torch.uint8), "torch.uint8 of shape (1,)"),
        (torch.zeros(2), "torch.float32 of shape (2,)"),
        (torch.zeros(1, 2, dtype=torch.uint8), "torch.uint8 of shape (1, 2)"),
    ],
)
def test_another_size_or_type_is_refused(packed: torch.Tensor, kind: str) -> None:
    message = f"4 groups of 2:4 are packed into 2 bytes (uint8), not into {kind}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        unpack(packed, 4, NMPattern(2, 4))


def test_only_exact_masks_are_packed() -> None:
    with pytest.raises(ValueError, match=r"mask is not 2:4: group 1 keeps 3 of 4 weights"):
        pack(torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool(), NMPattern(2, 4))
    with pytest.raises(TypeError, match="must be a bool tensor"):
        pack(torch.ones(1, 4), NMPattern(2, 4))
