"""Files: sparse models that others load, masks and their distributions.

Everything is safetensors, written under a temporary name and renamed, so that a file is either
whole or not there.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from maskpro_lightning.header import sort_notes
from maskpro_lightning.optimizer import MaskPro
from maskpro_lightning.pattern import NMPattern
from maskpro_lightning.targets import find_targets

_MASKS = "maskpro masks 1"
_DISTRIBUTIONS = "maskpro distributions 1"


def export_sparse(
    model: nn.Module,
    folder: str | os.PathLike[str],
    pattern: str | NMPattern = "2:4",
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> Path:
    """Write a model whose masks are applied, zeros included, for others to load.

    A Hugging Face model, or a module that holds exactly one, is written with ``save_pretrained``
    and loads with ``from_pretrained`` where this package is not installed; anything else becomes
    ``model.safetensors`` with the names of its ``state_dict``.

    Args:
        model: The model after the fit.
        folder: Where to write; made if it does not exist.
        pattern: What every masked weight must satisfy.
        include: Which layers are masked, as in :func:`find_targets`.
        exclude: Which layers are not.

    Returns:
        The folder.

    Raises:
        ValueError: a weight has a group with more than N nonzeros; nothing is written then.
    """
    pattern = NMPattern.parse(pattern)
    for target in find_targets(model, pattern, include, exclude):
        check_sparse(target.parameter, pattern, target.input_dim, target.name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pretrained = _pretrained_models(model)
    if len(pretrained) == 1:
        pretrained[0].save_pretrained(folder)
    else:
        _save(_without_sharing(model.state_dict()), folder / "model.safetensors", {"format": "pt"})
    return folder


def check_sparse(weight: Tensor, pattern: NMPattern, input_dim: int, name: str) -> None:
    """Refuse a weight with more than N nonzeros in a group of M.

    Fewer are fine: a kept weight may itself be zero.

    Raises:
        ValueError: names the weight and its first group with too many nonzeros.
    """
    nonzeros_G = (pattern.group(weight.detach(), input_dim) != 0).sum(-1).flatten()
    too_many_G = nonzeros_G > pattern.n
    if too_many_G.any():
        first = int(too_many_G.nonzero()[0])
        raise ValueError(
            f"{name!r} is not {pattern}: group {first} has {int(nonzeros_G[first])} nonzeros "
            f"({int(too_many_G.sum())} of {nonzeros_G.numel()} groups have too many). Export after "
            f"the fit, with the pattern, include and exclude of the fit."
        )


def save_masks(
    masks: Mapping[str, Tensor], pattern: NMPattern, path: str | os.PathLike[str]
) -> None:
    """Write masks as one bit per weight (row-major, highest bit first)."""
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    metadata = {"format": _MASKS, "pattern": str(pattern), "shapes": json.dumps(shapes)}
    packed = {
        name: torch.from_numpy(np.packbits(mask.cpu().numpy())) for name, mask in masks.items()
    }
    _save(packed, Path(path), metadata)


def load_masks(path: str | os.PathLike[str], pattern: NMPattern) -> dict[str, Tensor]:
    """Read masks that :func:`save_masks` wrote, bool, by parameter name.

    Raises:
        ValueError: not such a file, or masks of another pattern.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)!r} is not a whole safetensors file: {error}") from None
    if metadata.get("format") != _MASKS:
        raise ValueError(
            f"{os.fspath(path)!r} holds {metadata.get('format', 'unnamed tensors')!r}, not "
            f"{_MASKS!r}: give a file that save_masks wrote."
        )
    if metadata["pattern"] != str(pattern):
        raise ValueError(
            f"{os.fspath(path)!r} holds {metadata['pattern']} masks, but the pattern is {pattern}."
        )
    shapes = json.loads(metadata["shapes"])
    return {name: _unpacked(name, bits, shapes.get(name, [])) for name, bits in packed.items()}


def save_distributions(optimizer: MaskPro, path: str | os.PathLike[str]) -> None:
    """Write the logits of every masked weight, float32, in the weights' shapes and names."""
    groups = optimizer.param_groups
    metadata = {
        "format": _DISTRIBUTIONS,
        "pattern": groups[0]["pattern"],
        "seed": str(groups[0]["seed"]),
        "step": str(groups[0]["step"]),
    }
    _save(optimizer.logits(), Path(path), metadata)


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    sort_notes(partial)
    partial.replace(path)


def _pretrained_models(model: nn.Module) -> list[Any]:
    """The outermost Hugging Face models in a module."""
    if hasattr(model, "save_pretrained"):
        return [model]
    return [found for child in model.children() for found in _pretrained_models(child)]


def _unpacked(name: str, bits: Tensor, shape: list[int]) -> Tensor:
    size = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.dim() != 1 or bits.numel() != -(-size // 8):
        raise ValueError(f"The mask of {name!r} does not have the size of its shape {shape}.")
    mask = np.unpackbits(bits.numpy(), count=size)
    return torch.from_numpy(mask).bool().view(shape)


def _without_sharing(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict; those that share memory become copies, as safetensors asks."""
    return {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}
