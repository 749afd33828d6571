"""Joins the mask steps of small blocks into one: to start a step would take longer than to run it.

Shape suffixes: ``G`` groups, ``M`` group size, ``V`` words of a group.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maskpro_lightning.masks import philox
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.optim.fusion import Fusion
from maskpro_lightning.optim.transition import transition
from maskpro_lightning.weights.layout import block_size

#: A block of fewer groups takes less time to be copied twice than its own step takes to start.
SMALL = 2**14


@dataclass(frozen=True)
class Block:
    """A block's arguments for :func:`transition`, and the places of the results.

    Attributes:
        pattern: The pattern.
        groups: int64 (...), the groups' numbers.
        state: Words of the weights, the rest, the logits and the masks, each (..., V).
        key: The draw's key, as numbers or as int64 (G,).
        step: The number of the draw.
        lean: Whether the rest holds the pruned weights alone, see :func:`exchange`.
        change: Scalar or None; the logits move against it along grad log P(drawn mask).
        places: The views that take the next weights, logits and masks, and if lean the rest.
        seen: Selects, from one number for each group, those that this rank counts.
        redrawn: int64 scalar that takes the number of groups whose mask has changed.
        done: int64 scalar on the CPU that takes the number of the weight's blocks that are done.
        number: The block's number in the weight.
    """

    pattern: NMPattern
    groups: Tensor
    state: tuple[Tensor, ...]
    key: philox.Key
    step: int
    lean: bool
    change: Tensor | None
    places: tuple[Tensor, ...]
    seen: Callable[[Tensor], Tensor]
    redrawn: Tensor
    done: Tensor
    number: int

    @property
    def kind(self) -> Hashable:
        """Equal for blocks whose steps can be joined."""
        like = [(t.shape[-1], t.dtype, t.device) for t in (*self.state, *self.places)]
        return self.pattern, self.step, self.lean, id(self.change), tuple(like)


class Together:
    """Runs the steps of blocks; small ones wait for others, at most until :meth:`finish`."""

    def __init__(self, fusion: Fusion) -> None:
        self._fusion = fusion
        self._waiting: defaultdict[Hashable, list[Block]] = defaultdict(list)
        self._groups: Counter[Hashable] = Counter()

    def another(self) -> Together:
        """A new one that runs steps in the same way, with no block waiting."""
        return Together(self._fusion)

    def add(self, block: Block, *, now: bool = False) -> None:
        """Run a block's step; a small block waits for others of its kind, unless ``now``."""
        size = block.groups.numel()
        if now or size >= SMALL:
            self._make([block])
            return
        kind = block.kind
        if self._groups[kind] and self._groups[kind] + size > block_size(block.groups.device):
            self._make(self._waiting.pop(kind))
            del self._groups[kind]
        self._waiting[kind].append(block)
        self._groups[kind] += size

    def finish(self) -> None:
        """Run the steps of all blocks that wait."""
        while self._waiting:
            _, blocks = self._waiting.popitem()
            self._make(blocks)
        self._groups.clear()

    def _make(self, blocks: list[Block]) -> None:
        one = blocks[0] if len(blocks) == 1 else _joined(blocks)
        *found, changed = self._fusion(
            transition,
            one.pattern,
            one.groups,
            *one.state,
            one.key,
            torch.full((), one.step, device=one.groups.device),
            one.lean,
            one.change,
        )
        sizes = [block.groups.numel() for block in blocks]
        places: list[Tensor] = []
        values: list[Tensor] = []
        for number, result in enumerate(found):
            places += [block.places[number] for block in blocks]
            parts = result.flatten(0, -2).split(sizes)
            values += [
                part.view(place.shape)
                for part, place in zip(parts, places[-len(blocks) :], strict=True)
            ]
        places += [block.redrawn for block in blocks]
        values += _counts(blocks, changed, sizes)
        places += [block.done for block in blocks]
        values += [torch.tensor(block.number + 1) for block in blocks]
        # One call, so that an exception leaves each block as it was or as it should be.
        torch._foreach_copy_(places, values)


def _counts(blocks: Sequence[Block], changed: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The number of groups of each block whose mask has changed."""
    if len(blocks) == 1:
        return [blocks[0].seen(changed).sum()]
    lengths = torch.tensor(sizes, device=changed.device)
    return list(torch.segment_reduce(changed.flatten().float(), "sum", lengths=lengths).unbind())


def _joined(blocks: list[Block]) -> Block:
    """Blocks of one kind as one; its places are still those of the first."""

    def joined(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([tensor.flatten(0, -2) for tensor in tensors])

    # Added to zeros, since copying a number to a device would wait for the device.
    keys = [
        torch.cat([torch.zeros_like(block.groups.flatten()) + block.key[k] for block in blocks])
        for k in (0, 1)
    ]
    return replace(
        blocks[0],
        groups=torch.cat([block.groups.flatten() for block in blocks]),
        state=tuple(map(joined, zip(*(block.state for block in blocks), strict=True))),
        key=(keys[0], keys[1]),
    )
