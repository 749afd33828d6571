"""Finds the Hugging Face model in a module, and converts its tensors to those of its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from maskpro_lightning.weights.names import clean_name

# Entries of a config for which a server would look for packed or quantised weights.
_FOREIGN_CONFIGS = ("quantization_config", "sparsity_config", "compression_config")


def find(module: nn.Module, name: str = "") -> dict[str, Any]:
    """The outermost Hugging Face models in a module, by name."""
    if hasattr(type(module), "save_pretrained"):  # an instance can be a wrapper that forwards it
        return {clean_name(name): module}
    found: dict[str, Any] = {}
    for child_name, child in module.named_children():
        found |= find(child, f"{name}.{child_name}".removeprefix("."))
    return found


def only(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[str, Any]:
    """The name of the one Hugging Face model in a module, and the model.

    Args:
        model: The module.
        state: Its state.

    Raises:
        ValueError: there is none, there are several, or the module has tensors beside it; the model
            has adapters, or its config is one of packed weights.
    """
    found = find(model)
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} Hugging Face models, but this format is "
            f'for one: choose file_format="safetensors".'
        )
    ((name, inner),) = found.items()
    prefix = f"{name}." if name else ""
    ours = {id(value) for key, value in state.items() if key.startswith(prefix)}
    lost = [key for key, value in state.items() if id(value) not in ours]
    if lost:
        raise ValueError(
            f"{type(model).__name__} holds a Hugging Face model ({name!r}) and {len(lost)} tensors "
            f"more, such as {lost[0]!r}, which its folder would lose: choose "
            f'file_format="safetensors" to write everything, or export that model alone.'
        )
    if getattr(inner, "peft_config", None):
        raise ValueError(
            f"{type(inner).__name__} holds adapters, and its save_pretrained would write only "
            f"them. Merged now they would fill the zeros of the masks: take them off (unload()), "
            f"export the model beneath, and keep them beside it; or merge before the fit."
        )
    for key in _FOREIGN_CONFIGS:
        if getattr(inner.config, key, None) is not None:
            raise ValueError(
                f"The config of {type(inner).__name__} has a {key}, by which others would look "
                f"for packed weights instead of these: delete it first (del model.config.{key})."
            )
    return name, inner


def is_of_transformers(model: nn.Module) -> bool:
    """Whether a model's ``save_pretrained`` is that of transformers, not of another library."""
    return any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)


def save_beside(model: Any, folder: Path) -> None:
    """Write the files of a model of transformers other than its weights.

    A generation config is written unchecked. transformers would refuse one with settings that only
    sampling uses, as published models have, and the result of a fit would be lost.
    """
    logging: Any = import_module("transformers.utils.logging")
    config = getattr(model, "generation_config", None)
    kind, bars = type(config), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # of the weights, of which none are written here
    try:
        if config is not None:
            config.__class__ = type(kind.__name__, (kind,), {"validate": lambda *_, **__: None})
        model.save_pretrained(folder, state_dict={})  # without weights
    finally:
        if config is not None:
            config.__class__ = kind
        if bars:
            logging.enable_progress_bar()


def names_in(model: Any, name: str, state: Mapping[str, Tensor]) -> dict[str, str]:
    """The tensors that go into the model's files: their names there, and in the state.

    Of tied weights only the one that ``from_pretrained`` looks for.

    Args:
        model: The Hugging Face model.
        name: Its name in the module.
        state: The module's state.
    """
    prefix = f"{name}." if name else ""
    ours = {key.removeprefix(prefix): key for key in state}
    tied = getattr(model, "all_tied_weights_keys", {})
    names: dict[int, str] = {}
    for inner, key in ours.items():
        kept = names.setdefault(id(state[key]), inner)
        if kept in tied and inner not in tied:
            names[id(state[key])] = inner
    ignored = model._keys_to_ignore_on_save or ()
    kept_names = set(names.values()).difference(ignored)
    return {inner: key for inner, key in ours.items() if inner in kept_names}


class Conversion:
    """Converts the tensors of a model to those of its files, a few at a time.

    On loading, transformers fuses tensors that are separate in files, such as the experts of a
    layer; on saving it separates them. Parts are converted one by one: each tensor if that works,
    else each block, else all tensors together.

    Args:
        model: The Hugging Face model.
        shapes: Its tensors on the meta device, by name.

    Attributes:
        shapes: The tensors of its files on the meta device, by name.
        parts: The names of the tensors of each part.
    """

    def __init__(self, model: Any, shapes: Mapping[str, Tensor]) -> None:
        self._model = model
        self.shapes = self._convert(shapes)
        expected = {name: (shape.shape, shape.dtype) for name, shape in self.shapes.items()}
        for part_of in (lambda name: name, _block_of, lambda _: ""):
            self.parts = _grouped(shapes, part_of)
            found: dict[str, Any] = {}
            for part in self.parts:
                try:
                    found |= self._convert({name: shapes[name] for name in part})
                except Exception:  # noqa: BLE001, whatever misses the rest of a block
                    break
            if {name: (shape.shape, shape.dtype) for name, shape in found.items()} == expected:
                return
        raise AssertionError("all tensors together are not all tensors")

    def convert(self, whole: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the files, made part by part from the model's."""
        for part in self.parts:
            # Nothing of a part is kept while the next one is made.
            yield from self._convert({name: whole(name) for name in part}).items()

    def _convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        converted: dict[str, Tensor] = revert_weight_conversion(self._model, dict(tensors))
        return converted


def _block_of(name: str) -> str:
    """A name up to its first number, which is that of a block of the model."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else name


def _grouped(names: Mapping[str, object], part_of: Callable[[str], str]) -> list[list[str]]:
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(part_of(name), []).append(name)
    return list(parts.values())
