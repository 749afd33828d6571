"""Logits in bfloat16: rounded at random, right on average, and good enough to learn from."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from optimizer_cases import Regression, logits_of, one_weight, step
from oracle import random
from rules import mask_optimizer
from torch import Tensor, nn

from maskpro_lightning.masks import philox

LOW: dict[str, Any] = {"logits_dtype": "bfloat16"}


def moved(weight: Tensor, rule: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits before and after a step that is too small for bfloat16 at their size."""
    optimizer = one_weight(nn.Parameter(weight), lr=2e-3, logit_scale=1.0, published=True, **rule)
    optimizer.begin()
    before = logits_of(optimizer).float()
    step(optimizer, 1.0)
    return before, logits_of(optimizer)


def test_logits_are_rounded_to_a_neighbour_and_right_on_average() -> None:
    weight = random(256, 64)
    before, exact = moved(weight.clone(), {})
    _, rounded = moved(weight.clone(), LOW)
    assert rounded.dtype == torch.bfloat16
    error = (rounded.float() - exact).double()
    gap = 2**-7 * torch.maximum(exact.abs(), torch.tensor(2.0**-126)).double()
    assert (error.abs() < gap).all()
    # Rounding to the nearest would leave most logits of the initial mask where they were.
    kept = before == 1
    assert (rounded[kept] != 1).float().mean() > 0.05
    # Errors are independent and below 2^-7 of at most 1: five standard deviations of their mean.
    assert abs(float(error[kept].mean())) < 5 * 2**-7 / 2 / math.sqrt(int(kept.sum()))


def test_a_step_that_is_exact_in_bfloat16_is_not_rounded() -> None:
    optimizer = one_weight(nn.Parameter(random(8, 8)), logit_scale=3.0, **LOW)
    step(optimizer, 0.0)  # no residual, no advantage
    before = logits_of(optimizer).clone()
    step(optimizer, 0.0)
    assert logits_of(optimizer).equal(before)


def test_rounding_and_drawing_use_different_numbers() -> None:
    groups, at = torch.arange(64), torch.tensor(7)
    draws, others = (
        torch.stack(philox.random_words((1, 2), at, groups, 4, stream=stream)) for stream in (0, 1)
    )
    assert not (draws == others).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns_as_far(dtype: Any) -> None:
    shares = []
    for seed in range(3):
        task = Regression(seed)
        optimizer = mask_optimizer(
            [("w", task.weight)], estimator="straight_through", logits_dtype=dtype, seed=seed
        )
        optimizer.begin({"w": task.random_mask})

        def closure(task: Regression = task) -> Tensor:
            loss = task.loss()
            loss.backward()
            return loss

        for _ in range(100):
            optimizer.step(closure)
        shares.append(task.share_gained(optimizer))
    assert sum(shares) / len(shares) > 0.8


def test_another_dtype_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^logits_dtype is one of float32, bfloat16; got 'half'.$"
    ):
        one_weight(nn.Parameter(random(4, 4)), logits_dtype="half")
    with pytest.raises(ValueError, match=r"^memory is one of plain, lean; got 'none'.$"):
        one_weight(nn.Parameter(random(4, 4)), memory="none")
