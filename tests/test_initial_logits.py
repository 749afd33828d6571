"""Initial logits: the mask they stand for, and how sure they are of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rules import mask_optimizer

from maskpro_lightning import NMPattern
from maskpro_lightning.initial.initializers import magnitude, random
from maskpro_lightning.initial.logits import graded

PATTERNS = [NMPattern(1, 4), NMPattern(2, 4), NMPattern(4, 8), NMPattern(8, 16)]


@given(
    pattern=st.sampled_from(PATTERNS),
    seed=st.integers(0, 2**20),
    input_dim=st.sampled_from([0, 1, -1]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    scale=st.sampled_from([0.5, 4.0, 10.0]),
)
def test_the_given_mask_is_the_most_likely_one(
    pattern: NMPattern, seed: int, input_dim: int, dtype: torch.dtype, scale: float
) -> None:
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(seed)).to(dtype)
    mask = random(weight, pattern, input_dim, key=(seed, 0))
    logits = graded(weight, mask, pattern, input_dim, scale)
    least_kept = pattern.group(logits.where(mask, torch.inf), input_dim).amin(-1)
    most_pruned = pattern.group(logits.where(~mask, -torch.inf), input_dim).amax(-1)
    gap = (least_kept - most_pruned) / scale
    assert gap.min() > 0.199
    assert gap.max() < 3.001


def test_the_oracle() -> None:
    weight = torch.tensor([[4.0, -3.0, 0.0, 1.0], [2.0, 2.0, 0.0, 5.0]])
    mask = torch.tensor([[True, True, False, False], [True, False, False, True]])
    sure = torch.tensor(
        [
            # 16 - 1, 9 - 1; 9 - 0, 9 - 1
            [15**0.5, 8**0.5, 9**0.5, 8**0.5],
            # 4 - 4, 4 - 4; 4 - 0, 25 - 4
            [0.0, 0.0, 2.0, 21**0.5],
        ]
    )
    sure = (sure / sure.mean()).clamp(0.2, 3)
    expected = torch.where(mask, 1 + sure, 1 - sure) * 4 / 2
    torch.testing.assert_close(graded(weight, mask, NMPattern(2, 4), -1, 4.0), expected)


def test_a_mask_that_weights_speak_against_is_held_with_little_conviction() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
    mask = torch.tensor([True, True, False, False]).repeat(2, 1)
    against, for_it = graded(weight, mask, NMPattern(2, 4), -1, 2.0)
    assert against.tolist() == pytest.approx([1.2, 1.2, 0.8, 0.8])
    assert ((for_it - 1).abs() > 1).all()


@pytest.mark.parametrize("value", [0.0, 1.0, torch.nan, torch.inf])
def test_weights_that_say_nothing_give_logits_of_one_size(value: float) -> None:
    weight = torch.full((2, 8), value)
    mask = torch.tensor([True, False, True, False]).repeat(2, 2)
    assert graded(weight, mask, NMPattern(2, 4), -1, 3.0).equal(mask * 3.0)


def test_many_blocks_are_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(64, 64)
    mask = magnitude(weight, NMPattern(2, 4))
    whole = graded(weight, mask, NMPattern(2, 4), -1, 3.0)
    monkeypatch.setattr("maskpro_lightning.initial.initializers._GROUPS_AT_ONCE", 16)
    assert graded(weight, mask, NMPattern(2, 4), -1, 3.0).allclose(whole)


def test_the_published_rule_starts_from_logits_of_one_size() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 8))
    for published in (True, False):
        optimizer = mask_optimizer([("w", weight)], published=published, lr=1.0, logit_scale=10.0)
        optimizer.begin()
        sizes = set(optimizer.logits()["w"].flatten().tolist())
        assert (sizes == {0.0, 10.0}) is published
        optimizer.write("dense")
