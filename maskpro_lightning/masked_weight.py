"""One weight under masks: its dense copy, its logits, its masks, and what a step does to them.

Everything is done block by block, so that what is computed on the way stays in the processor's
cache and no temporary is as large as a layer.

Shape suffixes: ``G`` groups of a block, ``M`` group size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from maskpro_lightning import distribution, inclusion, philox
from maskpro_lightning.layout import Layout
from maskpro_lightning.pattern import NMPattern

Version = Literal["dense", "initial", "drawn", "mode"]

# One byte per weight holds three masks, a bit each.
_INITIAL, _DRAWN, _PREVIOUS = 1, 2, 4


@dataclass(frozen=True)
class Draw:
    """What a draw depends on besides logits, the weight's name and the group's number.

    Attributes:
        seed: Seed of all draws.
        step: Number of the draw, in [0, 2^64).
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

    ``previous_GM`` is the mask drawn before ``drawn_GM``; all False before the second draw.
    """

    name: str
    pattern: NMPattern
    dense_GM: Tensor
    logits_GM: Tensor
    initial_GM: Tensor
    drawn_GM: Tensor
    previous_GM: Tensor


@dataclass(frozen=True)
class MaskedWeight:
    """This rank's part of a weight and of the state of its masks.

    Attributes:
        name: The weight's name, which its draws depend on.
        layout: Where the part lies in the whole weight.
        weight: Holds ``dense * mask`` for one mask or another; written in place.
        dense: The weight as it was; never changes.
        logits: float32, padded to whole groups.
        masks: uint8, the initial, the drawn and the previous mask, a bit each; padded likewise.
    """

    name: str
    layout: Layout
    weight: Tensor
    dense: Tensor
    logits: Tensor
    masks: Tensor

    @staticmethod
    def state(weight: Tensor, mask: Tensor, logit_scale: float) -> dict[str, Tensor]:
        """The state of a weight whose initial mask, bool and padded, has logits of one size."""
        mask = mask.to(weight.device)
        return {
            "dense": weight.detach().clone(),
            "logits": mask.float() * logit_scale,
            "masks": mask.to(torch.uint8) * _INITIAL,
        }

    def advance(
        self,
        draw: Draw,
        change: Tensor | None = None,
        direction: Tensor | None = None,
        judged: Sequence[Draw] = (),
    ) -> None:
        """Move the logits, then draw the next mask and write it into the weight.

        Args:
            draw: The next draw.
            change: (K,); the logits move against the mean over K masks of each change along
                grad log P(mask).
            direction: Shaped like the weight; the logits move against it.
            judged: The K draws that ``change`` is about; without them, the mask drawn last.
        """
        moves = [] if direction is None else [direction]
        blocks = self.layout.blocks(self.weight, self.dense, self.logits, self.masks, *moves)
        for groups_G, (weight, dense, logits, masks, *block_moves) in blocks:
            logits_GM, masks_GM = _columns(logits), _columns(masks)
            if block_moves:
                logits_GM -= _columns(block_moves[0])
            if change is not None:
                kept_KGM = [self._sample(groups_G, logits_GM, each) for each in judged]
                kept_KGM = kept_KGM or [(masks_GM & _DRAWN).bool()]
                sharpened_GM = logits_GM * draw.sharpness
                for each, kept_GM in zip(change / len(change), kept_KGM, strict=True):
                    logits_GM -= each * distribution.score(
                        sharpened_GM, kept_GM, self.layout.pattern
                    )
            logits.copy_(logits_GM.view_as(logits))
            drawn_GM = self._sample(groups_G, logits_GM, draw)
            previous_GM = (masks_GM & _DRAWN) * (_PREVIOUS // _DRAWN)
            masks_GM = masks_GM & _INITIAL | previous_GM | drawn_GM.to(torch.uint8) * _DRAWN
            masks.copy_(masks_GM.view_as(masks))
            weight.copy_(_masked(dense, drawn_GM.view_as(dense)))

    def redraw(self, draw: Draw) -> None:
        """Replace the mask drawn last by that of a draw from the same logits."""
        for groups_G, (logits, masks) in self.layout.blocks(self.logits, self.masks):
            drawn_GM = self._sample(groups_G, _columns(logits), draw)
            masks_GM = _columns(masks) & (_INITIAL | _PREVIOUS)
            masks_GM |= drawn_GM.to(torch.uint8) * _DRAWN
            masks.copy_(masks_GM.view_as(masks))

    def _sample(self, groups_G: Tensor, logits_GM: Tensor, draw: Draw) -> Tensor:
        """What a draw makes of a block's logits, bool (G, M)."""
        replica = (draw.replica,) if draw.replica else ()
        key = philox.key_of(draw.seed, self.name, *replica)
        step = torch.tensor(draw.step, device=logits_GM.device)
        noise_GM = philox.exponential(key, step, groups_G, self.layout.pattern.m)
        return distribution.sample(logits_GM * draw.sharpness, noise_GM, self.layout.pattern)

    def direction(self, gradient: Tensor, sharpness: float) -> Tensor:
        """The gradient of the expected loss, to first order, in the logits.

        With c the gradient with respect to the mask (weight gradient times dense weight), that is
        the gradient of sum_j c_j P(j kept), computed in the memory of ``gradient``.
        """
        for _, (values, dense, logits) in self.layout.blocks(gradient, self.dense, self.logits):
            worth_GM = _columns(values).float() * _columns(dense).float()
            direction_GM = inclusion.gradient(
                _columns(logits) * sharpness, worth_GM, self.layout.pattern
            )
            values.copy_(direction_GM.view_as(values))
        return gradient

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
            masks_GM = _columns(masks)
            yield Groups(
                self.name,
                self.layout.pattern,
                _columns(dense),
                _columns(logits) * sharpness,
                *((masks_GM & bit).bool() for bit in (_INITIAL, _DRAWN, _PREVIOUS)),
            )

    def _kept(self, version: Version, logits: Tensor, masks: Tensor) -> Tensor:
        """A block's mask of a version, bool (..., M)."""
        if version == "dense":
            return torch.ones_like(masks, dtype=torch.bool)
        if version == "mode":
            return distribution.mode(_columns(logits), self.layout.pattern).view_as(masks)
        return (masks & {"initial": _INITIAL, "drawn": _DRAWN}[version]).bool()


def _columns(block: Tensor) -> Tensor:
    """A copy of a block as (G, M), stored column by column so that a column is contiguous."""
    return block.movedim(-1, 0).clone(memory_format=torch.contiguous_format).flatten(1).T


def _masked(dense: Tensor, kept: Tensor) -> Tensor:
    # Bits, since a product would leave negative zeros, and NaN where a pruned weight is infinite.
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dense.element_size()]
    return (dense.view(integer) & -kept.to(integer)).view(dense.dtype)
