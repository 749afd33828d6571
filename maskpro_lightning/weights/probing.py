"""Layers that multiply with other weights than their own, found before anything is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from maskpro_lightning.weights.contractions import observe
from maskpro_lightning.weights.layers import CONVOLUTIONS, TRANSPOSED


def computed_in_forward(module: nn.Module, shape: torch.Size) -> str | None:
    """What operation makes other weights of a layer's ``weight`` in its ``forward``, if one does.

    Weight-standardised convolutions do so: a mask on their weight is none of what is multiplied.
    Only linear layers and convolutions of a class with a ``forward`` of its own are tried, without
    numbers, on the meta device; nothing of the layer is changed.

    Args:
        module: The layer.
        shape: Shape of its whole weight.
    """
    if not isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)) or _is_of_torch(module):
        return None
    twin = _on_meta(module, shape)
    try:
        with torch.no_grad(), observe(twin) as seen:
            twin.forward(_inputs(module))
    except Exception:  # noqa: BLE001, whatever it asks for besides; the fit's first batch will tell
        return None
    products = seen.products.get(id(twin.weight), set())
    made_by = [product.computed_by for product in products]
    return None if None in made_by else next(iter(made_by), None)


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).forward.__module__.startswith("torch.")


def _on_meta(module: nn.Module, shape: torch.Size) -> Any:
    """A layer that shares all attributes of another one but its parameters and buffers."""
    twin: Any = object.__new__(type(module))
    vars(twin).update(vars(module))
    own = {name: p for name, p in module._parameters.items() if p is not None}
    shapes = {name: shape if name == "weight" else p.shape for name, p in own.items()}
    twin._parameters = module._parameters | {
        name: nn.Parameter(torch.empty(size, device="meta")) for name, size in shapes.items()
    }
    twin._buffers = {
        name: None if buffer is None else torch.empty_like(buffer, device="meta")
        for name, buffer in module._buffers.items()
    }
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
