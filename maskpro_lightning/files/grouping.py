"""Where the groups of a tensor lie in it; also as text in the notes of a file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskpro_lightning.files.packing import unpack
from maskpro_lightning.masks.pattern import NMPattern

_LARGEST_TENSOR = 2**48
_GROUPS_AT_ONCE = 2**16


@dataclass(frozen=True)
class Grouping:
    """Where the groups of a tensor lie in it.

    Attributes:
        shape: The tensor's shape.
        input_dim: The dimension that groups lie along, counted from the front.
        pattern: The pattern.
    """

    shape: tuple[int, ...]
    input_dim: int
    pattern: NMPattern

    @property
    def num_groups(self) -> int:
        """Number of groups, G."""
        return math.prod(self.shape) // self.pattern.m

    def groups(self, tensor: Tensor) -> Tensor:
        """A tensor of this shape as (G, M)."""
        return self.pattern.group(tensor, self.input_dim).reshape(-1, self.pattern.m)

    def lay_out(self, values_GM: Tensor) -> Tensor:
        """The inverse of :meth:`groups`."""
        sizes = list(self.shape)
        inputs = sizes.pop(self.input_dim)
        return values_GM.reshape(*sizes, inputs).movedim(-1, self.input_dim).contiguous()

    def unpack(self, packed: Tensor) -> Tensor:
        """The mask, bool (G, M), that :func:`packing.pack` has packed."""
        return unpack(packed, self.num_groups, self.pattern)


def find(mask: Tensor, pattern: NMPattern, name: str) -> Grouping:
    """Find the last dimension along which a mask is N:M.

    Raises:
        ValueError: there is none.
    """
    shape = tuple(mask.shape)
    for dim in range(mask.dim() - 1, -1, -1):
        if shape[dim] % pattern.m == 0 and (pattern.group(mask, dim).sum(-1) == pattern.n).all():
            return Grouping(shape, dim, pattern)
    raise ValueError(
        f"The mask of {name!r}, shape {shape}, keeps exactly {pattern.n} of every {pattern.m} "
        f"along none of its dimensions: it is no {pattern} mask."
    )


def to_text(layouts: Mapping[str, Grouping]) -> str:
    """Layouts by name, for a file's notes."""
    return json.dumps({name: [list(each.shape), each.input_dim] for name, each in layouts.items()})


def from_text(text: str, pattern: NMPattern) -> dict[str, Grouping]:
    """The inverse of :func:`to_text`.

    Raises:
        ValueError: it is no such text, or describes a tensor that cannot exist.
    """
    try:
        found = json.loads(text)
        entries = {name: (tuple(shape), dim) for name, (shape, dim) in found.items()}
    except (AttributeError, TypeError, ValueError, RecursionError):
        raise ValueError("its list of shapes cannot be read") from None
    for name, (shape, dim) in entries.items():
        _check_shape(name, shape)
        if type(dim) is not int or not 0 <= dim < len(shape) or shape[dim] % pattern.m:
            raise ValueError(f"{name!r} of shape {shape} has no {pattern} groups along {dim!r}")
    return {name: Grouping(shape, dim, pattern) for name, (shape, dim) in entries.items()}


def check_pattern(
    path: str | os.PathLike[str], notes: Mapping[str, str], pattern: NMPattern
) -> None:
    """Refuse a file of another pattern.

    Raises:
        ValueError: the notes' pattern is not this one.
    """
    if notes.get("pattern") != str(pattern):
        raise ValueError(
            f"{os.fspath(path)!r} holds {notes.get('pattern')} masks, but the pattern is "
            f"{pattern}: choose the file's pattern, or another file."
        )


def check_sparse(weight: Tensor, pattern: NMPattern, input_dim: int, name: str) -> None:
    """Refuse a weight with more than N nonzeros in a group of M.

    Fewer are fine: a kept weight may itself be zero.

    Raises:
        ValueError: names the weight and its first group with too many nonzeros.
    """
    rows = pattern.group(weight.detach(), input_dim)
    # In blocks, so that counting takes little memory beside a weight that was gathered.
    blocks = rows.split(max(1, _GROUPS_AT_ONCE // max(1, rows[:1].numel() // pattern.m)))
    first, wrong, before = "", 0, 0
    for block in blocks:
        nonzeros_G = (block != 0).sum(-1, dtype=torch.int32).flatten()
        too_many_G = nonzeros_G > pattern.n
        if not first and too_many_G.any():
            place = int(too_many_G.nonzero()[0])
            first = f"group {before + place} has {int(nonzeros_G[place])} nonzeros"
        wrong, before = wrong + int(too_many_G.sum()), before + nonzeros_G.numel()
    if wrong:
        raise ValueError(
            f"{name!r} is not {pattern}: {first} ({wrong} of {before} groups have too many). "
            f"Export after the fit, with the pattern, include and exclude of the fit."
        )


def _check_shape(name: str, shape: tuple[Any, ...]) -> None:
    """Refuse what is no shape, or a shape with more elements than a tensor could hold.

    Raises:
        ValueError: names the tensor and the shape.
    """
    sizes = all(type(size) is int and size >= 0 for size in shape)
    if not sizes or math.prod(max(1, size) for size in shape) > _LARGEST_TENSOR:
        raise ValueError(f"{name!r} cannot have the shape {shape}")
