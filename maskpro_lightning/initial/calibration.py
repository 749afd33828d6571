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
from maskpro_lightning.weights.parts import Parts
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
    model: nn.Module | None = None,
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
        model: What FSDP has wrapped, if it has.
        ranks: Those that find masks on batches together, each its share of them.

    Yields:
        The target's name and its mask.

    Raises:
        ValueError: an unknown method, or one that needs ``batches`` without them.
        RuntimeError: another rank could not find a mask.
    """
    check_method(method)
    parts = Parts(targets, pattern, model)
    if method in ("wanda", "sparsegpt", "reconstruction"):
        if batches is None:
            raise ValueError(f"init={method!r} needs batches to calibrate on.")
        how = _lying(targets, batches, reduce)
        one_shot = "sparsegpt" if method == "reconstruction" else method
        found = _calibrated(one_shot, targets, how, pattern, batches, reduce, parts, ranks)
        if method == "reconstruction":
            return _reconstructed(found, targets, how, pattern, batches, reduce, parts, ranks)
        return found
    return (
        (target.name, _from_weight(method, target, parts.whole(target.name), pattern, seed))
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
    parts: Parts,
    ranks: Ranks | None,
) -> Iterator[tuple[str, Tensor]]:
    def gather(name: str) -> tuple[Tensor]:
        return (parts.whole(name),)

    second_moments = method == "sparsegpt"
    for some, inputs in _passes(targets, how, second_moments):
        with InputStatistics(inputs, second_moments=second_moments) as statistics:
            for run in batches():
                run()
        if reduce is not None:
            statistics.reduce(reduce)
        find = partial(_from_inputs, statistics, second_moments, pattern)
        yield from _shared(list(some.values()), find, gather, ranks)


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
    find: Callable[..., Tensor],
    gather: Callable[[str], tuple[Tensor, ...]],
    ranks: Ranks | None,
) -> Iterator[tuple[str, Tensor]]:
    """Let each rank find its share of the masks, and send them to the others.

    Args:
        targets: The weights.
        find: Makes a mask of a target and of what was gathered for it.
        gather: Gathers that, the weight first; a collective.
        ranks: Those that find masks together; None for this process alone.
    """
    if ranks is None:
        yield from ((target.name, find(target, *gather(target.name))) for target in targets)
        return
    for first in range(0, len(targets), ranks.number):
        some, own, failure = targets[first : first + ranks.number], None, None
        for place, target in enumerate(some):
            gathered = gather(target.name)
            if place == ranks.own:
                own = target, gathered
            device = gathered[0].device
            del gathered  # which others need not keep
        if own is not None:
            target, gathered = own
            try:
                mask = find(target, *gathered).to(torch.uint8)
            except Exception as error:  # noqa: BLE001, raised when the others know
                failure, mask = error, torch.full(target.shape, _FAILED, device=device)
            del gathered, own
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
    found: Iterable[tuple[str, Tensor]],
    targets: Sequence[Target],
    how: Mapping[str, Lying],
    pattern: NMPattern,
    batches: Batches,
    reduce: Sum | None,
    parts: Parts,
    ranks: Ranks | None,
) -> Iterator[tuple[str, Tensor]]:
    """Improve masks; a rank keeps its parts of them and of the dense weights."""
    kept = {name: parts.take(name, mask) for name, mask in found}
    parts.reshard()
    dense = {target.name: parts.own(target.name).clone() for target in targets}

    def write(masks: Mapping[str, Tensor] | None = None) -> None:
        parts.reshard()
        for name, weight in dense.items():
            parts.own(name).copy_(weight if masks is None else weight.where(masks[name], 0))

    def gather(name: str) -> tuple[Tensor, Tensor]:
        return parts.join(name, dense[name]), parts.join(name, kept[name])

    for _ in range(_RECONSTRUCTION_ROUNDS):
        # H and C for each layer, twice what SparseGPT collects.
        for some, inputs in _passes(targets, how, second_moments=True, copies=2):
            statistics = reconstruction.PairedStatistics(inputs)
            try:
                for run in batches():
                    write()
                    with statistics.dense():
                        run()
                    write(kept)
                    with statistics.pruned():
                        run()
            finally:
                write()
            if reduce is not None:
                statistics.reduce(reduce)
            moments = statistics.moments
            find = partial(_from_moments, moments, pattern)
            seen = [some[name] for name in moments]
            for name, mask in _shared(seen, find, gather, ranks):
                kept[name] = parts.take(name, mask)
    return ((target.name, parts.join(target.name, kept[target.name])) for target in targets)


def _from_moments(
    moments: Mapping[str, tuple[Tensor, Tensor]],
    pattern: NMPattern,
    target: Target,
    weight: Tensor,
    mask: Tensor,
) -> Tensor:
    return reconstruction.reconstruct(
        weight, *moments[target.name], mask, pattern, target.input_dim
    )


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
