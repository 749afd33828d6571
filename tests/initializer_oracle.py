"""Slow, certain pruning: row by row, in plain Python or float64, importing nothing under test.

Shape suffixes: ``R`` outputs, ``K`` weights of one output, ``M`` group size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep_highest(scores_RK: Tensor, n: int, m: int) -> list[list[bool]]:
    """Keep the n highest of every m consecutive scores of a row; of equal ones the first."""
    mask = []
    for row in scores_RK.tolist():
        kept = set()
        for start in range(0, len(row), m):
            group = sorted(range(start, start + m), key=lambda j: (-row[j], j))
            kept.update(group[:n])
        mask.append([j in kept for j in range(len(row))])
    return mask


def wanda(weight_RK: Tensor, norm_K: Tensor, n: int, m: int) -> list[list[bool]]:
    """Keep the largest |w_j| * norm_j, in the double precision of Python's floats."""
    return keep_highest(weight_RK.abs().double() * norm_K.double(), n, m)


def sparsegpt(
    weight_RK: Tensor, hessian_KK: Tensor, n: int, m: int, damping: float
) -> tuple[Tensor, Tensor]:
    """Optimal Brain Surgeon, from the left: one row, one group, one weight at a time.

    Removing w_j so that the others, as far as they are still free, make up for it best costs
    w_j^2 / [H^-1]_jj and moves them by -w_j / [H^-1]_jj * [H^-1]_j, with H the Hessian of the free
    weights (Hassibi and Stork, 1993). The weights at the right of j and j itself are free.

    Returns:
        The mask and the updated weight, both (R, K).
    """
    hessian_KK = hessian_KK.double().clone()
    dead = [j for j in range(len(hessian_KK)) if hessian_KK[j, j] == 0]
    hessian_KK.diagonal().add_(damping * hessian_KK.diagonal().mean())
    for j in dead:
        hessian_KK[j, j] = 1.0
    free_inverse = [torch.linalg.inv(hessian_KK[j:, j:]) for j in range(len(hessian_KK))]
    updated_RK = weight_RK.double().clone()
    mask_RK = torch.ones(weight_RK.shape, dtype=torch.bool)
    for row, mask in zip(updated_RK, mask_RK, strict=True):
        row[dead] = 0.0
        for start in range(0, len(row), m):
            group = range(start, start + m)
            cost = {j: float(row[j] ** 2 / free_inverse[j][0, 0]) for j in group}
            for j in sorted(sorted(group, key=lambda j: (-cost[j], j))[n:]):
                row[j:] -= row[j] / free_inverse[j][0, 0] * free_inverse[j][0]
                row[j], mask[j] = 0.0, False
    return mask_RK, updated_RK


def error(weight_RK: Tensor, other_RK: Tensor, hessian_KK: Tensor) -> float:
    """Mean squared difference of the outputs; the Hessian is the mean of 2 x x^T."""
    difference_RK = weight_RK.double() - other_RK.double()
    return float(torch.trace(difference_RK @ hessian_KK.double() @ difference_RK.T)) / 2
