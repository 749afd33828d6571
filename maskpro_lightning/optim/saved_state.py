"""Checks a saved state of MaskPro before it is loaded, and refuses one that does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from maskpro_lightning.optim.masked_weight import BITS
from maskpro_lightning.weights.admission import LARGEST, check_rule
from maskpro_lightning.weights.layout import Layout, local

Group = dict[str, Any]
# Must be the same in the saved state; all other settings are taken over from it.
_IDENTITY = ("param_names", "pattern", "input_dim", "estimator")
_TENSORS = {"dense", "logits", "masks"}
_LOGITS = (torch.float32, torch.bfloat16)
# Beyond, a draw may overflow float32. No fit gets there, since a step is at most LARGEST.
_LARGEST_LOGIT = 1e20


def checked(
    saved: Mapping[str, Any], groups: Sequence[Group], weights: Sequence[tuple[str, Layout]]
) -> dict[str, Any]:
    """Refuse a state that these weights cannot go on from. Nothing is touched.

    Args:
        saved: The state, as ``MaskPro.state_dict`` returned it.
        groups: The optimizer's own parameter groups.
        weights: The names of its weights and the part of each that is this rank's, in order. Of a
            saved part, the groups that its edges cut are not checked.

    Returns:
        The state, with parameter groups as this version saves them.

    Raises:
        ValueError: says what is saved and what it should be.
    """
    saved_groups, states = _parts(saved)
    saved_groups = [_renamed(group) for group in saved_groups]
    _check_groups(saved_groups, groups)
    keys = list(chain.from_iterable(group["params"] for group in saved_groups))
    if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in groups]:
        raise ValueError(
            f"The saved masks belong to another model: there are {len(keys)} weights there and "
            f"{len(weights)} here."
        )
    begun = [states[key] for key in keys if key in states]
    if len(begun) not in (0, len(keys)) or len(states) != len(begun):
        raise _damaged(f"it holds masks of {len(states)} weights instead of {len(keys)}")
    for (name, layout), state in zip(weights, begun, strict=False):
        _check_weight(name, layout, state)
    return {**saved, "param_groups": saved_groups}


def _renamed(group: Group) -> Group:
    """A parameter group as this version saves it; it may come from version 0.1."""
    group = {"unit": torch.ones(()), **group}
    if "normalize" not in group:
        return group
    for name, meant in (("sharpness", 1.0), ("exploration", "shared")):
        if group.get(name) != meant:
            raise ValueError(
                f"These masks were learned with {name}={group.get(name)!r}, which this version "
                f"does not have: finish that fit with maskpro-lightning 0.1, or start a new one "
                f"from its mask file."
            )
    gone = {"normalize", "momentum", "sharpness", "exploration", "drawn_sharpness"}
    kept = {name: value for name, value in group.items() if name not in gone}
    if group.get("estimator") == "policy":
        kept |= {"published": not group["normalize"], "tracker_momentum": group["momentum"]}
    return kept


def _parts(saved: Any) -> tuple[list[Group], Mapping[Any, Any]]:
    if not isinstance(saved, Mapping):
        raise _damaged(f"it is a {type(saved).__name__}")
    groups, states = saved.get("param_groups"), saved.get("state")
    if not isinstance(groups, list) or not isinstance(states, Mapping):
        raise _damaged("it has no param_groups and state")
    if not all(isinstance(group, dict) and _is_keys(group.get("params")) for group in groups):
        raise _damaged("its param_groups have no params")
    return groups, states


def _is_keys(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(key, int) for key in value)


def _check_groups(saved_groups: Sequence[Group], groups: Sequence[Group]) -> None:
    for key in _IDENTITY:
        difference = _difference([g.get(key) for g in saved_groups], [g.get(key) for g in groups])
        if difference is not None:
            there, here = difference
            raise ValueError(
                f"The saved masks belong to another model, pattern or estimator: {key} is {there} "
                f"there and {here} here. Go on with what they were made with, or start anew."
            )
    for group, own_group in zip(saved_groups, groups, strict=True):
        for key, value in own_group.items():
            found = group.get(key)
            if _kind(found) != _kind(value):
                raise _damaged(f"{key} is {found!r}")
            if isinstance(value, Tensor) and not torch.as_tensor(found).isfinite():
                raise _damaged(f"{key} is {found!r}")
        if not 0 <= group["lr"] <= LARGEST:  # a scheduler may have taken it to 0
            raise _damaged(f"lr is {group['lr']}")
        if not isinstance(group["step"], int) or not 0 <= group["step"] < 2**48:
            raise _damaged(f"step is {group['step']}")
        try:
            check_rule(group | {"lr": group["initial_lr"]})
        except (TypeError, ValueError) as error:
            raise _damaged(str(error).rstrip(".")) from error


def _difference(saved: Any, own: Any) -> tuple[str, str] | None:
    """The first difference of two nested lists, since a model can have thousands of names."""
    if isinstance(saved, list) and isinstance(own, list):
        if len(saved) != len(own):
            return f"a list of {len(saved)}", f"one of {len(own)}"
        differences = (_difference(a, b) for a, b in zip(saved, own, strict=True))
        return next((found for found in differences if found is not None), None)
    same = type(saved) is type(own) and saved == own
    return None if same else (repr(saved), repr(own))


def _kind(value: Any) -> object:
    if isinstance(value, Tensor):
        return "tensor", value.shape
    return "number" if isinstance(value, int | float) else type(value)


def _check_weight(name: str, layout: Layout, state: Any) -> None:
    # Version 0.1 also kept how many groups were redrawn.
    if not isinstance(state, Mapping) or set(state) - {"redrawn"} != _TENSORS:
        raise _damaged(f"the state of {name!r} is not {', '.join(sorted(_TENSORS))}")
    for key in sorted(_TENSORS):
        value = state[key]
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            raise _damaged(f"{key} of {name!r} is no tensor of numbers")
        if tuple(value.shape) not in (layout.shape, layout.size):
            raise ValueError(
                f"The saved masks belong to another model: {name!r} has shape "
                f"{tuple(value.shape)} there and {layout.shape} here."
            )
    dense, logits, masks = (local(state[key]) for key in sorted(_TENSORS))
    dtypes = (dense.is_floating_point(), logits.dtype in _LOGITS, masks.dtype)
    if dtypes != (True, True, torch.uint8):
        raise _damaged(f"{name!r} has {dense.dtype}, {logits.dtype} and {masks.dtype}")
    if not (logits.abs() < _LARGEST_LOGIT).all():
        raise _damaged(f"the logits of {name!r} are not all below {_LARGEST_LOGIT:.0e}")
    _check_masks(name, _where(state["masks"], layout), masks)


def _where(saved: Tensor, layout: Layout) -> Layout:
    """The layout of a saved tensor: the whole weight, a DTensor's own part, or this rank's run."""
    if isinstance(saved, DTensor) or tuple(saved.shape) == layout.shape:
        return Layout.of(saved, layout.pattern, layout.input_dim)
    return layout


def _check_masks(name: str, layout: Layout, masks: Tensor) -> None:
    """Refuse a mask that is not N:M; groups that an edge cuts are not looked at."""
    part = "this rank's part of " if masks.shape != layout.shape else ""
    where, masks = layout.uncut(masks)
    for version, bit in BITS.items():
        if version == "best" and not (masks & bit).any():
            continue  # version 0.1 did not keep it in lean memory
        blocks = where.blocks((masks & bit).bool())
        kept = [kept.reshape(-1, where.pattern.m) for _, (kept,) in blocks]
        if kept:
            about = f"{part}the saved {version} mask of {name!r}"
            where.pattern.check(torch.cat(kept), -1, about)


def _damaged(reason: str) -> ValueError:
    return ValueError(
        f"This is no whole state of MaskPro, or a damaged one: {reason}. Resume from another "
        f"checkpoint."
    )
