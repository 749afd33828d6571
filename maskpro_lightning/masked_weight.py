"""One weight under masks: its dense copy, its logits, its masks, and what a step does to them.

Everything is done block by block, so that what is computed on the way stays in the processor's
cache and no temporary is as large as a layer.

Shape suffixes: ``G`` groups of a block, ``M`` group size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from maskpro_lightning import distribution, philox
from maskpro_lightning.fusion import Transition
from maskpro_lightning.pattern import NMPattern
from maskpro_lightning.transition import (
    DRAWN,
    INITIAL,
    PREVIOUS,
    integers_of,
    transition,
    words_of,
)

Version = Literal["dense", "initial", "drawn", "mode"]

# Groups handled at once: as many as a processor's cache holds, or more where each block costs a
# launch.
_BLOCK, _DEVICE_BLOCK = 2**16, 2**22


@dataclass(frozen=True)
class Draw:
    """What a draw depends on besides logits, the weight's name and the group's number.

    Attributes:
        seed: Seed of all draws.
        step: Number of the draw, in [0, 2^64).
        sharpness: Masks are drawn from softmax(sharpness * logits).
    """

    seed: int
    step: int
    sharpness: float


@dataclass(frozen=True)
class Groups:
    """Some groups of one weight: the logits that masks are drawn from, and masks, each (G, M).

    ``previous_GM`` is the mask drawn before ``drawn_GM``; all False before the second draw.
    """

    name: str
    pattern: NMPattern
    logits_GM: Tensor
    initial_GM: Tensor
    drawn_GM: Tensor
    previous_GM: Tensor


@dataclass(frozen=True)
class MaskedWeight:
    """A weight and the state of its masks, all in the weight's shape.

    Attributes:
        name: The weight's name, which its draws depend on.
        pattern: The pattern.
        input_dim: The dimension that groups lie along.
        weight: Holds ``dense * mask`` for one mask or another; written in place.
        dense: The weight as it was; never changes.
        logits: float32.
        masks: uint8, the initial, the drawn and the previous mask, a bit each.
    """

    name: str
    pattern: NMPattern
    input_dim: int
    weight: Tensor
    dense: Tensor
    logits: Tensor
    masks: Tensor

    @staticmethod
    def state(weight: Tensor, mask: Tensor, logit_scale: float) -> dict[str, Tensor]:
        """The state of a weight whose initial mask, bool in its shape, has logits of one size."""
        mask = mask.to(weight.device)
        return {
            "dense": weight.detach().clone(),
            "logits": mask.float() * logit_scale,
            "masks": mask.to(torch.uint8) * INITIAL,
        }

    def advance(
        self,
        draw: Draw,
        change: Tensor | None = None,
        direction: Tensor | None = None,
        step: Transition = transition,
    ) -> None:
        """Move the logits, then draw the next mask and write it into the weight.

        Args:
            draw: The next draw.
            change: Scalar; the logits move against it along grad log P(drawn mask).
            direction: Shaped like the weight; the logits move against it.
            step: Does what :func:`transition` does.
        """
        key = philox.key_of(draw.seed, self.name)
        number = torch.full((), draw.step, device=self.weight.device)
        moves = [] if direction is None else [direction]
        for groups_G, weight, dense, logits, masks, *block_moves in self._blocks(
            self.weight, self.dense, self.logits, self.masks, *moves
        ):
            words, next_logits, next_masks = step(
                self.pattern,
                groups_G.view(logits.shape[:-1]),
                words_of(dense),
                logits,
                masks,
                key,
                number,
                draw.sharpness,
                change,
                *(block_moves or [None]),
            )
            integers_of(weight).copy_(words)
            logits.copy_(next_logits)
            masks.copy_(next_masks)

    def direction(self, gradient: Tensor, sharpness: float) -> Tensor:
        """The gradient of the expected loss, to first order, in the logits; rms 1.

        With c the gradient with respect to the mask (weight gradient times dense weight), that is
        the gradient of sum_j c_j P(j kept), computed in the memory of ``gradient``. Divided by its
        root mean square, so that one step size fits all; zero where something is not finite.
        """
        for _, values, dense, logits in self._blocks(gradient, self.dense, self.logits):
            worth_GM = _columns(values).float() * _columns(dense).float()
            direction_GM = distribution.inclusion_gradient(
                _columns(logits) * sharpness, worth_GM, self.pattern
            )
            values.copy_(direction_GM.view_as(values))
        spread = gradient.float().square().mean().sqrt()
        learns = spread.isfinite() & (spread > 0)
        return gradient.div_(spread).where(learns, 0)

    def write(self, version: Version) -> None:
        """Write a version of the weight into it."""
        for _, weight, dense, logits, masks in self._blocks(
            self.weight, self.dense, self.logits, self.masks
        ):
            weight.copy_(_masked(dense, self._kept(version, logits, masks)))

    def mask(self, version: Version) -> Tensor:
        """The mask of a version, bool in the weight's shape."""
        found = torch.empty_like(self.weight, dtype=torch.bool)
        for _, kept, logits, masks in self._blocks(found, self.logits, self.masks):
            kept.copy_(self._kept(version, logits, masks))
        return found

    def groups(self, sharpness: float) -> Iterator[Groups]:
        """Go through all groups in blocks, for statistics."""
        for _, logits, masks in self._blocks(self.logits, self.masks):
            masks_GM = _columns(masks)
            yield Groups(
                self.name,
                self.pattern,
                _columns(logits) * sharpness,
                *((masks_GM & bit).bool() for bit in (INITIAL, DRAWN, PREVIOUS)),
            )

    def _blocks(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Go through tensors of the weight's shape in blocks of whole groups.

        Yields:
            int64 (G,), the groups' numbers in the weight, and a view (..., M) of each tensor.
        """
        views = [self.pattern.group(tensor.detach(), self.input_dim) for tensor in tensors]
        groups_in_row = views[0][0].numel() // self.pattern.m
        block = _BLOCK if views[0].device.type == "cpu" else _DEVICE_BLOCK
        rows = max(1, block // max(1, groups_in_row))
        for first in range(0, len(views[0]), rows):
            parts = [view[first : first + rows] for view in views]
            start = first * groups_in_row
            numbers_G = torch.arange(
                start, start + parts[0].numel() // self.pattern.m, device=views[0].device
            )
            yield numbers_G, *parts

    def _kept(self, version: Version, logits: Tensor, masks: Tensor) -> Tensor:
        """A block's mask of a version, bool (..., M)."""
        if version == "dense":
            return torch.ones_like(masks, dtype=torch.bool)
        if version == "mode":
            return distribution.mode(_columns(logits), self.pattern).view_as(masks)
        return (masks & {"initial": INITIAL, "drawn": DRAWN}[version]).bool()


def _columns(block: Tensor) -> Tensor:
    """A copy of a block as (G, M), stored column by column so that a column is contiguous."""
    return block.movedim(-1, 0).reshape(block.shape[-1], -1).contiguous().T


def _masked(dense: Tensor, kept: Tensor) -> Tensor:
    # Bits, since a product would leave negative zeros, and NaN where a pruned weight is infinite.
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dense.element_size()]
    return (dense.view(integer) & -kept.to(integer)).view(dense.dtype)
