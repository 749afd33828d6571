"""The layers of PyTorch and transformers: their weights, and what each one's product sums over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# Layers of transformers that multiply with parameters of their own, by class name: the dimension
# that the product sums over. The tests watch the products of each.
_BY_CLASS: Mapping[str, Mapping[str, int]] = {
    "AriaGroupedExpertsGemm": {"weight": -2},
    "Conv1D": {"weight": 0},  # (inputs, outputs)
    "DbrxExpertGLU": {"w1": -1, "v1": -1, "w2": 0},
    "FunnelRelMultiheadAttention": {"r_kernel": 0},
    "GraniteMoeHybridParallelExperts": {"weight": -1},
    "GraniteMoeParallelExperts": {"weight": -1},
    "GraniteMoeSharedParallelExperts": {"weight": -1},
    "GroupedLinearLayer": {"weight": -2},
    "InklingSharedExperts": {"gate_proj": -1, "up_proj": -1, "down_proj": -1},
    "JetMoeParallelExperts": {"weight": -1},
    "Llama4TextExperts": {"gate_up_proj": -2, "down_proj": -2},
    "LongcatFlashExperts": {"gate_up_proj": -1, "down_proj": -1},
    "QuantLinear": {"weight": -1},
    "RecurrentGemmaRglru": {"input_gate_weight": -2, "recurrent_gate_weight": -2},
    "Step3p7Experts": {"gate_up_proj": -1, "down_proj": -1},
    "XLNetRelativeAttention": {"q": 0, "k": 0, "v": 0, "r": 0, "o": -1},
    "ZambaMambaMixer": {"x_proj_weight": -1, "dt_proj_weight": -1},
}
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_RECURRENT = ("weight_ih", "weight_hh", "weight_hr")


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own parameters, without those of modules in it; a shared one under each name."""
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def weights_of(
    module: nn.Module, shapes: Mapping[int, torch.Size]
) -> Iterator[tuple[str, int, int]]:
    """The weights that a layer multiplies its inputs with.

    Args:
        module: The layer, without those inside it.
        shapes: Shapes of the whole weights that FSDP1 shows as pieces, by the parameter's id.

    Yields:
        The parameter's name in the layer, the dimension that the product sums over, and the number
        of products that lie side by side in that dimension, each of which sums over its own part.
    """
    if isinstance(module, TRANSPOSED):
        yield "weight", 0, module.groups
        return
    dims = _of_torch(module) or _of_transformers(module, shapes)
    # DBRX keeps its experts side by side in one matrix.
    experts = getattr(module, "moe_num_experts", 1)
    for name, dim in dims.items():
        if getattr(module, name, None) is not None:
            yield name, dim, experts if dim == 0 else 1


def _of_torch(module: nn.Module) -> Mapping[str, int]:
    if isinstance(module, nn.Linear | nn.Bilinear):
        return {"weight": -1}
    if isinstance(module, CONVOLUTIONS):
        return {"weight": 1}
    if isinstance(module, nn.MultiheadAttention):
        return dict.fromkeys(_ATTENTION, -1)
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return {name: -1 for name in own_parameters(module) if name.startswith(_RECURRENT)}
    return {}


def _of_transformers(module: nn.Module, shapes: Mapping[int, torch.Size]) -> Mapping[str, int]:
    # Not the class's own name alone, as fully_shard puts a subclass in its place.
    for kind in type(module).__mro__:
        if kind.__name__ in _BY_CLASS and kind.__module__.startswith("transformers"):
            return _BY_CLASS[kind.__name__]
    if hasattr(module, "is_transposed"):  # fused experts
        dim = -2 if module.is_transposed else -1
        weights = own_parameters(module).items()
        return {n: dim for n, w in weights if len(shapes.get(id(w), w.shape)) == 3}
    return {}
