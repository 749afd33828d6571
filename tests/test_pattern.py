"""Laws of N:M: what a group is, which N of it are kept, which masks and patterns are refused."""

from __future__ import annotations

import re

import oracle
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import random
from torch import Tensor

from maskpro_lightning.masks.pattern import NMPattern

TWO_OF_FOUR = NMPattern(2, 4)
# The last four are too large for counting rivals and are sorted.
PATTERNS = [
    NMPattern(*n_m)
    for n_m in [
        (1, 2),
        (1, 4),
        (2, 4),
        (3, 4),
        (8, 16),
        (15, 16),
        (1, 17),
        (9, 18),
        (16, 32),
        (2, 300),
    ]
]
REAL_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTEGER_DTYPES = [torch.int64, torch.int32, torch.int8, torch.uint8]
# Name, shape of a weight with eight inputs, and the dimension of its inputs.
LAYERS = [
    pytest.param((6, 8), -1, id="Linear [out, in]"),
    pytest.param((8, 6), 0, id="Conv1D [in, out]"),
    pytest.param((3, 8, 2, 2), 1, id="Conv2d [out, in, kh, kw]"),
    pytest.param((2, 3, 8), -1, id="experts [E, out, in]"),
]

every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)
every_layer = pytest.mark.parametrize(("shape", "input_dim"), LAYERS)


def top_of(weight: Tensor, input_dim: int) -> Tensor:
    """The 2:4 mask of a weight's highest entries, in the weight's shape."""
    mask = torch.zeros_like(weight, dtype=torch.bool)
    TWO_OF_FOUR.group(mask, input_dim)[:] = TWO_OF_FOUR.top(TWO_OF_FOUR.group(weight, input_dim))
    return mask


def assert_top_is_the_oracles(scores_GM: Tensor, pattern: NMPattern) -> None:
    kept_GM = pattern.top(scores_GM)
    assert kept_GM.tolist() == [oracle.top(row, pattern.n) for row in scores_GM.tolist()]
    assert oracle.keeps_exactly(pattern.n, pattern.m, kept_GM)


# --- top ----------------------------------------------------------------------------------------


@every_pattern
@pytest.mark.parametrize("dtype", REAL_DTYPES + INTEGER_DTYPES, ids=str)
def test_top_keeps_the_n_highest_whatever_the_dtype(pattern: NMPattern, dtype: torch.dtype) -> None:
    scores_GM = (30 * random(50, pattern.m)).abs().to(dtype)
    assert_top_is_the_oracles(scores_GM, pattern)


@every_pattern
@pytest.mark.parametrize("dtype", REAL_DTYPES + INTEGER_DTYPES, ids=str)
def test_of_equal_scores_top_keeps_the_first(pattern: NMPattern, dtype: torch.dtype) -> None:
    few_values_GM = random(50, pattern.m).abs().mul(2).to(torch.int64).to(dtype)
    assert_top_is_the_oracles(few_values_GM, pattern)
    kept_M = pattern.top(torch.ones(pattern.m, dtype=dtype))
    assert kept_M.tolist() == [True] * pattern.n + [False] * (pattern.m - pattern.n)


@every_pattern
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_top_keeps_n_among_true_zeros_and_infinities(
    pattern: NMPattern, dtype: torch.dtype
) -> None:
    values = torch.tensor([float("inf"), 1.0, 0.0, -0.0, -1.0, float("-inf")], dtype=dtype)
    choice_GM = random(50, pattern.m).mul(1e4).long() % len(values)
    assert_top_is_the_oracles(values[choice_GM], pattern)
    assert_top_is_the_oracles(torch.zeros(3, pattern.m, dtype=dtype), pattern)
    assert_top_is_the_oracles(torch.full((3, pattern.m), float("-inf"), dtype=dtype), pattern)


@given(data=st.data(), m=st.integers(2, 24))
@settings(deadline=None, derandomize=True, database=None, max_examples=100)
def test_top_is_the_oracles_for_any_pattern_and_any_scores(data: st.DataObject, m: int) -> None:
    pattern = NMPattern(data.draw(st.integers(1, m - 1)), m)
    score = st.floats(allow_nan=False, width=32) | st.sampled_from([-1.0, 0.0, 1.0])
    group = st.lists(score, min_size=m, max_size=m)
    groups = data.draw(st.lists(group, min_size=1, max_size=3))
    assert_top_is_the_oracles(torch.tensor(groups), pattern)


@every_layer
def test_top_reads_any_memory_layout_alike(shape: tuple[int, ...], input_dim: int) -> None:
    weight = random(*shape)
    backwards = weight.permute(*reversed(range(weight.ndim))).contiguous()
    strided = torch.stack([weight, -weight], dim=-1)[..., 0]
    expected = top_of(weight, input_dim)
    assert oracle.keeps_exactly(2, 4, expected, input_dim)
    for same in (backwards.permute(*reversed(range(weight.ndim))), strided):
        assert not same.is_contiguous()
        assert torch.equal(top_of(same, input_dim), expected)


# --- group --------------------------------------------------------------------------------------


@every_layer
def test_a_group_is_m_consecutive_inputs(shape: tuple[int, ...], input_dim: int) -> None:
    weight = random(*shape)
    groups = TWO_OF_FOUR.group(weight, input_dim)
    assert groups.shape[-2:] == (2, 4)
    for number in range(2):
        consecutive = weight.narrow(input_dim, 4 * number, 4).movedim(input_dim, -1)
        assert torch.equal(groups[..., number, :], consecutive)


@every_layer
@pytest.mark.parametrize("transposed", [False, True])
def test_writing_into_groups_writes_into_the_weight(
    shape: tuple[int, ...], input_dim: int, transposed: bool
) -> None:
    weight = random(*shape)
    if transposed:
        weight = weight.transpose(0, -1).contiguous().transpose(0, -1)
    expected = weight.clone()
    for first_of_a_group in (0, 4):
        expected.select(input_dim, first_of_a_group).fill_(7.0)
    TWO_OF_FOUR.group(weight, input_dim)[..., 0] = 7.0
    assert torch.equal(weight, expected)


def test_inputs_that_m_does_not_divide_are_refused() -> None:
    message = "A dimension of 6 cannot be cut into groups of 4 (pattern 2:4)."
    with pytest.raises(ValueError, match=re.escape(message)):
        TWO_OF_FOUR.group(torch.zeros(8, 6))


# --- check --------------------------------------------------------------------------------------


@every_layer
def test_check_accepts_what_keeps_exactly_n(shape: tuple[int, ...], input_dim: int) -> None:
    mask = top_of(random(*shape), input_dim)
    TWO_OF_FOUR.check(mask, input_dim)
    assert oracle.keeps_exactly(2, 4, mask, input_dim)


@every_layer
@pytest.mark.parametrize("kept", [0, 1, 3, 4])
def test_check_names_the_first_wrong_group(
    shape: tuple[int, ...], input_dim: int, kept: int
) -> None:
    mask = top_of(random(*shape), input_dim)
    groups_GM = TWO_OF_FOUR.group(mask, input_dim)
    total = mask.numel() // 4
    for wrong in (5, total - 1):
        place = torch.unravel_index(torch.tensor(wrong), groups_GM.shape[:-1])
        groups_GM[place] = torch.arange(4) < kept
    assert not oracle.keeps_exactly(2, 4, mask, input_dim)
    message = (
        f"the mask of 'fc' is not 2:4: group 5 keeps {kept} of 4 weights "
        f"(2 of {total} groups are wrong)."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        TWO_OF_FOUR.check(mask, input_dim, name="the mask of 'fc'")


def test_check_refuses_a_mask_that_is_not_bool() -> None:
    with pytest.raises(TypeError, match=r"mask must be a bool tensor, got torch\.float32\."):
        TWO_OF_FOUR.check(torch.ones(2, 4))


# --- the pattern itself -------------------------------------------------------------------------


@every_pattern
def test_a_pattern_reads_what_it_writes(pattern: NMPattern) -> None:
    assert NMPattern.parse(str(pattern)) == pattern
    assert NMPattern.parse(f" {pattern.n} : {pattern.m} ") == pattern
    assert NMPattern.parse(pattern) is pattern
    if pattern.m < 60:
        assert yaml.safe_load(str(pattern)) == pattern.n * 60 + pattern.m  # without quotes
    assert NMPattern.parse(yaml.safe_load(str(pattern))) == pattern


@pytest.mark.parametrize("n_m", [(1, 2), (2, 4), (3, 5), (4, 8), (9, 10)])
def test_sets_are_all_masks_in_lexicographic_order(n_m: tuple[int, int]) -> None:
    pattern = NMPattern(*n_m)
    assert torch.equal(pattern.sets(), oracle.sets(*n_m))
    assert pattern.num_sets == len(oracle.sets(*n_m))


def test_sparsity_counts_what_is_pruned() -> None:
    assert NMPattern(1, 4).sparsity == 0.75
    assert NMPattern(3, 4).sparsity == 0.25


@pytest.mark.parametrize("text", ["4:2", "2:0", "0:4", "4:4"])
def test_patterns_that_keep_nothing_or_everything_are_refused(text: str) -> None:
    n, m = text.split(":")
    message = (
        f"The pattern {text} keeps {n} of every {m} weights, but 1 <= N < M must hold: "
        f'write "2:4" to keep two of four.'
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        NMPattern.parse(text)


@pytest.mark.parametrize("text", ["2/4", "", "2:4:8", "-1:4", "2:", "2.0:4", "two:four", "٢:٤"])
def test_strings_of_another_form_are_refused(text: str) -> None:
    message = (
        f"{text!r} is not an N:M pattern: write kept weights, a colon and the group size, "
        f'such as "2:4".'
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        NMPattern.parse(text)


@pytest.mark.parametrize("number", [0, 4, 60, 244, 3601, -124])
def test_numbers_that_yaml_makes_of_no_pattern_are_refused(number: int) -> None:
    message = f"{number} is not an N:M pattern: write kept weights, a colon and the group size, in "
    with pytest.raises(ValueError, match=re.escape(message)):
        NMPattern.parse(number)


@pytest.mark.parametrize("value", [None, 2.4, True, (2, 4), b"2:4"])
def test_only_strings_and_patterns_are_read(value: object) -> None:
    message = f'A pattern is a string like "2:4", got {value!r}.'
    with pytest.raises(TypeError, match=re.escape(message)):
        NMPattern.parse(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [2.0, True, "2", None])
@pytest.mark.parametrize("name", ["n", "m"])
def test_n_and_m_are_integers(name: str, value: object) -> None:
    message = f"{name} of an N:M pattern must be an int, got {value!r}."
    with pytest.raises(TypeError, match=re.escape(message)):
        NMPattern(**{"n": 1, "m": 4} | {name: value})  # type: ignore[arg-type]
