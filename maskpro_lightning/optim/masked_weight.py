"""One masked weight: the versions that it can hold, its state, and a step on both.

The weight holds one version at a time: its dense values under one mask or another. A tensor beside
it, the *rest*, holds what the version lacks:

- in *plain* memory a copy of the dense weight. A version is written anew, whatever the weight
  holds;
- in *lean* memory the pruned values alone. To write a version, values are exchanged between weight
  and rest, and half an exchange would lose some. So one call writes a block and counts it as done,
  which no exception can split. A write that was interrupted between blocks is finished before
  anything else happens.

All work goes block by block: temporaries fit in the processor's cache, and none is as large as a
layer.

Shape suffixes: ``G`` groups of a block, ``M`` group size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import mul
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from maskpro_lightning.masks import columns, philox
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.optim.fusion import Fusion
from maskpro_lightning.optim.together import Block, Together
from maskpro_lightning.optim.transition import directed, exchange, moved
from maskpro_lightning.optim.words import (
    flags_of,
    integers_of,
    logits_of,
    logits_to,
    masks_of,
    one_by_one,
    words_of,
)
from maskpro_lightning.weights.layout import INTEGERS, Layout, block_size

Version = Literal["dense", "initial", "drawn", "mode", "best"]

# How many times smaller the blocks of a gradient are: it takes ten temporary numbers per weight, or
# hundreds for a large pattern. That costs no time.
_GRADIENT_SHARE = 4

#: The bits of the masks in a saved state, a byte per weight; 4 was once the draw before the last.
BITS: dict[Version, int] = {"initial": 1, "drawn": 2, "best": 8}


@dataclass(frozen=True)
class Draw:
    """The seed and the number of a draw.

    A draw depends on these, the logits, the weight's name and the group's number alone.

    Attributes:
        seed: Seed of all draws.
        step: Number of the draw, in [0, 2^48).
    """

    seed: int
    step: int


@dataclass(frozen=True)
class Groups:
    """Some groups of one weight, (G, M): dense values, logits, the initial and the drawn masks."""

    name: str
    pattern: NMPattern
    dense_GM: Tensor
    logits_GM: Tensor
    initial_GM: Tensor
    drawn_GM: Tensor


@dataclass(frozen=True)
class Lines:
    """All groups of a small weight and their gradient.

    Attributes:
        groups_G: int64, their numbers.
        gradient: (..., M), a view.
        dense: The dense weight, (..., M).
        logits: (..., M), a view; bfloat16 as int16.
    """

    groups_G: Tensor
    gradient: Tensor
    dense: Tensor
    logits: Tensor


@dataclass
class Held:
    """The version that a weight holds, and the write of another one that is under way, if any.

    Attributes:
        version: What the weight holds.
        bits: The sum of the dense weight's bits, by which lean memory checks its values.
    """

    version: Version = "dense"
    bits: Tensor | None = None
    _way: tuple[Version, Callable[[Tensor], None], Tensor] | None = field(default=None, init=False)

    def holds(self, version: Version) -> bool:
        """Whether the weight holds a version, and is not on its way to another."""
        return version == self.version and self._way is None

    def begin(self, version: Version, move: Callable[[Tensor], None]) -> Tensor:
        """Begin to write a version; :meth:`arrive` finishes it.

        Args:
            version: What the weight holds once all blocks are written.
            move: Given the number of blocks that are done, writes the others and counts them in it.

        Returns:
            The number of blocks that are done, now 0; int64 scalar on the CPU.
        """
        self.arrive()
        done = torch.zeros((), dtype=torch.int64)
        self._way = version, move, done
        return done

    def arrive(self) -> None:
        """Finish the write that has begun or was interrupted, if any."""
        if self._way is not None:
            version, move, done = self._way
            move(done)
            self.version = version
            self._way = None


@dataclass(frozen=True)
class MaskedWeight:
    """This rank's part of a weight and of the state of its masks.

    Attributes:
        name: The weight's name, which its draws depend on.
        layout: Where the part lies in the whole weight.
        weight: Holds one version or another; written in place.
        held: Which version that is.
        lean: Whether ``rest`` holds the values that the held version prunes, or else a copy of the
            dense weight.
        rest: M - N values for each group if lean, else M; padded to whole groups.
        logits: float32 or bfloat16, padded to whole groups.
        masks: uint8, the initial and the drawn mask of each group in 2 M bits, padded to bytes and
            to whole groups.
        redrawn: int64 (blocks,), the number of groups whose mask the last draw has changed.
        best: The remembered mask, a bit per weight, on the CPU; None if none is remembered.
    """

    name: str
    layout: Layout
    weight: Tensor
    held: Held
    lean: bool
    rest: Tensor
    logits: Tensor
    masks: Tensor
    redrawn: Tensor
    best: Tensor | None = None

    @staticmethod
    def state(
        layout: Layout,
        weight: Tensor,
        initial: Tensor,
        drawn: Tensor,
        logits: Tensor,
        *,
        lean: bool,
    ) -> dict[str, Tensor]:
        """The state of a weight that is dense now, by name; on the meta device, its shapes.

        Args:
            layout: Where this rank's part lies.
            weight: The dense part, padded with other ranks' values of its groups.
            initial: Its initial mask, bool, padded.
            drawn: The mask to go on from, bool, padded.
            logits: Its logits, padded.
            lean: Whether to keep the pruned values alone, and not a dense copy.
        """
        pattern = layout.pattern
        masks = _beside(layout, logits, -(-pattern.m // 4), torch.uint8)
        blocks = 0
        for _, (out, *both) in layout.blocks(state=(masks, initial, drawn)):
            blocks += 1
            flags_2M = [[flag.int() for flag in mask.unbind(-1)] for mask in both]
            out.copy_(masks_of(*flags_2M))
        if lean:
            rest = _beside(layout, logits, pattern.m - pattern.n, weight.dtype)
        else:
            rest = weight.detach().clone()
        redrawn = torch.zeros(blocks, dtype=torch.int64, device=weight.device)
        name = "pruned" if lean else "dense"
        return {name: rest, "logits": logits, "masks": masks, "redrawn": redrawn}

    def one_block(self, gradient: Tensor) -> Lines:
        """The whole of a small weight and its gradient as one block; it must cut no group."""
        self.held.arrive()
        for groups_G, (values, weight, *state) in self._blocks(gradient):
            return Lines(groups_G, values, self._dense(weight, *state), one_by_one(state[1]))
        numbers = torch.empty(0, dtype=torch.int64, device=gradient.device)
        empty = torch.empty(0, self.layout.pattern.m, device=gradient.device)
        logits = one_by_one(empty.to(self.logits.dtype))
        return Lines(numbers, empty.to(gradient.dtype), empty.to(self.weight.dtype), logits)

    def direction(self, gradient: Tensor, unit: Tensor, fusion: Fusion) -> Tensor:
        """Replace a gradient, in place, by the gradient of the expected loss in the logits.

        Args:
            gradient: In the weights, padded with other ranks' values of the part's groups.
            unit: Scalar that it is divided by.
            fusion: Runs the step of a block.

        Returns:
            The sum of the squares of the result, a scalar; a group that is cut counts on one rank.
        """
        self.held.arrive()
        total = torch.zeros((), device=gradient.device)
        # Plain memory needs only the dense copy, which is padded already where the weight is cut.
        weight = self.weight if self.lean else self.rest
        beside = gradient, weight, *self._state()
        blocks = self.layout.blocks(state=beside, share=_GRADIENT_SHARE)
        for number, (groups_G, (values, weight, *state)) in enumerate(blocks):
            logits = state[1]
            about = (unit,), values, self._dense(weight, *state), logits_of(logits)
            groups = groups_G.view(logits.shape[:-1])
            (found,) = fusion(directed, self.layout.pattern, groups, *about)
            values.copy_(found)
            squares = values.float().square()
            if self.layout.cut:
                squares = self.layout.seen_first(number, squares.sum(-1))
            total += squares.sum()
        return total

    def move(
        self,
        draw: Draw,
        direction: Tensor,
        scale: Tensor,
        bound: float,
        part: int,
        fusion: Fusion,
    ) -> None:
        """Move the logits against ``scale * direction``, each by at most a bound.

        Args:
            draw: The next draw.
            direction: Shaped like the padded part.
            scale: Scalar; if it is 0, the direction may be NaN.
            bound: The largest move.
            part: The number of this move among those before the draw, from 0.
            fusion: Runs the step of a block.
        """
        step = torch.full((), draw.step, device=self.weight.device)
        most = torch.full((), bound, device=self.weight.device)
        about = self.key(draw), step, (scale,), most, part
        for groups_G, (moves, logits) in self.layout.blocks(state=(direction, self.logits)):
            groups = groups_G.view(logits.shape[:-1])
            (found,) = fusion(moved, self.layout.pattern, groups, logits_of(logits), moves, *about)
            logits_to(logits).copy_(found)

    def key(self, draw: Draw) -> tuple[int, int]:
        """The key of a draw's random numbers: its seed and the weight's name."""
        return philox.key_of(draw.seed, self.name)

    def advance(self, draw: Draw, change: Tensor | None, together: Together) -> None:
        """Move the logits, then draw the next mask and write it into the weight.

        Complete once ``together`` has finished and ``held`` has arrived.

        Args:
            draw: The next draw.
            change: Scalar; the logits move against it along grad log P(drawn mask). None moves
                none.
            together: Runs the steps of all blocks.
        """
        self.write("drawn")
        resume = partial(self._resume, draw, change, together)
        self._advance(draw, change, together, self.held.begin("drawn", resume))

    def write(self, version: Version) -> None:
        """Write a version into the weight, unless it holds that version already."""
        self.held.arrive()
        if version != self.held.version:
            self.held.begin(version, partial(self._write, version))
            self.held.arrive()

    def is_intact(self) -> Tensor:
        """Whether the weight holds, to the bit, the version that was written last; a bool scalar.

        Lean memory has no copy to compare with. There, the check is that pruned values are zero and
        that the sum of the bits of all values is what it was.
        """
        self.held.arrive()
        intact = torch.ones((), dtype=torch.bool, device=self.weight.device)
        own = torch.ones_like(self.weight, dtype=torch.bool)
        for _, (mine, weight, *state) in self._blocks(own):
            flags_M = self._flags(self.held.version, *state)
            expected = _bits(weight if self.lean else state[0])
            if flags_M is not None:
                expected = expected & -torch.stack(flags_M, dim=-1).to(expected.dtype)
            intact &= ((_bits(weight) == expected) | ~mine).all()
        if self.lean:
            beside = 0 if self.held.version == "dense" else bits_in(self.rest)
            intact &= bits_in(self.weight) + beside == self.held.bits
        return intact

    def mask(self, version: Version) -> Tensor:
        """The mask of a version, bool in the weight's shape."""
        return self.layout.own(self._padded_mask(version))

    def changed(self, version: Version) -> tuple[Tensor, int]:
        """The number of groups whose mask of a version is not the initial one, and all groups'."""
        number, groups = torch.zeros((), dtype=torch.int64, device=self.weight.device), 0
        for _, (_, *state) in self._blocks(versions=(version,), once=True):
            flags_2M = [self._flags(each, *state) or [] for each in (version, "initial")]
            same = reduce(mul, [1 - (a ^ b) for a, b in zip(*flags_2M, strict=True)])
            number += (1 - same).sum()
            groups += same.numel()
        return number, groups

    def packed_mode(self) -> Tensor:
        """The most likely mask, packed as ``best`` is."""
        return torch.from_numpy(np.packbits(self._padded_mask("mode").cpu().numpy()))

    def groups(self) -> Iterator[Groups]:
        """All groups in blocks, for statistics; a group that is cut comes on one rank only."""
        self.held.arrive()
        for _, (weight, *state) in self._blocks(once=True):
            initial_GM, drawn_GM = (
                columns_of(torch.stack(flags_M, dim=-1).bool())
                for flags_M in flags_of(state[2], self.layout.pattern.m)
            )
            yield Groups(
                self.name,
                self.layout.pattern,
                columns_of(self._dense(weight, *state)),
                columns_of(state[1]).float(),
                initial_GM,
                drawn_GM,
            )

    def saved(self) -> dict[str, Tensor]:
        """This rank's part of a checkpoint: dense weight, logits, and masks as bits of bytes.

        The same in either memory. The dense weight and the logits may be views.
        """
        self.held.arrive()
        if self.lean:
            dense = torch.empty_like(self.weight.detach())
            for _, (out, weight, *state) in self._blocks(dense):
                out.copy_(self._dense(weight, *state))
        else:
            dense = self.layout.own(self.rest)
        masks = torch.zeros_like(self.weight, dtype=torch.uint8)
        for version, bit in BITS.items():
            masks += self.mask(version).to(torch.uint8) * bit
        return {"dense": dense, "logits": self.layout.own(self.logits), "masks": masks}

    def _advance(self, draw: Draw, change: Tensor | None, together: Together, done: Tensor) -> None:
        key, first = self.key(draw), int(done)
        for number, (groups_G, (weight, rest, logits, masks)) in enumerate(self._blocks()):
            if number < first:
                continue
            alike = () if self.lean else (rest,)
            block = Block(
                pattern=self.layout.pattern,
                groups=groups_G.view(logits.shape[:-1]),
                state=(words_of(weight, *alike), words_of(rest), logits_of(logits), masks),
                key=key,
                step=draw.step,
                lean=self.lean,
                change=change,
                places=(
                    integers_of(weight, *alike),
                    logits_to(logits),
                    masks,
                    *([integers_of(rest)] if self.lean else []),
                ),
                seen=partial(self.layout.seen_first, number),
                redrawn=self.redrawn[number],
                done=done,
                number=number,
            )
            # A weight that is cut is worked on in a padded copy, written back after the last block.
            together.add(block, now=self.layout.cut)

    def _resume(self, draw: Draw, change: Tensor | None, together: Together, done: Tensor) -> None:
        """Run the steps of the blocks that are left, if any."""
        if int(done) < len(self.redrawn):
            alone = together.another()
            self._advance(draw, change, alone, done)
            alone.finish()
            if self.layout.cut:  # the padded copy of the blocks before is lost
                self._write("drawn", torch.zeros_like(done))

    def _write(self, version: Version, done: Tensor) -> None:
        held = self.held.version
        first = int(done) if self.lean else 0
        blocks = self._blocks(versions=(held, version))
        for number, (_, (weight, *state)) in enumerate(blocks):
            if number < first:
                continue
            alike = () if self.lean else (state[0],)
            held_M = self._flags(held, *state) if self.lean else None  # plain memory needs none
            words, rest = words_of(weight, *alike), words_of(state[0])
            next_M = self._flags(version, *state)
            found = exchange(self.layout.pattern, words, rest, held_M, next_M, self.lean)
            places = [integers_of(weight, *alike), integers_of(state[0])][: len(found)]
            torch._foreach_copy_([*places, done], [*found, torch.tensor(number + 1)])

    def _blocks(
        self,
        *parts: Tensor,
        versions: Sequence[Version] = (),
        once: bool = False,
        share: int = 1,
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """Blocks of parts, of the weight, and of the state with the masks of some versions."""
        return self.layout.blocks(
            *parts, self.weight, state=self._state(*versions), once=once, share=share
        )

    def _state(self, *versions: Version) -> list[Tensor]:
        """The padded state in which masks of the held version, and of others, can be found."""
        state = [self.rest, self.logits, self.masks]
        if self.best is not None and "best" in (*versions, self.held.version):
            state.append(self._padded_mask("best"))
        return state

    def _padded_mask(self, version: Version) -> Tensor:
        """The mask of a version, bool, padded."""
        found = torch.ones_like(self.logits, dtype=torch.bool)
        if version == "best" and self.best is not None:
            bits = np.unpackbits(self.best.cpu().numpy(), count=found.numel())
            return found.copy_(torch.from_numpy(bits).view(found.shape))
        blocks = self.layout.blocks(state=(found, self.rest, self.logits, self.masks))
        for _, (kept, *state) in blocks:
            flags_M = self._flags(version, *state)
            if flags_M is not None:
                kept.copy_(torch.stack(flags_M, dim=-1))
        return found

    def _dense(self, weight: Tensor, *state: Tensor) -> Tensor:
        """A block of the dense weight, (..., M)."""
        if not self.lean:
            return state[0]
        held_M = self._flags(self.held.version, *state)
        words, rest = words_of(weight), words_of(state[0])
        words, _ = exchange(self.layout.pattern, words, rest, held_M, None, lean=True)
        dense = torch.empty_like(weight, memory_format=torch.contiguous_format)
        # A contiguous tensor might allow wider integers than the block.
        integers_of(dense, weight).copy_(words)
        return dense

    def _flags(
        self,
        version: Version,
        rest: Tensor,
        logits: Tensor,
        masks: Tensor,
        best: Tensor | None = None,
    ) -> list[Tensor] | None:
        """The columns of a block's mask of a version, int32; None for all weights."""
        if version == "dense":
            return None
        if version == "mode":
            return [flag.int() for flag in columns.top(logits.unbind(-1), self.layout.pattern.n)]
        if version == "best" and best is not None:
            return [flag.int() for flag in best.unbind(-1)]
        initial_M, drawn_M = flags_of(masks, self.layout.pattern.m)
        return drawn_M if version == "drawn" else initial_M


def bits_in(tensor: Tensor) -> Tensor:
    """The sum of a tensor's values, their bits as integers; int64. An exchange leaves it alike."""
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    # Part by part, since a sum in another dtype first makes a copy in that dtype.
    for part in _bits(tensor.detach()).flatten().split(block_size(tensor.device)):
        total += part.sum(dtype=torch.int64)
    return total


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(INTEGERS[tensor.element_size()])


def columns_of(block: Tensor) -> Tensor:
    """A copy of a block as (G, M), stored column by column so that a column is contiguous."""
    return block.movedim(-1, 0).clone(memory_format=torch.contiguous_format).flatten(1).T


def _beside(layout: Layout, padded: Tensor, each: int, dtype: torch.dtype) -> Tensor:
    """Zeros for a padded part, with ``each`` values for a group."""
    size = layout.size_of(padded.shape, each)
    return torch.zeros(size, dtype=dtype, device=padded.device)
