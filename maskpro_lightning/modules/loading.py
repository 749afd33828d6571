"""Weights of Hugging Face models: all at once, or block by block where each rank keeps a part."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from maskpro_lightning.catalog import resolve

_FLOATS = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_late: ContextVar[bool] = ContextVar("late", default=False)


@contextmanager
def loading_late() -> Iterator[None]:
    """Let each ``CausalLM`` made in this block load its weights once it is sharded."""
    token = _late.set(True)
    try:
        yield
    finally:
        _late.reset(token)


def loads_late() -> bool:
    """Whether weights are loaded later, see :func:`loading_late`."""
    return _late.get()


def pretrained(kind: Any, model: str, dtype: str) -> Any:
    """A Hugging Face model; on the meta device only its shapes, without its weights.

    Args:
        kind: One of transformers' classes ``AutoModel…``.
        model: Path or Hub name of the model, or a path inside ``recipes/``.
        dtype: The weights' dtype, or "auto".
    """
    if torch.get_default_device().type != "meta":
        return kind.from_pretrained(resolve(model), dtype=dtype)
    config = AutoConfig.from_pretrained(resolve(model))
    return kind.from_config(config, dtype=config.dtype if dtype == "auto" else dtype)


def mapped(
    kind: Any, model: str, dtype: str, shapes: Any
) -> tuple[Any, Callable[[nn.Module], None]]:
    """The model of :func:`pretrained`, with weights that are read from disk when they are used.

    transformers maps files into memory, but makes copies where their dtype is another. So the model
    comes in a dtype that holds all that they hold, exactly, and its parts get their own in turn.
    Where that would change a bit (some weights or buffers have a rule of their own for it), or
    files are no safetensors, it is loaded at once.

    Args:
        kind: One of transformers' classes ``AutoModel…``.
        model: Path or Hub name of the model, or a path inside ``recipes/``.
        dtype: The weights' dtype, or "auto".
        shapes: What :func:`pretrained` gave on the meta device.

    Returns:
        The model, and what gives a part of it, in place, the dtypes that are due.
    """
    path, wide = resolve(model), _wide_dtype(resolve(model))
    asked = AutoConfig.from_pretrained(path).dtype if dtype == "auto" else getattr(torch, dtype)
    ruled = shapes._keep_in_fp32_modules or shapes._keep_in_fp32_modules_strict
    if wide is None or ruled or asked is None:
        return kind.from_pretrained(path, dtype=dtype), lambda part: None
    found = kind.from_pretrained(path, dtype=wide)
    if [b.dtype for b in found.buffers()] != [b.dtype for b in shapes.buffers()]:
        return kind.from_pretrained(path, dtype=dtype), lambda part: None
    for config in (
        found.config,
        *(getattr(found.config, k, None) for k in found.config.sub_configs),
    ):
        if config is not None:
            config.dtype = asked
    dtypes = {name: parameter.dtype for name, parameter in shapes.named_parameters()}
    due = {parameter: dtypes[name] for name, parameter in found.named_parameters()}

    def convert(part: nn.Module) -> None:
        for parameter in part.parameters():
            if parameter in due:  # and not sharded; kept there, it would never be freed
                parameter.data = parameter.data.to(due.pop(parameter))

    return found, convert


def _wide_dtype(path: str) -> torch.dtype | None:
    """A dtype that holds each number in a model's safetensors files; None if there is none."""
    try:
        kinds = _kinds(path, SAFE_WEIGHTS_NAME)
    except OSError:
        try:
            index = json.loads(_file(path, SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
        except OSError:
            return None
        names = set(index["weight_map"].values())
        kinds = {kind for name in names for kind in _kinds(path, name)}
    if not kinds <= _FLOATS.keys():
        return None
    return reduce(torch.promote_types, (_FLOATS[kind] for kind in kinds))


def _kinds(path: str, name: str) -> set[str]:
    with safe_open(_file(path, name), "pt") as file:
        return {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118


def _file(path: str, name: str) -> Path:
    found = cached_file(path, name)
    assert found is not None
    return Path(found)
