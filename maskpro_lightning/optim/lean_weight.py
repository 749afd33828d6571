"""One weight under masks in the least memory: kept weights in the weight, pruned ones beside it.

There is no second copy of the weight, so to write a version of it is to exchange weights between
the two places, and half an exchange would lose some. Each block is therefore exchanged in one call
that no exception can part, which also counts it; what was interrupted between blocks is finished
before anything else is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from maskpro_lightning.masks import columns, philox
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.optim.fusion import Fusion
from maskpro_lightning.optim.masked_weight import (
    GRADIENT_SHARE,
    Draw,
    Groups,
    Version,
    columns_of,
    direct_block,
    move_block,
)
from maskpro_lightning.optim.transition import (
    DRAWN,
    INITIAL,
    PREVIOUS,
    exchange,
    lean_transition,
)
from maskpro_lightning.optim.words import (
    flags_of,
    integers_of,
    logits_of,
    logits_to,
    masks_of,
    words_of,
)
from maskpro_lightning.weights.layout import block_size

_NO_BEST = "memory='lean' does not keep the best mask: choose memory='plain'."


@dataclass
class Held:
    """Which version a weight holds, and how far it is on its way to another."""

    version: Version = "dense"
    _way: tuple[Version, Callable[[Tensor], None], Tensor] | None = field(default=None, init=False)

    def become(self, version: Version, move: Callable[[Tensor], None]) -> None:
        """Move all blocks.

        Args:
            version: What the weight holds then.
            move: Moves the blocks from a number on, which it raises with each.
        """
        self.settle()
        self._way = version, move, torch.zeros((), dtype=torch.int64)
        self.settle()

    def settle(self) -> None:
        """Finish what was interrupted."""
        if self._way is not None:
            version, move, done = self._way
            move(done)
            self.version = version
            self._way = None


@dataclass(frozen=True)
class LeanWeight:
    """A weight and the state of its masks.

    Attributes:
        name: The weight's name, which its draws depend on.
        pattern: The pattern.
        input_dim: The dimension that groups lie along.
        weight: Holds one version or another; written in place.
        pruned: What that version leaves out, in the weight's shape with M - N for M inputs.
        logits: float32 or bfloat16, in the weight's shape.
        masks: uint8, the initial and the drawn mask in two bits per weight: in the weight's shape
            with the bytes of a group for M inputs.
        redrawn: int64 (blocks,), the number of groups with another mask than in the draw before.
        held: What the weight holds.
    """

    name: str
    pattern: NMPattern
    input_dim: int
    weight: Tensor
    pruned: Tensor
    logits: Tensor
    masks: Tensor
    redrawn: Tensor
    held: Held

    @staticmethod
    def state(
        weight: Tensor,
        mask: Tensor,
        logits: Tensor,
        pattern: NMPattern,
        input_dim: int,
    ) -> dict[str, Tensor]:
        """The state of a weight with its initial mask, bool, and logits, both in its shape."""
        state = _empty(weight, logits, pattern, input_dim)
        for _, kept, masks in _blocks(pattern, input_dim, mask, state["masks"]):
            initial_M = [flag.int() for flag in kept.unbind(-1)]
            masks.copy_(masks_of(initial_M, initial_M))
        return state

    def move(self, draw: Draw, direction: Tensor, scale: Tensor, part: int, fusion: Fusion) -> None:
        """See :meth:`MaskedWeight.move`."""
        step = torch.full((), draw.step, device=self.weight.device)
        about = self._key(draw), step, scale, part
        for groups_G, moves, logits in self._blocks(direction, self.logits):
            move_block(fusion, self.pattern, groups_G, logits, moves, *about)

    def advance(self, draw: Draw, change: Tensor | None, fusion: Fusion) -> None:
        """Move the logits, then draw the next mask and write it into the weight.

        Args:
            draw: The next draw.
            change: (1,); the logits move against it along grad log P(drawn mask).
            fusion: Runs the step of a block.
        """
        self.held.settle()
        if self.held.version != "drawn":
            self.write("drawn")
        along_score = None if change is None else change[0]
        self.held.become("drawn", partial(self._advance, draw, along_score, fusion))

    def direction(self, gradient: Tensor, sharpness: float, fusion: Fusion) -> Tensor:
        """See :meth:`MaskedWeight.direction`."""
        self.held.settle()
        total = torch.zeros((), device=gradient.device)
        for groups_G, values, logits, weight, pruned, masks in self._blocks(
            gradient, self.logits, self.weight, self.pruned, self.masks, share=GRADIENT_SHARE
        ):
            dense = self._dense(weight, pruned, logits, masks)
            direct_block(fusion, self.pattern, groups_G, values, dense, logits, sharpness)
            total += values.float().square().sum()
        return total

    def write(self, version: Version) -> None:
        """Write a version of the weight into it."""
        self.held.settle()
        if version != self.held.version:
            self.held.become(version, partial(self._exchange, self.held.version, version))

    def remember(self) -> None:
        """Refuse to keep a third mask.

        Raises:
            ValueError: always.
        """
        raise ValueError(_NO_BEST)

    def mask(self, version: Version) -> Tensor:
        """The mask of a version, bool in the weight's shape."""
        found = torch.ones_like(self.weight, dtype=torch.bool)
        for _, kept, logits, masks in self._blocks(found, self.logits, self.masks):
            flags_M = self._flags(version, logits, masks)
            if flags_M is not None:
                kept.copy_(torch.stack(flags_M, dim=-1))
        return found

    def groups(self, sharpness: float) -> Iterator[Groups]:
        """Go through all groups in blocks, for statistics."""
        self.held.settle()
        parts = self._blocks(self.weight, self.pruned, self.logits, self.masks)
        for number, (_, weight, pruned, logits, masks) in enumerate(parts):
            initial_GM, drawn_GM = (
                columns_of(torch.stack(flags_M, dim=-1).bool())
                for flags_M in flags_of(masks, self.pattern.m)
            )
            yield Groups(
                self.name,
                self.pattern,
                columns_of(self._dense(weight, pruned, logits, masks)),
                columns_of(logits).float() * sharpness,
                initial_GM,
                drawn_GM,
                self.redrawn[number],
            )

    def saved(self) -> dict[str, Tensor]:
        """The state as a :class:`MaskedWeight` has it, and the groups redrawn."""
        self.held.settle()
        dense = self.weight.detach().clone()
        masks = torch.empty_like(dense, dtype=torch.uint8)
        for _, weight, pruned, logits, packed, bits in self._blocks(
            dense, self.pruned, self.logits, self.masks, masks
        ):
            weight.copy_(self._dense(weight, pruned, logits, packed))
            both = zip(*flags_of(packed, self.pattern.m), strict=True)
            flags_M = [i * INITIAL | drawn * (DRAWN | PREVIOUS) for i, drawn in both]
            bits.copy_(torch.stack(flags_M, dim=-1))
        redrawn = self.redrawn.sum()
        return {"dense": dense, "logits": self.logits, "masks": masks, "redrawn": redrawn}

    def _key(self, draw: Draw) -> tuple[int, int]:
        return philox.key_of(draw.seed, self.name)

    def _advance(self, draw: Draw, change: Tensor | None, fusion: Fusion, done: Tensor) -> None:
        key, step = self._key(draw), torch.full((), draw.step, device=self.weight.device)
        parts = self._blocks(self.weight, self.pruned, self.logits, self.masks)
        for number, (groups_G, weight, pruned, logits, masks) in enumerate(parts):
            if number < done:
                continue
            *found, redrawn = fusion(
                lean_transition,
                self.pattern,
                groups_G.view(logits.shape[:-1]),
                words_of(weight),
                words_of(pruned),
                logits_of(logits),
                masks,
                key,
                step,
                draw.sharpness,
                change,
            )
            places = [integers_of(weight), integers_of(pruned), logits_to(logits), masks]
            counts = [self.redrawn[number], done]
            torch._foreach_copy_([*places, *counts], [*found, redrawn.sum(), done + 1])

    def _exchange(self, before: Version, after: Version, done: Tensor) -> None:
        parts = self._blocks(self.weight, self.pruned, self.logits, self.masks)
        for number, (_, weight, pruned, logits, masks) in enumerate(parts):
            if number < done:
                continue
            held_M, next_M = (self._flags(v, logits, masks) for v in (before, after))
            words = exchange(self.pattern, words_of(weight), words_of(pruned), held_M, next_M)
            torch._foreach_copy_(
                [integers_of(weight), integers_of(pruned), done], [*words, done + 1]
            )

    def _blocks(self, *tensors: Tensor, share: int = 1) -> Iterator[tuple[Tensor, ...]]:
        return _blocks(self.pattern, self.input_dim, *tensors, share=share)

    def _dense(self, weight: Tensor, pruned: Tensor, logits: Tensor, masks: Tensor) -> Tensor:
        """A block of the dense weight, (..., M), a copy."""
        held_M = self._flags(self.held.version, logits, masks)
        words, _ = exchange(self.pattern, words_of(weight), words_of(pruned), held_M, None)
        dense = torch.empty_like(weight, memory_format=torch.contiguous_format)
        # What is contiguous could hold pairs where the block cannot.
        integers_of(dense, weight).copy_(words)
        return dense

    def _flags(self, version: Version, logits: Tensor, masks: Tensor) -> list[Tensor] | None:
        """The columns of a block's mask of a version, int32; None for all weights."""
        if version == "dense":
            return None
        if version == "best":
            raise ValueError(_NO_BEST)
        if version == "mode":
            return [flag.int() for flag in columns.top(logits.unbind(-1), self.pattern.n)]
        initial_M, drawn_M = flags_of(masks, self.pattern.m)
        return initial_M if version == "initial" else drawn_M


def loaded(saved: dict[str, Tensor], pattern: NMPattern, input_dim: int) -> dict[str, Tensor]:
    """The state for what :meth:`LeanWeight.saved` gives, with a weight that holds ``dense``."""
    state = _empty(saved["dense"], saved["logits"], pattern, input_dim)
    for _, bits, masks in _blocks(pattern, input_dim, saved["masks"], state["masks"]):
        initial, drawn, previous = (bits // bit & 1 for bit in (INITIAL, DRAWN, PREVIOUS))
        masks.copy_(masks_of(initial.int().unbind(-1), drawn.int().unbind(-1)))
        state["redrawn"][0] += (drawn != previous).any(-1).sum()
    if "redrawn" in saved:
        state["redrawn"][0] = saved["redrawn"]
    return state


def _blocks(
    pattern: NMPattern, input_dim: int, *tensors: Tensor, share: int = 1
) -> Iterator[tuple[Tensor, ...]]:
    """Go through tensors with something for each group in blocks of whole groups.

    Args:
        pattern: The pattern.
        input_dim: The dimension that groups lie along.
        tensors: The first of the weight's shape; others may have another number for each group.
        share: Take so many times fewer groups at once.

    Yields:
        int64 (G,), the groups' numbers in the weight, and a view of each tensor, of which the last
        dimension holds what belongs to a group.
    """
    along = tensors[0].shape[input_dim] // pattern.m
    views = [
        tensor.detach().movedim(input_dim, -1).unflatten(-1, (along, -1)) for tensor in tensors
    ]
    groups_in_row = views[0][0].numel() // pattern.m
    rows = max(1, block_size(views[0].device) // share // max(1, groups_in_row))
    for first in range(0, len(views[0]), rows):
        parts = [view[first : first + rows] for view in views]
        start, number = first * groups_in_row, parts[0].numel() // pattern.m
        yield torch.arange(start, start + number, device=views[0].device), *parts


def _empty(weight: Tensor, logits: Tensor, pattern: NMPattern, input_dim: int) -> dict[str, Tensor]:
    shapes = {"pruned": pattern.m - pattern.n, "masks": -(-pattern.m // 4)}
    groups = weight.shape[input_dim] // pattern.m
    number = sum(1 for _ in _blocks(pattern, input_dim, weight))

    def zeros(each: int, dtype: torch.dtype) -> Tensor:
        shape = list(weight.shape)
        shape[input_dim] = groups * each
        return torch.zeros(shape, dtype=dtype, device=weight.device)

    return {
        "pruned": zeros(shapes["pruned"], weight.dtype),
        "logits": logits,
        "masks": zeros(shapes["masks"], torch.uint8),
        "redrawn": torch.zeros(number, dtype=torch.int64, device=weight.device),
    }
