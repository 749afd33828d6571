"""Laws of what MaskPro writes into the weights, and of what it refuses."""

from __future__ import annotations

import re
from itertools import product

import oracle
import pytest
import torch
from optimizer_cases import (
    Shape,
    assert_holds,
    drawn_of,
    every_case,
    grouped,
    one_weight,
    step,
    top_of,
)
from oracle import random
from rules import mask_optimizer
from torch import Tensor, nn

from maskpro_lightning.optim.masked_weight import Version
from maskpro_lightning.weights import layout

VERSIONS: list[Version] = ["dense", "initial", "drawn", "mode"]


# --- what the weights hold ----------------------------------------------------------------------


@every_case
def test_weights_hold_exactly_n_of_m_dense_ones(pattern: str, shape: Shape, input_dim: int) -> None:
    weight = nn.Parameter(random(*shape))
    optimizer = one_weight(weight, pattern, input_dim, logit_scale=0.1)
    optimizer.begin()
    n, m = map(int, pattern.split(":"))
    for _ in range(3):
        drawn = drawn_of(optimizer)
        assert oracle.keeps_exactly(n, m, drawn, input_dim)
        assert_holds(weight, random(*shape), drawn)
        step(optimizer, 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_number_is_pruned_to_plus_zero_and_kept_to_the_bit(dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    dense = torch.tensor([-1.0, -0.0, inf, -inf, nan, -nan, 0.3, 0.0], dtype=dtype).repeat(32, 1)
    weight = nn.Parameter(dense.clone())
    optimizer = one_weight(weight, logit_scale=0.1)
    optimizer.begin({"w": torch.tensor([[True, True, False, False] * 2] * 32)})
    drawn = drawn_of(optimizer)
    assert drawn.any(0).all()
    assert not drawn.all(0).any()
    assert_holds(weight, dense, drawn)


@every_case
def test_the_initial_mask_is_the_one_given_and_the_first_mode(
    pattern: str, shape: Shape, input_dim: int
) -> None:
    given = top_of(random(*shape).sin(), pattern, input_dim)
    optimizer = one_weight(nn.Parameter(random(*shape)), pattern, input_dim, logit_scale=0.1)
    optimizer.begin({"w": given})
    assert torch.equal(optimizer.masks("initial")["w"], given)
    assert torch.equal(optimizer.masks("mode")["w"], given)
    gap = optimizer.logits()["w"][given].min() - optimizer.logits()["w"][~given].max()
    assert 0 < gap < 0.1


@every_case
def test_without_masks_the_largest_weights_are_kept_first(
    pattern: str, shape: Shape, input_dim: int
) -> None:
    optimizer = one_weight(nn.Parameter(random(*shape)), pattern, input_dim)
    assert optimizer.step() is None
    largest = top_of(random(*shape).abs(), pattern, input_dim)
    assert torch.equal(optimizer.masks("initial")["w"], largest)


@every_case
def test_every_version_is_written_and_taken_back_to_the_bit(
    pattern: str, shape: Shape, input_dim: int
) -> None:
    weight, dense = nn.Parameter(random(*shape)), random(*shape)
    optimizer = one_weight(weight, pattern, input_dim, logit_scale=0.5, lr=1.0)
    for loss in (1.0, -2.0, 1.0, 3.0):
        step(optimizer, loss)
    masks = {version: optimizer.masks(version)["w"] for version in VERSIONS}
    assert masks["dense"].all()

    def fail_under(version: Version) -> None:
        with optimizer.applied(version):
            assert_holds(weight, dense, masks[version])
            raise ArithmeticError("in the body")

    for outer, inner in product(VERSIONS, VERSIONS):
        assert outer == inner or not torch.equal(masks[outer], masks[inner])
        with optimizer.applied(outer):
            assert_holds(weight, dense, masks[outer])
            with pytest.raises(ArithmeticError, match="in the body"):
                fail_under(inner)
            assert_holds(weight, dense, masks[outer])
        assert_holds(weight, dense, masks["drawn"])


def test_nothing_is_touched_before_begin() -> None:
    weight = nn.Parameter(random(4, 8))
    optimizer = one_weight(weight)
    for version in VERSIONS:
        optimizer.write(version)
        assert torch.equal(weight, random(4, 8))
    assert not optimizer.begun


@every_case
def test_groups_go_through_everything_in_order(
    monkeypatch: pytest.MonkeyPatch, pattern: str, shape: Shape, input_dim: int
) -> None:
    monkeypatch.setattr(layout, "_BLOCK", 5)
    optimizer = one_weight(nn.Parameter(random(*shape)), pattern, input_dim, logit_scale=0.5)
    step(optimizer, 1.0)
    before = drawn_of(optimizer)
    step(optimizer, 2.0)
    expected = {
        "logits_GM": optimizer.logits()["w"],
        "initial_GM": optimizer.masks("initial")["w"],
        "drawn_GM": drawn_of(optimizer),
    }
    blocks = list(optimizer.groups())
    assert len(blocks) > 1
    changed = grouped(before != drawn_of(optimizer), pattern, input_dim).any(-1)
    assert optimizer.redrawn()["w"] == changed.sum()
    assert {(block.name, str(block.pattern)) for block in blocks} == {("w", pattern)}
    for name, tensor in expected.items():
        together_GM = torch.cat([getattr(block, name) for block in blocks])
        rows = grouped(tensor, pattern, input_dim)
        assert torch.equal(together_GM, rows.reshape(-1, rows.shape[-1]))


# --- names --------------------------------------------------------------------------------------


def test_unnamed_weights_are_called_by_number() -> None:
    first, second = nn.Parameter(random(4, 8)), nn.Parameter(random(2, 8))
    optimizer = mask_optimizer([first, second])
    optimizer.begin()
    shapes = {name: mask.shape for name, mask in optimizer.masks().items()}
    assert shapes == {"0": first.shape, "1": second.shape}


def test_unnamed_weights_of_two_groups_have_names_of_their_own() -> None:
    groups = [{"params": [nn.Parameter(random(4, 8))], "input_dim": dim} for dim in (0, 1)]
    optimizer = mask_optimizer(groups)
    optimizer.begin()
    assert len(optimizer.masks()) == len(optimizer.logits()) == 2


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0, but 0 < lr <= 1e+06 must hold."),
        ({"lr": -1.0}, "lr is -1.0, but 0 < lr <= 1e+06 must hold."),
        ({"lr": float("nan")}, "lr is nan, but 0 < lr <= 1e+06 must hold."),
        ({"logit_scale": 0.0}, "logit_scale is 0.0, but 0 < logit_scale <= 1e+06 must hold."),
        ({"lr": 2e6}, "lr is 2000000.0, but 0 < lr <= 1e+06 must hold."),
        ({"momentum": 1.0}, "momentum is 1.0, but 0 <= momentum < 1 must hold."),
        ({"momentum": -0.1}, "momentum is -0.1, but 0 <= momentum < 1 must hold."),
    ],
)
def test_a_rule_out_of_range_is_refused(rule: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        one_weight(nn.Parameter(random(4, 8)), **rule)


def test_a_pattern_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^The pattern 4:2 keeps 4 of every 2 weights"):
        one_weight(nn.Parameter(random(4, 8)), "4:2")
    group = {"params": [("w", nn.Parameter(random(4, 8)))], "pattern": "2/4"}
    with pytest.raises(ValueError, match=r"^'2/4' is not an N:M pattern"):
        mask_optimizer([group])


@pytest.mark.parametrize(("shape", "input_dim"), [((8, 6), -1), ((6, 8), 0), ((8, 6, 4, 4), 1)])
def test_inputs_that_m_does_not_divide_are_refused_by_name(shape: Shape, input_dim: int) -> None:
    message = "'w' has 6 input features, not a multiple of 4 (pattern 2:4): leave it out or choose"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        one_weight(nn.Parameter(random(*shape)), "2:4", input_dim)


TWO_OF_FOUR = torch.tensor([True, False, True, False])


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        (
            {},
            ValueError,
            (
                "There is no initial mask for 'w' among 0 masks: give one for every weight, or "
                "leave the weight out."
            ),
        ),
        (
            {"w": TWO_OF_FOUR.repeat(4, 2), "v": TWO_OF_FOUR},
            ValueError,
            "There are masks of unknown weights, ['v']: those of this model are named like 'w'.",
        ),
        (
            {"w": TWO_OF_FOUR.repeat(4, 1)},
            ValueError,
            (
                "The mask of 'w' has shape (4, 4), but the weight has shape (4, 8): give a mask in "
                "the shape of the whole weight."
            ),
        ),
        (
            {"w": torch.ones(4, 8, dtype=torch.bool)},
            ValueError,
            "the mask of 'w' is not 2:4: group 0 keeps 4 of 4 weights (8 of 8 groups are wrong).",
        ),
        (
            {"w": TWO_OF_FOUR.repeat(4, 2).float()},
            TypeError,
            "the mask of 'w' must be a bool tensor, got torch.float32.",
        ),
    ],
    ids=["missing", "unknown", "of another shape", "keeps all", "not bool"],
)
def test_masks_that_do_not_fit_are_refused_and_nothing_is_touched(
    masks: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    weight = nn.Parameter(random(4, 8))
    optimizer = one_weight(weight)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        optimizer.begin(masks)
    assert not optimizer.begun
    assert torch.equal(weight, random(4, 8))


def test_masks_begin_once_and_are_not_there_before() -> None:
    optimizer = one_weight(nn.Parameter(random(4, 8)))
    message = "There are no masks before the first step or begin()."
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        optimizer.masks()
    optimizer.begin()
    message = "The masks have begun already: make a new MaskPro to start over."
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        optimizer.begin()


def test_a_version_that_does_not_exist_is_refused() -> None:
    optimizer = one_weight(nn.Parameter(random(4, 8)))
    message = "version is one of ('dense', 'initial', 'drawn', 'mode', 'best'), got 'nope'."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        optimizer.write("nope")  # type: ignore[arg-type]
