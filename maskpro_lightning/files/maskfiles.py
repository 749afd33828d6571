"""Files of masks: packed ones of this package, and MaskLLM's."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile

import numpy as np
import torch
from torch import Tensor

from maskpro_lightning.files import archive, grouping
from maskpro_lightning.files.atomic import atomic
from maskpro_lightning.files.packing import pack
from maskpro_lightning.masks.pattern import NMPattern

_MASKS = "maskpro masks 2"
_LARGEST_NPY_HEADER = 2**14
# What reading a zip file can raise. Of LZMA and BZIP2 a file could demand any memory.
_ZIP_ERRORS = (ValueError, KeyError, OSError, EOFError, RuntimeError, BadZipFile, zlib.error)
_ZIP_METHODS = (ZIP_STORED, ZIP_DEFLATED)


def save_masks(
    masks: Mapping[str, Tensor], pattern: str | NMPattern, path: str | os.PathLike[str]
) -> None:
    """Write masks in as few bits as whole bytes allow: 0.667 bits per weight at 2:4.

    Args:
        masks: By parameter name, bool, exactly N of every M kept along one dimension.
        pattern: The pattern.
        path: The file, of safetensors.

    Raises:
        ValueError: a mask is not N:M.
    """
    pattern = NMPattern.parse(pattern)
    layouts = {name: grouping.find(mask, pattern, name) for name, mask in masks.items()}
    packed = {name: pack(layouts[name].groups(mask), pattern) for name, mask in masks.items()}
    notes = {"pattern": str(pattern), "layouts": grouping.to_text(layouts)}
    archive.write(packed, path, _MASKS, notes)


def load_masks(path: str | os.PathLike[str], pattern: str | NMPattern) -> dict[str, Tensor]:
    """Read masks that :func:`save_masks` wrote, bool, by parameter name.

    Raises:
        ValueError: it is no such file, was changed since, or holds masks of another pattern.
    """
    pattern = NMPattern.parse(pattern)
    packed, notes = archive.read(path, _MASKS)
    grouping.check_pattern(path, notes, pattern)
    try:
        return _unpacked(packed, notes.get("layouts", ""), pattern)
    except ValueError as error:
        raise archive.broken(path, f"no file of masks ({error})") from None


def save_maskllm(
    masks: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], path: str | os.PathLike[str]
) -> None:
    """Write masks as MaskLLM does: a bit per weight, row by row, without shapes.

    Args:
        masks: Bool masks by parameter name; or pairs of them, of which each is dropped before the
            next is asked for.
        path: The file, a numpy archive; its folder is made if it does not exist.
    """
    pairs = masks.items() if isinstance(masks, Mapping) else masks
    bits = {f"{name}.mask": np.packbits(mask.cpu().numpy()) for name, mask in pairs}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **bits)  # type: ignore[arg-type]


def load_maskllm(
    path: str | os.PathLike[str],
    shapes: Mapping[str, Sequence[int]],
    pattern: str | NMPattern = "2:4",
) -> dict[str, Tensor]:
    """Read masks in MaskLLM's format, which holds no shapes.

    Args:
        path: The file, a numpy archive.
        shapes: The shape of each mask to read, by parameter name. The file's names may lack the
            first parts of these, as they do if the file is of a model within a module. Other masks
            are not read.
        pattern: The pattern of the masks.

    Returns:
        Bool masks by the names in ``shapes``.

    Raises:
        ValueError: it is no such file; a mask is missing, has another size or is not N:M.
    """
    pattern = NMPattern.parse(pattern)
    with Path(path).open("rb") as file:
        if file.read(2) != b"PK":  # numpy.load would try other kinds of files
            raise archive.broken(path, "not a numpy archive (.npz)")
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as npz:
                keys = _keys_in_file(shapes, npz.files)
                masks = {name: _mask_in(npz, keys[name], shapes[name]) for name in shapes}
            for name, mask in masks.items():
                grouping.find(mask, pattern, name)
        except _ZIP_ERRORS as error:
            raise archive.broken(path, f"no file of these {pattern} masks ({error})") from None
    return masks


def _keys_in_file(names: Mapping[str, Any], files: Sequence[str]) -> dict[str, str]:
    """For each name the key in the file: the longest of the name's endings that is there."""
    held, keys = set(files), {}
    for name in names:
        parts = name.split(".")
        ends = (f"{'.'.join(parts[start:])}.mask" for start in range(len(parts)))
        key = next((end for end in ends if end in held), None)
        if key is None:
            raise ValueError(f"it holds no mask of {name!r}, but {len(held)} others")
        keys[name] = key
    if len(set(keys.values())) < len(keys):
        raise ValueError("two of the names asked for have the same end as one in the file")
    return keys


def _mask_in(npz: Any, key: str, shape: Sequence[int]) -> Tensor:
    """One mask of an archive, whose size is known before anything is allocated."""
    size = math.prod(shape)
    expected = (-(-size // 8),)
    entry = npz.zip.getinfo(f"{key}.npy")
    if entry.compress_type not in _ZIP_METHODS:
        raise ValueError(f"{key!r} is compressed in another way than numpy does it")
    if entry.file_size > expected[0] + _LARGEST_NPY_HEADER:
        raise ValueError(f"{key!r} has {entry.file_size} bytes, too many for {tuple(shape)} bits")
    with npz.zip.open(entry) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{key!r} is no array of bytes")
        try:
            found, _, dtype = np.lib.format.read_array_header_1_0(file)
        except Exception as error:  # numpy parses it as Python, and makes a dtype of what it says
            raise ValueError(f"the header of {key!r} cannot be read") from error
    if found != expected or dtype != np.uint8:
        raise ValueError(
            f"{key!r} is {dtype} of shape {found}, but the bits of {tuple(shape)} are uint8 of "
            f"shape {expected}"
        )
    bits = npz[f"{key}.npy"]
    mask = torch.from_numpy(np.unpackbits(bits)).bool()
    if mask[size:].any():
        raise ValueError(f"the bits of {key!r} beyond its {size} weights are not zero")
    return mask[:size].view(*shape)


def _unpacked(packed: Mapping[str, Tensor], text: str, pattern: NMPattern) -> dict[str, Tensor]:
    layouts = grouping.from_text(text, pattern)
    if layouts.keys() != packed.keys():
        raise ValueError("its masks and its list of shapes have different names")
    return {name: found.lay_out(found.unpack(packed[name])) for name, found in layouts.items()}
