"""Initial masks by name, calibrated on a model's own batches where the method asks for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, get_args

from torch import Tensor

from maskpro_lightning import initializers, philox
from maskpro_lightning.pattern import NMPattern
from maskpro_lightning.targets import Target

Method = Literal["magnitude", "wanda", "sparsegpt", "random", "nonzeros"]

_log = logging.getLogger(__name__)
# Statistics held at once; what needs more is collected in several passes over the batches.
_STATISTICS_BYTES = 2**33


def check_method(method: str) -> None:
    """Refuse a method that :func:`initial_masks` does not know.

    Raises:
        ValueError: names the methods that there are.
    """
    if method not in get_args(Method):
        raise ValueError(
            f"init is one of {', '.join(get_args(Method))}, a .safetensors file of masks, or masks "
            f"by parameter name; got {method!r}."
        )


def initial_masks(
    method: str,
    targets: Sequence[Target],
    pattern: NMPattern,
    *,
    seed: int = 0,
    forward: Callable[[], None] | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
    whole: Callable[[Tensor], Tensor] = Tensor.detach,
) -> Iterator[tuple[str, Tensor]]:
    """Masks of the targets, bool, shaped like the whole weights, each made when it is asked for.

    Args:
        method: "magnitude" (largest |w|), "wanda" (largest |w| times the norm of its input,
            arXiv 2306.11695), "sparsegpt" (the mask of arXiv 2301.00774; its changed weights are
            not used), "random", or "nonzeros" (what an already sparse model kept).
        targets: The weights, which must hold their dense values.
        pattern: The pattern.
        seed: Seed of "random".
        forward: Runs the model over the calibration batches; for "wanda" and "sparsegpt".
        reduce: Sums a tensor over the data-parallel ranks, so that all find the same masks.
        whole: Gathers a weight of which each rank has a part.

    Yields:
        The target's name and its mask.

    Raises:
        ValueError: an unknown method, or one that needs ``forward`` without it.
    """
    check_method(method)
    if method in ("wanda", "sparsegpt"):
        if forward is None:
            raise ValueError(f"init={method!r} needs batches to calibrate on.")
        return _calibrated(method, targets, pattern, forward, reduce, whole)
    return (
        (target.name, _from_weight(method, target, whole(target.parameter), pattern, seed))
        for target in targets
    )


def _from_weight(
    method: str, target: Target, weight: Tensor, pattern: NMPattern, seed: int
) -> Tensor:
    input_dim = target.input_dim
    if method == "random":
        key = philox.key_of(seed, target.name, "initial mask")
        return initializers.random(weight, pattern, input_dim, key=key)
    if method == "nonzeros":
        return initializers.nonzeros(weight, pattern, input_dim, name=target.name)
    return initializers.magnitude(weight, pattern, input_dim)


def _calibrated(
    method: str,
    targets: Sequence[Target],
    pattern: NMPattern,
    forward: Callable[[], None],
    reduce: Callable[[Tensor], Tensor] | None,
    whole: Callable[[Tensor], Tensor],
) -> Iterator[tuple[str, Tensor]]:
    second_moments = method == "sparsegpt"
    for some in _passes(targets, second_moments):
        modules = {target.name: target.module for target in some.values()}
        with initializers.InputStatistics(modules, second_moments=second_moments) as statistics:
            forward()
        if reduce is not None:
            statistics.reduce(reduce)
        for name, target in some.items():
            weight, input_dim = whole(target.parameter), target.input_dim
            if name in statistics.unseen:
                _log.warning("%s: no input seen (called by name?); masked by magnitude.", name)
                mask = initializers.magnitude(weight, pattern, input_dim)
            elif second_moments:
                hessian = statistics.hessian[name]
                mask, _ = initializers.sparsegpt(weight, hessian, pattern, input_dim)
            else:
                mask = initializers.wanda(weight, statistics.norm[name], pattern, input_dim)
            yield name, mask


def _passes(targets: Sequence[Target], second_moments: bool) -> Iterator[Mapping[str, Target]]:
    """Cut the targets into runs whose statistics fit into memory together."""
    some: dict[str, Target] = {}
    held = 0
    for target in targets:
        needed = initializers.bytes_needed(target.module, second_moments)
        if some and held + needed > _STATISTICS_BYTES:
            yield some
            some, held = {}, 0
        some[target.name] = target
        held += needed
    if some:
        yield some
