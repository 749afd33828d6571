"""Why a weight gets no mask."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.weights.admission import is_maskable, kind_of
from maskpro_lightning.weights.contractions import storage_of
from maskpro_lightning.weights.names import clean_name
from maskpro_lightning.weights.pieces import extent

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
    if weight.is_inference():
        return "was made in inference mode, so that nothing can be written into it"
    if _is_expanded(weight):
        return "holds the same numbers in several places (it was expanded): clone it"
    if not -len(shape) <= input_dim < len(shape) or not shape.numel():
        return f"has no groups along dimension {input_dim}, its shape being {tuple(shape)}"
    inputs = shape[input_dim] // products
    if inputs % pattern.m:
        return f"has {inputs} input{'s' * (inputs != 1)}, not a multiple of {pattern.m}"
    return None


def sharing(weights: Iterable[Tensor]) -> set[int]:
    """The ids of those weights that have memory in common, so that a mask would change several."""
    by_storage: dict[int, list[Tensor]] = {}
    for weight in weights:
        if is_lazy(weight) or weight.is_meta or not is_maskable(weight) or _is_expanded(weight):
            continue
        storage = storage_of(weight)
        if storage is not None and weight.untyped_storage().nbytes():  # else a shard's to come
            by_storage.setdefault(storage, []).append(weight)
    found: set[int] = set()
    for several in by_storage.values():
        ends = sorted((*extent(weight), id(weight)) for weight in several if weight.numel())
        if all(one[1] <= other[0] for one, other in pairwise(ends)):
            continue
        # Lines of one may lie between those of another: only now count what is in each place.
        count = torch.zeros(several[0].untyped_storage().nbytes(), dtype=torch.uint8)
        for step in (1, 0):
            for weight in several:
                item = weight.element_size()
                places = weight.shape, [item * each for each in weight.stride()]
                own = count.as_strided(*places, item * int(weight.storage_offset()))
                if step:
                    own += 1
                elif (own > 1).any():
                    found.add(id(weight))
    return found


def _is_expanded(weight: Tensor) -> bool:
    steps = zip(weight.shape, weight.stride(), strict=True)
    return any(size > 1 and not stride for size, stride in steps)


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
