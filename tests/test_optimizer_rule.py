"""Laws of the update: how the logits move with the losses, and that they learn."""

from __future__ import annotations

import math
from typing import get_args

import oracle
import pytest
import torch
from optimizer_cases import (
    Regression,
    Shape,
    assert_holds,
    drawn_of,
    every_case,
    grouped,
    logits_of,
    one_weight,
    step,
)
from oracle import random
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.optim.lr_scheduler import LinearLR

from maskpro_lightning import MaskPro, NMPattern
from maskpro_lightning.masks import distribution
from maskpro_lightning.optim.estimators import policy_lr
from maskpro_lightning.optim.masked_weight import Version

EPS = torch.finfo(torch.float32).eps


# --- the published rule -------------------------------------------------------------------------


def assert_moves_as_published(
    optimizer: MaskPro, residual: float, lr: float, pattern: str, input_dim: int
) -> None:
    """One step is pi - lr (r - delta) grad log P, and delta an average that r enters after it."""
    pi, drawn = logits_of(optimizer).double(), drawn_of(optimizer)
    alpha, delta = optimizer.param_groups[0]["tracker_momentum"], float(optimizer.tracker["delta"])
    step(optimizer, loss=4.0 + residual, baseline=4.0)
    rows, kept = (grouped(tensor, pattern, input_dim) for tensor in (pi, drawn))
    rows.sub_(lr * (residual - delta) * oracle.score(rows, kept))
    # The score's tolerance is test_distribution's; then come a product and a difference.
    move, n = lr * abs(residual - delta), NMPattern.parse(pattern).n
    tolerance = move * (4 * n * EPS + n * math.exp(-27)) + EPS * (move + float(pi.abs().max()))
    torch.testing.assert_close(logits_of(optimizer).double(), pi, rtol=0, atol=tolerance)
    expected = pytest.approx(alpha * delta + (1 - alpha) * residual, abs=4 * EPS)
    assert float(optimizer.tracker["delta"]) == expected
    assert float(optimizer.last["residual"]) == residual


@every_case
def test_a_published_step_is_the_papers_update(pattern: str, shape: Shape, input_dim: int) -> None:
    weight, lr = nn.Parameter(random(*shape)), 0.5
    rule = {"lr": lr, "momentum": 0.75, "published": True, "logit_scale": 2.0}
    optimizer = one_weight(weight, pattern, input_dim, **rule)
    optimizer.begin()
    for residual in (2.5, -1.0, 0.5):
        assert_moves_as_published(optimizer, residual, lr, pattern, input_dim)


def test_a_scheduler_sets_the_step_size() -> None:
    optimizer = one_weight(nn.Parameter(random(8, 8)), lr=1.0, published=True)
    optimizer.begin()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for lr in (1.0, 0.5, 0.25):
        assert_moves_as_published(optimizer, residual=2.0, lr=lr, pattern="2:4", input_dim=-1)
        scheduler.step()  # warns, which is an error here, unless it sees the optimizer's step


# --- the normalised rule ------------------------------------------------------------------------


def advantage_of_the_last(residuals: list[float], alpha: float) -> float:
    """Its deviation from the mean of those before, over the root mean square of deviations.

    In both means a residual counts alpha times as much as the next one.
    """

    def mean(values: list[float]) -> float:
        weights = [alpha**age for age in reversed(range(len(values)))]
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

    deviations = [r - mean(residuals[:t] or [r]) for t, r in enumerate(residuals)]
    spread = math.sqrt(mean([deviation**2 for deviation in deviations]))
    return deviations[-1] / spread if spread else 0.0


def test_an_advantage_is_a_deviation_in_units_of_the_spread() -> None:
    alpha, residuals = 0.9, random(20).tolist()
    optimizer = one_weight(nn.Parameter(random(8, 8)), momentum=alpha)
    for t, residual in enumerate(residuals, start=1):
        step(optimizer, residual)
        # t averages of four roundings each, divided by 1 - alpha^t >= 1 - alpha, as in Adam.
        expected = advantage_of_the_last(residuals[:t], alpha)
        assert float(optimizer.last["advantage"]) == pytest.approx(expected, abs=40 * t * EPS)
    assert expected != 0


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.99])
def test_advantages_are_bounded_and_outliers_reach_the_bound(alpha: float) -> None:
    optimizer = one_weight(nn.Parameter(random(8, 8)), momentum=alpha)
    residuals = [*(random(60).tan() ** 3).tolist(), 1e12, -1e18]
    sizes = []
    for residual in residuals:
        step(optimizer, residual)
        sizes.append(abs(float(optimizer.last["advantage"])))
    bound = 1 / math.sqrt(1 - alpha)
    steps = len(residuals)
    assert max(sizes) <= bound * (1 + 8 * EPS / (1 - alpha))
    # A single residual that dwarfs all others has weight 1 - alpha of 1 - alpha^t.
    assert sizes[-1] == pytest.approx(bound * math.sqrt(1 - alpha**steps), rel=1e-4)


def test_the_unit_of_the_loss_does_not_matter() -> None:
    trajectories = []
    # Powers of two, so that no rounding differs; squares of the last two leave float32.
    for unit in (1.0, 2.0**10, 2.0**-10, 2.0**100, 2.0**-100):
        optimizer = one_weight(nn.Parameter(random(8, 8)), lr=0.3)
        for residual in random(20).tolist():
            step(optimizer, unit * residual)
        trajectories.append(logits_of(optimizer))
    assert all(torch.equal(logits, trajectories[0]) for logits in trajectories)
    assert not torch.equal(trajectories[0], 4.0 * optimizer.masks("initial")["w"])


def test_the_first_step_has_nothing_to_compare_and_leaves_the_logits() -> None:
    optimizer = one_weight(nn.Parameter(random(8, 8)))
    optimizer.begin()
    before = logits_of(optimizer)
    step(optimizer, 1.7)
    assert torch.equal(logits_of(optimizer), before)
    step(optimizer, 1.8)
    assert not torch.equal(logits_of(optimizer), before)


@pytest.mark.parametrize("residual", [0.0, 1.0, 3.7, -0.3])
@pytest.mark.parametrize("alpha", [0.9, 0.99])
def test_equal_residuals_leave_the_logits(residual: float, alpha: float) -> None:
    optimizer = one_weight(nn.Parameter(random(8, 8)), momentum=alpha)
    optimizer.begin()
    before = logits_of(optimizer)
    for _ in range(20):
        step(optimizer, residual)
    assert torch.equal(logits_of(optimizer), before)


@pytest.mark.parametrize("residual", [1.0, 3.7, -0.3])
def test_equal_residuals_leave_the_logits_with_a_long_memory(residual: float) -> None:
    test_equal_residuals_leave_the_logits(residual, alpha=0.999)


# --- the losses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("held", get_args(Version))
def test_the_closure_sees_the_initial_mask_then_the_drawn_one(held: Version) -> None:
    weight, dense = nn.Parameter(random(16, 8)), random(16, 8)
    optimizer = one_weight(weight, logit_scale=0.5)
    optimizer.begin()
    masks = [optimizer.masks(version)["w"] for version in ("initial", "drawn")]
    assert not torch.equal(*masks)
    optimizer.write(held)  # as after a validation
    seen: list[Tensor] = []

    def closure() -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append(weight.detach().clone())
        return weight.sum()

    loss = optimizer.step(closure)
    assert len(seen) == 2
    for weights, mask in zip(seen, masks, strict=True):
        assert_holds(weights, dense, mask)
    baseline, drawn = (weights.sum() for weights in seen)
    assert loss == optimizer.last["loss"] == drawn
    assert optimizer.last["baseline"] == baseline
    assert optimizer.last["residual"] == drawn - baseline != 0


def test_identical_masks_leave_no_residual_under_dropout() -> None:
    weight = nn.Parameter(random(16, 8))
    # Another draw than the initial mask has a probability below e^-990.
    optimizer = one_weight(weight, logit_scale=1e3)
    losses = set()
    for seed in range(3):
        torch.manual_seed(seed)
        losses.add(float(optimizer.step(lambda: dropout(weight, 0.5).sum())))
        after = torch.rand(())
        assert optimizer.last["residual"] == 0
        torch.manual_seed(seed)
        dropout(weight, 0.5)
        assert torch.rand(()) == after  # as if the closure had been called once
    assert len(losses) == 3


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("place", ["loss", "baseline"])
# The square of 1e30 is not finite in float32.
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_loss_that_is_not_finite_teaches_nothing(bad: float, place: str, published: bool) -> None:
    weight = nn.Parameter(random(8, 8))
    optimizer = one_weight(weight, published=published)
    for residual in (1.0, 2.0):
        step(optimizer, residual)
    logits, tracker = logits_of(optimizer), optimizer.tracker
    step(optimizer, **{"loss": 1.0, place: bad})
    assert torch.equal(logits_of(optimizer), logits)
    assert optimizer.tracker == tracker | {"skipped": 1, "skipped_in_a_row": 1}
    assert optimizer.last["advantage"] == 0
    step(optimizer, 5.0)
    assert optimizer.tracker["count"] == 3
    assert (optimizer.tracker["skipped"], optimizer.tracker["skipped_in_a_row"]) == (1, 0)
    assert logits_of(optimizer).isfinite().all()
    assert not torch.equal(logits_of(optimizer), logits)
    assert_holds(weight, random(8, 8), drawn_of(optimizer))


# --- learning -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_it_learns_most_of_the_way_from_a_random_mask_to_the_best(seed: int) -> None:
    problem = Regression(seed)
    optimizer = one_weight(problem.weight, lr=0.1, logit_scale=1.0, seed=seed)
    optimizer.begin({"w": problem.random_mask})
    for _ in range(200):
        optimizer.step(problem.loss)
    assert problem.share_gained(optimizer) > 0.5


@pytest.mark.parametrize("steps", [100, 1000])
@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8"])
def test_chance_alone_hardly_changes_a_mask_however_long_the_fit(pattern: str, steps: int) -> None:
    # 4 sd of a binomial around 1 %, what the rule's docstring promises at most, of 4096 groups.
    nm = NMPattern.parse(pattern)
    weight = nn.Parameter(random(64, 64 * nm.m))
    optimizer = one_weight(weight, pattern, lr=policy_lr(nm, 4.0, steps))
    optimizer.begin()
    scheduler = LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    losses = random(steps, seed=1).float()
    for loss in losses:
        step(optimizer, float(loss))
        scheduler.step()
    changed = grouped(optimizer.masks("mode")["w"] != optimizer.masks("initial")["w"], pattern, -1)
    assert changed.any(-1).float().mean() <= 0.01 + 4 * math.sqrt(0.01 / 4096)


def test_evidence_changes_masks_at_the_step_size_of_a_long_fit() -> None:
    steps, problem = 2000, Regression(0)
    rate = policy_lr(NMPattern(2, 4), 4.0, steps)
    optimizer = one_weight(problem.weight, lr=rate, logit_scale=4.0)
    optimizer.begin({"w": problem.random_mask})
    scheduler = LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        optimizer.step(problem.loss)
        scheduler.step()
    assert problem.share_gained(optimizer) > 0.5


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "3:5"])
def test_gap_information_is_the_enumerated_mean_square_of_a_difference_of_scores(
    pattern: str,
) -> None:
    nm = NMPattern.parse(pattern)
    kept_CM = oracle.sets(nm.n, nm.m)
    fresh_CM = (2.0 * kept_CM[0]).expand(kept_CM.shape).double().clone().requires_grad_()
    log_p_C = oracle.log_prob(fresh_CM, kept_CM)
    (score_CM,) = torch.autograd.grad(log_p_C.sum(), fresh_CM)
    squared_C = (score_CM[:, 0] - score_CM[:, -1]).square()
    p_C = log_p_C.detach().exp()
    expected = float((p_C * squared_C).sum())
    variance = float((p_C * squared_C.square()).sum()) - expected**2
    actual = distribution.gap_information(nm, 2.0)
    assert abs(actual - expected) <= 4 * math.sqrt(variance / 2**15)
