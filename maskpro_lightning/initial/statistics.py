"""What layers see of their inputs, as Wanda and SparseGPT need it, collected by forward hooks.

Shape suffixes: ``C`` groups of a convolution (1 for other layers), ``K`` weights of one output (a
convolution's in the order kernel positions, input channels), ``T`` rows of input (tokens,
positions).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle

from maskpro_lightning.weights.layout import whole_of

# Rows of input handled at once: bounds the memory of what is computed on the way.
_ROWS_AT_ONCE = 2**12


class InputStatistics:
    """What Wanda and SparseGPT need to know of layers' inputs, collected in forward passes.

    ``with InputStatistics(layers, second_moments=False) as statistics: model(batch)``. Understands
    ``nn.Linear``, Hugging Face's ``Conv1D`` and ``nn.Conv1d`` to ``nn.Conv3d``; other layers stay
    unseen. Every row counts alike, padding too. Computed in float32, whatever the autocast.

    Args:
        modules: Layers by name, on the device that they run on.
        second_moments: Collect :attr:`hessian` as well; costs what :func:`bytes_needed` says.

    Raises:
        ValueError: in the forward pass, when a layer's input is not finite.
    """

    def __init__(self, modules: Mapping[str, nn.Module], *, second_moments: bool) -> None:
        self._modules = dict(modules)
        self._second_moments = second_moments
        self._hooks: list[RemovableHandle] = []
        self._rows = dict.fromkeys(self._modules, 0)
        self._means: dict[str, Tensor] = {}  # of x^2, or of 2 x x^T
        for name, module in self._modules.items():
            if (shape := mean_shape(module, second_moments)) is not None:
                device = module.get_parameter("weight").device
                self._means[name] = torch.zeros(shape, dtype=torch.float32, device=device)

    def __enter__(self) -> Self:
        for name in self._means:
            hook = partial(self._see, name)
            handle = self._modules[name].register_forward_pre_hook(hook, with_kwargs=True)
            self._hooks.append(handle)
        return self

    def __exit__(self, *_: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    @property
    def unseen(self) -> list[str]:
        """Layers that saw no input: never called, used in pieces by another, not understood."""
        return [name for name, rows in self._rows.items() if not rows]

    @property
    def norm(self) -> dict[str, Tensor]:
        """Root mean square of each input over all rows, float32 (C, K), by layers seen."""
        means = {name: mean for name, mean in self._means.items() if self._rows[name]}
        if self._second_moments:
            means = {name: mean.diagonal(dim1=1, dim2=2) / 2 for name, mean in means.items()}
        return {name: mean_CK.sqrt() for name, mean_CK in means.items()}

    @property
    def hessian(self) -> dict[str, Tensor]:
        """Mean of 2 x x^T over all rows x, float32 (C, K, K), by layers seen; not copies.

        Raises:
            RuntimeError: second moments were not collected.
        """
        if not self._second_moments:
            raise RuntimeError("The Hessian was not collected: set second_moments=True.")
        return {name: mean for name, mean in self._means.items() if self._rows[name]}

    def reduce(self, sum_: Callable[[Tensor], Tensor]) -> None:
        """Join what several processes have seen; call it once, after the ``with`` block.

        ``sum_`` sums a tensor over the processes, also for layers that this one has not seen.
        """
        for name, mean in self._means.items():
            rows = int(sum_(torch.tensor(self._rows[name], device=mean.device)))
            self._means[name] = sum_(mean * (self._rows[name] / max(1, rows)))
            self._rows[name] = rows

    @torch.no_grad()
    def _see(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        inputs = whole_of(args[0] if args else next(iter(kwargs.values())))
        if not inputs.numel():
            return  # an expert without tokens
        if not inputs.isfinite().all():
            raise ValueError(
                f"The input of {name!r} holds NaN or infinity: look at the batch and at the layers "
                f"before it."
            )
        for rows_CTK in input_rows(module, inputs):
            self._rows[name] += rows_CTK.shape[1]
            old, new = 1 - rows_CTK.shape[1] / self._rows[name], 1 / self._rows[name]
            # In place or with out=, and so beyond the reach of autocast. The product is formed
            # before it is added: some BLAS would add each row to the large sum and round it away.
            if self._second_moments:
                product_CKK = torch.empty_like(self._means[name])
                torch.bmm(rows_CTK.mT, rows_CTK, out=product_CKK)
                self._means[name].mul_(old).add_(product_CKK, alpha=2 * new)
            else:
                self._means[name].mul_(old).add_(rows_CTK.square().sum(1), alpha=new)


def bytes_needed(module: nn.Module, second_moments: bool) -> int:
    """Memory that :class:`InputStatistics` holds for a layer, in bytes; 0 if it stays unseen."""
    return 4 * math.prod(mean_shape(module, second_moments) or (0,))


def mean_shape(module: nn.Module, second_moments: bool) -> tuple[int, ...] | None:
    """(C, K), or (C, K, K) for second moments; None if the layer's inputs are not understood."""
    groups = 1
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        groups = module.groups
        columns = module.in_channels // groups * math.prod(module.kernel_size)
    elif isinstance(module, nn.Linear):
        columns = module.in_features
    elif hasattr(module, "nf") and "Conv1D" in [kind.__name__ for kind in type(module).__mro__]:
        columns = getattr(module, "nx", None) or module.get_parameter("weight").shape[0]
    else:
        return None
    return (groups, columns, columns) if second_moments else (groups, columns)


def input_rows(module: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
    """What a layer multiplies its weight with, in float32 pieces (C, T, K)."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        for rows_TK in inputs.reshape(-1, inputs.shape[-1]).split(_ROWS_AT_ONCE):
            yield rows_TK[None].float()
        return
    dims = len(module.kernel_size)
    mode = module.padding_mode.replace("zeros", "constant")
    for sample in inputs if inputs.dim() == dims + 2 else inputs[None]:
        windows = pad(sample.float(), module._reversed_padding_repeated_twice, mode)
        steps = zip(module.kernel_size, module.dilation, module.stride, strict=True)
        for dim, (size, dilation, stride) in enumerate(steps, start=1):
            reach = dilation * (size - 1) + 1
            windows = windows.unfold(dim, reach, stride)[..., ::dilation]
        # (inputs, *positions, *kernel) becomes (C, *positions, *kernel, inputs / C).
        windows = windows.unflatten(0, (module.groups, -1)).movedim(1, -1)
        yield windows.flatten(1, dims).flatten(2)
