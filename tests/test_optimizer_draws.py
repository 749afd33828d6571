"""Laws of a draw and of a checkpoint: what the masks depend on, and how they go on."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from optimizer_cases import drawn_of, logits_of, one_weight, step
from oracle import random
from rules import mask_optimizer
from torch import Tensor, nn

from maskpro_lightning import MaskPro
from maskpro_lightning.weights import layout

RESIDUALS = [1.0, -0.5, 2.0, 0.25, -1.0, 0.75]
SHAPES = {"a.weight": (8, 16), "b.weight": (4, 8), "c.weight": (12, 8)}
RULE: dict[str, Any] = {"lr": 0.3, "logit_scale": 1.0}
Masks = dict[str, Tensor]


def named_weights(names: Iterable[str] = SHAPES) -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(random(*SHAPES[name]))) for name in names]


def trajectory(optimizers: Sequence[MaskPro]) -> list[dict[str, Masks]]:
    """Drawn masks and logits by name after each step; the optimizers share the losses."""
    found = []
    for residual in RESIDUALS:
        for optimizer in optimizers:
            step(optimizer, residual)
        masks = {k: mask for opt in optimizers for k, mask in opt.masks("drawn").items()}
        logits = {k: pi.clone() for opt in optimizers for k, pi in opt.logits().items()}
        found.append({"masks": masks, "logits": logits})
    return found


def assert_same(one: list[dict[str, Masks]], other: list[dict[str, Masks]]) -> None:
    assert len(one) == len(other) == len(RESIDUALS)
    for here, there in zip(one, other, strict=True):
        for kind in ("masks", "logits"):
            assert here[kind].keys() == there[kind].keys() == SHAPES.keys()
            assert all(torch.equal(here[kind][name], there[kind][name]) for name in SHAPES)


# --- what a draw depends on ---------------------------------------------------------------------


def test_the_order_of_the_weights_does_not_matter() -> None:
    backwards = mask_optimizer(named_weights(reversed(SHAPES)), **RULE)
    assert_same(trajectory([mask_optimizer(named_weights(), **RULE)]), trajectory([backwards]))


@pytest.mark.parametrize("block", [1, 3, 7, 2**20])
def test_the_size_of_a_block_does_not_matter(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    expected = trajectory([mask_optimizer(named_weights(), **RULE)])
    monkeypatch.setattr(layout, "_BLOCK", block)
    assert_same(trajectory([mask_optimizer(named_weights(), **RULE)]), expected)


def test_the_split_into_optimizers_or_groups_does_not_matter() -> None:
    expected = trajectory([mask_optimizer(named_weights(), **RULE)])
    assert_same(
        trajectory([mask_optimizer(named_weights([name]), **RULE) for name in SHAPES]), expected
    )
    groups = [{"params": named_weights([name])} for name in SHAPES]
    assert_same(trajectory([mask_optimizer(groups, **RULE)]), expected)


def test_the_dtype_of_the_weights_and_the_global_generator_do_not_matter() -> None:
    halves = [(name, nn.Parameter(weight.half())) for name, weight in named_weights()]
    floats = [(name, nn.Parameter(weight.float())) for name, weight in halves]
    expected = trajectory([mask_optimizer(floats, **RULE)])
    torch.manual_seed(1)
    assert_same(trajectory([mask_optimizer(halves, **RULE)]), expected)


def test_a_group_draws_alike_however_many_follow() -> None:
    whole, part = nn.Parameter(random(9, 8)), nn.Parameter(random(9, 8)[:4])
    # From logits of one size: others depend on how large the other weights are.
    rule = RULE | {"published": True}
    optimizers = one_weight(whole, **rule), one_weight(part, **rule)
    for residual in RESIDUALS:
        for optimizer in optimizers:
            step(optimizer, residual)
        assert torch.equal(drawn_of(optimizers[0])[:4], drawn_of(optimizers[1]))


def test_other_seeds_names_steps_and_groups_draw_other_masks() -> None:
    def first_draws(name: str, seed: int) -> list[Tensor]:
        optimizer = mask_optimizer(
            [(name, nn.Parameter(torch.ones(64, 4)))], seed=seed, logit_scale=0.01
        )
        found = []
        for _ in range(2):
            step(optimizer, 1.0)
            found.append(optimizer.masks("drawn")[name])
        return found

    draws = [mask for name in ("a", "b") for seed in (0, 1) for mask in first_draws(name, seed)]
    # 64 groups of six masks, almost equally likely: a pair agrees in 64 / 6 on average, with a
    # standard deviation of 3; equal draws would agree in 64, and a shift by a group is a pair too.
    pairs = [(i, j) for i in range(len(draws)) for j in range(i)]
    agreeing = [int((draws[i] == draws[j]).all(-1).sum()) for i, j in pairs]
    neighbours = [int((mask == mask.roll(1, 0)).all(-1).sum()) for mask in draws]
    assert max(agreeing + neighbours) < 64 / 6 + 6 * 3


# --- checkpoints --------------------------------------------------------------------------------


class Training:
    """A weight whose losses depend on its masks, in a precision that could lose logits."""

    def __init__(self, dtype: torch.dtype, dense: Tensor) -> None:
        self.weight = nn.Parameter(dense.to(dtype))
        self.optimizer = one_weight(self.weight, **RULE, momentum=0.9)

    def train(self, steps: int) -> None:
        x = random(32, 8)
        for _ in range(steps):
            self.optimizer.step(lambda: (x @ self.weight.float().T).square().mean())

    def observed(self) -> dict[str, Tensor]:
        masks = {v: self.optimizer.masks(v)["w"] for v in ("initial", "drawn", "mode")}
        return {
            "weight": self.weight.detach().clone(),
            "logits": logits_of(self.optimizer),
            "redrawn": self.optimizer.redrawn()["w"],
            **masks,
            **self.optimizer.tracker,
        }


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_resumed_is_uninterrupted_to_the_bit_and_not_half_way(dtype: torch.dtype) -> None:
    uninterrupted, interrupted = (Training(dtype, random(6, 8)) for _ in range(2))
    uninterrupted.train(8)
    interrupted.train(4)
    half_way = interrupted.observed()
    state = through_a_file(interrupted.optimizer.state_dict())
    resumed = Training(dtype, torch.zeros(6, 8))  # the checkpoint brings the weights
    resumed.optimizer.load_state_dict(state)
    assert_equal(resumed.observed() | {"redrawn": half_way["redrawn"]}, half_way)
    resumed.train(4)
    assert_equal(resumed.observed(), uninterrupted.observed())
    assert logits_of(resumed.optimizer).dtype == torch.float32
    assert not torch.equal(logits_of(resumed.optimizer), half_way["logits"])
    with resumed.optimizer.applied("dense"):
        assert torch.equal(resumed.weight, random(6, 8).to(dtype))


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert differing == []


def test_a_checkpoint_shares_no_memory_with_the_one_who_loaded_it() -> None:
    saved = Training(torch.float32, random(6, 8))
    saved.train(2)
    before = saved.observed()
    resumed = Training(torch.float32, random(6, 8))
    resumed.optimizer.load_state_dict(saved.optimizer.state_dict())
    resumed.train(2)
    assert_equal(saved.observed(), before)


def test_a_checkpoint_brings_its_rule() -> None:
    saved = one_weight(nn.Parameter(random(4, 8)), lr=0.5, seed=7, published=True, momentum=0.5)
    saved.begin()
    fresh = one_weight(nn.Parameter(random(4, 8)))
    fresh.load_state_dict(saved.state_dict())
    for optimizer in (saved, fresh):
        step(optimizer, 1.0)
    assert torch.equal(logits_of(fresh), logits_of(saved))
    assert torch.equal(drawn_of(fresh), drawn_of(saved))


def test_a_checkpoint_from_before_the_first_step_begins_anew() -> None:
    fresh = one_weight(nn.Parameter(random(4, 8)))
    fresh.load_state_dict(one_weight(nn.Parameter(random(4, 8))).state_dict())
    assert not fresh.begun
    step(fresh, 1.0)
    assert fresh.begun


def test_a_checkpoint_from_before_the_first_step_gives_the_dense_weights_back() -> None:
    weight = nn.Parameter(random(4, 8))
    optimizer = one_weight(weight)
    empty = through_a_file(optimizer.state_dict())
    optimizer.begin()
    optimizer.load_state_dict(empty)
    assert torch.equal(weight, random(4, 8))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda weight: one_weight(weight, "1:4"),
            "pattern is '2:4' there and '1:4' here.",
        ),
        (
            lambda weight: one_weight(weight, input_dim=0),
            "input_dim is -1 there and 0 here.",
        ),
        (
            lambda weight: mask_optimizer([("v", weight)]),
            "param_names is 'w' there and 'v' here.",
        ),
        (
            lambda weight: mask_optimizer([weight]),
            "param_names is ['w'] there and None here.",
        ),
        (
            lambda weight: one_weight(weight, estimator="straight_through"),
            "estimator is 'policy' there and 'straight_through' here.",
        ),
    ],
    ids=["pattern", "input_dim", "name", "no name", "estimator"],
)
def test_masks_of_another_model_or_pattern_are_refused(other: Any, message: str) -> None:
    saved = one_weight(nn.Parameter(random(8, 8)))
    saved.begin()
    weight = nn.Parameter(random(8, 8))
    message = f"The saved masks belong to another model, pattern or estimator: {message}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)} Go on with"):
        other(weight).load_state_dict(saved.state_dict())
    assert torch.equal(weight, random(8, 8))


def test_masks_of_another_shape_are_refused() -> None:
    saved = one_weight(nn.Parameter(random(1, 8)))
    saved.begin()
    weight = nn.Parameter(random(4, 8))
    with pytest.raises(ValueError, match="'w'"):
        one_weight(weight).load_state_dict(saved.state_dict())
    assert torch.equal(weight, random(4, 8))
