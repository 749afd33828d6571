"""Finds layers whose ``forward`` multiplies with other weights than ``weight``, before a fit."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from maskpro_lightning.weights.contractions import observe
from maskpro_lightning.weights.layers import CONVOLUTIONS, TRANSPOSED, own_parameters


def computed_in_forward(module: nn.Module, shape: torch.Size) -> str | None:
    """The operation by which a layer's ``forward`` computes other weights from its ``weight``.

    Weight-standardised convolutions do so: their product would not see the zeros of a mask. Tries
    linear layers and convolutions of classes with a ``forward`` of their own, on the meta device;
    the layer itself is not changed.

    Args:
        module: The layer.
        shape: Shape of its whole weight.

    Returns:
        The operation's name; None if there is none, or the layer was not tried.
    """
    if not isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)) or _is_of_torch(module):
        return None
    try:
        twin = _on_meta(module, shape)
        with torch.no_grad(), observe(twin) as seen:
            twin.forward(_inputs(module))
    except Exception:  # noqa: BLE001, it needs other inputs; the fit's first batch will show it
        return None
    products = seen.products.get(id(twin.weight), set())
    made_by = [product.computed_by for product in products]
    return None if None in made_by else next(iter(made_by), None)


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).forward.__module__.startswith("torch.")


def _on_meta(module: nn.Module, shape: torch.Size) -> Any:
    """A layer like another one, whose own parameters and buffers are on the meta device."""
    twin: Any = object.__new__(type(module))
    # Dicts are copied, since a module keeps its parameters and buffers in some.
    for name, value in vars(module).items():
        vars(twin)[name] = copy(value) if isinstance(value, dict) else value
    for name, parameter in own_parameters(module).items():
        size = shape if name == "weight" else parameter.shape
        setattr(twin, name, nn.Parameter(torch.empty(size, device="meta")))
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        setattr(twin, name, torch.empty_like(buffer, device="meta"))
    return twin


def _inputs(module: Any) -> Tensor:
    if isinstance(module, nn.Linear):
        return torch.empty(2, module.in_features, device="meta")
    reach = [
        2 * (dilation * (size - 1) + 1) + step
        for size, dilation, step in zip(
            module.kernel_size, module.dilation, module.stride, strict=True
        )
    ]
    return torch.empty(2, module.in_channels, *reach, device="meta")
