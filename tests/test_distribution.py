"""Laws of drawing N of M without replacement, held against enumeration in float64."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskpro_lightning import distribution
from maskpro_lightning.distribution import entropy, inclusion, log_prob, mode, sample, score
from maskpro_lightning.pattern import NMPattern
from maskpro_lightning.philox import exponential, key_of

PATTERNS = [NMPattern(n, m) for m in range(2, 9) for n in range(1, m)]
SCALES = [1.0, 5.0, 10.0, 30.0, 150.0]
TWO_OF_FOUR = NMPattern(2, 4)
BY_QUADRATURE = NMPattern(9, 18)
# The documented error of the quadrature.
QUADRATURE = 1e-6

every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)
every_scale = pytest.mark.parametrize("scale", SCALES)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)


def every_set(pattern: NMPattern, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits and kept sets, (4 C, M): every set four times, each with logits of its own."""
    kept_GM = oracle.sets(pattern.n, pattern.m).repeat(4, 1)
    return random(*kept_GM.shape, scale=scale, dtype=dtype), kept_GM


def some_sets(pattern: NMPattern, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits and kept sets, (24, M), of a pattern with too many sets to go through."""
    order_GM = random(24, pattern.m).argsort(-1)
    return random(24, pattern.m, scale=scale, dtype=dtype), order_GM < pattern.n


def eps_of(logits: Tensor) -> float:
    return torch.finfo(logits.dtype).eps


def clamp_error(n: int) -> float:
    """Log-ratios end at 27, which moves each of N kept weights by at most e^-27."""
    return n * math.exp(-27)


def log_prob_tolerance(logits_GM: Tensor, n: int) -> float:
    """Two differences per kept weight, each rounded at the size of the logits' spread, and a sum."""
    spread = float((logits_GM.amax(-1) - logits_GM.amin(-1)).max())
    return 2 * n * (1 + spread) * eps_of(logits_GM) + clamp_error(n)


def score_tolerance(logits: Tensor, n: int) -> float:
    """An expectation in [0, 1] from products of N factors, each made with about four roundings."""
    return 4 * n * eps_of(logits) + clamp_error(n)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, check_dtype=False)


# --- sampling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_m", [(1, 4), (2, 4), (3, 4), (3, 5), (4, 8)])
def test_masks_are_sampled_with_the_enumerated_probabilities(n_m: tuple[int, int]) -> None:
    n, m = n_m
    draws, logits_M = 200_000, random(m)
    noise_GM = exponential(key_of("frequencies"), torch.tensor(0), torch.arange(draws), m)
    kept_GM = sample(logits_M.expand(draws, m), noise_GM, NMPattern(n, m))
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@every_pattern
def test_samples_keep_exactly_n(pattern: NMPattern, dtype: torch.dtype) -> None:
    noise_GM = exponential(key_of("exactly n"), torch.tensor(0), torch.arange(200), pattern.m)
    kept_GM = sample(random(200, pattern.m, dtype=dtype), noise_GM, pattern)
    assert oracle.keeps_exactly(pattern.n, pattern.m, kept_GM)


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


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p.n <= 4], ids=str)
def test_the_oracle_sums_over_all_orders(pattern: NMPattern) -> None:
    logits_GM, kept_GM = every_set(pattern, 3.0, torch.float64)
    rows = zip(logits_GM[:20].tolist(), kept_GM[:20].tolist(), strict=True)
    by_orders = [oracle.log_prob_by_orders(logits, kept) for logits, kept in rows]
    assert_near(oracle.log_prob(logits_GM, kept_GM)[:20], torch.tensor(by_orders).double(), 1e-12)


@both_dtypes
@every_scale
@every_pattern
def test_log_prob_is_the_sum_over_all_orders(
    pattern: NMPattern, scale: float, dtype: torch.dtype
) -> None:
    logits_GM, kept_GM = every_set(pattern, scale, dtype)
    expected_G = oracle.log_prob(logits_GM, kept_GM)
    tolerance = log_prob_tolerance(logits_GM, pattern.n)
    assert_near(log_prob(logits_GM, kept_GM, pattern), expected_G, tolerance)


@both_dtypes
@every_scale
@every_pattern
def test_score_is_the_gradient_of_log_prob(
    pattern: NMPattern, scale: float, dtype: torch.dtype
) -> None:
    logits_GM, kept_GM = every_set(pattern, scale, dtype)
    expected_GM = oracle.score(logits_GM, kept_GM)
    tolerance = score_tolerance(logits_GM, pattern.n)
    assert_near(score(logits_GM, kept_GM, pattern), expected_GM, tolerance)


@given(data=st.data(), m=st.integers(2, 6))
@settings(deadline=None, derandomize=True, database=None, max_examples=100)
def test_log_prob_and_score_are_the_oracles_for_any_logits(data: st.DataObject, m: int) -> None:
    pattern = NMPattern(data.draw(st.integers(1, m - 1)), m)
    logit = st.floats(-60, 60, width=32) | st.sampled_from([0.0, 10.0])
    logits_M = torch.tensor(data.draw(st.lists(logit, min_size=m, max_size=m)))
    kept_M = torch.tensor(data.draw(st.permutations(range(m)))) < pattern.n
    expected, tolerance = oracle.log_prob(logits_M, kept_M), log_prob_tolerance(logits_M, pattern.n)
    assert_near(log_prob(logits_M, kept_M, pattern), expected, tolerance)
    expected_M, tolerance = oracle.score(logits_M, kept_M), score_tolerance(logits_M, pattern.n)
    assert_near(score(logits_M, kept_M, pattern), expected_M, tolerance)


@every_pattern
def test_probabilities_sum_to_one_and_the_expected_score_to_zero(pattern: NMPattern) -> None:
    kept_CM = oracle.sets(pattern.n, pattern.m)
    for scale in SCALES:
        logits_CM = random(pattern.m, scale=scale, dtype=torch.float64).expand(kept_CM.shape)
        p_C = log_prob(logits_CM, kept_CM, pattern).exp()
        tolerance = log_prob_tolerance(logits_CM, pattern.n)
        assert float(p_C.sum()) == pytest.approx(1, abs=tolerance)
        expectation_M = p_C @ score(logits_CM, kept_CM, pattern)
        assert_near(expectation_M, torch.zeros(pattern.m), tolerance)


@every_scale
@pytest.mark.parametrize("pattern", [*PATTERNS, BY_QUADRATURE], ids=str)
def test_score_sums_to_zero_over_a_group(pattern: NMPattern, scale: float) -> None:
    logits_GM, kept_GM = some_sets(pattern, scale, torch.float32)
    sums_G = score(logits_GM, kept_GM, pattern).sum(-1)
    assert_near(sums_G, torch.zeros(24), score_tolerance(logits_GM, pattern.n))


@pytest.mark.parametrize("pattern", [*PATTERNS, BY_QUADRATURE], ids=str)
def test_a_shift_of_all_logits_changes_nothing(pattern: NMPattern) -> None:
    logits_GM, kept_GM = some_sets(pattern, 5.0, torch.float32)
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
    smallest = expected_CM.abs().amin()
    assert smallest < 1e-4
    actual_CM = score(logits_CM, kept_CM, TWO_OF_FOUR)
    torch.testing.assert_close(actual_CM, expected_CM.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("ahead", [15.0, 30.0, 150.0])
@pytest.mark.parametrize("pattern", [*PATTERNS, BY_QUADRATURE], ids=str)
def test_score_of_a_settled_group_is_zero(pattern: NMPattern, ahead: float) -> None:
    kept_M = torch.arange(pattern.m) < pattern.n
    gradient_M = score(ahead * kept_M, kept_M, pattern)
    # Each kept weight is lost with probability at most M e^-ahead.
    bound = pattern.n * pattern.m * math.exp(-ahead) + score_tolerance(gradient_M, pattern.n)
    assert_near(gradient_M, torch.zeros(pattern.m), bound)


@both_dtypes
@pytest.mark.parametrize("ahead", [30.0, 150.0, 1000.0])
@pytest.mark.parametrize("pattern", [*PATTERNS, BY_QUADRATURE], ids=str)
def test_a_set_against_all_odds_has_a_finite_log_prob_and_score(
    pattern: NMPattern, ahead: float, dtype: torch.dtype
) -> None:
    kept_M = torch.arange(pattern.m) < pattern.n
    logits_M = ahead * (~kept_M).to(dtype)
    n, rest = pattern.n, pattern.m - pattern.n
    # All N clocks ring in time t with probability t^N; the first ring outside has E[t^N] = N!.
    expected = math.lgamma(n + 1) - n * (ahead + math.log(rest))
    actual = float(log_prob(logits_M, kept_M, pattern))
    assert actual == pytest.approx(expected, abs=log_prob_tolerance(logits_M, n) + QUADRATURE)
    expected_M = torch.where(kept_M, 1.0, -n / rest)
    assert_near(score(logits_M, kept_M, pattern), expected_M, score_tolerance(logits_M, n) + QUADRATURE)
