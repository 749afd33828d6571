"""Writes safetensors files one tensor at a time, and Hugging Face's index over several files.

A file begins with the length of its header. The header, in JSON, says where each tensor lies; the
tensors' bytes follow. So only shapes and dtypes must be known before the first tensor is written,
and tensors may come in any order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
# In the order in which safetensors lays out tensors, which aligns them.
_DTYPES = {
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "complex64": "C64",
    "float32": "F32",
    "uint32": "U32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "uint16": "U16",
    "int16": "I16",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def write(
    folder: Path,
    shapes: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_size: int | str,
) -> None:
    """Write tensors as they come, without keeping any.

    The files are ``model.safetensors``, or, where that would be too large,
    ``model-00001-of-0000N.safetensors`` and so on with ``model.safetensors.index.json``. Each is,
    byte for byte, the one that safetensors itself would write.

    Args:
        folder: The folder; files of these names are overwritten.
        shapes: Tensors on the meta device by name; files are filled in this order.
        tensors: The tensors by name, in any order.
        max_shard_size: The largest size of a file's tensors, in bytes or such as "5GB" (10^9
            bytes); a tensor larger than that gets a file of its own.

    Raises:
        ValueError: ``max_shard_size`` is no positive size.
        TypeError: safetensors does not have a tensor's dtype.
    """
    files = _split(shapes, bytes_of(max_shard_size))
    places: dict[str, tuple[Path, int]] = {}
    for number, names in enumerate(files, 1):
        many = f"-{number:05}-of-{len(files):05}" if len(files) > 1 else ""
        path = folder / f"model{many}.safetensors"
        offsets = _begin(path, {name: shapes[name] for name in names})
        places |= {name: (path, offset) for name, offset in offsets.items()}
    if len(files) > 1:
        _write_index(folder / INDEX, shapes, places)
    for name, tensor in tensors:
        path, offset = places.pop(name)
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(_bytes_in(tensor, shapes[name]))
        del tensor  # before the next one is made
    assert not places, f"{sorted(places)} did not come"


def bytes_of(size: int | str) -> int:
    """A size such as "5GB" as a number of bytes.

    Raises:
        ValueError: not a positive number of bytes.
    """
    number, unit = (str(size), 1) if isinstance(size, int) else (size[:-2], _UNITS.get(size[-2:]))
    if unit is None or not number.strip().isdecimal() or int(number) < 1:
        raise ValueError(
            f"max_shard_size is {size!r}: give a positive number of bytes, or one with a unit of "
            f"{', '.join(_UNITS)}, such as '5GB'."
        )
    return int(number) * unit


def _split(shapes: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """The names in each file."""
    files: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if files[-1] and size + shape.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(name)
        size += shape.nbytes
    return files


def _begin(path: Path, shapes: Mapping[str, Tensor]) -> dict[str, int]:
    """Write a file's header; returns where in the file each tensor begins."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name in _in_order(shapes):
        offsets[name], end = end, end + shapes[name].nbytes
        header[name] = {
            "dtype": _DTYPES[_dtype(shapes[name])],
            "shape": list(shapes[name].shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return {name: 8 + len(text) + offset for name, offset in offsets.items()}


def _in_order(shapes: Mapping[str, Tensor]) -> Sequence[str]:
    for name, shape in shapes.items():
        if _dtype(shape) not in _DTYPES:
            raise TypeError(
                f"{name!r} is of {shape.dtype}, which safetensors does not have: convert it, or "
                f"use torch.save."
            )
    order = list(_DTYPES)
    return sorted(shapes, key=lambda name: (order.index(_dtype(shapes[name])), name.encode()))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bytes_in(tensor: Tensor, shape: Tensor) -> memoryview:
    assert (tensor.shape, tensor.dtype) == (shape.shape, shape.dtype)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _write_index(
    path: Path, shapes: Mapping[str, Tensor], places: Mapping[str, tuple[Path, int]]
) -> None:
    files = {name: file.name for name, (file, _) in places.items()}
    total = sum(shape.nbytes for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
