"""Checks what MaskPro is given, rules, weights, masks and losses, and refuses it by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.weights.layout import Layout

#: The largest lr and logit_scale. With residuals up to 1e18 none of their products overflows.
LARGEST = 1e6


def check_rule(rule: Mapping[str, Any]) -> None:
    """Refuse numbers of an estimator or a parameter group that are out of range.

    Raises:
        TypeError: a number is none.
        ValueError: a number is out of range.
    """
    momentum = rule.get("tracker_momentum", 0)
    for name, value in (*((n, rule[n]) for n in ("lr", "logit_scale")), ("momentum", momentum)):
        if not isinstance(value, int | float):
            raise TypeError(f"{name} is {value!r}, but it must be a number.")
    for name in ("lr", "logit_scale"):
        if not 0 < rule[name] <= LARGEST:
            raise ValueError(f"{name} is {rule[name]}, but 0 < {name} <= {LARGEST:.0e} must hold.")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}, but 0 <= momentum < 1 must hold.")
    if not isinstance(rule.get("seed", 0), int):
        raise TypeError(f"seed is {rule['seed']!r}, but it must be an int.")


def check_lr(group: Mapping[str, Any]) -> None:
    """Refuse a learning rate out of range, which a scheduler may have set."""
    if not 0 <= group["lr"] <= LARGEST:
        raise ValueError(
            f"The learning rate is {group['lr']} at step {group['step']}: a scheduler has "
            f"to keep it in [0, {LARGEST:.0e}]."
        )


def check_weights(
    weights: Iterable[tuple[Mapping[str, Any], str, Tensor, Sequence[int]]],
) -> None:
    """Refuse weights that cannot be masked.

    Args:
        weights: Parameter group, name, weight, and shape of the whole weight, of which a rank may
            have a part.

    Raises:
        ValueError: names the first weight that cannot be masked, and why.
    """
    seen: dict[str, int] = {}
    for group, name, weight, shape in weights:
        if name in seen or id(weight) in seen.values():
            twin = name if name in seen else next(n for n, i in seen.items() if i == id(weight))
            raise ValueError(
                f"{name!r} is given twice, first as {twin!r}: give each weight once, under a name "
                f"of its own."
            )
        seen[name] = id(weight)
        pattern, input_dim = NMPattern.parse(group["pattern"]), group["input_dim"]
        _check_weight(name, weight, shape, pattern, input_dim)


def _check_weight(
    name: str, weight: Tensor, shape: Sequence[int], pattern: NMPattern, input_dim: int
) -> None:
    if not -len(shape) <= input_dim < len(shape) or not math.prod(shape):
        raise ValueError(
            f"{name!r} has shape {tuple(shape)}, without groups of weights along "
            f"input_dim={input_dim}: leave it out or give its own input_dim."
        )
    if not is_maskable(weight):
        raise ValueError(
            f"{name!r} holds {kind_of(weight)} numbers; masks need dense floating-point weights of "
            f"at least 16 bits: leave it out or load the model unquantised."
        )
    if weight.is_meta:
        raise ValueError(
            f"{name!r} is on the meta device, without values: load the weights before masking."
        )
    inputs = shape[input_dim]
    if inputs % pattern.m:
        raise ValueError(
            f"{name!r} has {inputs} input features, not a multiple of {pattern.m} "
            f"(pattern {pattern}): leave it out or choose another pattern."
        )


def check_finite(wrong: Mapping[str, float]) -> None:
    """Refuse weights that are not finite.

    Args:
        wrong: By name, the number of elements of each weight that are NaN or infinite.

    Raises:
        ValueError: names the first weight that has some.
    """
    names = [name for name, number in wrong.items() if number]
    if names:
        others = f" ({len(names)} weights do)" if len(names) > 1 else ""
        layer = names[0].rpartition(".")[0] or names[0]
        raise ValueError(
            f"{names[0]!r} holds {wrong[names[0]]:.0f} numbers that are NaN or infinite{others}: "
            f'load the weights again, or leave it out with exclude=["{layer}"].'
        )


def is_maskable(weight: Tensor) -> bool:
    """Whether a weight holds dense floating-point numbers of at least 16 bits."""
    floating = weight.is_floating_point() and weight.dtype.itemsize > 1
    return floating and weight.layout == torch.strided


def kind_of(weight: Tensor) -> object:
    """The layout of a weight that is not dense, else its dtype, for a message."""
    return weight.dtype if weight.layout == torch.strided else weight.layout


def each_once(
    names: Sequence[str], masks: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Masks with their names, one after the other; there has to be one for each name.

    Raises:
        ValueError: names a mask of an unknown weight, or a weight without a mask.
    """
    unknown = sorted(set(masks) - set(names)) if isinstance(masks, Mapping) else []
    missing = set(names)
    for name, mask in masks.items() if isinstance(masks, Mapping) else masks:
        if unknown or name not in names:
            raise ValueError(
                f"There are masks of unknown weights, {unknown[:3] or [name]}: those of this "
                f"model are named like {names[0]!r}."
            )
        missing.discard(name)
        yield name, mask
    for name in names:
        if name in missing:
            raise ValueError(
                f"There is no initial mask for {name!r} among {len(names) - len(missing)} "
                f"masks: give one for every weight, or leave the weight out."
            )


def check_mask(name: str, mask: Any, shape: Sequence[int]) -> None:
    """Refuse a mask that is no tensor of a weight's shape; whether it is N:M is not checked."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"The mask of {name!r} is a {type(mask).__name__}, not a bool tensor.")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(
            f"The mask of {name!r} has shape {tuple(mask.shape)}, but the weight has shape "
            f"{tuple(shape)}: give a mask in the shape of the whole weight."
        )


def check_loss(loss: Any, source: str = "The loss is") -> None:
    """Refuse a loss that is no tensor of one number; the message begins with ``source``."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"{source} {what}, but a loss is a tensor of one number.")


def is_sparse(layout: Layout, weight: Tensor) -> bool:
    """Whether this rank's part of a weight has at most N nonzeros in each group, and any at all."""
    where, weight = layout.uncut(weight.detach())
    found = False
    for _, (values,) in where.blocks(weight):
        counts_G = (values != 0).sum(-1)
        if (counts_G > where.pattern.n).any():
            return False
        found = found or bool(counts_G.any())
    return found
