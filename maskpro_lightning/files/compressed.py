"""Checkpoints without zeros: kept values and packed masks, 54 % of the bytes at 2:4, bfloat16."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from maskpro_lightning.files import archive, grouping
from maskpro_lightning.files.gathering import state_of
from maskpro_lightning.files.grouping import Grouping
from maskpro_lightning.files.packing import pack
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.weights.layout import INTEGERS
from maskpro_lightning.weights.targets import find_targets

_COMPRESSED = "maskpro compressed 1"


def save_compressed(
    model: nn.Module,
    path: str | os.PathLike[str],
    pattern: str | NMPattern = "2:4",
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> None:
    """Write a sparse model's state without the zeros of its masks.

    Args:
        model: The model after the fit.
        path: The file, of safetensors.
        pattern: The pattern of the masks.
        include: Which layers are masked, as in :func:`find_targets`.
        exclude: Which layers are not.

    Raises:
        ValueError: a group has more than N weights other than +0 (-0 counts, since it could not be
            restored).
        TypeError: the state holds something other than tensors.
    """
    pattern = NMPattern.parse(pattern)
    targets = {id(t.parameter): t for t in find_targets(model, pattern, include, exclude)}
    tensors: dict[str, Tensor] = {}
    layouts: dict[str, Grouping] = {}
    first_names: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, value in state_of(model).items():
        first = first_names.setdefault(id(value), name)
        if first != name:
            shared[name] = first
        elif target := targets.get(id(value)):
            dim = target.input_dim % value.dim()
            layouts[name] = Grouping(tuple(value.shape), dim, pattern)
            kept, mask = _compressed(value.detach(), layouts[name], target.name)
            tensors |= {f"kept:{name}": kept, f"mask:{name}": mask}
        else:
            tensors[f"whole:{name}"] = value.detach().clone()
    notes = {
        "pattern": str(pattern),
        "layouts": grouping.to_text(layouts),
        "shared": json.dumps(shared),
    }
    archive.write(tensors, path, _COMPRESSED, notes)


def load_compressed(
    path: str | os.PathLike[str], pattern: str | NMPattern = "2:4"
) -> dict[str, Tensor]:
    """Restore the state that :func:`save_compressed` wrote, bit for bit, zeros included.

    Args:
        path: The file.
        pattern: The pattern of its masks.

    Returns:
        The model's ``state_dict``, on the CPU; tensors that were shared are shared again.

    Raises:
        ValueError: it is no such file, was changed since, or holds masks of another pattern.
    """
    pattern = NMPattern.parse(pattern)
    tensors, notes = archive.read(path, _COMPRESSED)
    grouping.check_pattern(path, notes, pattern)
    try:
        return _state_in(tensors, notes, pattern)
    except ValueError as error:
        raise archive.broken(path, f"no compressed checkpoint ({error})") from None


def _compressed(weight: Tensor, where: Grouping, name: str) -> tuple[Tensor, Tensor]:
    """The kept values, flat, and the packed mask, which keeps all values other than +0."""
    bits_GM = where.groups(weight).view(INTEGERS[weight.element_size()])
    taken_GM = bits_GM != 0
    if (taken_GM.sum(-1) > where.pattern.n).any():
        raise ValueError(
            f"{name!r} has a group with more than {where.pattern.n} numbers other than +0, which a "
            f"{where.pattern} mask cannot keep (a pruned weight may hold -0): set pruned weights "
            f"to 0.0."
        )
    mask_GM = where.pattern.top(taken_GM)
    return bits_GM.masked_select(mask_GM).view(weight.dtype), pack(mask_GM, where.pattern)


def _state_in(
    tensors: Mapping[str, Tensor], notes: Mapping[str, str], pattern: NMPattern
) -> dict[str, Tensor]:
    layouts = grouping.from_text(notes.get("layouts", ""), pattern)
    state = {name: _restored(tensors, name, where) for name, where in layouts.items()}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(":")
        if kind == "whole" and name not in state:
            state[name] = tensor
        elif kind not in ("kept", "mask") or name not in layouts:
            raise ValueError(f"{key!r} has no place in a state_dict")
    return state | _shared(state, notes.get("shared", ""))


def _restored(tensors: Mapping[str, Tensor], name: str, where: Grouping) -> Tensor:
    kept, mask = tensors.get(f"kept:{name}"), tensors.get(f"mask:{name}")
    if kept is None or mask is None or not kept.is_floating_point():
        raise ValueError(f"it holds no kept values or no mask of {name!r}")
    mask_GM = where.unpack(mask)
    if kept.shape != (len(mask_GM) * where.pattern.n,):
        raise ValueError(f"the kept values of {name!r} are not as many as its mask keeps")
    integer = INTEGERS[kept.element_size()]
    bits_GM = torch.zeros(mask_GM.shape, dtype=integer).masked_scatter_(mask_GM, kept.view(integer))
    return where.lay_out(bits_GM).view(kept.dtype)


def _shared(state: Mapping[str, Tensor], text: str) -> dict[str, Tensor]:
    try:
        return {name: state[first] for name, first in json.loads(text).items() if name not in state}
    except (AttributeError, KeyError, TypeError, RecursionError):
        raise ValueError("its list of shared tensors cannot be read") from None
