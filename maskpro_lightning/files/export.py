"""A sparse model for others to load, in the format that they read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors.torch import save_file
from torch import Tensor, nn

from maskpro_lightning.files import archive
from maskpro_lightning.files.compressed import save_compressed, state_of
from maskpro_lightning.files.grouping import check_sparse
from maskpro_lightning.files.maskfiles import save_maskllm
from maskpro_lightning.initial import initializers
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.optim.optimizer import MaskPro
from maskpro_lightning.weights.targets import Target, clean_name, find_targets

_DISTRIBUTIONS = "maskpro distributions 1"
# What makes a server look for packed or quantised weights, which are not there.
_FOREIGN_CONFIGS = ("quantization_config", "sparsity_config", "compression_config")

Format = Literal["auto", "huggingface", "safetensors", "compressed", "maskllm"]


def export_sparse(
    model: nn.Module,
    folder: str | os.PathLike[str],
    pattern: str | NMPattern = "2:4",
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    file_format: Format = "auto",
) -> Path:
    """Write a model whose masks are applied, for others to load.

    The formats:

    - "huggingface": the one Hugging Face model that this is or holds, by ``save_pretrained``, zeros
      included; loads with ``from_pretrained`` where this package is not installed.
    - "safetensors": ``model.safetensors``, the ``state_dict``, zeros included.
    - "compressed": ``compressed.safetensors``, the ``state_dict`` without the zeros; loads with
      :func:`load_compressed`.
    - "maskllm": ``masks.npz``, the masks alone, as MaskLLM writes them.
    - "auto": "huggingface" where there is one such model, else "safetensors".

    Args:
        model: The model after the fit.
        folder: Where to write; made if it does not exist.
        pattern: What every masked weight must satisfy.
        include: Which layers are masked, as in :func:`find_targets`.
        exclude: Which layers are not.
        file_format: One of the formats.

    Returns:
        The folder.

    Raises:
        ValueError: a weight has a group with more than N nonzeros; the format would lose a part of
            the model; nothing is written then.
    """
    pattern = NMPattern.parse(pattern)
    targets = find_targets(model, pattern, include, exclude)
    for target in targets:
        check_sparse(target.parameter, pattern, target.input_dim, target.name)
    if file_format not in get_args(Format):
        raise ValueError(f"file_format is one of {get_args(Format)}, got {file_format!r}.")
    if file_format == "auto":
        file_format = "huggingface" if len(_pretrained(model)) == 1 else "safetensors"
    folder = Path(folder)
    if file_format == "huggingface":
        _write_pretrained(_whole_pretrained(model), folder)
        return folder
    if file_format == "maskllm":
        masks = _masks(model, targets, pattern)
    state = state_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    if file_format == "safetensors":
        _write_state(state, folder / "model.safetensors")
    elif file_format == "compressed":
        save_compressed(
            model, folder / "compressed.safetensors", pattern, include=include, exclude=exclude
        )
    else:
        save_maskllm(masks, folder / "masks.npz")
    return folder


def save_distributions(optimizer: MaskPro, path: str | os.PathLike[str]) -> None:
    """Write the logits of every masked weight, float32, in the weights' shapes and names."""
    groups = optimizer.param_groups
    notes = {
        "pattern": groups[0]["pattern"],
        "seed": str(groups[0]["seed"]),
        "step": str(groups[0]["step"]),
    }
    archive.write(optimizer.logits(), path, _DISTRIBUTIONS, notes)


def _pretrained(module: nn.Module, name: str = "") -> dict[str, Any]:
    """The outermost Hugging Face models in a module, by name."""
    if hasattr(module, "save_pretrained"):
        return {name: module}
    found: dict[str, Any] = {}
    for child_name, child in module.named_children():
        found |= _pretrained(child, f"{name}.{child_name}".removeprefix("."))
    return found


def _whole_pretrained(model: nn.Module) -> Any:
    """The one Hugging Face model in a module, if ``save_pretrained`` writes all that there is."""
    found = _pretrained(model)
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} Hugging Face models, but this format is "
            f'for one: choose file_format="safetensors".'
        )
    ((name, inner),) = found.items()
    ours = {id(value) for value in state_of(inner).values()}
    lost = [key for key, value in state_of(model).items() if id(value) not in ours]
    if lost:
        raise ValueError(
            f"{type(model).__name__} holds a Hugging Face model ({name!r}) and {len(lost)} tensors "
            f"more, such as {lost[0]!r}, which its folder would lose: choose "
            f'file_format="safetensors" to write everything, or export that model alone.'
        )
    if getattr(inner, "peft_config", None):
        raise ValueError(
            f"{type(inner).__name__} holds adapters, and its save_pretrained would write only "
            f"them: merge them into the weights first (merge_and_unload)."
        )
    for key in _FOREIGN_CONFIGS:
        if getattr(inner.config, key, None) is not None:
            raise ValueError(
                f"The config of {type(inner).__name__} has a {key}, by which others would look "
                f"for packed weights instead of these: delete it first (del model.config.{key})."
            )
    return inner


def _write_pretrained(model: Any, folder: Path) -> None:
    """Files are moved into place when all are written; other files of the folder stay."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
        model.save_pretrained(partial)
        for stale in folder.glob("model*.safetensors*"):  # would be loaded instead of new ones
            stale.unlink()
        for path in Path(partial).iterdir():
            path.replace(folder / path.name)


def _write_state(state: Mapping[str, Tensor], path: Path) -> None:
    # Copies, since safetensors refuses tensors that share memory.
    plain = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    with archive.whole(path) as partial:
        save_file(plain, partial, {"format": "pt"})


def _masks(model: nn.Module, targets: Sequence[Target], pattern: NMPattern) -> dict[str, Tensor]:
    """The masks that nonzeros show, named as in the one Hugging Face model, if there is one."""
    found = _pretrained(model)
    prefix = clean_name(f"{next(iter(found))}.") if len(found) == 1 and "" not in found else ""
    return {
        target.name.removeprefix(prefix): initializers.nonzeros(
            target.parameter.detach(), pattern, target.input_dim, name=target.name
        )
        for target in targets
    }
