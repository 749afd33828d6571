"""Laws of the noise: Philox to the bit, a function of its arguments alone, truly exponential."""

from __future__ import annotations

import math
import struct

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskpro_lightning.masks.philox import exponential, key_of, philox

KEY = key_of(0, "layer.weight")
STEP = torch.tensor(3)
# A sample has this many numbers, and a law of chance may fail once in a million.
DRAWS = 400_000
CHANCE = 1e-6
FIVE_SIGMA = 5.0  # two-sided, 6e-7


def noise(key: tuple[int, int] = KEY, step: int = 3, m: int = 4) -> Tensor:
    """A large sample, (DRAWS / m, m)."""
    return exponential(key, torch.tensor(step), torch.arange(DRAWS // m), m)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


# --- the generator ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        ("00000000 00000000", "00000000 " * 4, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff", "ffffffff " * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "a4093822 299f31d0",
            "243f6a88 85a308d3 13198a2e 03707344",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(key: str, counter: str, words: str) -> None:
    k0, k1 = (int(word, 16) for word in key.split())
    c0, c1, c2, c3 = (torch.tensor(int(word, 16)) for word in counter.split())
    answer = philox((k0, k1), (c0, c1, c2, c3))
    assert [f"{int(word):08x}" for word in answer] == words.split()


word = st.integers(0, 2**32 - 1)


@given(key=st.tuples(word, word), counters=st.lists(st.tuples(word, word, word, word), min_size=1))
@settings(deadline=None, derandomize=True, database=None, max_examples=100)
def test_philox_is_the_oracles_for_any_key_and_counter(
    key: tuple[int, int], counters: list[tuple[int, int, int, int]]
) -> None:
    c0, c1, c2, c3 = torch.tensor(counters).unbind(-1)
    words = torch.stack(philox(key, (c0, c1, c2, c3)), dim=-1)
    assert words.tolist() == [oracle.philox(key, counter) for counter in counters]


def test_a_key_is_two_words_that_never_change() -> None:
    # printf '0\0layer.weight' | b2sum -l 64; with other words no old run could be resumed.
    digest = bytes.fromhex("2d6bd8c20e80cfc3")
    assert key_of(0, "layer.weight") == struct.unpack("<2I", digest)
    assert all(0 <= part < 2**32 for seed in range(1000) for part in key_of(seed))


def test_other_parts_give_another_key() -> None:
    keys = [key_of(seed, name) for seed in range(100) for name in ("a.weight", "b.weight")]
    assert len(set(keys)) == 200
    assert key_of("ab", "c") != key_of("a", "bc")


# --- a function of key, step and group alone ----------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8, 18])
@pytest.mark.parametrize("step", [0, 1, 2**32 - 1, 2**32, 2**62 + 1])
def test_noise_is_philox_through_the_inverse_of_the_exponentials_distribution(
    m: int, step: int
) -> None:
    groups = [0, 1, 2, 2**31, 2**32, 2**32 + 1, 2**40 + 3]
    blocks = math.ceil(m / 4)
    words_GM = torch.tensor(
        [
            [
                word
                for block in range(blocks * group, blocks * (group + 1))
                for word in oracle.philox(
                    KEY, (block % 2**32, block // 2**32, step % 2**32, step // 2**32)
                )
            ][:m]
            for group in groups
        ]
    )
    expected = -torch.log1p(-(words_GM.double() + 0.5) * 2**-32)
    actual = exponential(KEY, torch.tensor(step), torch.tensor(groups), m)
    # Rounding u to float32 moves -log(1 - u) by up to 2^-24 / (1 - u), and then rounds that.
    error = (actual - expected).abs()
    assert (error <= 2**-23 * (expected.exp() + expected)).all()


@pytest.mark.parametrize("m", [2, 4, 5, 8])
def test_any_subset_or_order_of_groups_gets_the_same_noise(m: int) -> None:
    everything = exponential(KEY, STEP, torch.arange(1000), m)
    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    for size in (1, 2, 3, 7, 8, 9, 31, 64, 501, 1000):
        some = shuffled[:size]
        assert torch.equal(exponential(KEY, STEP, some, m), everything[some])
    assert exponential(KEY, STEP, shuffled[:0], m).shape == (0, m)


@pytest.mark.parametrize("m", [2, 4, 5, 8])
def test_no_two_groups_steps_or_keys_share_their_noise(m: int) -> None:
    groups = torch.cat([torch.arange(100) + start for start in (0, 2**31, 2**32, 2**33, 2**50)])
    steps = [torch.tensor(step) for step in (0, 1, 2**32, 2**32 + 1, 2**62)]
    keys = [(0, 0), (0, 1), (1, 0), (1, 1)]
    rows = torch.cat([exponential(key, step, groups, m) for key in keys for step in steps])
    assert len(rows.unique(dim=0)) == len(rows) == 4 * 5 * 500


@pytest.mark.parametrize(
    ("key", "step"),
    [
        pytest.param(KEY, 4, id="the next step"),
        pytest.param(KEY, 3 + 2**32, id="a far step"),
        pytest.param(key_of(1, "layer.weight"), 3, id="another seed"),
        pytest.param(key_of(0, "other.weight"), 3, id="another name"),
    ],
)
def test_noise_of_different_draws_is_uncorrelated(key: tuple[int, int], step: int) -> None:
    assert abs(correlation(noise(), noise(key, step))) < FIVE_SIGMA / math.sqrt(DRAWS)


@pytest.mark.parametrize("dim", [pytest.param(0, id="groups"), pytest.param(1, id="weights")])
def test_noise_of_neighbours_is_uncorrelated(dim: int) -> None:
    assert abs(correlation(noise(), noise().roll(1, dim))) < FIVE_SIGMA / math.sqrt(DRAWS)


# --- exponentially distributed ------------------------------------------------------------------


@pytest.mark.parametrize("m", [4, 5, 8])
def test_noise_follows_the_exponential_law(m: int) -> None:
    sorted_noise = noise(m=m).double().flatten().sort().values
    draws = len(sorted_noise)
    law = -torch.expm1(-sorted_noise)
    steps = torch.arange(draws + 1) / draws
    distance = float(torch.maximum((steps[1:] - law).max(), (law - steps[:-1]).max()))
    # Dvoretzky, Kiefer, Wolfowitz: P(distance > d) <= 2 exp(-2 n d^2), for every n.
    assert distance < math.sqrt(math.log(2 / CHANCE) / (2 * draws))


@pytest.mark.parametrize("column", range(8))
def test_noise_has_mean_and_variance_one_in_every_place(column: int) -> None:
    sample = noise(m=8)[:, column].double()
    # Var(x) = 1, and Var((x - 1)^2) = 9 - 1.
    assert abs(float(sample.mean()) - 1) < FIVE_SIGMA / math.sqrt(len(sample))
    assert abs(float(sample.var()) - 1) < FIVE_SIGMA * math.sqrt(8 / len(sample))


def test_noise_stays_in_its_range_at_the_extreme_words(monkeypatch: pytest.MonkeyPatch) -> None:
    extremes = (torch.tensor([0]), torch.tensor([1])) + (torch.tensor([2**32 - 1]),) * 2
    monkeypatch.setattr("maskpro_lightning.masks.philox.philox", lambda key, counter: extremes)
    smallest, second, largest, _ = exponential(KEY, STEP, torch.tensor([0]), 4)[0].tolist()
    assert smallest == 2**-33
    assert second == pytest.approx(1.5 * 2**-32, rel=2**-23)
    assert largest == pytest.approx(24 * math.log(2), rel=2**-23)


def test_noise_is_float32_with_one_row_per_group() -> None:
    rows = exponential(KEY, STEP, torch.arange(7), 5)
    assert rows.dtype == torch.float32
    assert rows.shape == (7, 5)
