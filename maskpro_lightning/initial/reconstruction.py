r"""Initial masks by what layers make of the inputs that they will really see.

A mask of one output is good if the layer, fed by the *pruned* network, still puts out what the
dense layer would. With v = m * w the kept weights of the output, x an input in the dense network
and :math:`\tilde x` the same input in the pruned one, its mask minimises

.. math:: E \left( w \cdot \frac{x + \tilde x}{2} - v \cdot \tilde x \right)^2
          = v H v^T - 2 v C w^T + \text{const}, \quad
          H = E \, \tilde x \tilde x^T, \quad C = E \, \tilde x \frac{(x + \tilde x)^T}{2}

Half of the target is the dense layer on its dense inputs, which makes up for what earlier layers
did wrong; the other half keeps masks from chasing what they cannot reach. No gradients are taken.
The search swaps a kept with a pruned weight of the same group wherever that helps most, until
nothing does (for x as its own target that is SparseSwaps, arXiv 2512.10922).

Shape suffixes: ``C`` parts of the outputs (1 but for grouped convolutions and experts), ``R``
outputs of one, ``K`` weights of one output, ``M`` group size, ``T`` rows of input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from maskpro_lightning.initial.initializers import laid_out, rows_of
from maskpro_lightning.initial.statistics import Inputs, Rows, fill_idle
from maskpro_lightning.masks.pattern import NMPattern

# The search ends after so many visits of each group, or when fewer than this share still swap.
_MOST_SWEEPS = 20
_FEW = 1e-3


class PairedStatistics:
    """Moments of weights' inputs in the pruned network, and of those with their dense targets.

    For each batch, run the model once within :meth:`dense` and once within :meth:`pruned`, holding
    the weights that these names say.

    Args:
        inputs: Of which weights.
    """

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        # Inputs of the dense network, in their order, by the weight's name and its parts.
        self._seen: dict[tuple[str, int | None], list[list[Tensor]]] = {}
        self._rows = {name: [0] * parts for name, (parts, _) in inputs.shapes.items()}
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        for name, (parts, columns) in inputs.shapes.items():
            shape = (parts, columns, columns)
            hessian_CKK, cross_CKK = torch.zeros(
                2, *shape, dtype=torch.float32, device=inputs.devices[name]
            )
            self._moments[name] = hessian_CKK, cross_CKK

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Remember the inputs of the dense network."""
        self._seen = {}
        with self._inputs.seen(self._remember):
            yield

    @contextmanager
    def pruned(self) -> Iterator[None]:
        """Add up moments of the inputs of the pruned network, on the same batch."""
        with self._inputs.seen(self._add):
            yield
        self._seen.clear()

    @property
    def moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """H and C of each weight seen, float32 (C, K, K), in any unit."""
        seen = {name: pair for name, pair in self._moments.items() if any(self._rows[name])}
        for name, pair in seen.items():
            fill_idle(self._rows[name], *pair)
        return seen

    def reduce(self, sum_: Callable[[Tensor], Tensor]) -> None:
        """Join what several processes have seen, also of weights that this one has not."""
        for name, (hessian_CKK, cross_CKK) in self._moments.items():
            rows_C = sum_(torch.tensor(self._rows[name], device=cross_CKK.device))
            self._rows[name] = [int(rows) for rows in rows_C]
            self._moments[name] = sum_(hessian_CKK), sum_(cross_CKK)

    def _remember(self, name: str, parts: slice, inputs: Sequence[Tensor], rows: Rows) -> None:
        kept = [each.detach().clone() for each in inputs]
        self._seen.setdefault((name, parts.start), []).append(kept)

    @torch.no_grad()
    def _add(self, name: str, parts: slice, inputs: Sequence[Tensor], rows: Rows) -> None:
        remembered = self._seen.get((name, parts.start))
        dense = remembered.pop(0) if remembered else inputs
        shapes = [[each.shape for each in some] for some in (dense, inputs)]
        if shapes[0] != shapes[1]:  # another choice of experts: nothing to compare with
            dense = inputs
        hessian_CKK, cross_CKK = (moment[parts] for moment in self._moments[name])
        for rows_CTK, dense_CTK in zip(rows(inputs), rows(dense), strict=True):
            self._rows[name][parts] = [n + rows_CTK.shape[1] for n in self._rows[name][parts]]
            # With out=, and so beyond the reach of autocast.
            product_CKK = hessian_CKK.new_empty(len(rows_CTK), *hessian_CKK.shape[1:])
            hessian_CKK += torch.bmm(rows_CTK.mT, rows_CTK, out=product_CKK)
            target_CTK = (rows_CTK + dense_CTK) / 2
            cross_CKK += torch.bmm(rows_CTK.mT, target_CTK, out=product_CKK)


@torch.no_grad()
def reconstruct(
    weight: Tensor,
    hessian: Tensor,
    cross: Tensor,
    mask: Tensor,
    pattern: NMPattern,
    input_dim: int = -1,
) -> Tensor:
    """Swap weights within groups until hardly a swap lowers ``v H v^T - 2 v C w^T`` of an output.

    Args:
        weight: The dense weight; its outputs are cut into C equal parts.
        hessian: H, (C, K, K), symmetric.
        cross: C, (C, K, K), in the same unit.
        mask: The mask to start from, bool, shaped like the weight.
        pattern: The pattern.
        input_dim: The dimension that the layer sums over.

    Returns:
        The mask, in the weight's shape and layout.

    Raises:
        ValueError: the shapes do not fit.
    """
    weight_CRK = rows_of(weight, hessian.diagonal(dim1=-2, dim2=-1), pattern, input_dim).float()
    kept_CRK = rows_of(mask, hessian.diagonal(dim1=-2, dim2=-1), pattern, input_dim).clone()
    for weight_RK, kept_RK, hessian_KK, cross_KK in zip(
        weight_CRK, kept_CRK, hessian, cross, strict=True
    ):
        # Half of the derivative in v, kept up to date with every swap.
        slope_RK = (weight_RK * kept_RK) @ hessian_KK - weight_RK @ cross_KK.mT
        for _ in range(_MOST_SWEEPS):
            swaps = _sweep(weight_RK, kept_RK, slope_RK, hessian_KK, pattern)
            if swaps <= _FEW * weight_RK.numel() / pattern.m:
                break
    return laid_out(kept_CRK, weight, input_dim)


def _sweep(
    weight_RK: Tensor, kept_RK: Tensor, slope_RK: Tensor, hessian_KK: Tensor, pattern: NMPattern
) -> int:
    """Visit each group once and make its best swap, in place; count the swaps."""
    swaps = 0
    for start in range(0, weight_RK.shape[1], pattern.m):
        here = slice(start, start + pattern.m)
        weight_RM, kept_RM, hessian_MM = (
            weight_RK[:, here],
            kept_RK[:, here],
            hessian_KK[here, here],
        )
        own_RM = weight_RM.square() * hessian_MM.diagonal()
        slope_RM = 2 * weight_RM * slope_RK[:, here]
        both_RMM = 2 * weight_RM[:, :, None] * weight_RM[:, None, :] * hessian_MM
        # What it costs to keep a pruned weight (rows) instead of a kept one (columns).
        cost_RMM = (own_RM + slope_RM)[:, :, None] + (own_RM - slope_RM)[:, None, :] - both_RMM
        cost_RMM[kept_RM[:, :, None] | ~kept_RM[:, None, :]] = torch.inf
        best_R = cost_RMM.flatten(1).min(1)
        # A gain within rounding could be undone and made again for ever.
        rows = (best_R.values < -1e-6 * (own_RM + slope_RM.abs()).sum(1)).nonzero()[:, 0]
        if not len(rows):
            continue
        swaps += len(rows)
        enters = best_R.indices[rows] // pattern.m + start
        leaves = best_R.indices[rows] % pattern.m + start
        kept_RK[rows, enters] = True
        kept_RK[rows, leaves] = False
        slope_RK[rows] += (
            weight_RK[rows, enters, None] * hessian_KK[enters]
            - weight_RK[rows, leaves, None] * hessian_KK[leaves]
        )
    return swaps
