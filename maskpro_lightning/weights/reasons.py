"""The reasons for which a weight gets no mask; each reads on from the weight's name."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.weights.admission import is_maskable, kind_of
from maskpro_lightning.weights.contractions import storage_of
from maskpro_lightning.weights.layers import own_parameters
from maskpro_lightning.weights.names import clean_name
from maskpro_lightning.weights.pieces import extent

#: The reason of a weight that may be multiplied, but along a dimension that only the user knows.
UNKNOWN = "is of a layer whose product is not known"
_LORA = {"lora_a", "lora_b", "lora_embedding_a", "lora_embedding_b"}


def left_out_by_default(model: nn.Module) -> dict[int, str]:
    """The reasons for weights that could be masked but are left out, by the parameter's id.

    Names are matched by whole parts: ``flora_encoder`` is no ``lora_``.
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
        if {"original_module", "modules_to_save"} <= dict(module.named_children()).keys():
            leave_out(module.get_submodule("original_module"), "is what PEFT trains a copy of")
    return reasons


def is_lazy(weight: Tensor) -> bool:
    """Whether a weight has no shape until the first batch."""
    return bool(nn.parameter.is_lazy(weight))


def metrics_in(model: nn.Module) -> set[int]:
    """The ids of metrics and of all modules in them."""
    return {
        id(inner) for module in model.modules() if _is_metric(module) for inner in module.modules()
    }


def unknown(module: nn.Module, name: str, metrics: set[int]) -> str:
    """The reason of a weight whose product is not known.

    Args:
        module: The module that owns it.
        name: Its name in this module.
        metrics: What :func:`metrics_in` returned.
    """
    if id(module) in metrics:
        return "is part of a metric"
    if _is_parametrised(module, name):
        return "is what a parametrization computes a weight from"
    return UNKNOWN


def unfit(
    weight: Tensor, shape: torch.Size, input_dim: int, products: int, pattern: NMPattern
) -> str | None:
    """The reason for which a weight cannot be masked; None if it can.

    Args:
        weight: The weight, or this rank's part of it.
        shape: The whole weight's shape.
        input_dim: The dimension that groups lie along.
        products: The number of products that lie side by side in it.
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
    """The ids of weights that share memory, so that a mask of one would change others."""
    by_storage: dict[int, list[Tensor]] = {}
    for weight in weights:
        if is_lazy(weight) or weight.is_meta or not is_maskable(weight) or _is_expanded(weight):
            continue
        storage = storage_of(weight)
        if storage is not None and weight.untyped_storage().nbytes():  # FSDP frees some until used
            by_storage.setdefault(storage, []).append(weight)
    found: set[int] = set()
    for several in by_storage.values():
        ends = sorted((*extent(weight), id(weight)) for weight in several if weight.numel())
        if all(one[1] <= other[0] for one, other in pairwise(ends)):
            continue
        # Rows of one may lie between rows of another, so count the weights at every byte.
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
    """Whether a weight is computed from a parameter, by PyTorch's parametrization, new or old."""
    if isinstance(module, ParametrizationList):
        return True
    owner, _, _ = name.rpartition("_")
    if not owner or owner in own_parameters(module):
        return False
    return isinstance(getattr(module, owner, None), Tensor)


def _is_metric(module: nn.Module) -> bool:
    return any(kind.__module__.startswith("torchmetrics") for kind in type(module).__mro__)
