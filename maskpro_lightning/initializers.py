"""Initial masks: the largest weights, Wanda's, SparseGPT's, random ones, a sparse model's own.

Each function takes a weight of any floating dtype and layout, the pattern and the dimension that
the layer sums over, ``input_dim``. It returns a bool mask in the weight's shape and layout that
keeps exactly N of every M; of equal scores the first is kept. All raise ``ValueError`` where M does
not divide the inputs. Wanda (arXiv 2306.11695) and SparseGPT (arXiv 2301.00774) judge a weight by
the inputs of its layer, of which :class:`InputStatistics` collects what they need.

Shape suffixes: ``C`` groups of a convolution (1 for other layers), ``R`` output rows of one of
them, ``K`` columns of a row (a convolution's are ordered kernel positions, then input channels),
``B`` columns of a block, ``T`` rows of input (tokens, positions), ``G`` groups, ``M`` group size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle

from maskpro_lightning import philox
from maskpro_lightning.pattern import NMPattern

_log = logging.getLogger(__name__)
# Groups, or rows of input, handled at once: bounds the memory of what is computed on the way.
_GROUPS_AT_ONCE = 2**16
_ROWS_AT_ONCE = 2**12


@torch.no_grad()
def magnitude(weight: Tensor, pattern: NMPattern, input_dim: int = -1) -> Tensor:
    """Keep the N largest weights of each group by absolute value.

    Raises:
        ValueError: the weight holds NaN.
    """
    return _mask(weight, _top(pattern.group(weight, input_dim).abs(), pattern), input_dim)


@torch.no_grad()
def random(
    weight: Tensor, pattern: NMPattern, input_dim: int = -1, *, key: tuple[int, int]
) -> Tensor:
    """Keep N of each group at random, every mask alike likely.

    Args:
        weight: Only its shape and device count.
        pattern: The pattern.
        input_dim: The dimension that the layer sums over.
        key: Two 32-bit words, see :func:`~maskpro_lightning.philox.key_of`. A group's mask is a
            function of the key and of the group's number alone.
    """
    groups = pattern.group(weight, input_dim).shape[:-1].numel()
    draw = torch.zeros((), dtype=torch.int64, device=weight.device)
    kept_GM = torch.cat([
        pattern.top(-philox.exponential(key, draw, numbers_G, pattern.m))
        for numbers_G in torch.arange(groups, device=weight.device).split(_GROUPS_AT_ONCE)
    ])
    return _mask(weight, kept_GM, input_dim)


@torch.no_grad()
def nonzeros(
    weight: Tensor, pattern: NMPattern, input_dim: int = -1, *, name: str = "weight"
) -> Tensor:
    """The mask of a weight that is sparse already: where it is not zero.

    Raises:
        ValueError: a group has not exactly N nonzeros, which would leave its mask to guesswork.
            ``name`` is what the message calls the weight.
    """
    nonzero_GM = pattern.group(weight, input_dim) != 0
    count_G = nonzero_GM.sum(-1).flatten()
    wrong_G = count_G != pattern.n
    if wrong_G.any():
        first = int(wrong_G.nonzero()[0])
        raise ValueError(
            f"{name!r} does not show its {pattern} mask: group {first} has {int(count_G[first])} "
            f"nonzeros of {pattern.m} ({int(wrong_G.sum())} of {count_G.numel()} groups have more "
            f"or fewer than {pattern.n}). Give the mask itself (masks=...): a kept weight may be "
            f"zero too, so masks are not guessed from zeros."
        )
    return _mask(weight, nonzero_GM, input_dim)


@torch.no_grad()
def wanda(weight: Tensor, norm: Tensor, pattern: NMPattern, input_dim: int = -1) -> Tensor:
    """Keep the N largest ``|W_ij| * ||X_j||_2`` of each group (arXiv 2306.11695, eq. 1).

    Args:
        weight: The weight; its outputs are C equal parts, each with a line of ``norm``.
        norm: (C, K), the inputs' norms in any unit, such as :attr:`InputStatistics.norm`.
        pattern: The pattern.
        input_dim: The dimension that the layer sums over.

    Raises:
        ValueError: the shapes do not fit, or there is NaN.
    """
    rows_CRK = _rows(weight, "norm", norm, 2, pattern, input_dim)
    scores_CRK = rows_CRK.abs().to(_precise(weight)) * norm[:, None].to(weight.device)
    kept_GM = _top(scores_CRK.unflatten(-1, (-1, pattern.m)), pattern)
    return _mask(weight, kept_GM, input_dim)


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
    """Prune column by column; columns further right make up for the errors.

    With U the upper triangle for which ``U^T U`` is the inverse of the damped Hessian, a group
    keeps the N largest ``(w_j / U_jj)^2`` of what its weights have become when it is reached, and
    a pruned w_j moves each weight k > j of its row by ``-w_j / U_jj * U_jk`` (arXiv 2301.00774,
    algorithm 1, n:m). Computed in float32, or in float64 if the weight is.

    Args:
        weight: The weight; its outputs are C equal parts, each with a matrix of ``hessian``.
        hessian: (C, K, K), 2 X^T X in any unit, such as :attr:`InputStatistics.hessian`. An input
            with zero on the diagonal is dead: its weights become zero, so they go first.
        pattern: The pattern.
        input_dim: The dimension that the layer sums over.
        damping: Added to the diagonal, as a share of its mean. Ten and a hundred times as much is
            tried where this does not make the Hessian positive definite.
        block: Columns after which errors are passed on to all columns further right, rounded down
            to a multiple of M but at least M; matters to speed alone.

    Returns:
        The mask, and the pruned and updated weight in the weight's shape, layout and dtype.

    Raises:
        ValueError: the shapes do not fit, something is not finite, or damping < 0.
        RuntimeError: the Hessian is not positive definite, whatever damping was tried.
    """
    if damping < 0:
        raise ValueError(f"damping is {damping}, but damping >= 0 must hold.")
    rows_CRK = _rows(weight, "hessian", hessian, 3, pattern, input_dim)
    hessian_CKK = hessian.to(weight.device, _precise(weight))
    for name, tensor in (("weight", weight), ("hessian", hessian_CKK)):
        if not tensor.isfinite().all():
            raise ValueError(f"The {name} that SparseGPT got holds NaN or infinity.")
    factor_CKK = _inverse_factor(hessian_CKK, damping)
    dead_CK = hessian_CKK.diagonal(dim1=1, dim2=2) == 0
    # Transposed, so that what is computed column by column runs over memory.
    weight_CKR = rows_CRK.mT.to(factor_CKK.dtype).clone(memory_format=torch.contiguous_format)
    weight_CKR.masked_fill_(dead_CK[..., None], 0)
    kept_CKR = torch.empty_like(weight_CKR, dtype=torch.bool)
    width = max(pattern.m, block - block % pattern.m)
    for start in range(0, weight_CKR.shape[1], width):
        here, right = slice(start, start + width), slice(start + width, None)
        error_CBR = _prune_block(
            weight_CKR[:, here], kept_CKR[:, here], factor_CKK[:, here, here], pattern
        )
        weight_CKR[:, right] -= factor_CKK[:, here, right].mT @ error_CBR
    weight_CKR.masked_fill_(~kept_CKR, 0)
    updated = torch.empty_like(weight)
    view = updated.movedim(input_dim, -1)
    view.copy_(weight_CKR.mT.reshape(view.shape))
    return _mask(weight, kept_CKR.mT, input_dim), updated


class InputStatistics:
    """What Wanda and SparseGPT need to know of layers' inputs, collected in forward passes.

    ``with InputStatistics(layers, second_moments=False) as statistics: model(batch)``. Understands
    ``nn.Linear``, Hugging Face's ``Conv1D`` and ``nn.Conv1d`` to ``nn.Conv3d``; other layers stay
    unseen. Every row counts alike, padding too. Entering again goes on adding.

    Args:
        modules: Layers by name, on the device that they run on.
        second_moments: Collect :attr:`hessian` as well; costs what :func:`bytes_needed` says.
    """

    def __init__(self, modules: Mapping[str, nn.Module], *, second_moments: bool) -> None:
        self._modules = dict(modules)
        self._second_moments = second_moments
        self._hooks: list[RemovableHandle] = []
        self._rows = dict.fromkeys(self._modules, 0)
        self._sums: dict[str, Tensor] = {}
        for name, module in self._modules.items():
            if (shape := _sum_shape(module, second_moments)) is not None:
                device = module.get_parameter("weight").device
                self._sums[name] = torch.zeros(shape, dtype=torch.float32, device=device)

    def __enter__(self) -> Self:
        for name in self._sums:
            hook = partial(self._see, name)
            handle = self._modules[name].register_forward_pre_hook(hook, with_kwargs=True)
            self._hooks.append(handle)
        return self

    def __exit__(self, *_: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    @property
    def norm(self) -> Mapping[str, Tensor]:
        """Root of the mean square of each input over all rows, float32 (C, K), by layer seen."""
        return _OfSeen(self, lambda name: self._mean_squares(name).sqrt())

    @property
    def hessian(self) -> Mapping[str, Tensor]:
        """Mean of 2 x x^T over all rows x, float32 (C, K, K), by layer seen.

        Raises:
            RuntimeError: second moments were not collected.
        """
        if not self._second_moments:
            raise RuntimeError("No Hessian was collected: set second_moments=True.")
        return _OfSeen(self, self._hessian)

    @property
    def unseen(self) -> list[str]:
        """Layers that saw no input: never called, called in pieces by another, not understood."""
        return [name for name, rows in self._rows.items() if not rows]

    def reduce(self, sum_: Callable[[Tensor], Tensor]) -> None:
        """Add up what several processes have seen; call it once, after the ``with`` block.

        Args:
            sum_: Sums a tensor over the processes. Called in the same order everywhere, also for
                layers that this process has not seen.
        """
        for name, sum_here in self._sums.items():
            rows = torch.tensor(self._rows[name], device=sum_here.device)
            self._sums[name] = sum_(sum_here)
            self._rows[name] = int(sum_(rows))

    def _see(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()))
        exact = torch.autocast(inputs.device.type, enabled=False)
        # Leaving inference mode lets a later pass outside of it go on adding in place.
        with torch.inference_mode(False), torch.no_grad(), exact:
            for rows_CTK in _input_rows(module, inputs):
                self._rows[name] += rows_CTK.shape[1]
                if self._second_moments:
                    self._sums[name].baddbmm_(rows_CTK.mT, rows_CTK)
                else:
                    self._sums[name] += rows_CTK.square().sum(1)

    def _mean_squares(self, name: str) -> Tensor:
        sums = self._sums[name]
        squares_CK = sums.diagonal(dim1=1, dim2=2) if self._second_moments else sums
        if not squares_CK.isfinite().all():
            raise ValueError(
                f"The inputs of {name!r} hold NaN or infinity, or overflow float32 when squared: "
                f"look at the calibration batches and at the layers before it."
            )
        return squares_CK / self._rows[name]

    def _hessian(self, name: str) -> Tensor:
        self._mean_squares(name)
        return self._sums[name] * (2 / self._rows[name])


def bytes_needed(module: nn.Module, second_moments: bool) -> int:
    """Memory that :class:`InputStatistics` holds for a layer, in bytes; 0 if it stays unseen."""
    return 4 * math.prod(_sum_shape(module, second_moments) or (0,))


class _OfSeen(Mapping[str, Tensor]):
    """Computes a statistic when it is asked for, so that only one at a time takes memory."""

    def __init__(self, statistics: InputStatistics, compute: Callable[[str], Tensor]) -> None:
        unseen = set(statistics.unseen)
        self._names = [name for name in statistics._modules if name not in unseen]
        self._compute = compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _sum_shape(module: nn.Module, second_moments: bool) -> tuple[int, ...] | None:
    """Shape of a layer's sums: (C, K) or (C, K, K); None if its inputs are not understood."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        groups = module.groups
        columns = module.in_channels // groups * math.prod(module.kernel_size)
    elif isinstance(module, nn.Linear):
        groups, columns = 1, module.in_features
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        groups, columns = 1, module.get_parameter("weight").shape[0]
    else:
        return None
    return (groups, columns, columns) if second_moments else (groups, columns)


def _input_rows(module: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
    """What a layer multiplies its weight with, in float32 pieces (C, T, K)."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        for rows_TK in inputs.reshape(-1, inputs.shape[-1]).split(_ROWS_AT_ONCE):
            yield rows_TK[None].float()
        return
    dims = len(module.kernel_size)
    mode = module.padding_mode.replace("zeros", "constant")
    for sample in inputs if inputs.dim() == dims + 2 else inputs[None]:
        windows = pad(sample.float(), module._reversed_padding_repeated_twice, mode)
        for dim, (size, dilation) in enumerate(zip(module.kernel_size, module.dilation), start=1):
            windows = windows.unfold(dim, dilation * (size - 1) + 1, module.stride[dim - 1])
            windows = windows[..., ::dilation]
        # (inputs, *positions, *kernel) becomes (C, *positions, *kernel, inputs / C).
        windows = windows.unflatten(0, (module.groups, -1)).movedim(1, -1)
        yield windows.flatten(1, dims).flatten(2)


def _precise(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _top(scores_GM: Tensor, pattern: NMPattern) -> Tensor:
    if scores_GM.isnan().any():
        raise ValueError("There is NaN among the weights or what they are multiplied with.")
    return pattern.top(scores_GM)


def _mask(weight: Tensor, kept: Tensor, input_dim: int) -> Tensor:
    """Which weights are kept, in the order of the group view, as a mask laid out like the weight."""
    mask = torch.empty_like(weight, dtype=torch.bool)
    view = mask.movedim(input_dim, -1)
    view.copy_(kept.reshape(view.shape))
    return mask


def _rows(
    weight: Tensor, name: str, statistic: Tensor, dim: int, pattern: NMPattern, input_dim: int
) -> Tensor:
    """A weight as the matrices (C, R, K) that its statistic tells of."""
    shape = pattern.group(weight, input_dim).flatten(-2).shape
    parts, columns = statistic.shape[0], statistic.shape[-1]
    rows = {math.prod(shape[i:]): math.prod(shape[:i]) for i in range(1, len(shape))}
    square = statistic.dim() == dim and statistic.shape[1:].numel() == columns ** (dim - 1)
    if not square or rows.get(columns, -1) % parts:
        raise ValueError(
            f"A {name} of shape {tuple(statistic.shape)} does not fit a weight of shape "
            f"{tuple(weight.shape)}: ({', '.join(['C'] + ['K'] * (dim - 1))}) is needed, C groups "
            f"of a convolution (1 otherwise) and K weights of one output, one of {list(rows)}."
        )
    return weight.movedim(input_dim, -1).reshape(parts, -1, columns)


def _inverse_factor(hessian_CKK: Tensor, damping: float) -> Tensor:
    """The upper triangle U for which ``U^T U`` is the inverse of the damped Hessian."""
    diagonal_CK = hessian_CKK.diagonal(dim1=1, dim2=2)
    for share in (damping, 10 * damping, 100 * damping):
        added_CK = share * diagonal_CK.mean(-1, keepdim=True) + (diagonal_CK == 0)
        # Factored from the last column to the first, H = R R^T with R upper: then U = R^-1, and
        # the inverse, which would lose digits, is never formed.
        damped_CKK = (hessian_CKK + added_CK.diag_embed()).flip(1, 2)
        lower_CKK, failed_C = torch.linalg.cholesky_ex(damped_CKK)
        if not failed_C.any():
            one_KK = torch.eye(*hessian_CKK.shape[1:]).to(hessian_CKK)
            return torch.linalg.solve_triangular(lower_CKK.flip(1, 2), one_KK, upper=True)
        _log.warning("Damping by %g does not make the Hessian positive definite.", share)
    raise RuntimeError(
        f"The Hessian of {hessian_CKK.shape[1]} inputs is not positive definite, even with 100 "
        f"times the damping {damping}: calibrate on more batches or set a larger damping."
    )


def _prune_block(
    weight_CBR: Tensor, kept_CBR: Tensor, factor_CBB: Tensor, pattern: NMPattern
) -> Tensor:
    """Prune some columns in place; returns the errors (C, B, R) that it made, in units of U."""
    error_CBR = torch.zeros_like(weight_CBR)
    diagonal_CB1 = factor_CBB.diagonal(dim1=1, dim2=2)[..., None]
    for j in range(weight_CBR.shape[1]):
        if j % pattern.m == 0:
            group = slice(j, j + pattern.m)
            scores_CMR = weight_CBR[:, group].abs() / diagonal_CB1[:, group]
            kept_CBR[:, group] = pattern.top(scores_CMR.mT).mT
        error_CBR[:, j] = (weight_CBR[:, j] / diagonal_CB1[:, j]).masked_fill(kept_CBR[:, j], 0)
        weight_CBR[:, j:] -= factor_CBB[:, j, j:, None] * error_CBR[:, j, None]
    return error_CBR
