"""Laws of MaskPro's step: what the weights hold, how logits move, what a draw depends on."""

from __future__ import annotations

import re
from itertools import product

import oracle
import pytest
import torch
from oracle import random
from torch import Tensor, nn
from torch.nn.functional import dropout

from maskpro_lightning import MaskPro, NMPattern
from maskpro_lightning import optimizer as optimizer_module
from maskpro_lightning.optimizer import Version

VERSIONS: list[Version] = ["dense", "initial", "drawn", "mode"]
# Name, shape of a weight with a number of inputs, and the dimension of its inputs.
LAYERS = [
    pytest.param((6, "inputs"), -1, id="Linear"),
    pytest.param(("inputs", 6), 0, id="Conv1D"),
    pytest.param((3, "inputs", 2, 2), 1, id="Conv2d"),
    pytest.param((2, 3, "inputs"), -1, id="experts"),
    pytest.param((2, "inputs", 3), -2, id="transposed experts"),
]
every_layer = pytest.mark.parametrize(("shape", "input_dim"), LAYERS)
every_pattern = pytest.mark.parametrize(
    "pattern", [NMPattern.parse(p) for p in ("1:4", "2:4", "3:5", "4:8", "8:16")], ids=str
)
Shape = tuple[int | str, ...]


def weight_of(shape: Shape, inputs: int) -> nn.Parameter:
    return nn.Parameter(random(*(inputs if size == "inputs" else int(size) for size in shape)))


def top_of(scores: Tensor, pattern: NMPattern, input_dim: int = -1) -> Tensor:
    """The oracle's mask of the highest scores, in their shape."""
    rows = pattern.group(scores, input_dim)
    kept = [oracle.top(row, pattern.n) for row in rows.flatten(0, -2).tolist()]
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    pattern.group(mask, input_dim)[:] = torch.tensor(kept).view_as(rows)
    return mask


def bits(tensor: Tensor) -> Tensor:
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().clone().view(integer[tensor.element_size()])


def assert_holds(weight: Tensor, dense: Tensor, mask: Tensor) -> None:
    """Kept weights are the dense ones to the bit, the others +0.0, whose bits are all zero."""
    assert torch.equal(bits(weight), bits(dense) * mask)


def one_weight(weight: Tensor, pattern: NMPattern, input_dim: int = -1, **rule: object) -> MaskPro:
    """A MaskPro of one weight named "w"."""
    group = {"params": [("w", weight)], "input_dim": input_dim}
    return MaskPro([group], pattern, **rule)  # type: ignore[arg-type]


def told(residual: float) -> dict[str, object]:
    """Arguments of a step whose loss is the residual and whose baseline is zero."""
    return {"closure": lambda: torch.tensor(residual), "baseline": torch.tensor(0.0)}


# --- what the weights hold ----------------------------------------------------------------------


@every_pattern
@every_layer
def test_weights_hold_exactly_n_of_the_dense_ones(
    shape: Shape, input_dim: int, pattern: NMPattern
) -> None:
    weight = weight_of(shape, 2 * pattern.m)
    dense = weight.detach().clone()
    optimizer = one_weight(weight, pattern, input_dim, logit_scale=0.1)
    optimizer.begin()
    for _ in range(3):
        drawn = optimizer.masks("drawn")["w"]
        assert oracle.keeps_exactly(pattern.n, pattern.m, drawn, input_dim)
        assert_holds(weight, dense, drawn)
        optimizer.step(**told(1.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_number_is_pruned_to_plus_zero_and_kept_to_the_bit(dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    numbers = torch.tensor([-1.0, -0.0, inf, -inf, nan, -nan, 0.3, 0.0], dtype=dtype)
    weight = nn.Parameter(numbers.repeat(32, 1))
    dense = weight.detach().clone()
    optimizer = one_weight(weight, NMPattern(2, 4), logit_scale=0.1)
    optimizer.begin({"w": torch.tensor([[True, True, False, False] * 2] * 32)})
    drawn = optimizer.masks("drawn")["w"]
    assert drawn.any(0).all()
    assert not drawn.all(0).any()
    assert_holds(weight, dense, drawn)


@every_pattern
@every_layer
def test_the_initial_masks_are_those_given_and_the_first_mode(
    shape: Shape, input_dim: int, pattern: NMPattern
) -> None:
    weight = weight_of(shape, 2 * pattern.m)
    given = top_of(random(*weight.shape).sin(), pattern, input_dim)
    optimizer = one_weight(weight, pattern, input_dim, logit_scale=0.1)
    optimizer.begin({"w": given})
    for version in ("initial", "mode"):
        assert torch.equal(optimizer.masks(version)["w"], given)
    assert torch.equal(optimizer.logits()["w"], 0.1 * given)


@every_pattern
@every_layer
def test_without_masks_the_largest_weights_are_kept_first(
    shape: Shape, input_dim: int, pattern: NMPattern
) -> None:
    weight = weight_of(shape, 2 * pattern.m)
    largest = top_of(weight.detach().abs(), pattern, input_dim)
    optimizer = one_weight(weight, pattern, input_dim)
    optimizer.step(closure=None)
    assert torch.equal(optimizer.masks("initial")["w"], largest)


@every_layer
def test_every_version_is_written_and_taken_back_to_the_bit(shape: Shape, input_dim: int) -> None:
    weight = weight_of(shape, 8)
    dense = weight.detach().clone()
    optimizer = one_weight(weight, NMPattern(2, 4), input_dim, logit_scale=0.5, lr=1.0)
    for residual in (1.0, -2.0, 1.0, 3.0):
        optimizer.step(**told(residual))
    masks = {version: optimizer.masks(version)["w"] for version in VERSIONS}
    assert masks["dense"].all()
    for outer, inner in product(VERSIONS, VERSIONS):
        assert outer == inner or not torch.equal(masks[outer], masks[inner])
        with optimizer.applied(outer):
            assert_holds(weight, dense, masks[outer])
            with pytest.raises(ArithmeticError), optimizer.applied(inner):
                assert_holds(weight, dense, masks[inner])
                raise ArithmeticError
            assert_holds(weight, dense, masks[outer])
        assert_holds(weight, dense, masks["drawn"])


def test_nothing_is_touched_before_begin() -> None:
    weight = nn.Parameter(random(4, 8))
    optimizer = one_weight(weight, NMPattern(2, 4))
    for version in VERSIONS:
        optimizer.write(version)
        assert torch.equal(weight, random(4, 8))
    assert not optimizer.begun


@every_layer
def test_groups_go_through_everything_in_order(
    monkeypatch: pytest.MonkeyPatch, shape: Shape, input_dim: int
) -> None:
    monkeypatch.setattr(optimizer_module, "_BLOCK", 5)
    pattern = NMPattern(2, 4)
    optimizer = one_weight(weight_of(shape, 8), pattern, input_dim, logit_scale=0.5)
    optimizer.step(**told(1.0))
    previous = optimizer.masks("drawn")["w"]
    optimizer.step(**told(2.0))
    tensors = (optimizer.logits()["w"], *(optimizer.masks(v)["w"] for v in ("initial", "drawn")))
    found = list(optimizer.groups())
    assert len(found) > 1
    assert {(groups.name, groups.pattern) for groups in found} == {("w", pattern)}
    for name, tensor in zip(
        ("logits_GM", "initial_GM", "drawn_GM", "previous_GM"), (*tensors, previous), strict=True
    ):
        together = torch.cat([getattr(groups, name) for groups in found])
        assert torch.equal(together, pattern.group(tensor, input_dim).reshape(-1, 4))


# --- the published rule -------------------------------------------------------------------------


@every_pattern
@every_layer
def test_a_published_step_is_the_papers_update(
    shape: Shape, input_dim: int, pattern: NMPattern
) -> None:
    lr, alpha, delta = 0.5, 0.75, 0.0
    weight = weight_of(shape, 2 * pattern.m)
    rule = {"lr": lr, "momentum": alpha, "normalize": False, "logit_scale": 2.0}
    optimizer = one_weight(weight, pattern, input_dim, **rule)
    optimizer.begin()
    eps = torch.finfo(torch.float32).eps
    for residual in (2.5, -1.0, 0.5):
        pi = optimizer.logits()["w"].double()
        drawn = optimizer.masks("drawn")["w"]
        optimizer.step(**told(residual))
        score_GM = oracle.score(pattern.group(pi, input_dim), pattern.group(drawn, input_dim))
        pattern.group(pi, input_dim).sub_(lr * (residual - delta) * score_GM)
        # The score's own tolerance, as in test_distribution; then a product and a difference.
        step = lr * abs(residual - delta)
        tolerance = 4 * pattern.n * eps * step + eps * (step + pi.abs().max().item())
        actual = optimizer.logits()["w"].double()
        torch.testing.assert_close(actual, pi, rtol=0, atol=tolerance)
        delta = alpha * delta + (1 - alpha) * residual
        assert float(optimizer.tracker["delta"]) == pytest.approx(delta, abs=8 * eps)


def test_a_scheduler_sets_the_step_size_and_warns_of_nothing() -> None:
    rule = {"momentum": 0.0, "normalize": False}
    optimizer = one_weight(nn.Parameter(random(8, 8)), NMPattern(2, 4), lr=1.0, **rule)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for lr in (1.0, 0.5, 0.25):
        optimizer.begun or optimizer.begin()
        pi, drawn = optimizer.logits()["w"].clone(), optimizer.masks("drawn")["w"]
        delta = float(optimizer.tracker["delta"])
        optimizer.step(**told(1.0 + delta))
        scheduler.step()
        moved_GM = (pi - optimizer.logits()["w"]).view(-1, 4)
        score_GM = oracle.score(pi.view(-1, 4), drawn.view(-1, 4))
        torch.testing.assert_close(moved_GM.double(), lr * score_GM, rtol=0, atol=1e-5)


# --- the baseline -------------------------------------------------------------------------------


def test_the_closure_sees_the_initial_mask_then_the_drawn_one() -> None:
    weight = nn.Parameter(random(16, 8))
    dense = weight.detach().clone()
    optimizer = one_weight(weight, NMPattern(2, 4), logit_scale=0.5)
    optimizer.begin()
    masks = [optimizer.masks(version)["w"] for version in ("initial", "drawn")]
    assert not torch.equal(*masks)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append(weight.detach().clone())
        return weight.sum()

    loss = optimizer.step(closure)
    assert len(seen) == 2
    for held, mask in zip(seen, masks, strict=True):
        assert_holds(held, dense, mask)
    baseline, drawn = (held.sum() for held in seen)
    assert loss == drawn == optimizer.last["loss"]
    assert baseline == optimizer.last["baseline"]
    assert drawn - baseline == optimizer.last["residual"] != 0


def test_identical_masks_leave_no_residual_under_dropout() -> None:
    weight = nn.Parameter(random(16, 8))
    # A draw other than the initial mask has probability below e^-1000.
    optimizer = one_weight(weight, NMPattern(2, 4), logit_scale=1e3)
    losses = []
    for seed in range(3):
        torch.manual_seed(seed)
        losses.append(float(optimizer.step(lambda: dropout(weight, 0.5).sum())))
        assert optimizer.last["residual"] == 0
        after = torch.rand(())
        torch.manual_seed(seed)
        dropout(weight, 0.5)
        assert after == torch.rand(())  # as if the closure had been called once
    assert len(set(losses)) == 3
