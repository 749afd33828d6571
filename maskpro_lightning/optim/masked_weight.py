"""One weight under masks: its dense copy, its logits, its masks, and what a step does to them.

Everything is done block by block, so that what is computed on the way stays in the processor's
cache and no temporary is as large as a layer.

Shape suffixes: ``G`` groups of a block, ``M`` group size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from maskpro_lightning.masks import distribution, philox
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.optim.fusion import Fusion
from maskpro_lightning.optim.together import Block, Together
from maskpro_lightning.optim.transition import BEST, DRAWN, INITIAL, PREVIOUS, directed, moved
from maskpro_lightning.optim.words import integers_of, logits_of, logits_to, words_of
from maskpro_lightning.weights.layout import Layout

Version = Literal["dense", "initial", "drawn", "mode", "best"]

# A gradient takes some ten numbers per weight on the way, or hundreds for a large pattern: so many
# times fewer groups at once, which costs no time.
GRADIENT_SHARE = 4

_BITS: dict[Version, int] = {"initial": INITIAL, "drawn": DRAWN, "best": BEST}


@dataclass(frozen=True)
class Draw:
    """What a draw depends on besides logits, the weight's name and the group's number.

    Attributes:
        seed: Seed of all draws.
        step: Number of the draw, in [0, 2^48).
        sharpness: Masks are drawn from softmax(sharpness * logits).
        replica: Number of the replica that draws a mask of its own; 0 where all share theirs.
    """

    seed: int
    step: int
    sharpness: float
    replica: int = 0


@dataclass(frozen=True)
class Groups:
    """Some groups of one weight: it dense, the logits that draws are from, masks, each (G, M).

    ``redrawn`` is the number of groups, int64, whose mask is another than in the draw before, which
    for the first draw is the initial mask.
    """

    name: str
    pattern: NMPattern
    dense_GM: Tensor
    logits_GM: Tensor
    initial_GM: Tensor
    drawn_GM: Tensor
    redrawn: Tensor


@dataclass(frozen=True)
class MaskedWeight:
    """This rank's part of a weight and of the state of its masks.

    Attributes:
        name: The weight's name, which its draws depend on.
        layout: Where the part lies in the whole weight.
        weight: Holds ``dense * mask`` for one mask or another; written in place.
        dense: The weight as it was; never changes.
        logits: float32 or bfloat16, padded to whole groups.
        masks: uint8, the initial, the drawn, the previous and the best mask, a bit each; padded
            likewise.
    """

    name: str
    layout: Layout
    weight: Tensor
    dense: Tensor
    logits: Tensor
    masks: Tensor

    @staticmethod
    def state(weight: Tensor, mask: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """The state of a weight with its initial mask, bool, and logits, both padded."""
        return {
            "dense": weight.detach().clone(),
            "logits": logits,
            "masks": mask.to(torch.uint8).mul_(INITIAL | DRAWN | BEST),
        }

    def move(self, draw: Draw, direction: Tensor, scale: Tensor, part: int, fusion: Fusion) -> None:
        """Move the logits against ``scale * direction``.

        Args:
            draw: The next draw.
            direction: Shaped like the weight.
            scale: Scalar; at 0 the direction may be anything.
            part: Number of the move before that draw, from 0.
            fusion: Runs the step of a block.
        """
        step = torch.full((), draw.step, device=self.weight.device)
        about = self._key(draw), step, scale, part
        for groups_G, (logits, moves) in self.layout.blocks(self.logits, direction):
            move_block(fusion, self.layout.pattern, groups_G, logits, moves, *about)

    def advance(
        self,
        draw: Draw,
        change: Tensor | None,
        together: Together,
        judged: Sequence[Draw] = (),
    ) -> None:
        """Move the logits, then draw the next mask and write it into the weight.

        Args:
            draw: The next draw.
            change: (K,); the logits move against the mean over K masks of each change along
                grad log P(mask). None leaves them where they are.
            together: Makes the steps of all blocks.
            judged: The K draws that ``change`` is about; without them, K is 1 and it is about the
                mask drawn last.
        """
        key = self._key(draw)
        blocks = self.layout.blocks(self.weight, self.dense, self.logits, self.masks)
        for groups_G, (weight, dense, logits, masks) in blocks:
            along_score, moves = change, None
            if change is not None and judged:
                along_score = None
                moves = self._taught(groups_G, logits, draw.sharpness, change, judged)
            block = Block(
                self.layout.pattern,
                groups_G.view(logits.shape[:-1]),
                (words_of(dense, weight), logits_of(logits), words_of(masks)),
                key,
                draw.step,
                draw.sharpness,
                along_score,
                moves,
                (integers_of(weight, dense), logits_to(logits), integers_of(masks)),
            )
            # A weight that is cut is worked on in a copy, which the next block may bring back.
            together.add(block, now=self.layout.cut)

    def _taught(
        self,
        groups_G: Tensor,
        logits: Tensor,
        sharpness: float,
        change: Tensor,
        judged: Sequence[Draw],
    ) -> Tensor:
        """What a block's logits move against after K masks, float32 (..., M)."""
        logits_GM = columns_of(logits).float()
        total_GM = torch.zeros_like(logits_GM)
        for each, draw in zip(change / len(change), judged, strict=True):
            kept_GM = self._sample(groups_G, logits_GM, draw)
            total_GM += each * distribution.score(
                logits_GM * sharpness, kept_GM, self.layout.pattern
            )
        return total_GM.view_as(logits)

    def redraw(self, draw: Draw) -> None:
        """Replace the mask drawn last by that of a draw from the same logits."""
        for groups_G, (logits, masks) in self.layout.blocks(self.logits, self.masks):
            drawn_GM = self._sample(groups_G, columns_of(logits).float(), draw)
            masks_GM = columns_of(masks) & (INITIAL | PREVIOUS | BEST)
            masks_GM |= drawn_GM.to(torch.uint8) * DRAWN
            masks.copy_(masks_GM.view_as(masks))

    def remember(self) -> None:
        """Make the most likely mask the best one."""
        for _, (logits, masks) in self.layout.blocks(self.logits, self.masks):
            kept = self._kept("mode", logits, masks)
            masks.bitwise_and_(INITIAL | DRAWN | PREVIOUS).add_(kept, alpha=BEST)

    def _key(self, draw: Draw) -> tuple[int, int]:
        replica = (draw.replica,) if draw.replica else ()
        return philox.key_of(draw.seed, self.name, *replica)

    def _sample(self, groups_G: Tensor, logits_GM: Tensor, draw: Draw) -> Tensor:
        """What a draw makes of a block's logits, bool (G, M)."""
        step = torch.tensor(draw.step, device=logits_GM.device)
        noise_GM = philox.exponential(self._key(draw), step, groups_G, self.layout.pattern.m)
        return distribution.sample(logits_GM * draw.sharpness, noise_GM, self.layout.pattern)

    def direction(self, gradient: Tensor, sharpness: float, fusion: Fusion) -> Tensor:
        """Turn a gradient, in its memory, into that of the expected loss in the logits.

        Returns:
            The sum of its squares, a scalar.
        """
        total = torch.zeros((), device=gradient.device)
        blocks = self.layout.blocks(gradient, self.dense, self.logits, share=GRADIENT_SHARE)
        for groups_G, (values, dense, logits) in blocks:
            direct_block(fusion, self.layout.pattern, groups_G, values, dense, logits, sharpness)
            total += values.float().square().sum()
        return total

    def write(self, version: Version) -> None:
        """Write a version of the weight into it."""
        blocks = self.layout.blocks(self.weight, self.dense, self.logits, self.masks)
        for _, (weight, dense, logits, masks) in blocks:
            weight.copy_(_masked(dense, self._kept(version, logits, masks)))

    def mask(self, version: Version) -> Tensor:
        """The mask of a version, bool in the weight's shape."""
        found = torch.empty_like(self.weight, dtype=torch.bool)
        for _, (kept, logits, masks) in self.layout.blocks(found, self.logits, self.masks):
            kept.copy_(self._kept(version, logits, masks))
        return found

    def groups(self, sharpness: float) -> Iterator[Groups]:
        """Go through all groups in blocks, for statistics; a cut one counts on one rank."""
        blocks = self.layout.blocks(self.dense, self.logits, self.masks, once=True)
        for _, (dense, logits, masks) in blocks:
            masks_GM = columns_of(masks)
            initial_GM, drawn_GM, previous_GM = (
                (masks_GM & bit).bool() for bit in (INITIAL, DRAWN, PREVIOUS)
            )
            yield Groups(
                self.name,
                self.layout.pattern,
                columns_of(dense),
                columns_of(logits).float() * sharpness,
                initial_GM,
                drawn_GM,
                (drawn_GM != previous_GM).any(-1).sum(),
            )

    def _kept(self, version: Version, logits: Tensor, masks: Tensor) -> Tensor:
        """A block's mask of a version, bool (..., M)."""
        if version == "dense":
            return torch.ones_like(masks, dtype=torch.bool)
        if version == "mode":
            return distribution.mode(columns_of(logits), self.layout.pattern).view_as(masks)
        return (masks & _BITS[version]).bool()


def move_block(
    fusion: Fusion,
    pattern: NMPattern,
    groups_G: Tensor,
    logits: Tensor,
    moves: Tensor,
    *about: Any,
) -> None:
    """Move a block's logits in place, see :func:`moved`."""
    groups = groups_G.view(logits.shape[:-1])
    (found,) = fusion(moved, pattern, groups, logits_of(logits), moves, *about)
    logits_to(logits).copy_(found)


def direct_block(
    fusion: Fusion,
    pattern: NMPattern,
    groups_G: Tensor,
    values: Tensor,
    dense: Tensor,
    logits: Tensor,
    sharpness: float,
) -> None:
    """Turn a block's gradient in place, see :func:`directed`."""
    groups = groups_G.view(logits.shape[:-1])
    about = values, dense, logits_of(logits), sharpness
    (found,) = fusion(directed, pattern, groups, *about)
    values.copy_(found)


def columns_of(block: Tensor) -> Tensor:
    """A copy of a block as (G, M), stored column by column so that a column is contiguous."""
    return block.movedim(-1, 0).clone(memory_format=torch.contiguous_format).flatten(1).T


def _masked(dense: Tensor, kept: Tensor) -> Tensor:
    # Bits, since a product would leave negative zeros, and NaN where a pruned weight is infinite.
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dense.element_size()]
    return (dense.view(integer) & -kept.to(integer)).view(dense.dtype)
