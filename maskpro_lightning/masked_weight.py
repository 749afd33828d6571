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
from maskpro_lightning.fusion import Fusion
from maskpro_lightning.pattern import NMPattern
from maskpro_lightning.transition import (
    DRAWN,
    INITIAL,
    PREVIOUS,
    integers_of,
    logits_of,
    logits_to,
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

    ``redrawn`` is the number of groups, int64, whose mask is another than in the draw before, which
    for the first draw is the initial mask.
    """

    name: str
    pattern: NMPattern
    logits_GM: Tensor
    initial_GM: Tensor
    drawn_GM: Tensor
    redrawn: Tensor


@dataclass(frozen=True)
class MaskedWeight:
    """A weight and the state of its masks, all in the weight's shape.

    Attributes:
        name: The weight's name, which its draws depend on.
        pattern: The pattern.
        input_dim: The dimension that groups lie along.
        weight: Holds ``dense * mask`` for one mask or another; written in place.
        dense: The weight as it was; never changes.
        logits: float32 or bfloat16.
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
    def state(
        weight: Tensor, mask: Tensor, logit_scale: float, logits_dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The state of a weight whose initial mask, bool in its shape, has logits of one size."""
        mask = mask.to(weight.device)
        return {
            "dense": weight.detach().clone(),
            "logits": mask.to(logits_dtype).mul_(logit_scale),
            "masks": mask.to(torch.uint8).mul_(INITIAL | DRAWN),
        }

    def advance(
        self, draw: Draw, change: Tensor | None, direction: Tensor | None, fusion: Fusion
    ) -> None:
        """Move the logits, then draw the next mask and write it into the weight.

        Args:
            draw: The next draw.
            change: Scalar; the logits move against it along grad log P(drawn mask).
            direction: Shaped like the weight; the logits move against it.
            fusion: Runs the step of a block.
        """
        key = philox.key_of(draw.seed, self.name)
        number = torch.full((), draw.step, device=self.weight.device)
        moves = [] if direction is None else [direction]
        for groups_G, weight, dense, logits, masks, *moving in blocks(
            self.pattern, self.input_dim, self.weight, self.dense, self.logits, self.masks, *moves
        ):
            found = fusion(
                transition,
                self.pattern,
                groups_G.view(logits.shape[:-1]),
                words_of(dense),
                logits_of(logits),
                masks,
                key,
                number,
                draw.sharpness,
                change,
                moving[0] if moving else None,
            )
            # One call, so that an exception leaves a block as it was or as it should be.
            torch._foreach_copy_([integers_of(weight), logits_to(logits), masks], found)

    def direction(self, gradient: Tensor, sharpness: float) -> Tensor:
        """The gradient of the expected loss, to first order, in the logits; rms 1.

        With c the gradient with respect to the mask (weight gradient times dense weight), that is
        the gradient of sum_j c_j P(j kept), computed in the memory of ``gradient``. Divided by its
        root mean square, so that one step size fits all; zero where something is not finite.
        """
        total = torch.zeros((), device=gradient.device)
        for _, values, dense, logits in blocks(
            self.pattern, self.input_dim, gradient, self.dense, self.logits
        ):
            worth_GM = columns_of(values).float() * columns_of(dense).float()
            direction_GM = distribution.inclusion_gradient(
                columns_of(logits).float() * sharpness, worth_GM, self.pattern
            )
            values.copy_(direction_GM.view_as(values))
            total += values.float().square().sum()
        return unit(gradient, total)

    def write(self, version: Version) -> None:
        """Write a version of the weight into it."""
        for _, weight, dense, logits, masks in blocks(
            self.pattern, self.input_dim, self.weight, self.dense, self.logits, self.masks
        ):
            weight.copy_(_masked(dense, self._kept(version, logits, masks)))

    def mask(self, version: Version) -> Tensor:
        """The mask of a version, bool in the weight's shape."""
        found = torch.empty_like(self.weight, dtype=torch.bool)
        for _, kept, logits, masks in blocks(
            self.pattern, self.input_dim, found, self.logits, self.masks
        ):
            kept.copy_(self._kept(version, logits, masks))
        return found

    def groups(self, sharpness: float) -> Iterator[Groups]:
        """Go through all groups in blocks, for statistics."""
        for _, logits, masks in blocks(self.pattern, self.input_dim, self.logits, self.masks):
            masks_GM = columns_of(masks)
            initial_GM, drawn_GM, previous_GM = (
                (masks_GM & bit).bool() for bit in (INITIAL, DRAWN, PREVIOUS)
            )
            yield Groups(
                self.name,
                self.pattern,
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
            return distribution.mode(columns_of(logits), self.pattern).view_as(masks)
        return (masks & {"initial": INITIAL, "drawn": DRAWN}[version]).bool()


def blocks(pattern: NMPattern, input_dim: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Go through tensors with something for each group in blocks of whole groups.

    Args:
        pattern: The pattern.
        input_dim: The dimension that groups lie along.
        tensors: The first of the weight's shape; others may have another number for each group.

    Yields:
        int64 (G,), the groups' numbers in the weight, and a view of each tensor, of which the last
        dimension holds what belongs to a group.
    """
    along = tensors[0].shape[input_dim] // pattern.m
    views = [
        tensor.detach().movedim(input_dim, -1).unflatten(-1, (along, -1)) for tensor in tensors
    ]
    groups_in_row = views[0][0].numel() // pattern.m
    size = _BLOCK if views[0].device.type == "cpu" else _DEVICE_BLOCK
    rows = max(1, size // max(1, groups_in_row))
    for first in range(0, len(views[0]), rows):
        parts = [view[first : first + rows] for view in views]
        start, number = first * groups_in_row, parts[0].numel() // pattern.m
        yield torch.arange(start, start + number, device=views[0].device), *parts


def unit(direction: Tensor, total: Tensor) -> Tensor:
    """A direction divided, in place, by its root mean square, given the total of its squares."""
    spread = (total / direction.numel()).sqrt()
    learns = spread.isfinite() & (spread > 0)
    return direction.div_(spread).masked_fill_(~learns, 0)


def columns_of(block: Tensor) -> Tensor:
    """A copy of a block as (G, M), stored column by column so that a column is contiguous."""
    return block.movedim(-1, 0).reshape(block.shape[-1], -1).contiguous().T


def _masked(dense: Tensor, kept: Tensor) -> Tensor:
    # Bits, since a product would leave negative zeros, and NaN where a pruned weight is infinite.
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dense.element_size()]
    return (dense.view(integer) & -kept.to(integer)).view(dense.dtype)
