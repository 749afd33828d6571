"""Laws of the statistics of masks, held against enumeration."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from optimizer_cases import step
from oracle import random
from rules import mask_optimizer
from torch import Tensor, nn

from maskpro_lightning import MaskPro, NMPattern
from maskpro_lightning.tracking.metrics import (
    BINS,
    MaskChange,
    MaskEntropy,
    histograms,
    mask_metrics,
)
from maskpro_lightning.weights import layout

# Up to 128 masks: 2:16 has 120, 2:17 has 136.
EXACT = [NMPattern(*n_m) for n_m in [(1, 2), (1, 4), (2, 4), (3, 4), (3, 5), (4, 8), (2, 16)]]
ESTIMATED = [NMPattern(2, 17), NMPattern(5, 10)]
NOT_USED = torch.zeros(0)
# What float32 and log-probabilities of a few nats leave, far below any statistic that matters.
ROUNDING = 1e-5


def oracle_entropies(logits_GM: Tensor, pattern: NMPattern) -> Tensor:
    """Entropy of each group in units of log C(M, N), (G,)."""
    nats_G = torch.stack([oracle.entropy(logits_M.double(), pattern.n) for logits_M in logits_GM])
    return nats_G / math.log(pattern.num_sets)


# --- the metrics --------------------------------------------------------------------------------


def test_change_is_the_share_of_groups_that_differ_anywhere() -> None:
    one = torch.tensor([[[1, 1, 0, 0], [1, 0, 1, 0]], [[0, 0, 1, 1], [0, 1, 0, 1]]]).bool()
    other = one.clone()
    other[0, 1] = torch.tensor([0, 1, 0, 1]).bool()  # four places, one group
    change = MaskChange()
    change.update(one, other)
    assert change.compute() == 1 / 4
    change.update(one[:1, :1], other[:1, :1])
    assert change.compute() == 1 / 5
    change.update(~other, other)
    assert change.compute() == 5 / 9


@pytest.mark.parametrize("pattern", EXACT, ids=str)
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_entropy_is_the_oracles_where_masks_are_few(pattern: NMPattern, scale: float) -> None:
    logits_GM = scale * random(6, pattern.m)
    entropy = MaskEntropy()
    for block_GM in (logits_GM[:2], logits_GM[2:]):
        entropy.update(block_GM, NOT_USED, pattern)
    expected = oracle_entropies(logits_GM, pattern).mean()
    assert float(entropy.compute()) == pytest.approx(float(expected), abs=ROUNDING)


@pytest.mark.parametrize("pattern", [*EXACT, *ESTIMATED], ids=str)
def test_entropy_is_one_undecided_and_zero_decided(pattern: NMPattern) -> None:
    kept_GM = oracle.sets(pattern.n, pattern.m)[:7]
    for scale, expected in ((0.0, 1.0), (50.0, 0.0)):
        entropy = MaskEntropy()
        entropy.update(scale * kept_GM, kept_GM, pattern)
        assert float(entropy.compute()) == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize("pattern", ESTIMATED, ids=str)
def test_entropy_is_estimated_from_draws_where_masks_are_many(pattern: NMPattern) -> None:
    groups, logits_M = 400, random(pattern.m)
    p_C = oracle.probabilities(logits_M.double(), pattern.n)
    numbers_G = p_C.multinomial(groups, True, generator=torch.Generator().manual_seed(0))
    entropy = MaskEntropy()
    drawn_GM = oracle.sets(pattern.n, pattern.m)[numbers_G]
    entropy.update(logits_M.repeat(groups, 1), drawn_GM, pattern)
    # The mean of G draws of -log P, whose variance is enumerated: five standard deviations.
    nats_C = -p_C.log() / math.log(pattern.num_sets)
    mean = float(p_C @ nats_C)
    deviation = float((p_C @ (nats_C - mean) ** 2).sqrt()) / math.sqrt(groups)
    assert 0 < 5 * deviation < 0.1 * mean  # or the law would say nothing
    assert abs(float(entropy.compute()) - mean) < 5 * deviation


# --- what a run shows ---------------------------------------------------------------------------


def trained() -> MaskPro:
    """Three weights of different sizes, patterns and layouts after a few steps."""
    weights = {"small": (2, 8), "large": (8, 16), "conv": (4, 8, 3)}
    groups = [
        {
            "params": [(name, nn.Parameter(random(*shape)))],
            "input_dim": 1,
            "pattern": "2:4" if name != "large" else "4:8",
        }
        for name, shape in weights.items()
    ]
    optimizer = mask_optimizer(groups, lr=1.0, logit_scale=1.1)
    for residual in (1.0, -2.0, 3.0):
        step(optimizer, residual)
    return optimizer


def test_each_weight_has_the_statistics_of_its_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_BLOCK", 3)
    optimizer = trained()
    before = optimizer.masks("drawn")
    step(optimizer, -1.0)
    initial, now, mode = (optimizer.masks(v) for v in ("initial", "drawn", "mode"))
    found = mask_metrics(optimizer)
    assert found.keys() == {"small", "large", "conv", ""}
    for name, logits in optimizer.logits().items():
        pattern = NMPattern(4, 8) if name == "large" else NMPattern(2, 4)

        def share(one: Tensor, other: Tensor, pattern: NMPattern = pattern) -> float:
            differs = pattern.group(one != other, 1).any(-1)
            return float(differs.double().mean())

        rows_GM = pattern.group(logits, 1).reshape(-1, pattern.m)
        entropy = float(oracle_entropies(rows_GM, pattern).mean())
        assert found[name] == {
            "entropy": pytest.approx(entropy, abs=ROUNDING),
            "changed": pytest.approx(share(mode[name], initial[name]), abs=ROUNDING),
            "churn": pytest.approx(share(now[name], before[name]), abs=ROUNDING),
        }
        assert all(0 < value < 1 for value in found[name].values())


def test_the_statistics_of_all_count_every_group_alike() -> None:
    optimizer = trained()
    found = mask_metrics(optimizer)
    groups = {"small": 2 * 8 // 4, "large": 8 * 16 // 8, "conv": 4 * 8 * 3 // 4}
    for statistic in ("entropy", "changed", "churn"):
        values = {name: found[name][statistic] for name in groups}
        assert len(set(values.values())) == 3
        mean = sum(groups[name] * values[name] for name in groups) / sum(groups.values())
        assert found[""][statistic] == pytest.approx(mean, abs=ROUNDING)
        assert abs(mean - sum(values.values()) / 3) > 100 * ROUNDING  # weighted or not matters


def test_nothing_has_changed_before_the_first_step() -> None:
    optimizer = mask_optimizer([("w", nn.Parameter(random(64, 8)))], logit_scale=1.0)
    optimizer.begin()
    assert mask_metrics(optimizer)["w"]["changed"] == 0


@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(5, 10)], ids=str)
def test_entropy_is_that_of_the_draws(pattern: NMPattern) -> None:
    weight = nn.Parameter(random(20, 2 * pattern.m))
    rule = {"logit_scale": 4.0, "published": True}
    optimizer = mask_optimizer([("w", weight)], pattern, **rule)
    step(optimizer, 0.0)
    # All groups have the same logits up to their order, and so the same entropy.
    expected = float(oracle_entropies(optimizer.logits()["w"][:1, : pattern.m], pattern))
    assert mask_metrics(optimizer)["w"]["entropy"] == pytest.approx(expected, rel=0.2)


def bins(values: list[float]) -> list[int]:
    """How many values lie in each bin; none so close to an edge that rounding could decide."""
    places = [min(value * BINS, BINS - 0.5) for value in values]
    assert all(abs(place - round(place)) > 1e-3 or place == 0 for place in places)
    return [sum(int(place) == b for place in places) for b in range(BINS)]


def test_histograms_count_groups_by_certainty_and_by_what_the_initial_mask_keeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layout, "_BLOCK", 3)
    optimizer = trained()
    initial, mode = optimizer.masks("initial"), optimizer.masks("mode")
    found = histograms(optimizer)
    assert found.keys() == {"small", "large", "conv"}
    for masked, (name, logits) in zip(
        optimizer.param_groups, optimizer.logits().items(), strict=True
    ):
        pattern = NMPattern.parse(masked["pattern"])
        dense = optimizer.state[masked["params"][0]]["dense"]
        rows = [pattern.group(t, 1).reshape(-1, pattern.m) for t in (logits, dense)]
        kept_GM, mode_GM = (
            pattern.group(t[name], 1).reshape(-1, pattern.m) for t in (initial, mode)
        )
        p_G = [float(oracle.probabilities(row.double(), pattern.n).max()) for row in rows[0]]
        square_GM = rows[1].double().square()
        share_G = ((square_GM * kept_GM).sum(-1) / square_GM.sum(-1)).tolist()
        moved_G = (kept_GM != mode_GM).any(-1).tolist()
        moved = [share for share, moved in zip(share_G, moved_G, strict=True) if moved]
        assert moved
        for key, values in (
            ("confidence", [-math.log10(1 - p) / 5 for p in p_G]),
            ("retained", share_G),
            ("changed", moved),
        ):
            assert [row[key] for row in found[name]] == bins(values), (name, key)
        assert [row["bin"] for row in found[name]] == list(range(BINS))


def test_certain_groups_and_groups_of_zeros_have_a_bin_too() -> None:
    weight = nn.Parameter(torch.zeros(1, 8))
    optimizer = mask_optimizer([("w", weight)], logit_scale=60.0)
    optimizer.begin()
    last = histograms(optimizer)["w"][-1]
    assert last == {"bin": BINS - 1, "confidence": 2, "retained": 2, "changed": 0}
