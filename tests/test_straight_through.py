"""Laws of the straight-through estimator: logits move along what keeping a weight is worth."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from optimizer_cases import CASES, Regression, Shape, drawn_of, grouped, logits_of, one_weight
from oracle import random
from rules import mask_optimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR, LRScheduler, OneCycleLR

from maskpro_lightning import MaskPro, NMPattern, StraightThrough

EPS = torch.finfo(torch.float32).eps


def straight_through(weight: Tensor, *args: Any, **rule: Any) -> MaskPro:
    return one_weight(weight, *args, estimator="straight_through", **rule)


def learn_from(optimizer: MaskPro, weight: Tensor, gradient: Tensor) -> None:
    """One step under a loss whose gradient is the one given."""
    optimizer.step(lambda: backward((weight * gradient).sum()))


def backward(loss: Tensor) -> Tensor:
    if loss.requires_grad:  # the estimator "policy" takes no gradients
        loss.backward()
    return loss


# --- the update ---------------------------------------------------------------------------------


def worth_gradient(pi_GM: Tensor, worth_GM: Tensor, n: int) -> Tensor:
    """The gradient of the expected worth of what is kept, a sum over all masks."""
    pi_GM.requires_grad_()
    kept_CM = oracle.sets(n, pi_GM.shape[-1])
    kept_CGM = kept_CM[:, None].expand(-1, len(pi_GM), -1)
    p_CG = oracle.log_prob(pi_GM.expand(kept_CGM.shape), kept_CGM).exp()
    expected_worth = (p_CG * (kept_CGM * worth_GM).sum(-1)).sum()
    return torch.autograd.grad(expected_worth, pi_GM)[0]


@pytest.mark.parametrize(  # test_distribution has 8:16, whose orders are too many to go through
    ("pattern", "shape", "input_dim"), [case for case in CASES if case.values[0] != "8:16"]
)
def test_a_step_follows_the_gradient_of_the_enumerated_worth(
    pattern: str, shape: Shape, input_dim: int
) -> None:
    weight, lr = nn.Parameter(random(*shape)), 0.5
    optimizer = straight_through(weight, pattern, input_dim, lr=lr, logit_scale=1.0)
    optimizer.begin()
    for seed in (1, 2):
        gradient, before = random(*shape, seed=seed), logits_of(optimizer)
        learn_from(optimizer, weight, gradient)
        moved = (logits_of(optimizer).double() - before) / -lr
        pi_GM, worth_GM = (
            grouped(tensor, pattern, input_dim).double().flatten(0, -2)
            for tensor in (before, gradient * random(*shape))
        )
        expected_GM = worth_gradient(pi_GM, worth_GM, int(pattern.partition(":")[0]))
        size = expected_GM.square().mean().sqrt()
        # M values in a sum, each from a handful of roundings.
        error = worth_GM.shape[-1] * float(worth_GM.abs().max() / size) * 8 * EPS
        tolerance = error + EPS * float(before.abs().max()) / lr
        moved_GM = grouped(moved, pattern, input_dim).flatten(0, -2)
        expected_GM = (expected_GM / size).clamp(-1, 1)
        torch.testing.assert_close(moved_GM, expected_GM, rtol=0, atol=tolerance)


def test_no_logit_moves_by_more_than_the_step_size() -> None:
    weight, lr = nn.Parameter(random(64, 64)), 0.25
    optimizer = straight_through(weight, lr=lr)
    optimizer.begin()
    before = logits_of(optimizer)
    gradient = random(64, 64)
    gradient[:, :4] *= 1e4
    learn_from(optimizer, weight, gradient)
    moved = (logits_of(optimizer) - before).abs()
    assert 0.99 * lr < moved.max() <= lr + 32 * EPS


@pytest.mark.parametrize(("weights", "share"), [(1, 2 / 15), (35, 0.0845), (210, 0.0345)])
def test_the_step_size_falls_with_the_root_of_the_number_of_weights(
    weights: int, share: float
) -> None:
    named = [(str(i), nn.Parameter(random(2, 4))) for i in range(weights)]
    rule = MaskPro(named).param_groups[0]
    assert rule["lr"] == pytest.approx(share * rule["logit_scale"], rel=1e-3)
    assert MaskPro(named, estimator=StraightThrough(lr=0.7)).param_groups[0]["lr"] == 0.7


def test_the_closure_is_called_once_with_gradients_under_the_drawn_mask() -> None:
    weight = nn.Parameter(random(8, 8))
    optimizer = straight_through(weight, logit_scale=0.5)
    optimizer.begin()
    seen = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        seen.append(weight.detach().clone())
        return backward(weight.square().sum())

    expected = random(8, 8) * drawn_of(optimizer)
    loss = optimizer.step(closure)
    assert len(seen) == 1
    assert torch.equal(seen[0], expected)
    assert loss == optimizer.last["loss"] == expected.square().sum()
    assert weight.grad is None  # its memory is free for the next backward pass


def test_the_unit_of_the_loss_does_not_matter() -> None:
    trajectories = []
    # Powers of two, so that no rounding differs; squares of the last two leave float32.
    for unit in (1.0, 2.0**10, 2.0**-10, 2.0**100, 2.0**-100):
        weight = nn.Parameter(random(8, 8))
        optimizer = straight_through(weight)
        for seed in range(5):
            learn_from(optimizer, weight, unit * random(8, 8, seed=seed))
        trajectories.append(logits_of(optimizer))
    assert [
        n for n, logits in enumerate(trajectories) if not torch.equal(logits, trajectories[0])
    ] == []


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_gradient_without_direction_teaches_nothing(bad: float) -> None:
    weight = nn.Parameter(random(8, 8))
    optimizer = straight_through(weight)
    optimizer.begin()
    before = logits_of(optimizer)
    gradient = torch.zeros(8, 8)
    gradient[3, 4] = bad
    learn_from(optimizer, weight, gradient)
    assert torch.equal(logits_of(optimizer), before)
    assert optimizer.tracker["skipped"] == (bad != 0)
    learn_from(optimizer, weight, random(8, 8))
    assert optimizer.tracker["skipped_in_a_row"] == 0
    assert logits_of(optimizer).isfinite().all()
    assert not torch.equal(logits_of(optimizer), before)


def test_an_update_counts_as_skipped_by_the_share_of_weights_that_skip_it() -> None:
    weights = {name: nn.Parameter(random(4, 8, seed=n)) for n, name in enumerate("abcd")}
    optimizer = mask_optimizer(weights.items(), estimator="straight_through")
    optimizer.begin()
    before = {name: logits.clone() for name, logits in optimizer.logits().items()}
    units = dict(zip("abcd", (1.0, float("nan"), 1.0, 1.0), strict=True))

    def closure() -> Tensor:
        return backward(sum(units[name] * w.square().sum() for name, w in weights.items()))

    for _ in range(2):
        optimizer.step(closure)
    moved = {n for n, logits in optimizer.logits().items() if not torch.equal(logits, before[n])}
    assert moved == set("acd")
    assert optimizer.tracker["skipped"] == 2 / 4
    assert optimizer.tracker["skipped_in_a_row"] == 0


@pytest.mark.parametrize("memory", ["plain", "lean"])
def test_logits_that_move_while_the_most_likely_mask_is_written_lose_no_weight(memory: Any) -> None:
    dense = random(8, 8)
    weight = nn.Parameter(dense.clone())
    optimizer = straight_through(weight, lr=10.0, logit_scale=0.1, memory=memory)
    optimizer.begin()
    optimizer.write("mode")
    with optimizer.taking_gradients():
        assert torch.equal(weight.detach(), dense * drawn_of(optimizer))
        loss = backward((weight * random(8, 8, seed=1)).sum()).detach()
    optimizer.step(lambda: loss)
    optimizer.write("mode")
    assert torch.equal(weight.detach(), dense * optimizer.masks("mode")["w"])
    optimizer.write("dense")
    assert torch.equal(weight.detach(), dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_in_half_precision_is_the_one_in_single_to_its_rounding(dtype: torch.dtype) -> None:
    moves = []
    for kind in (torch.float32, dtype):
        weight = nn.Parameter(random(8, 8).to(dtype).to(kind))
        optimizer = straight_through(weight, lr=1.0)
        optimizer.begin()
        before = logits_of(optimizer)
        learn_from(optimizer, weight, random(8, 8, seed=1).to(dtype).to(kind))
        moves.append(logits_of(optimizer) - before)
    assert moves[1].dtype == torch.float32
    # The direction is kept in the gradient's memory, rounded twice, relative to its size.
    torch.testing.assert_close(moves[1], moves[0], rtol=2 * torch.finfo(dtype).eps, atol=4 * EPS)


@pytest.mark.parametrize("reason", ["no backward", "no part in the loss", "frozen"])
def test_a_weight_without_gradient_is_refused_by_name(reason: str) -> None:
    weight, other = nn.Parameter(random(4, 8)), nn.Parameter(random(4, 8))
    optimizer = straight_through(weight.requires_grad_(reason != "frozen"))
    message = (
        "No gradient has reached any masked weight: loss.backward() has to be called, and weights "
        "need requires_grad=True and a part in the loss."
    )
    closure = {
        "no backward": weight.sum,
        "no part in the loss": lambda: backward(other.sum()),
        "frozen": lambda: backward((weight + other).sum()),
    }[reason]
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        optimizer.step(closure)


def test_a_weight_without_a_part_in_one_loss_waits_for_the_next() -> None:
    weight, other = nn.Parameter(random(4, 8)), nn.Parameter(random(4, 8, seed=1))
    optimizer = mask_optimizer({"w": weight, "o": other}.items(), estimator="straight_through")
    optimizer.begin()
    before = {name: logits.clone() for name, logits in optimizer.logits().items()}
    optimizer.step(lambda: backward(other.square().sum()))
    assert torch.equal(optimizer.logits()["w"], before["w"])
    assert not torch.equal(optimizer.logits()["o"], before["o"])


def test_each_of_several_backward_passes_moves_by_its_share() -> None:
    """As steps of a third of the rate would, along the same gradients."""
    weights = [nn.Parameter(random(8, 8)) for _ in range(2)]
    one_step = straight_through(weights[0], lr=0.3)
    steps = straight_through(weights[1], lr=0.3 / 3)
    gradients = [random(8, 8, seed=seed) for seed in (1, 2, 3)]

    def closure() -> Tensor:
        return torch.stack([backward((weights[0] * each).sum()) for each in gradients]).mean()

    one_step.step(closure, backward_passes=3)
    for gradient in gradients:
        learn_from(steps, weights[1], gradient)
    torch.testing.assert_close(logits_of(one_step), logits_of(steps), rtol=4 * EPS, atol=4 * EPS)


def test_no_two_gradients_are_in_memory_at_once() -> None:
    layers = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(6)])
    optimizer = mask_optimizer(layers.named_parameters(), estimator="straight_through")
    optimizer.begin()
    alive: list[int] = []
    for layer in layers:
        layer.register_full_backward_hook(
            lambda *_: alive.append(sum(p.grad is not None for p in layers.parameters()))
        )
    inputs = random(4, 8).requires_grad_()
    optimizer.step(lambda: backward(layers(inputs).square().sum()))
    assert len(alive) == 6
    assert max(alive) <= 1


def test_gradients_that_are_there_before_the_step_teach_the_same() -> None:
    weights = [nn.Parameter(random(8, 8)) for _ in range(2)]
    at_once, later = map(straight_through, weights)
    gradient = random(8, 8, seed=1)
    at_once.begin()
    learn_from(at_once, weights[0], gradient)
    later.begin()
    loss = backward((weights[1] * gradient).sum()).detach()
    later.step(lambda: loss)
    assert weights[1].grad is None
    assert torch.equal(logits_of(at_once), logits_of(later))
    assert torch.equal(drawn_of(at_once), drawn_of(later))


def test_a_backward_pass_that_fails_leaves_no_hook_and_no_gradient_counted() -> None:
    weight = nn.Parameter(random(8, 8))
    optimizer = straight_through(weight)

    def fails() -> Tensor:
        backward(weight.square().sum())
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match=r"^no memory$"):
        optimizer.step(fails)
    weight.sum().backward()
    assert weight.grad is not None  # nothing has taken it
    weight.grad = None
    with pytest.raises(RuntimeError, match="No gradient has reached"):
        optimizer.step(lambda: torch.tensor(1.0))


def test_a_rate_that_rises_does_not_turn_the_draws_round() -> None:
    weight = nn.Parameter(random(64, 8))
    optimizer = straight_through(weight, lr=0.01, logit_scale=8.0)
    scheduler = OneCycleLR(optimizer, max_lr=0.01, total_steps=10, cycle_momentum=False)
    for _ in range(4):
        learn_from(optimizer, weight, random(64, 8))
        scheduler.step()
    # Logits move by 0.04 at most, so nearly all groups should draw their initial mask.
    same = (drawn_of(optimizer) == optimizer.masks("initial")["w"]).view(-1, 4).all(-1)
    assert same.float().mean() > 0.9


# --- learning and going on ----------------------------------------------------------------------


def test_it_learns_most_of_the_way_from_a_random_mask_to_the_best() -> None:
    gained = []
    for seed in range(5):
        problem = Regression(seed)
        optimizer = straight_through(problem.weight, lr=0.2, logit_scale=1.0, seed=seed)
        scheduler = LinearLR(optimizer, 1.0, 0.0, total_iters=120)
        optimizer.begin({"w": problem.random_mask})
        for _ in range(120):
            optimizer.step(lambda p=problem: backward(p.loss()))
            scheduler.step()
        gained.append(problem.share_gained(optimizer))
    assert sum(gained) / len(gained) > 0.8
    assert min(gained) > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_is_uninterrupted_to_the_bit_and_not_half_way(dtype: torch.dtype) -> None:
    def fresh() -> tuple[MaskPro, LRScheduler, Callable[[], Tensor]]:
        problem = Regression(0, dtype)
        optimizer = straight_through(problem.weight)
        scheduler = LinearLR(optimizer, 1.0, 0.0, total_iters=8)
        return optimizer, scheduler, lambda: backward(problem.loss())

    def train(
        optimizer: MaskPro, scheduler: LRScheduler, closure: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        for _ in range(4):
            optimizer.step(closure)
            scheduler.step()
        return logits_of(optimizer), drawn_of(optimizer)

    uninterrupted, resumed = fresh(), fresh()
    half_way, _ = train(*uninterrupted)
    for ours, theirs in zip(resumed[:2], uninterrupted[:2], strict=True):
        ours.load_state_dict(theirs.state_dict())
    logits, drawn = train(*resumed)
    expected_logits, expected_drawn = train(*uninterrupted)
    assert torch.equal(logits, expected_logits)
    assert torch.equal(drawn, expected_drawn)
    assert not torch.equal(logits, half_way)


def changed_by_a_draw(weights: int) -> float:
    """In how many groups a draw is not the initial mask, summed over so many weights."""
    weight = nn.Parameter(random(512, 256, seed=4))
    estimator = StraightThrough().for_fit(NMPattern(2, 4), weights)
    optimizer = MaskPro([("w", weight)], "2:4", estimator=estimator, fused=False)
    optimizer.begin()
    drawn, initial = (optimizer.masks(version)["w"] for version in ("drawn", "initial"))
    return weights * float((drawn != initial).view(-1, 4).any(-1).float().mean())


def test_a_draw_changes_no_more_in_all_layers_of_a_deep_model_than_of_a_shallow_one() -> None:
    few = changed_by_a_draw(35)
    for weights in (84, 210, 700):
        assert few / 100 < changed_by_a_draw(weights) < few


def test_steps_of_a_shallow_model_are_bounded_and_those_of_a_deep_one_smaller() -> None:
    found = {n: StraightThrough().for_fit(NMPattern(2, 4), n).rule() for n in (1, 35, 210)}
    assert found[1] == pytest.approx({"lr": 0.4, "logit_scale": 3.0})
    assert found[35] == pytest.approx({"lr": 0.2535, "logit_scale": 3.0}, rel=1e-3)
    assert found[210] == pytest.approx({"lr": 0.907, "logit_scale": 26.29}, rel=1e-3)
    given = StraightThrough(lr=0.2, logit_scale=5.0)
    assert given.for_fit(NMPattern(2, 4), 210) == given
