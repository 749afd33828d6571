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

Shape suffixes: ``C`` parts of the outputs (1 but for grouped convolutions), ``R`` outputs of one,
``K`` weights of one output, ``M`` group size, ``T`` rows of input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from maskpro_lightning.initial.initializers import laid_out, rows_of
from maskpro_lightning.initial.statistics import input_rows, mean_shape
from maskpro_lightning.masks.pattern import NMPattern

# The search ends after so many visits of each group, or when fewer than this share still swap.
_MOST_SWEEPS = 20
_FEW = 1e-3


class PairedStatistics:
    """Moments of layers' inputs in the pruned network, and of those with their dense targets.

    For each batch, run the model once within :meth:`dense` and once within :meth:`pruned`, holding
    the weights that these names say. Understands the layers that ``InputStatistics`` does.

    Args:
        modules: Layers by name, on the device that they run on.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = {
            name: module for name, module in modules.items() if mean_shape(module, True) is not None
        }
        self._seen: dict[str, list[Tensor]] = {}  # inputs of the dense network, in their order
        self._rows = dict.fromkeys(self._modules, 0)
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        for name, module in self._modules.items():
            shape = mean_shape(module, True)
            assert shape is not None
            device = module.get_parameter("weight").device
            hessian_CKK, cross_CKK = torch.zeros(2, *shape, dtype=torch.float32, device=device)
            self._moments[name] = hessian_CKK, cross_CKK

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Remember the inputs of the dense network."""
        self._seen = {name: [] for name in self._modules}
        with self._hooks(self._remember):
            yield

    @contextmanager
    def pruned(self) -> Iterator[None]:
        """Add up moments of the inputs of the pruned network, on the same batch."""
        with self._hooks(self._add):
            yield
        self._seen.clear()

    @property
    def moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """H and C of each layer seen, float32 (C, K, K), in any unit."""
        return {name: pair for name, pair in self._moments.items() if self._rows[name]}

    def reduce(self, sum_: Callable[[Tensor], Tensor]) -> None:
        """Join what several processes have seen, also of layers that this one has not."""
        for name, (hessian_CKK, cross_CKK) in self._moments.items():
            self._rows[name] = int(sum_(torch.tensor(self._rows[name], device=cross_CKK.device)))
            self._moments[name] = sum_(hessian_CKK), sum_(cross_CKK)

    @contextmanager
    def _hooks(self, see: Any) -> Iterator[None]:
        handles = [
            module.register_forward_pre_hook(partial(see, name), with_kwargs=True)
            for name, module in self._modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _remember(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._seen[name].append(_input_of(args, kwargs).detach().clone())

    @torch.no_grad()
    def _add(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        inputs = _input_of(args, kwargs)
        dense = self._seen[name].pop(0) if self._seen[name] else inputs
        if dense.shape != inputs.shape:  # another choice of experts: nothing to compare with
            dense = inputs
        hessian_CKK, cross_CKK = self._moments[name]
        product_CKK = torch.empty_like(hessian_CKK)
        pairs = zip(input_rows(module, inputs), input_rows(module, dense), strict=True)
        for rows_CTK, dense_CTK in pairs:
            self._rows[name] += rows_CTK.shape[1]
            # With out=, and so beyond the reach of autocast.
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


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    inputs: Tensor = args[0] if args else next(iter(kwargs.values()))
    return inputs
