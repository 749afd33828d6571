"""Loads Hugging Face models: all at once, or block by block where each rank keeps a part."""

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
    """Let each ``CausalLM`` made in the ``with`` block load its weights when it is sharded."""
    token = _late.set(True)
    try:
        yield
    finally:
        _late.reset(token)


def loads_late() -> bool:
    """Whether this runs in a block of :func:`loading_late`."""
    return _late.get()


def pretrained(kind: Any, model: str, dtype: str) -> Any:
    """A Hugging Face model; if the default device is "meta", only its shapes.

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

    transformers maps files into memory, but copies tensors whose dtype is to be another. So the
    model is made in a dtype that holds all of the files' numbers exactly, and its parts are
    converted one by one. It is loaded at once if that would change a bit (as some models have rules
    for dtypes of their own), or if the files are no safetensors.

    Args:
        kind: One of transformers' classes ``AutoModel…``.
        model: Path or Hub name of the model, or a path inside ``recipes/``.
        dtype: The weights' dtype, or "auto".
        shapes: What :func:`pretrained` returned on the meta device.

    Returns:
        The model, and a function that converts a part of it, in place, to the dtypes asked for.
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
            # Not those that are sharded by now. Popped, so that mapped memory can be freed.
            if parameter in due:
                parameter.data = parameter.data.to(due.pop(parameter))

    return found, convert


def _wide_dtype(path: str) -> torch.dtype | None:
    """A dtype that holds all numbers in a model's safetensors files exactly; None if none does."""
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
