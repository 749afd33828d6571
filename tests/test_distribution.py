"""Laws of drawing N of M without replacement, held against enumeration in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import random
from torch import Tensor

from maskpro_lightning.masks import distribution, inclusion
from maskpro_lightning.masks.distribution import (
    entropy,
    log_prob,
    mode,
    sample,
    score,
)
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.masks.philox import exponential, key_of

PATTERNS = [NMPattern(n, m) for m in range(2, 9) for n in range(1, m)]
SCALES = [1.0, 5.0, 10.0, 30.0, 150.0]
TWO_OF_FOUR = NMPattern(2, 4)
BY_QUADRATURE = NMPattern(9, 18)
# The documented error of the quadratures of gradients; what lies left of inclusion's first node.
QUADRATURE = 1e-6
QUADRATURE_OF_INCLUSION = math.exp(-18)


def patterns(*several: NMPattern | str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("pattern", [NMPattern.parse(p) for p in several], ids=str)


every_pattern = patterns(*PATTERNS)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def cases(
    pattern: NMPattern, dtype: torch.dtype = torch.float32, scales: Sequence[float] = SCALES
) -> tuple[Tensor, Tensor]:
    """Logits and kept sets, (G, M): every set (of very many, 12) at each scale of the logits."""
    n, m = pattern.n, pattern.m
    kept_CM = oracle.sets(n, m) if m <= 8 else random(12, m, seed=1).argsort(-1) < n
    logits_GM = random(len(scales), *kept_CM.shape) * torch.tensor(scales)[:, None, None]
    return logits_GM.flatten(0, 1).to(dtype), kept_CM.repeat(len(scales), 1)


def at_every_scale(m: int) -> Tensor:
    """One group of logits for each scale, (5, M)."""
    return random(len(SCALES), m) * torch.tensor(SCALES)[:, None]


def eps_of(logits: Tensor) -> float:
    return torch.finfo(logits.dtype).eps


def clamp_error(n: int) -> float:
    """Log-ratios end at 27, which moves each of N kept weights by at most e^-27."""
    return n * math.exp(-27)


def log_prob_tolerance(logits_GM: Tensor, n: int) -> Tensor:
    """Per kept weight two differences and a sum, each rounded at the size of the spread, (G,)."""
    spread_G = logits_GM.amax(-1) - logits_GM.amin(-1)
    return 2 * n * (1 + spread_G) * eps_of(logits_GM) + clamp_error(n)


def score_tolerance(logits: Tensor, n: int) -> float:
    """An expectation in [0, 1] from products of N factors, each made with about four roundings."""
    return 4 * n * eps_of(logits) + clamp_error(n)


def assert_near(actual: Tensor, expected: Tensor | float, tolerance: Tensor | float) -> None:
    error = (actual - expected).abs()
    assert (error <= tolerance).all(), f"off by {error.max()}, more than {tolerance}"


def assert_log_prob_and_score_are_the_oracles(
    logits_GM: Tensor, kept_GM: Tensor, pattern: NMPattern, quadrature: float = 0.0
) -> None:
    expected_G = oracle.log_prob(logits_GM, kept_GM)
    tolerance_G = log_prob_tolerance(logits_GM, pattern.n) + quadrature
    assert_near(log_prob(logits_GM, kept_GM, pattern), expected_G, tolerance_G)
    expected_GM = oracle.score(logits_GM, kept_GM)
    tolerance = score_tolerance(logits_GM, pattern.n) + quadrature
    assert_near(score(logits_GM, kept_GM, pattern), expected_GM, tolerance)


# --- sampling -----------------------------------------------------------------------------------


@patterns("1:4", "2:4", "3:4", "3:5", "4:8")
def test_masks_are_sampled_with_the_enumerated_probabilities(pattern: NMPattern) -> None:
    n, m, draws = pattern.n, pattern.m, 200_000
    logits_M = 0.7 * random(m)
    noise_GM = exponential(key_of("frequencies"), torch.tensor(0), torch.arange(draws), m)
    kept_GM = sample(logits_M.expand(draws, m), noise_GM, pattern)
    number_M = 2 ** torch.arange(m)
    numbers_G, numbers_C = (kept_GM * number_M).sum(-1), (oracle.sets(n, m) * number_M).sum(-1)
    counts_C = (numbers_G[:, None] == numbers_C).sum(0)
    expected_C = draws * oracle.probabilities(logits_M, n)
    assert counts_C.sum() == draws
    assert expected_C.min() > 5  # or the law of chi-square would not hold
    chi_square = float(((counts_C - expected_C) ** 2 / expected_C).sum())
    # Laurent and Massart (2000): P(chi^2_k >= k + 2 sqrt(k x) + 2x) <= e^-x, here one in a million.
    k, x = len(counts_C) - 1, math.log(1e6)
    assert chi_square < k + 2 * math.sqrt(k * x) + 2 * x


@every_pattern
def test_the_mode_is_the_most_likely_set(pattern: NMPattern) -> None:
    for logits_M in random(5, pattern.m):
        most_likely = oracle.probabilities(logits_M, pattern.n).argmax()
        assert torch.equal(mode(logits_M, pattern), oracle.sets(pattern.n, pattern.m)[most_likely])


@every_pattern
@pytest.mark.parametrize("c", [0.5, 10.0])
def test_the_mode_of_a_scaled_mask_is_the_mask(pattern: NMPattern, c: float) -> None:
    mask_CM = oracle.sets(pattern.n, pattern.m)
    assert torch.equal(mode(c * mask_CM, pattern), mask_CM)


# --- log_prob and score -------------------------------------------------------------------------


@patterns(*(p for p in PATTERNS if p.n <= 4))
def test_the_oracle_sums_over_all_orders(pattern: NMPattern) -> None:
    logits_GM, kept_GM = cases(pattern, torch.float64, scales=[3.0])
    rows = zip(logits_GM.tolist(), kept_GM.tolist(), strict=True)
    by_orders_G = torch.stack([oracle.log_prob_by_orders(*row) for row in rows])
    assert_near(oracle.log_prob(logits_GM, kept_GM), by_orders_G, 1e-12)


@both_dtypes
@every_pattern
def test_log_prob_sums_over_all_orders_and_score_is_its_gradient(
    pattern: NMPattern, dtype: torch.dtype
) -> None:
    assert_log_prob_and_score_are_the_oracles(*cases(pattern, dtype), pattern)


@given(data=st.data(), m=st.integers(2, 6))
@settings(deadline=None, derandomize=True, database=None, max_examples=100)
def test_log_prob_and_score_are_the_oracles_for_any_logits(data: st.DataObject, m: int) -> None:
    pattern = NMPattern(data.draw(st.integers(1, m - 1)), m)
    logit = st.floats(-60, 60, width=32) | st.sampled_from([0.0, 10.0])
    logits_M = torch.tensor(data.draw(st.lists(logit, min_size=m, max_size=m)))
    kept_M = torch.tensor(data.draw(st.permutations(range(m)))) < pattern.n
    assert_log_prob_and_score_are_the_oracles(logits_M, kept_M, pattern)


@every_pattern
def test_probabilities_sum_to_one_and_the_expected_score_to_zero(pattern: NMPattern) -> None:
    kept_CM = oracle.sets(pattern.n, pattern.m)
    for logits_M in at_every_scale(pattern.m).double():
        logits_CM = logits_M.expand(kept_CM.shape)
        p_C = log_prob(logits_CM, kept_CM, pattern).exp()
        tolerance = log_prob_tolerance(logits_M, pattern.n)
        assert_near(p_C.sum(), 1, tolerance)
        assert_near(p_C @ score(logits_CM, kept_CM, pattern), 0, tolerance)


@patterns(*PATTERNS, BY_QUADRATURE)
def test_score_sums_to_zero_over_a_group(pattern: NMPattern) -> None:
    logits_GM, kept_GM = cases(pattern)
    sums_G = score(logits_GM, kept_GM, pattern).sum(-1)
    assert_near(sums_G, 0, score_tolerance(logits_GM, pattern.n))


@patterns(*PATTERNS, BY_QUADRATURE)
def test_a_shift_of_all_logits_changes_nothing(pattern: NMPattern) -> None:
    logits_GM, kept_GM = cases(pattern, scales=[1.0, 5.0])
    logits_GM = (256 * logits_GM).round() / 256  # so that the shift is exact, and the law too
    for law in (log_prob, score):
        expected = law(logits_GM, kept_GM, pattern)
        assert torch.equal(law(logits_GM + 1024, kept_GM, pattern), expected)


@pytest.mark.parametrize("logits", [[10, 10, 0, 0], [10, 0, 0, 0], [10, 5, 0, 0], [0, 10, 0, 5]])
def test_score_of_a_confident_group_keeps_its_digits(logits: list[float]) -> None:
    # 1 - p + 1e-8 in place of 1 - p gives -0.35 in such a group.
    kept_CM = oracle.sets(2, 4)
    logits_CM = torch.tensor(logits, dtype=torch.float32).expand(kept_CM.shape)
    expected_CM = oracle.score(logits_CM, kept_CM)
    assert expected_CM.abs().min() < 1e-4
    actual_CM = score(logits_CM, kept_CM, TWO_OF_FOUR)
    torch.testing.assert_close(actual_CM, expected_CM.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("ahead", [15.0, 30.0, 150.0])
@patterns(*PATTERNS, BY_QUADRATURE)
def test_score_of_a_settled_group_is_zero(pattern: NMPattern, ahead: float) -> None:
    kept_M = torch.arange(pattern.m) < pattern.n
    gradient_M = score(ahead * kept_M, kept_M, pattern)
    # Each kept weight is lost with probability at most M e^-ahead.
    bound = pattern.n * pattern.m * math.exp(-ahead) + score_tolerance(gradient_M, pattern.n)
    assert_near(gradient_M, 0, bound)


@both_dtypes
@pytest.mark.parametrize("ahead", [30.0, 150.0, 1000.0])
@patterns(*PATTERNS, BY_QUADRATURE)
def test_a_set_against_all_odds_has_a_finite_log_prob_and_score(
    pattern: NMPattern, ahead: float, dtype: torch.dtype
) -> None:
    kept_M = torch.arange(pattern.m) < pattern.n
    logits_M = ahead * (~kept_M).to(dtype)
    n, rest = pattern.n, pattern.m - pattern.n
    # All N clocks ring in time t with probability t^N; the first ring outside has E[t^N] = N!.
    expected = math.lgamma(n + 1) - n * (ahead + math.log(rest))
    log_prob_error = log_prob_tolerance(logits_M, n) + QUADRATURE
    assert_near(log_prob(logits_M, kept_M, pattern), expected, log_prob_error)
    expected_M = torch.where(kept_M, 1.0, -n / rest)
    score_error = score_tolerance(logits_M, n) + QUADRATURE
    assert_near(score(logits_M, kept_M, pattern), expected_M, score_error)


# --- quadrature, beyond N = 8 -------------------------------------------------------------------


@both_dtypes
@patterns("8:16", BY_QUADRATURE)
def test_large_patterns_have_the_oracles_log_prob_and_score(
    pattern: NMPattern, dtype: torch.dtype
) -> None:
    assert_log_prob_and_score_are_the_oracles(*cases(pattern, dtype), pattern, QUADRATURE)


@patterns("1:4", "3:5", "4:8", "7:8")
def test_quadrature_and_orders_agree(pattern: NMPattern, monkeypatch: pytest.MonkeyPatch) -> None:
    logits_GM, kept_GM = cases(pattern, torch.float64)
    by_orders = [law(logits_GM, kept_GM, pattern) for law in (log_prob, score)]
    monkeypatch.setattr(distribution, "_LARGEST_N_BY_ORDERS", 0)
    by_quadrature = [law(logits_GM, kept_GM, pattern) for law in (log_prob, score)]
    for orders, quadrature in zip(by_orders, by_quadrature, strict=True):
        assert not torch.equal(orders, quadrature)  # or the same was computed twice
        assert_near(quadrature, orders, QUADRATURE)


# --- inclusion and entropy ----------------------------------------------------------------------


@patterns(*PATTERNS, "3:12")
def test_inclusion_is_the_enumerated_probability_and_sums_to_n(pattern: NMPattern) -> None:
    logits_GM = at_every_scale(pattern.m)
    expected_GM = torch.stack([oracle.inclusion(logits_M, pattern.n) for logits_M in logits_GM])
    # A sum over nodes of products of at most M probabilities.
    tolerance = pattern.m * eps_of(logits_GM) + QUADRATURE_OF_INCLUSION
    actual_GM = inclusion.probabilities(logits_GM, pattern)
    assert_near(actual_GM, expected_GM, tolerance)
    assert_near(actual_GM.sum(-1), pattern.n, pattern.n * tolerance)


@both_dtypes
@patterns(*PATTERNS, "4:11")
def test_the_gradient_of_inclusion_is_the_oracles(pattern: NMPattern, dtype: torch.dtype) -> None:
    logits_GM = at_every_scale(pattern.m).to(dtype).requires_grad_()
    values_GM = random(len(SCALES), pattern.m, seed=1).to(dtype)
    oracles_GM = torch.stack([oracle.inclusion(logits_M, pattern.n) for logits_M in logits_GM])
    (expected_GM,) = torch.autograd.grad((oracles_GM * values_GM.double()).sum(), logits_GM)
    (through_GM,) = torch.autograd.grad(
        (inclusion.probabilities(logits_GM, pattern) * values_GM).sum(), logits_GM
    )
    direct_GM = inclusion.gradient(logits_GM.detach(), values_GM, pattern)
    # The oracle itself rounds log-probabilities, which are as large as the logits' spread.
    rounding = pattern.m * eps_of(logits_GM) + 2 * max(SCALES) * torch.finfo(torch.float64).eps
    quadrature = QUADRATURE_OF_INCLUSION * (pattern.num_sets > 300)
    tolerance = float(values_GM.abs().sum()) * (rounding + quadrature)
    for actual_GM in (through_GM, direct_GM):
        assert_near(actual_GM, expected_GM, tolerance)


@patterns(*PATTERNS, "8:16")
def test_the_race_and_the_walk_agree_on_inclusion(
    pattern: NMPattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits_GM = at_every_scale(pattern.m).double()
    values_GM = random(len(SCALES), pattern.m, seed=1)
    found = []
    for most_sets in (0, 2**15):
        monkeypatch.setattr(inclusion, "_MOST_SETS", most_sets)
        found.append(
            (
                inclusion.probabilities(logits_GM, pattern),
                inclusion.gradient(logits_GM, values_GM, pattern),
            )
        )
    (race_GM, race_gradient_GM), (walk_GM, walk_gradient_GM) = found
    assert_near(race_GM, walk_GM, QUADRATURE_OF_INCLUSION)
    assert not torch.equal(race_gradient_GM, walk_gradient_GM)
    spread = float(values_GM.max() - values_GM.min())
    assert_near(race_gradient_GM, walk_gradient_GM, spread * QUADRATURE)


@every_pattern
def test_entropy_is_the_enumerated_one_and_at_most_log_c(pattern: NMPattern) -> None:
    logits_GM = at_every_scale(pattern.m)
    expected_G = torch.stack([oracle.entropy(logits_M, pattern.n) for logits_M in logits_GM])
    log_c = math.log(pattern.num_sets)
    # -p log p moves by at most (1 - log p) p times what log p moves by.
    tolerance_G = (1 + log_c) * log_prob_tolerance(logits_GM, pattern.n)
    actual_G = entropy(logits_GM, pattern)
    assert_near(actual_G, expected_G, tolerance_G)
    assert (actual_G < log_c).all()
    assert_near(entropy(torch.zeros(pattern.m), pattern), log_c, tolerance_G[0])


@pytest.mark.parametrize("ahead", [30.0, 150.0, 1000.0])
@every_pattern
def test_entropy_of_a_settled_group_is_zero(pattern: NMPattern, ahead: float) -> None:
    logits_CM = ahead * oracle.sets(pattern.n, pattern.m)
    assert_near(entropy(logits_CM, pattern), 0, log_prob_tolerance(logits_CM, pattern.n))


# --- every function -----------------------------------------------------------------------------


def every_function(logits_GM: Tensor, kept_GM: Tensor, pattern: NMPattern) -> list[Tensor]:
    noise_GM = random(*logits_GM.shape).abs()
    return [
        log_prob(logits_GM, kept_GM, pattern),
        score(logits_GM, kept_GM, pattern),
        inclusion.probabilities(logits_GM, pattern),
        inclusion.gradient(logits_GM, logits_GM, pattern),
        entropy(logits_GM, pattern),
        sample(logits_GM, noise_GM, pattern),
        mode(logits_GM, pattern),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@patterns("1:4", "2:4", "3:5")
def test_half_precision_logits_are_computed_with_in_float32(
    pattern: NMPattern, dtype: torch.dtype
) -> None:
    logits_GM, kept_GM = cases(pattern, scales=[1.0, 5.0])
    half_GM = logits_GM.to(dtype)
    in_half = every_function(half_GM, kept_GM, pattern)
    in_float32 = every_function(half_GM.float(), kept_GM, pattern)
    for actual, expected in zip(in_half, in_float32, strict=True):
        assert torch.equal(actual, expected)
        assert actual.dtype in (torch.float32, torch.bool)


@patterns("1:4", "2:4", "3:5")
def test_all_leading_dimensions_count_groups(pattern: NMPattern) -> None:
    logits_GM, kept_GM = cases(pattern, scales=[1.0, 5.0])
    shape = (2, 1, -1)
    flat = every_function(logits_GM, kept_GM, pattern)
    folded = every_function(logits_GM.unflatten(0, shape), kept_GM.unflatten(0, shape), pattern)
    for actual, expected in zip(folded, flat, strict=True):
        assert torch.equal(actual, expected.unflatten(0, shape))
