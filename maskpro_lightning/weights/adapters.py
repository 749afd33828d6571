"""Merges PEFT's adapters into sparse weights without filling the zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.weights.kept import SparseWeights
from maskpro_lightning.weights.targets import find_targets


class Merged(NamedTuple):
    """A model with its adapters merged.

    Attributes:
        model: The model, sparse and without adapters.
        loss_before: The loss with the adapters beside the sparse weights; None if not measured.
        loss_after: The loss of the merged model; None if not measured. The difference is the cost
            of masking the adapters.
    """

    model: nn.Module
    loss_before: float | None
    loss_after: float | None


def merge_adapters(
    model: nn.Module,
    pattern: str | NMPattern = "2:4",
    loss: Callable[[Any], Tensor | float] | None = None,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> Merged:
    """Merge adapters of PEFT into sparse weights, of which zeros stay zero.

    PEFT's own ``merge_and_unload`` adds the dense product of an adapter's factors, which fills the
    zeros. Here the part of the product on pruned weights is dropped; ``loss`` measures the cost.

    Args:
        model: A PEFT model, or a module that holds one.
        pattern: The pattern of its masks.
        loss: Called with the model before and after the merge, in evaluation mode and without
            gradients.
        include: Which layers are masked, as in :func:`find_targets`.
        exclude: Which layers are not.

    Raises:
        ValueError: the model has no adapters, or a weight is not N:M before them.
    """
    pattern = NMPattern.parse(pattern)
    name, adapted = _peft_model(model)
    sparse = SparseWeights(find_targets(model, pattern, include, exclude), pattern)
    before = _measure(loss, model)
    merged: nn.Module = adapted.merge_and_unload()
    sparse.zero_all()
    if name:
        model.set_submodule(name, merged)
    else:
        model = merged
    # Checks the result, since PEFT may have put other tensors in the weights' place.
    SparseWeights(find_targets(model, pattern, include, exclude), pattern)
    return Merged(model, before, _measure(loss, model))


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers that adapters of PEFT wrap, with the names of the wrappers."""
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if type(module).__module__.startswith("peft.") and isinstance(base, nn.Module):
            yield name, base


def _peft_model(model: nn.Module) -> tuple[str, Any]:
    """The outermost model with adapters, and its name."""
    for name, module in model.named_modules():
        of_peft = any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)
        if of_peft and hasattr(module, "merge_and_unload"):
            return name, module
    raise ValueError(
        f"{type(model).__name__} holds no PEFT model, so there are no adapters to merge: give what "
        f"get_peft_model returned, or a module that holds it."
    )


@torch.no_grad()
def _measure(loss: Callable[[Any], Tensor | float] | None, model: nn.Module) -> float | None:
    if loss is None:
        return None
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        return float(loss(model))
    finally:
        for module in training:
            module.training = True
