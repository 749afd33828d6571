"""Small blocks whose steps are made as one learn what each would learn alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import random
from rules import mask_optimizer
from torch import Tensor, nn

from maskpro_lightning.optim import lessons, together

SHAPES = {"a": (8, 16), "b": (24, 8), "c": (1, 12), "d": (6, 8, 3, 3), "e": (5, 16), "f": (8, 16)}
RESIDUALS = [1.0, -0.5, 2.0, 0.25]


def learned(rule: dict[str, Any]) -> dict[str, Tensor]:
    """All that three groups of small weights hold after some steps; two share all but their lr."""
    weights = {name: nn.Parameter(random(*shape)) for name, shape in SHAPES.items()}
    groups: list[dict[str, Any]] = [
        {"params": [(name, weights[name]) for name in names], **rules}
        for names, rules in (
            ("abc", {"input_dim": -1}),
            ("d", {"input_dim": 1, "pattern": "1:4"}),
            ("ef", {"input_dim": -1, "lr": 0.7}),
        )
    ]
    optimizer = mask_optimizer(groups, lr=0.3, logit_scale=1.0, fused=False, **rule)

    def loss(residual: float) -> Tensor:
        for number, weight in enumerate(weights.values()):
            weight.grad = random(*weight.shape, seed=number) * residual
        return torch.tensor(residual)

    for residual in RESIDUALS:
        optimizer.step(lambda residual=residual: loss(residual), torch.tensor(0.0))
    logits, drawn = optimizer.logits(), optimizer.masks("drawn")
    return {
        f"{name} {what}": value[name]
        for name in SHAPES
        for what, value in {"weight": weights, "logits": logits, "mask": drawn}.items()
    }


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"logits_dtype": "bfloat16"},
        {"estimator": "straight_through"},
        {"estimator": "straight_through", "logits_dtype": "bfloat16"},
        {"estimator": "straight_through", "memory": "lean"},
    ],
    ids=str,
)
@pytest.mark.parametrize("block", [60, 2**16], ids=["a few at once", "all at once"])
def test_steps_made_as_one_are_what_each_makes_alone(
    rule: dict[str, Any], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = {}
    with monkeypatch.context() as patched:
        patched.setattr(together, "SMALL", 0)
        patched.setattr(lessons, "_SMALL", 0)
        alone = learned(rule)
    monkeypatch.setattr(together, "block_size", lambda _: block)
    monkeypatch.setattr(lessons, "block_size", lambda _: block)
    found = learned(rule)
    assert [name for name in alone if not torch.equal(found[name], alone[name])] == []


def test_blocks_of_a_kind_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = []

    def counted(*arguments: Any) -> Any:
        groups.append(arguments[1].numel())
        return transition(*arguments)

    transition = together.transition
    monkeypatch.setattr(together, "transition", counted)
    learned({})
    # Three kinds: 2:4, 1:4 and those of another lr, drawn first and then at every step. The first
    # draw, which no lr matters to, is of two kinds.
    abc, d, ef = 32 + 48 + 3, 6 * 2 * 9, 20 + 32
    assert sorted(groups) == sorted([abc + ef, d] + [abc, d, ef] * len(RESIDUALS))


def test_small_gradients_of_a_kind_are_learned_from_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups = []

    def counted(*arguments: Any) -> Any:
        groups.append(arguments[1].numel())
        return directed(*arguments)

    directed = lessons.directed
    monkeypatch.setattr(lessons, "directed", counted)
    learned({"estimator": "straight_through"})
    assert sorted(groups) == sorted([32 + 48 + 3, 20 + 32] * len(RESIDUALS))  # "d" is alone


def test_several_gradients_of_a_small_weight_are_learned_from_one_after_the_other() -> None:
    found = []
    for together_with_others in (False, True):
        weights = {name: nn.Parameter(random(8, 16)) for name in "ab"}
        optimizer = mask_optimizer(weights.items(), estimator="straight_through", fused=False)

        def closure(weights: Any = weights, others: bool = together_with_others) -> Tensor:
            for seed in range(3):
                (weights["a"] * random(8, 16, seed=seed)).sum().backward()
                if others:
                    weights["b"].sum().backward()
            return torch.tensor(1.0)

        optimizer.step(closure, backward_passes=3)
        found.append(optimizer.logits()["a"])
    assert torch.equal(*found)
