"""Converts linear layers to PyTorch's 2:4 kernels, after a check that they lose nothing.

``torch.sparse.to_sparse_semi_structured`` itself silently keeps two of four weights, however many
are not zero, and treats float32 as 1:2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse.semi_structured import SparseSemiStructuredTensor, to_sparse_semi_structured

from maskpro_lightning.files.grouping import check_sparse
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.weights.targets import Target, find_targets

_DTYPES = (torch.float16, torch.bfloat16)
_PATTERN = NMPattern(2, 4)


def to_semi_structured(
    model: nn.Module, *, include: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> list[str]:
    """Let a 2:4 model's linear layers run on PyTorch's sparse kernels, in place.

    The weights then take no gradient, and ``state_dict`` holds PyTorch's sparse tensors: export the
    model before.

    Args:
        model: The model after the fit, on a CUDA device, in float16 or bfloat16.
        include: Which layers to convert, as in :func:`find_targets`.
        exclude: Which layers to leave as they are.

    Returns:
        The names of the weights.

    Raises:
        ValueError: names weights that no kernel takes, or that are not 2:4; nothing is converted.
    """
    targets = find_targets(model, _PATTERN, include, exclude)
    check_semi_structured(targets)
    for target in targets:
        sparse = to_sparse_semi_structured(target.parameter.detach().contiguous())
        target.module.weight = nn.Parameter(sparse, requires_grad=False)
    return [target.name for target in targets]


def check_semi_structured(targets: Sequence[Target]) -> None:
    """Refuse weights that are not 2:4 or that no kernel takes.

    Raises:
        ValueError: names them.
    """
    reasons = {target.name: _reason_against(target) for target in targets}
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    if refused:
        first = "; ".join(f"{name!r} {reason}" for name, reason in list(refused.items())[:3])
        raise ValueError(
            f"PyTorch's 2:4 kernels do not take {len(refused)} of {len(targets)} weights: {first}. "
            f"Leave them out with exclude=[...]."
        )
    for target in targets:
        check_sparse(target.parameter, _PATTERN, -1, target.name)
    for device in {target.parameter.device for target in targets}:
        reason = no_kernel_on(device)
        if reason is not None:
            raise ValueError(f"{reason}: move the model to such a device first.")


def no_kernel_for(weight: Tensor) -> str | None:
    """Why no 2:4 kernel takes a weight of this shape and dtype; None if one does.

    Args:
        weight: (outputs, inputs); only its shape and dtype count.
    """
    if weight.dim() != 2:
        return f"has {weight.dim()} dimensions, not two"
    if weight.dtype not in _DTYPES:
        return f"is {weight.dtype}, not {' or '.join(str(dtype) for dtype in _DTYPES)}"
    least = _kernel()._DTYPE_SHAPE_CONSTRAINTS[weight.dtype]
    rows, columns = least.sparse_min_rows, least.sparse_min_cols
    if weight.shape[0] % rows or weight.shape[1] % columns or not weight.numel():
        return f"has shape {tuple(weight.shape)}, not multiples of ({rows}, {columns})"
    return None


def no_kernel_on(device: torch.device) -> str | None:
    """Why a device has no 2:4 kernel; None if it has."""
    if device.type != "cuda":
        return f"PyTorch's 2:4 kernels run on NVIDIA GPUs (CUDA), there is none for {device.type!r}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        name, has = torch.cuda.get_device_name(device), "{}.{}".format(*capability)
        return f"PyTorch's 2:4 kernels need compute capability 8.0, {name} has {has}"
    if _kernel() is SparseSemiStructuredTensorCUSPARSELT and not _has_cusparselt():
        return "This build of PyTorch has no cuSPARSELt, the library of its 2:4 kernels"
    return None


def _kernel() -> type[SparseSemiStructuredTensor]:
    """The class of sparse tensors that PyTorch would convert to."""
    forced = SparseSemiStructuredTensor._FORCE_CUTLASS
    return SparseSemiStructuredTensorCUTLASS if forced else SparseSemiStructuredTensorCUSPARSELT


def _has_cusparselt() -> bool:
    return torch.backends.cusparselt.is_available()


def _reason_against(target: Target) -> str | None:
    if not isinstance(target.module, nn.Linear):
        return f"belongs to a {type(target.module).__name__}, not to a linear layer"
    return no_kernel_for(target.parameter)
