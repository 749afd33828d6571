"""Merges PEFT's adapters into sparse weights without filling the zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.weights.kept import SparseWeights
from maskpro_lightning.weights.modes import evaluating
from maskpro_lightning.weights.targets import Target, find_targets


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
    several = _peft_models(model)
    targets = find_targets(model, pattern, include, exclude)
    sparse = SparseWeights(targets, pattern)
    before = _measure(loss, model)
    for name, adapted in several:
        merged: nn.Module = adapted.merge_and_unload()
        if name:
            model.set_submodule(name, merged)
        else:
            model = merged
    sparse.zero_all()
    # Checks the result, since PEFT may have put other tensors in the weights' place.
    SparseWeights([_as_it_is(target) for target in targets], pattern)
    return Merged(model, before, _measure(loss, model))


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers that adapters of PEFT wrap, with the names of the wrappers."""
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if type(module).__module__.startswith("peft.") and isinstance(base, nn.Module):
            yield name, base


def _peft_models(model: nn.Module) -> list[tuple[str, Any]]:
    """The outermost models with adapters, with their names."""
    found: list[tuple[str, Any]] = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        of_peft = any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)
        if module not in inside and of_peft and hasattr(module, "merge_and_unload"):
            found.append((name, module))
            inside.update(module.modules())
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no PEFT model, so there are no adapters to merge: give "
            f"what get_peft_model returned, or a module that holds it."
        )
    return found


def _as_it_is(target: Target) -> Target:
    """A target with the parameter that its layer has now."""
    return replace(target, parameter=getattr(target.module, target.name.rpartition(".")[2]))


@torch.no_grad()
def _measure(loss: Callable[[Any], Tensor | float] | None, model: nn.Module) -> float | None:
    if loss is None:
        return None
    with evaluating(model):
        return float(loss(model))
