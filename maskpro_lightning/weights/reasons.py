"""Why a weight gets no mask."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.weights.admission import is_maskable, kind_of
from maskpro_lightning.weights.names import clean_name

#: Of what may well be multiplied, but along a dimension that only the user can name.
UNKNOWN = "is of a layer whose product is not known"
_LORA = {"lora_a", "lora_b", "lora_embedding_a", "lora_embedding_b"}


def left_out_by_default(model: nn.Module) -> dict[int, str]:
    """Why weights are left out that could be masked, by the parameters' ids.

    Names count by their whole parts: ``flora_encoder`` is no ``lora_``.
    """
    reasons: dict[int, str] = {}

    def leave_out(module: nn.Module, reason: str) -> None:
        reasons.update({id(weight): reason for weight in module.parameters()})

    for name, module in model.named_modules(remove_duplicate=False):
        parts = clean_name(name).lower().split(".")
        output = getattr(module, "get_output_embeddings", lambda: None)()
        if output is not None:
            leave_out(output, "is an output embedding")
        if parts[-1] == "lm_head":
            leave_out(module, "is an output embedding")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            leave_out(module, "is an embedding")
        if parts[-1] in _LORA:
            leave_out(module, "is a factor of LoRA")
        if "original_module" in module._modules and "modules_to_save" in module._modules:
            leave_out(module.get_submodule("original_module"), "is what PEFT trains a copy of")
    return reasons


def is_lazy(weight: Tensor) -> bool:
    """Whether a weight waits for its first batch to have a shape."""
    return bool(nn.parameter.is_lazy(weight))


def metrics_in(model: nn.Module) -> set[int]:
    """The ids of all modules inside of metrics."""
    return {
        id(inner) for module in model.modules() if _is_metric(module) for inner in module.modules()
    }


def unknown(module: nn.Module, name: str, metrics: set[int]) -> str:
    """Why a weight is no candidate at all.

    Args:
        module: The module that owns it.
        name: Its name in there.
        metrics: What :func:`metrics_in` found.
    """
    if id(module) in metrics:
        return "is part of a metric"
    if _is_parametrised(module, name):
        return "is what a parametrization computes a weight from"
    return UNKNOWN


def unfit(
    weight: Tensor, shape: torch.Size, input_dim: int, products: int, pattern: NMPattern
) -> str | None:
    """Why a weight of dense numbers in groups cannot be had; None if it can.

    Args:
        weight: The weight, or this rank's part of it.
        shape: The whole weight's shape.
        input_dim: The dimension that groups lie along.
        products: How many products lie side by side in it.
        pattern: The pattern.
    """
    if not is_maskable(weight):
        return f"holds {kind_of(weight)} numbers, not dense floating-point ones of 16 bits or more"
    if not -len(shape) <= input_dim < len(shape) or not shape.numel():
        return f"has no groups along dimension {input_dim}, its shape being {tuple(shape)}"
    inputs = shape[input_dim] // products
    if inputs % pattern.m:
        return f"has {inputs} input{'s' * (inputs != 1)}, not a multiple of {pattern.m}"
    return None


def _is_parametrised(module: nn.Module, name: str) -> bool:
    """Whether a parameter is what another one is computed from, in PyTorch's new or old way."""
    if isinstance(module, ParametrizationList):
        return True
    owner, _, _ = name.rpartition("_")
    if not owner or owner in module._parameters:
        return False
    return isinstance(getattr(module, owner, None), Tensor)


def _is_metric(module: nn.Module) -> bool:
    return any(kind.__module__.startswith("torchmetrics") for kind in type(module).__mro__)
