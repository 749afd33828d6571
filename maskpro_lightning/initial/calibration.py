"""Initial masks by name, calibrated on a model's own batches where the method asks for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed import broadcast

from maskpro_lightning.initial import initializers, reconstruction
from maskpro_lightning.initial.operands import Lying, lying
from maskpro_lightning.initial.statistics import (
    Inputs,
    InputStatistics,
    bytes_needed,
    is_watched,
    layer_shape,
)
from maskpro_lightning.masks import philox
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.weights.targets import Target

Method = Literal["magnitude", "wanda", "sparsegpt", "reconstruction", "random", "nonzeros"]
Batches = Callable[[], Iterable[Callable[[], object]]]
Sum = Callable[[Tensor], Tensor]

_log = logging.getLogger(__name__)
# In the place of a mask that could not be found.
_FAILED = 2
# Statistics held at once; what needs more is collected in several passes over the batches. A weight
# of more than two dimensions that alone needs more, as the experts of a large layer, gets none.
_STATISTICS_BYTES = 2**33
# Each looks at the network that the masks of the round before leave.
_RECONSTRUCTION_ROUNDS = 3


@dataclass(frozen=True)
class Ranks:
    """The ranks of PyTorch's default process group.

    Attributes:
        own: This one.
        number: How many there are.
    """

    own: int
    number: int


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
    batches: Batches | None = None,
    reduce: Sum | None = None,
    whole: Callable[[Tensor], Tensor] = Tensor.detach,
    ranks: Ranks | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Masks of the targets, bool, shaped like the whole weights, each made when it is asked for.

    Args:
        method: "magnitude" (largest |w|), "wanda" (largest |w| times the norm of its input,
            arXiv 2306.11695), "sparsegpt" (the mask of arXiv 2301.00774; its changed weights are
            not used), "reconstruction" (that mask, improved by swaps until the pruned network's
            layers put out most nearly what they should, see ``reconstruction``; seven passes over
            the batches), "random", or "nonzeros" (what an already sparse model kept).
        targets: The weights, which must hold their dense values, and hold them again afterwards.
        pattern: The pattern.
        seed: Seed of "random".
        batches: Goes through the calibration batches, for "wanda", "sparsegpt" and
            "reconstruction"; each item runs the model on one, as often as it is called.
        reduce: Sums a tensor over the data-parallel ranks, so that all find the same masks.
        whole: Gathers a weight of which each rank has a part.
        ranks: Those that find masks by Wanda and SparseGPT together, each its share of them.

    Yields:
        The target's name and its mask.

    Raises:
        ValueError: an unknown method, or one that needs ``batches`` without them.
        RuntimeError: another rank could not find a mask.
    """
    check_method(method)
    if method in ("wanda", "sparsegpt", "reconstruction"):
        if batches is None:
            raise ValueError(f"init={method!r} needs batches to calibrate on.")
        how = _lying(targets, batches, reduce)
        if method == "reconstruction":
            found = _calibrated("sparsegpt", targets, how, pattern, batches, reduce, whole, ranks)
            return iter(_reconstructed(dict(found), targets, how, pattern, batches, reduce).items())
        return _calibrated(method, targets, how, pattern, batches, reduce, whole, ranks)
    return (
        (target.name, _from_weight(method, target, whole(target.parameter), pattern, seed))
        for target in targets
    )


def _lying(targets: Sequence[Target], batches: Batches, reduce: Sum | None) -> dict[str, Lying]:
    """How those weights lie in their products that are not seen by calls of their layers."""
    watched = [target for target in targets if is_watched(target)]
    for run in batches() if watched else ():
        return lying(watched, run, reduce)
    return {}


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
    how: Mapping[str, Lying],
    pattern: NMPattern,
    batches: Batches,
    reduce: Sum | None,
    whole: Callable[[Tensor], Tensor],
    ranks: Ranks | None,
) -> Iterator[tuple[str, Tensor]]:
    second_moments = method == "sparsegpt"
    for some, inputs in _passes(targets, how, second_moments):
        with InputStatistics(inputs, second_moments=second_moments) as statistics:
            for run in batches():
                run()
        if reduce is not None:
            statistics.reduce(reduce)
        find = partial(_from_inputs, statistics, second_moments, pattern)
        if ranks is None:
            yield from ((name, find(t, whole(t.parameter))) for name, t in some.items())
        else:
            yield from _shared(list(some.values()), find, whole, ranks)


def _from_inputs(
    statistics: InputStatistics,
    second_moments: bool,
    pattern: NMPattern,
    target: Target,
    weight: Tensor,
) -> Tensor:
    name, input_dim = target.name, target.input_dim
    if name in statistics.unseen:
        _log.warning("%s: no input seen (called by name?); masked by magnitude.", name)
        return initializers.magnitude(weight, pattern, input_dim)
    if name in statistics.idle:
        idle, parts = statistics.idle[name], len(statistics.norm[name])
        _log.warning("%s: %d of %d parts saw no input; masked by magnitude.", name, idle, parts)
    if second_moments:
        return initializers.sparsegpt(weight, statistics.hessian[name], pattern, input_dim)[0]
    return initializers.wanda(weight, statistics.norm[name], pattern, input_dim)


def _shared(
    targets: Sequence[Target],
    find: Callable[[Target, Tensor], Tensor],
    whole: Callable[[Tensor], Tensor],
    ranks: Ranks,
) -> Iterator[tuple[str, Tensor]]:
    """Let each rank find its share of the masks, and send them to the others."""
    for first in range(0, len(targets), ranks.number):
        some, own, failure = targets[first : first + ranks.number], None, None
        for place, target in enumerate(some):
            weight = whole(target.parameter)
            if place == ranks.own:
                own = target, weight
            device = weight.device
            del weight  # which others need not keep
        if own is not None:
            target, weight = own
            try:
                mask = find(target, weight).to(torch.uint8)
            except Exception as error:  # noqa: BLE001, raised when the others know
                failure, mask = error, torch.full(weight.shape, _FAILED, device=device)
            del weight, own
        for place, target in enumerate(some):
            sent = mask if place == ranks.own else torch.empty(target.shape, device=device)
            sent = sent.to(torch.uint8).contiguous()
            broadcast(sent, place)
            if failure is not None and place == ranks.own:
                raise failure
            if sent.flatten()[0] == _FAILED:
                raise RuntimeError(
                    f"Another rank found no mask for {target.name!r}: see its error."
                )
            yield target.name, sent.bool()


@torch.no_grad()
def _reconstructed(
    masks: dict[str, Tensor],
    targets: Sequence[Target],
    how: Mapping[str, Lying],
    pattern: NMPattern,
    batches: Batches,
    reduce: Sum | None,
) -> dict[str, Tensor]:
    dense = {target.name: target.parameter.detach().clone() for target in targets}

    def write(kept: Mapping[str, Tensor] | None = None) -> None:
        for target in targets:
            weight = dense[target.name]
            target.parameter.copy_(weight if kept is None else weight.where(kept[target.name], 0))

    for _ in range(_RECONSTRUCTION_ROUNDS):
        # H and C for each layer, twice what SparseGPT collects.
        for some, inputs in _passes(targets, how, second_moments=True, copies=2):
            statistics = reconstruction.PairedStatistics(inputs)
            try:
                for run in batches():
                    write()
                    with statistics.dense():
                        run()
                    write(masks)
                    with statistics.pruned():
                        run()
            finally:
                write()
            if reduce is not None:
                statistics.reduce(reduce)
            for name, (hessian, cross) in statistics.moments.items():
                masks[name] = reconstruction.reconstruct(
                    dense[name], hessian, cross, masks[name], pattern, some[name].input_dim
                )
    return masks


def _passes(
    targets: Sequence[Target], how: Mapping[str, Lying], second_moments: bool, copies: int = 1
) -> Iterator[tuple[Mapping[str, Target], Inputs]]:
    """Cut the targets into runs whose statistics fit into memory together."""
    needed, too_large = {}, []
    for target in targets:
        shape = how.get(target.name) or layer_shape(target.module)
        needed[target.name] = copies * bytes_needed(shape, second_moments)
        bounded = target.name in how or isinstance(target.module, nn.Bilinear)
        if bounded and needed[target.name] > _STATISTICS_BYTES:
            gigabytes = needed[target.name] / 2**30
            needed[target.name] = 0
            too_large.append(target.name)
            _log.warning("%s: its inputs' moments need %.0f GiB.", target.name, gigabytes)
    some: dict[str, Target] = {}
    held = 0
    for target in targets:
        if some and held + needed[target.name] > _STATISTICS_BYTES:
            yield some, Inputs(list(some.values()), how, too_large)
            some, held = {}, 0
        some[target.name] = target
        held += needed[target.name]
    if some:
        yield some, Inputs(list(some.values()), how, too_large)
