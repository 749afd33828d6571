"""Initial masks: the largest weights, Wanda's, SparseGPT's, random ones, a sparse model's own.

Each function takes a weight of any floating dtype and layout, the pattern and the dimension that
the layer sums over, ``input_dim``. It returns a bool mask in the weight's shape and layout that
keeps exactly N of every M; of equal scores the first is kept. All raise ``ValueError`` where M does
not divide the inputs. Wanda (arXiv 2306.11695) and SparseGPT (arXiv 2301.00774) judge a weight by
the inputs of its layer, of which ``statistics`` collects what they need.

Shape suffixes: ``C`` groups of a convolution (1 for other layers), ``R`` outputs of one of them,
``K`` weights of one output (a convolution's in the order kernel positions, input channels), ``B``
columns of a block, ``G`` groups, ``M`` group size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from maskpro_lightning.masks import philox
from maskpro_lightning.masks.pattern import NMPattern

# Groups handled at once: bounds the memory of what is computed on the way.
_GROUPS_AT_ONCE = 2**16


@torch.no_grad()
def magnitude(weight: Tensor, pattern: NMPattern, input_dim: int = -1) -> Tensor:
    """Keep the N largest weights of each group by absolute value.

    Raises:
        ValueError: the weight holds NaN.
    """
    mask = torch.empty_like(weight, dtype=torch.bool)
    for values_GM, kept_GM in blocks(pattern, input_dim, weight, mask):
        kept_GM.copy_(_top(values_GM.abs(), pattern))
    return mask


@torch.no_grad()
def random(
    weight: Tensor, pattern: NMPattern, input_dim: int = -1, *, key: tuple[int, int]
) -> Tensor:
    """Keep N of each group at random, all masks being equally likely.

    ``key`` is two 32-bit words, see :func:`philox.key_of`. A group's mask is a
    function of the key and the group's number alone; of the weight only shape and device count.
    """
    groups = pattern.group(weight, input_dim).shape[:-1].numel()
    step = torch.tensor(0, device=weight.device)
    kept = [
        pattern.top(-philox.exponential(key, step, some_G, pattern.m))
        for some_G in torch.arange(groups, device=weight.device).split(_GROUPS_AT_ONCE)
    ]
    return laid_out(torch.cat(kept), weight, input_dim)


@torch.no_grad()
def nonzeros(
    weight: Tensor, pattern: NMPattern, input_dim: int = -1, *, name: str = "weight"
) -> Tensor:
    """The mask of a weight that is sparse already: where it is not zero.

    Raises:
        ValueError: a group has more or fewer than N nonzeros, so that its mask would be a guess;
            ``name`` is what the message calls the weight.
    """
    kept_GM = pattern.group(weight, input_dim) != 0
    count_G = kept_GM.sum(-1).flatten()
    wrong_G = count_G != pattern.n
    if wrong_G.any():
        first = int(wrong_G.nonzero()[0])
        raise ValueError(
            f"{name!r} does not show a {pattern} mask: group {first} has {int(count_G[first])} "
            f"nonzeros of {pattern.m} weights ({int(wrong_G.sum())} of {count_G.numel()} groups "
            f"are wrong). A kept weight can be zero, so masks are not guessed: give the mask "
            f"itself (masks=...)."
        )
    return laid_out(kept_GM, weight, input_dim)


@torch.no_grad()
def wanda(weight: Tensor, norm: Tensor, pattern: NMPattern, input_dim: int = -1) -> Tensor:
    """Keep the N largest ``|W_ij| * ||X_j||_2`` of each group (arXiv 2306.11695, equation 1).

    ``norm`` is (C, K), in any unit, such as :attr:`InputStatistics.norm`; the outputs are cut into
    C equal parts, each with a line of its own.

    Raises:
        ValueError: the shapes do not fit, or there is NaN.
    """
    rows_CRK = rows_of(weight, norm, pattern, input_dim)
    scores_GM = pattern.group(rows_CRK.abs() * norm[:, None].to(weight.device))
    return laid_out(_top(scores_GM, pattern), weight, input_dim)


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    pattern: NMPattern,
    input_dim: int = -1,
    *,
    damping: float = 0.01,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """Prune column by column; the columns further right make up for each error.

    With U the upper triangle for which ``U^T U`` is the inverse of the damped Hessian, a group
    keeps the N largest ``(w_j / U_jj)^2`` of what its weights have become when it is reached, and
    a pruned w_j moves the others of its output by ``-w_j / U_jj * U_jk``, k > j (arXiv 2301.00774,
    algorithm 1, n:m). Computed in float32, or in float64 if the weight is.

    Args:
        weight: The weight; its outputs are cut into C equal parts, each with a matrix of its own.
        hessian: (C, K, K), 2 X^T X in any unit, such as :attr:`InputStatistics.hessian`. An input
            with zero on the diagonal is dead: its weights become zero and are pruned first.
        pattern: The pattern.
        input_dim: The dimension that the layer sums over.
        damping: Added to the diagonal, as a share of its mean. Ten and a hundred times as much is
            tried where this does not make the Hessian positive definite.
        block: Columns after which errors are passed on to all columns further right, rounded down
            to a multiple of M, at least M; matters to speed alone.

    Returns:
        The mask, and the pruned and updated weight in the weight's shape, layout and dtype.

    Raises:
        ValueError: the shapes do not fit, something is not finite, or damping < 0.
        RuntimeError: the Hessian is not positive definite with any damping that was tried.
    """
    if damping < 0:
        raise ValueError(f"damping is {damping}, but damping >= 0 must hold.")
    rows_CRK = rows_of(weight, hessian.diagonal(dim1=-2, dim2=-1), pattern, input_dim)
    hessian_CKK = hessian.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    for name, tensor in (("weight", weight), ("Hessian", hessian_CKK)):
        if not tensor.isfinite().all():
            raise ValueError(f"The {name} holds NaN or infinity: SparseGPT cannot work with it.")
    factor_CKK = _inverse_factor(hessian_CKK, damping)
    # Transposed, so that what is computed column by column runs over memory.
    weight_CKR = rows_CRK.mT.to(factor_CKK.dtype).clone(memory_format=torch.contiguous_format)
    weight_CKR[hessian_CKK.diagonal(dim1=-2, dim2=-1) == 0] = 0
    kept_CKR = torch.empty_like(weight_CKR, dtype=torch.bool)
    width = max(pattern.m, block - block % pattern.m)
    for start in range(0, weight_CKR.shape[1], width):
        here, right = slice(start, start + width), slice(start + width, None)
        error_CBR = _prune_block(
            weight_CKR[:, here], kept_CKR[:, here], factor_CKK[:, here, here], pattern
        )
        weight_CKR[:, right] -= factor_CKK[:, here, right].mT @ error_CBR
    updated = weight_CKR.where(kept_CKR, 0).mT.to(weight.dtype)
    return laid_out(kept_CKR.mT, weight, input_dim), laid_out(updated, weight, input_dim)


def blocks(pattern: NMPattern, input_dim: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Go through tensors of one shape in blocks of groups, a view (..., M) of each."""
    views = [pattern.group(tensor, input_dim) for tensor in tensors]
    rows = max(1, _GROUPS_AT_ONCE // max(1, views[0][0].numel() // pattern.m))
    return zip(*(view.split(rows) for view in views), strict=True)


def rows_of(weight: Tensor, statistic_CK: Tensor, pattern: NMPattern, input_dim: int) -> Tensor:
    """The weight as (C, R, K), to go with its inputs' statistics."""
    shape = pattern.group(weight, input_dim).flatten(-2).shape
    columns = [math.prod(shape[i:]) for i in range(1, len(shape))]
    given = tuple(statistic_CK.shape)
    if len(given) != 2 or given[1] not in columns or weight.numel() // given[1] % given[0]:
        raise ValueError(
            f"Inputs with statistics (C, K) = {given} do not fit a weight of shape "
            f"{tuple(weight.shape)}: K must be the weights of one output (one of {columns}) and "
            f"C divide the outputs (1 unless a convolution has groups)."
        )
    return weight.movedim(input_dim, -1).reshape(given[0], -1, given[1])


def laid_out(values: Tensor, weight: Tensor, input_dim: int) -> Tensor:
    """Values in the order of the group view, in the weight's shape and layout."""
    laid_out = torch.empty_like(weight, dtype=values.dtype)
    view = laid_out.movedim(input_dim, -1)
    view.copy_(values.reshape(view.shape))
    return laid_out


def _top(scores_GM: Tensor, pattern: NMPattern) -> Tensor:
    if scores_GM.isnan().any():
        raise ValueError("There is NaN among the weights or their inputs' norms.")
    return pattern.top(scores_GM)


def _inverse_factor(hessian_CKK: Tensor, damping: float) -> Tensor:
    """The upper triangle U for which ``U^T U`` is the inverse of the damped Hessian."""
    diagonal_CK, columns = hessian_CKK.diagonal(dim1=1, dim2=2), hessian_CKK.shape[1]
    for share in (damping, 10 * damping, 100 * damping):
        added_CK = share * diagonal_CK.mean(-1, keepdim=True) + (diagonal_CK == 0)
        # Factored from the last column to the first, H = R R^T with R upper. Then U is R^-1, and
        # the inverse itself, which would lose digits, is never formed.
        damped_CKK = hessian_CKK + added_CK.diag_embed()
        flipped_CKK, failed_C = torch.linalg.cholesky_ex(damped_CKK.flip(1, 2))
        if not failed_C.any():
            factor_CKK: Tensor = torch.linalg.solve_triangular(
                flipped_CKK.flip(1, 2), torch.eye(columns).to(hessian_CKK), upper=True
            )
            return factor_CKK
    raise RuntimeError(
        f"The Hessian of {columns} inputs is not positive definite, even with 100 "
        f"times the damping of {damping}: calibrate on more batches or set a larger damping."
    )


def _prune_block(
    weight_CBR: Tensor, kept_CBR: Tensor, factor_CBB: Tensor, pattern: NMPattern
) -> Tensor:
    """Prune some columns in place and return the errors made, in units of U, (C, B, R)."""
    error_CBR = torch.zeros_like(weight_CBR)
    diagonal_CB = factor_CBB.diagonal(dim1=1, dim2=2)
    for j in range(weight_CBR.shape[1]):
        if j % pattern.m == 0:
            group = slice(j, j + pattern.m)
            scores_CMR = weight_CBR[:, group].abs() / diagonal_CB[:, group, None]
            kept_CBR[:, group] = pattern.top(scores_CMR.mT).mT
        error_CR = (weight_CBR[:, j] / diagonal_CB[:, j, None]).masked_fill(kept_CBR[:, j], 0)
        weight_CBR[:, j:] -= factor_CBB[:, j, j:, None] * error_CR[:, None]
        error_CBR[:, j] = error_CR
    return error_CBR
