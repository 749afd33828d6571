"""What weights are multiplied with, as Wanda and SparseGPT need it, collected in forward passes.

Shape suffixes: ``C`` parts of a weight with inputs of their own (groups of a convolution, experts;
1 for other weights), ``K`` weights of one output (a convolution's in the order kernel positions,
input channels), ``T`` rows of input (tokens, positions).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from maskpro_lightning.initial.operands import Lying, inputs_of
from maskpro_lightning.weights.layout import whole_of
from maskpro_lightning.weights.targets import Target

# Rows of input handled at once: bounds the memory of what is computed on the way.
_ROWS_AT_ONCE = 2**12
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

#: Pieces (C or 1, T, K) of float32 rows that inputs make.
Rows = Callable[[Sequence[Tensor]], Iterator[Tensor]]


class Inputs:
    """The inputs of weights, seen in forward passes.

    Layers are asked where they are called: ``nn.Linear``, Hugging Face's ``Conv1D``, convolutions,
    transposed ones without groups, ``nn.Bilinear``. Where weights are multiplied otherwise, as
    experts and recurrent layers are, the products are watched.

    Args:
        targets: The weights, on the device that they run on.
        lying: How those lie whose products are watched, by name; what is neither in it nor known
            as a layer stays unseen.
        leave: Weights that shall stay unseen.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        lying: Mapping[str, Lying],
        leave: Collection[str] = (),
    ) -> None:
        self._lying = lying
        self._targets = [target for target in targets if target.name not in leave]
        self._layers: dict[str, nn.Module] = {}
        #: (C, K) of each weight that can be seen.
        self.shapes: dict[str, tuple[int, int]] = {}
        self.devices = {target.name: target.parameter.device for target in targets}
        for target in self._targets:
            shape = layer_shape(target.module)
            if target.name in lying:
                self.shapes[target.name] = lying[target.name]
            elif shape is not None and not is_watched(target):
                self.shapes[target.name] = shape
                self._layers[target.name] = target.module

    @contextmanager
    def seen(self, see: Callable[[str, slice, Sequence[Tensor], Rows], None]) -> Iterator[None]:
        """Hand over the inputs of all forward passes in the block.

        Args:
            see: Gets a weight's name, the parts that inputs are for, the inputs, and what makes
                rows of them.

        Raises:
            ValueError: in the forward pass, when inputs are not finite.
            RuntimeError: likewise, when a weight is multiplied otherwise than ``lying`` says.
        """

        def hook(
            name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> None:
            given = [*args, *kwargs.values()]
            inputs = [whole_of(each) for each in given[: 1 + isinstance(module, nn.Bilinear)]]
            size = given[1] if isinstance(module, _TRANSPOSED) and len(given) > 1 else None
            finite(name, slice(None), inputs, partial(input_rows, module, output_size=size))

        def finite(name: str, parts: slice, inputs: Sequence[Tensor], rows: Rows) -> None:
            if not all(each.numel() for each in inputs):
                return  # an expert without tokens
            if not all(each.isfinite().all() for each in inputs):
                raise ValueError(
                    f"The input of {name!r} holds NaN or infinity: look at the batch and at the "
                    f"layers before it."
                )
            see(name, parts, inputs, rows)

        def watch(name: str, parts: slice, rows_TK: Tensor) -> None:
            finite(name, parts, [rows_TK], _rows_of_matrix)

        with ExitStack() as stack:
            for name, module in self._layers.items():
                handle = module.register_forward_pre_hook(partial(hook, name), with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(inputs_of(self._targets, self._lying, watch))
            yield


class InputStatistics:
    """What Wanda and SparseGPT need to know of the inputs of weights.

    ``with InputStatistics(Inputs(targets, {}), second_moments=False) as statistics: model(batch)``.
    Every row counts alike, padding too. Computed in float32, whatever the autocast. A part of a
    weight that saw no input, as an expert without tokens, is given uncorrelated ones of equal size,
    by which the largest weights are kept.

    Args:
        inputs: Of which weights, see there for what is raised in a forward pass.
        second_moments: Collect :attr:`hessian` as well; costs what :func:`bytes_needed` says.
    """

    def __init__(self, inputs: Inputs, *, second_moments: bool) -> None:
        self._inputs = inputs
        self._second_moments = second_moments
        self._stack = ExitStack()
        self._rows: dict[str, list[int]] = {}  # of each part
        self._means: dict[str, Tensor] = {}  # of x^2, or of 2 x x^T
        for name, (parts, columns) in inputs.shapes.items():
            shape = (parts, columns, columns) if second_moments else (parts, columns)
            self._means[name] = torch.zeros(shape, dtype=torch.float32, device=inputs.devices[name])
            self._rows[name] = [0] * parts

    def __enter__(self) -> Self:
        self._stack.enter_context(self._inputs.seen(self._see))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def unseen(self) -> list[str]:
        """Weights that saw no input: never called, used in pieces by another, not understood."""
        return [name for name in self._inputs.devices if not any(self._rows.get(name, ()))]

    @property
    def idle(self) -> dict[str, int]:
        """How many parts of a weight of which others saw inputs saw none."""
        return {name: rows.count(0) for name, rows in self._rows.items() if any(rows) and 0 in rows}

    @property
    def norm(self) -> dict[str, Tensor]:
        """Root mean square of each input over all rows, float32 (C, K), by weights seen."""
        means = self._seen_means()
        if self._second_moments:
            means = {name: mean.diagonal(dim1=1, dim2=2) / 2 for name, mean in means.items()}
        return {name: mean_CK.sqrt() for name, mean_CK in means.items()}

    @property
    def hessian(self) -> dict[str, Tensor]:
        """Mean of 2 x x^T over all rows x, float32 (C, K, K), by weights seen; not copies.

        Raises:
            RuntimeError: second moments were not collected.
        """
        if not self._second_moments:
            raise RuntimeError("The Hessian was not collected: set second_moments=True.")
        return self._seen_means()

    def reduce(self, sum_: Callable[[Tensor], Tensor]) -> None:
        """Join what several processes have seen; call it once, after the ``with`` block.

        ``sum_`` sums a tensor over the processes, also for weights that this one has not seen.
        """
        for name, mean in self._means.items():
            own = torch.tensor(self._rows[name], dtype=torch.float64)
            all_ = sum_(torch.tensor(self._rows[name], device=mean.device))
            share = (own / all_.cpu().clamp(min=1)).to(mean)
            self._means[name] = sum_(mean * share.view(-1, *(1,) * (mean.dim() - 1)))
            self._rows[name] = [int(rows) for rows in all_]

    def _seen_means(self) -> dict[str, Tensor]:
        for name in self.idle:
            fill_idle(self._rows[name], self._means[name])
        return {name: mean for name, mean in self._means.items() if any(self._rows[name])}

    @torch.no_grad()
    def _see(self, name: str, parts: slice, inputs: Sequence[Tensor], rows: Rows) -> None:
        for rows_CTK in rows(inputs):
            seen = self._rows[name]
            alike = len(set(seen[parts])) == 1
            for some in [parts] if alike else _each(parts, len(seen)):
                seen[some] = [number + rows_CTK.shape[1] for number in seen[some]]
                old, new = 1 - rows_CTK.shape[1] / seen[some][0], 1 / seen[some][0]
                mean = self._means[name][some]
                # In place or with out=, and so beyond the reach of autocast. The product is formed
                # before it is added: some BLAS would add each row to the large sum and round it.
                if self._second_moments:
                    product_CKK = mean.new_empty(len(rows_CTK), *mean.shape[1:])
                    torch.bmm(rows_CTK.mT, rows_CTK, out=product_CKK)
                    mean.mul_(old).add_(product_CKK, alpha=2 * new)
                else:
                    mean.mul_(old).add_(rows_CTK.square().sum(1), alpha=new)


def fill_idle(rows: Sequence[int], *moments: Tensor) -> None:
    """Give parts without rows the moments of uncorrelated inputs of equal size, in place."""
    for part, number in enumerate(rows):
        for moment in moments if not number else ():
            moment[part] = 1 if moment.dim() == 2 else torch.eye(moment.shape[1])


def is_watched(target: Target) -> bool:
    """Whether a weight is seen by its products, not by calls of its layer."""
    # Attention takes its output layer's weight by name.
    by_name = isinstance(target.module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return by_name or layer_shape(target.module) is None


def bytes_needed(shape: tuple[int, int] | None, second_moments: bool) -> int:
    """Memory that :class:`InputStatistics` holds for a weight of (C, K), in bytes."""
    parts, columns = shape or (0, 0)
    return 4 * parts * columns * (columns if second_moments else 1)


def layer_shape(module: nn.Module) -> tuple[int, int] | None:
    """(C, K) of a layer's weight; None if its products have to be watched."""
    if isinstance(module, _CONVOLUTIONS):
        kernel = math.prod(module.kernel_size)
        return module.groups, module.in_channels // module.groups * kernel
    if isinstance(module, _TRANSPOSED) and module.groups == 1:
        return 1, module.in_channels * math.prod(module.kernel_size)
    if isinstance(module, nn.Bilinear):
        return 1, module.in1_features * module.in2_features
    if isinstance(module, nn.Linear):
        return 1, module.in_features
    if hasattr(module, "nf") and "Conv1D" in [kind.__name__ for kind in type(module).__mro__]:
        return 1, getattr(module, "nx", None) or module.get_parameter("weight").shape[0]
    return None


def input_rows(
    module: nn.Module, inputs: Sequence[Tensor], output_size: Any = None
) -> Iterator[Tensor]:
    """What a layer multiplies its weight with, in float32 pieces (C, T, K).

    Args:
        module: The layer.
        inputs: What it was called with, one tensor or a bilinear layer's two.
        output_size: What a transposed convolution was asked for.
    """
    if isinstance(module, nn.Bilinear):
        pairs = zip(*(_rows_of_matrix([each]) for each in inputs), strict=True)
        for one_CTI, other_CTJ in pairs:
            yield (one_CTI[..., :, None] * other_CTJ[..., None, :]).flatten(2)
        return
    if not isinstance(module, _CONVOLUTIONS + _TRANSPOSED):
        yield from _rows_of_matrix(inputs)
        return
    (batch,) = inputs
    dims = len(module.kernel_size)
    for sample in batch if batch.dim() == dims + 2 else batch[None]:
        windows, strides = _laid_out(module, sample.float(), output_size)
        steps = zip(module.kernel_size, module.dilation, strides, strict=True)
        for dim, (size, dilation, stride) in enumerate(steps, start=1):
            reach = dilation * (size - 1) + 1
            windows = windows.unfold(dim, reach, stride)[..., ::dilation]
        if isinstance(module, _TRANSPOSED):
            windows = windows.flip(tuple(range(-dims, 0)))
        # (inputs, *positions, *kernel) becomes (C, *positions, *kernel, inputs / C).
        windows = windows.unflatten(0, (module.groups, -1)).movedim(1, -1)
        yield windows.flatten(1, dims).flatten(2)


def _laid_out(module: Any, sample: Tensor, output_size: Any) -> tuple[Tensor, Sequence[int]]:
    """A sample as the windows of a convolution go over it, and how far they move."""
    dims = len(module.kernel_size)
    if isinstance(module, _CONVOLUTIONS):
        mode = module.padding_mode.replace("zeros", "constant")
        return pad(sample, module._reversed_padding_repeated_twice, mode), module.stride
    sizes = [
        stride * (n - 1) + 1 for n, stride in zip(sample.shape[1:], module.stride, strict=True)
    ]
    apart = sample.new_zeros(len(sample), *sizes)
    apart[:, *(slice(None, None, stride) for stride in module.stride)] = sample
    edges: list[int] = []
    for dim in reversed(range(dims)):
        reach = module.dilation[dim] * (module.kernel_size[dim] - 1)
        before = reach - module.padding[dim]
        least = sizes[dim] + reach - 2 * module.padding[dim]
        more = module.output_padding[dim]
        edges += [before, before + (output_size[dim - dims] - least if output_size else more)]
    return pad(apart, edges), [1] * dims


def _rows_of_matrix(inputs: Sequence[Tensor]) -> Iterator[Tensor]:
    (rows,) = inputs
    for rows_TK in rows.reshape(-1, rows.shape[-1]).split(_ROWS_AT_ONCE):
        yield rows_TK[None].float()


def _each(parts: slice, number: int) -> list[slice]:
    return [slice(part, part + 1) for part in range(*parts.indices(number))]
