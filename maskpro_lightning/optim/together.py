"""Makes the mask steps of many small blocks as one, since each would cost more to start than to do.

Shape suffixes: ``G`` groups, ``M`` group size, ``V`` words of a group.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maskpro_lightning.masks import philox
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.optim.fusion import Fusion
from maskpro_lightning.optim.transition import transition
from maskpro_lightning.weights.layout import block_size

# Groups below which copying a block, twice, takes less time than starting its step.
_SMALL = 2**14


@dataclass(frozen=True)
class Block:
    """What :func:`transition` takes for a block, and where its results go.

    Attributes:
        pattern: The pattern.
        groups: int64 (...), the groups' numbers.
        state: Dense weights, logits and masks, each (..., V).
        key: What its draws depend on besides, as numbers or as int64 (G,).
        step: int64 scalar, the number of the draw.
        sharpness: Its sharpness.
        change: (1,) or None; the logits move against it along grad log P(drawn mask).
        direction: (..., M) or None; the logits move against it.
        places: Views of weight, logits and masks, like ``state``.
    """

    pattern: NMPattern
    groups: Tensor
    state: tuple[Tensor, ...]
    key: philox.Key
    step: int
    sharpness: float
    change: Tensor | None
    direction: Tensor | None
    places: tuple[Tensor, ...]

    @property
    def kind(self) -> Hashable:
        """The same for blocks whose steps can be made as one."""
        moves = [] if self.direction is None else [self.direction]
        like = [(t.shape[-1], t.dtype, t.device) for t in (*self.state, *self.places, *moves)]
        return self.pattern, self.step, self.sharpness, id(self.change), tuple(like)


class Together:
    """Makes steps, those of small blocks later than asked for; all are made by :meth:`finish`."""

    def __init__(self, fusion: Fusion) -> None:
        self._fusion = fusion
        self._waiting: defaultdict[Hashable, list[Block]] = defaultdict(list)
        self._groups: Counter[Hashable] = Counter()

    def add(self, block: Block, *, now: bool = False) -> None:
        """Make a step, or put it off until there are more of its kind unless it has to be made."""
        size = block.groups.numel()
        if now or size >= _SMALL:
            self._make([block])
            return
        kind = block.kind
        if self._groups[kind] and self._groups[kind] + size > block_size(block.groups.device):
            self._make(self._waiting.pop(kind))
            del self._groups[kind]
        self._waiting[kind].append(block)
        self._groups[kind] += size

    def finish(self) -> None:
        """Make what has been put off."""
        while self._waiting:
            _, blocks = self._waiting.popitem()
            self._make(blocks)
        self._groups.clear()

    def _make(self, blocks: list[Block]) -> None:
        one = blocks[0] if len(blocks) == 1 else _joined(blocks)
        found = self._fusion(
            transition,
            one.pattern,
            one.groups,
            *one.state,
            one.key,
            torch.full((), one.step, device=one.groups.device),
            one.sharpness,
            None if one.change is None else one.change[0],
            one.direction,
        )
        sizes = [block.groups.numel() for block in blocks]
        parts = [result.flatten(0, -2).split(sizes) for result in found]
        # One call, so that an exception leaves a block as it was or as it should be.
        torch._foreach_copy_(
            [place for block in blocks for place in block.places],
            [
                part.view(place.shape)
                for block, *results in zip(blocks, *parts, strict=True)
                for place, part in zip(block.places, results, strict=True)
            ],
        )


def _joined(blocks: list[Block]) -> Block:
    """Blocks of a kind as one, a copy, whose groups have keys of their own."""
    first = blocks[0]

    def joined(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([tensor.flatten(0, -2) for tensor in tensors])

    states = zip(*(block.state for block in blocks), strict=True)
    directions = [block.direction for block in blocks if block.direction is not None]
    # Adding a number does not wait for the device, as copying it there would.
    keys = [
        torch.cat([torch.zeros_like(block.groups.flatten()) + block.key[k] for block in blocks])
        for k in (0, 1)
    ]
    return replace(
        first,
        groups=torch.cat([block.groups.flatten() for block in blocks]),
        state=tuple(map(joined, states)),
        key=(keys[0], keys[1]),
        direction=joined(directions) if directions else None,
    )
