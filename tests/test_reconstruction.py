"""Laws of masks by reconstruction: the search's objective, its end, and the moments it is given."""

from __future__ import annotations

from itertools import product

import oracle
import pytest
import torch
from modules import inputs_of
from oracle import random
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from maskpro_lightning import NMPattern, find_targets
from maskpro_lightning.initial.calibration import initial_masks
from maskpro_lightning.initial.initializers import magnitude
from maskpro_lightning.initial.reconstruction import PairedStatistics, reconstruct

EPS = torch.finfo(torch.float32).eps
every_pattern = pytest.mark.parametrize(
    "pattern", [NMPattern(1, 2), NMPattern(2, 4), NMPattern(3, 5), NMPattern(4, 8)], ids=str
)


def moments_of(columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """H and C of correlated inputs, which the pruned network distorts, (1, K, K)."""
    mixing = random(columns, columns, seed=seed) + 2 * torch.eye(columns)
    dense = random(6 * columns, columns, seed=seed + 1) @ mixing
    pruned = dense + random(6 * columns, columns, seed=seed + 2)
    return (pruned.T @ pruned)[None], (pruned.T @ (pruned + dense) / 2)[None]


def cost_of(weight: Tensor, mask: Tensor, hessian: Tensor, cross: Tensor) -> Tensor:
    """``v H v^T - 2 v C w^T`` of each output, in float64, (R)."""
    weight, kept = weight.double(), weight.double() * mask
    linear = (kept @ cross[0].double() * weight).sum(1)
    return (kept @ hessian[0].double() * kept).sum(1) - 2 * linear


@every_pattern
def test_no_swap_is_left_that_helps(pattern: NMPattern) -> None:
    weight, (hessian, cross) = random(3, 40), moments_of(40)
    start = magnitude(weight, pattern)
    found = reconstruct(weight, hessian, cross, start, pattern)
    pattern.check(found)
    cost_R = cost_of(weight, found, hessian, cross)
    assert (cost_R < cost_of(weight, start, hessian, cross)).all()
    size = float((weight.abs() @ hessian[0].abs() * weight.abs()).sum())
    for row, group in product(range(3), range(40 // pattern.m)):
        places = range(group * pattern.m, (group + 1) * pattern.m)
        for enters, leaves in product(places, places):
            if not found[row, enters] and found[row, leaves]:
                other = found.clone()
                other[row, enters], other[row, leaves] = True, False
                better = cost_R[row] - cost_of(weight, other, hessian, cross)[row]
                assert better <= 40 * EPS * size + 1e-5 * size


def test_of_one_group_it_finds_the_best_mask_but_for_double_swaps() -> None:
    pattern, weight, (hessian, cross) = NMPattern(1, 4), random(20, 4), moments_of(4)
    found = reconstruct(weight, hessian, cross, magnitude(weight, pattern), pattern)
    masks_CM = oracle.sets(1, 4)
    costs_CR = torch.stack(
        [cost_of(weight, m.expand(20, 4), hessian, cross) for m in masks_CM.bool()]
    )
    assert torch.equal(found, masks_CM.bool()[costs_CR.argmin(0)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layout_of_the_weight_does_not_matter(dtype: torch.dtype) -> None:
    pattern, weight, (hessian, cross) = NMPattern(2, 4), random(6, 8).to(dtype), moments_of(8)
    start = magnitude(weight, pattern)
    expected = reconstruct(weight, hessian, cross, start, pattern)
    transposed = reconstruct(weight.T, hessian, cross, start.T, pattern, input_dim=0)
    assert torch.equal(transposed, expected.T)
    assert not torch.equal(expected, start)


@pytest.mark.parametrize("layer", [nn.Linear(8, 6), Conv1D(6, 8)], ids=["Linear", "Conv1D"])
def test_moments_pair_the_inputs_of_the_pruned_and_the_dense_network(layer: nn.Module) -> None:
    statistics = PairedStatistics(inputs_of(layer=layer))
    dense, pruned = random(2, 5, 3, 8), random(2, 5, 3, 8, seed=1)
    for dense_inputs, pruned_inputs in zip(dense, pruned, strict=True):
        with statistics.dense():
            layer(dense_inputs)
        with statistics.pruned(), torch.autocast("cpu", torch.bfloat16):
            layer(pruned_inputs)
    hessian, cross = statistics.moments["layer"]
    rows, targets = pruned.reshape(-1, 8).double(), dense.reshape(-1, 8).double()
    torch.testing.assert_close(hessian[0].double(), rows.T @ rows, rtol=30 * EPS, atol=30 * EPS)
    expected = rows.T @ (rows + targets) / 2
    torch.testing.assert_close(cross[0].double(), expected, rtol=30 * EPS, atol=30 * EPS)
    assert not layer._forward_pre_hooks


def test_an_input_of_another_shape_is_its_own_target() -> None:
    layer = nn.Linear(8, 6)
    statistics = PairedStatistics(inputs_of(layer=layer, unseen=nn.Linear(8, 6)))
    with statistics.dense():
        layer(random(5, 8))
    with statistics.pruned():
        layer(random(4, 8, seed=1))
        layer(random(3, 8, seed=2))
    hessian, cross = statistics.moments["layer"]
    assert torch.equal(hessian, cross)
    assert "unseen" not in statistics.moments


def test_it_imitates_the_dense_network_better_than_its_start_and_leaves_the_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)
    )
    batches = [torch.randn(64, 16) for _ in range(4)]
    unseen = torch.randn(256, 16)
    pattern, before = NMPattern(2, 4), {k: v.clone() for k, v in model.state_dict().items()}
    targets = find_targets(model, pattern)
    errors = {}
    with torch.no_grad():
        expected = model(unseen)
        for method in ("sparsegpt", "reconstruction"):
            runs = [lambda b=b: model(b) for b in batches]
            masks = dict(initial_masks(method, targets, pattern, batches=lambda runs=runs: runs))
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
            for target in targets:
                pattern.check(masks[target.name], target.input_dim)
                target.parameter.mul_(masks[target.name])
            errors[method] = float((model(unseen) - expected).square().mean())
            model.load_state_dict(before)
    assert errors["reconstruction"] < 0.8 * errors["sparsegpt"]
