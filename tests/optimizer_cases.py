"""Cases and shorthands that the tests of MaskPro share."""

from __future__ import annotations

from itertools import product
from typing import Any

import oracle
import pytest
import torch
from rules import mask_optimizer
from torch import Tensor, nn

from maskpro_lightning import MaskPro, NMPattern

# Pattern, shape of a weight with two groups of inputs, and the dimension of its inputs.
CASES = [
    pytest.param("2:4", (6, 8), -1, id="2:4 Linear [out, in]"),
    pytest.param("2:4", (8, 6), 0, id="2:4 Conv1D [in, out]"),
    pytest.param("2:4", (3, 8, 2, 2), 1, id="2:4 Conv2d [out, in, kh, kw]"),
    pytest.param("2:4", (2, 3, 8), -1, id="2:4 experts [E, out, in]"),
    pytest.param("2:4", (2, 8, 3), -2, id="2:4 experts [E, in, out]"),
    pytest.param("1:4", (8, 6), 0, id="1:4 Conv1D"),
    pytest.param("1:2", (6, 4), -1, id="1:2 Linear"),
    pytest.param("3:5", (3, 10, 2, 2), 1, id="3:5 Conv2d"),
    pytest.param("4:8", (2, 3, 16), -1, id="4:8 experts"),
    pytest.param("8:16", (6, 32), -1, id="8:16 Linear"),
]
every_case = pytest.mark.parametrize(("pattern", "shape", "input_dim"), CASES)
Shape = tuple[int, ...]


def one_weight(weight: Tensor, pattern: str = "2:4", input_dim: int = -1, **rule: Any) -> MaskPro:
    """A MaskPro of one weight named "w"."""
    group = {"params": [("w", weight)], "input_dim": input_dim}
    return mask_optimizer([group], pattern, **rule)


def step(optimizer: MaskPro, loss: float, baseline: float = 0.0) -> None:
    """One step that is told its losses."""
    optimizer.step(lambda: torch.tensor(loss), torch.tensor(baseline))


def logits_of(optimizer: MaskPro) -> Tensor:
    return optimizer.logits()["w"].clone()


def drawn_of(optimizer: MaskPro) -> Tensor:
    return optimizer.masks("drawn")["w"]


def grouped(tensor: Tensor, pattern: str, input_dim: int) -> Tensor:
    return NMPattern.parse(pattern).group(tensor, input_dim)


def top_of(scores: Tensor, pattern: str, input_dim: int) -> Tensor:
    """The oracle's mask of the highest scores, in their shape."""
    rows, n = grouped(scores, pattern, input_dim), NMPattern.parse(pattern).n
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    kept = [oracle.top(row, n) for row in rows.flatten(0, -2).tolist()]
    grouped(mask, pattern, input_dim)[:] = torch.tensor(kept).view_as(rows)
    return mask


def bits(tensor: Tensor) -> Tensor:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().clone().view(integer[tensor.element_size()])


def assert_holds(weight: Tensor, dense: Tensor, mask: Tensor) -> None:
    """Kept weights are the dense ones to the bit; the others are +0.0, all of whose bits are 0."""
    assert torch.equal(bits(weight), bits(dense) * mask)


class Regression:
    """A layer that should go on computing what it computes dense, from inputs of its own.

    Args:
        seed: Of weights, inputs and the random mask.
        dtype: Of the weights.
    """

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.weight = nn.Parameter(oracle.random(4, 16, seed=seed).to(dtype))
        self.random_mask = top_of(oracle.random(4, 16, seed=seed + 100), "2:4", -1)
        self._x = oracle.random(64, 16, seed=seed + 200)
        self._y = self._x @ self.weight.detach().float().T

    def loss(self) -> Tensor:
        return (self._x @ self.weight.float().T - self._y).square().mean()

    @torch.no_grad()
    def share_gained(self, optimizer: MaskPro) -> float:
        """How far the most likely mask has come from the initial one (0) to the best (1)."""
        losses = {}
        for version in ("initial", "mode"):
            with optimizer.applied(version):
                losses[version] = float(self.loss())
        with optimizer.applied("dense"):
            best = self._best()
        return (losses["initial"] - losses["mode"]) / (losses["initial"] - best)

    def _best(self) -> float:
        """The lowest loss of all masks: outputs have losses of their own, and 6^4 masks each."""
        four_sets = product(oracle.sets(2, 4), repeat=4)
        masks = torch.stack([torch.cat(sets) for sets in four_sets])
        outputs = zip(self.weight.float(), self._y.T, strict=True)
        errors = [self._x @ (row * masks).T - y[:, None] for row, y in outputs]
        return float(torch.stack([error.square().mean(0).min() for error in errors]).mean())
