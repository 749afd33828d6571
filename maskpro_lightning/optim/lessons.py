"""Learning from gradients: from each as soon as it is there, from those of small weights together.

A weight's logits move by ``lr * share`` along the gradient of the expected loss in them. That is
divided by its root mean square over the whole weight, so that one step size fits all weights, and
no element counts for more than that. Gradients of deep networks are heavy-tailed: without the
bound, a step moves a handful of decisive groups by many units in all layers together, and the loss
runs away. Where the root mean square is not finite or zero nothing is learned.

A gradient of any size will do: it is worked on in a unit of its own, a power of two.

Shape suffixes: ``G`` groups, ``W`` weights.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskpro_lightning.optim.fusion import Fusion
from maskpro_lightning.optim.masked_weight import Draw, MaskedWeight
from maskpro_lightning.optim.transition import directed, moved
from maskpro_lightning.optim.units import unit_of
from maskpro_lightning.weights.layout import block_size, sums

# Groups of a whole weight below which copying its gradient takes less time than starting a step for
# it alone; and few enough to be one block.
_SMALL = 2**13


@dataclass(frozen=True)
class Lesson:
    """One gradient to learn from.

    Attributes:
        masked: The weight, or this rank's part of it.
        gradient: That of the loss in the part, whose memory is used.
        draw: The next draw.
        bound: How far a logit may move, ``lr`` times this gradient's share of the step.
        part: Number of the backward pass in the step, from 0.
    """

    masked: MaskedWeight
    gradient: Tensor
    draw: Draw
    bound: float
    part: int

    @property
    def groups(self) -> int:
        """The number of groups in the whole weight."""
        return math.prod(self.masked.layout.shape) // self.masked.layout.pattern.m

    @property
    def kind(self) -> Hashable:
        """The same for lessons that can be learned as one; alike on all ranks."""
        tensors = (self.gradient, self.masked.weight, self.masked.logits)
        like = [(tensor.dtype, tensor.device) for tensor in tensors]
        return self.masked.layout.pattern, self.draw, self.bound, self.part, tuple(like)


class Lessons:
    """Learns from gradients, from small ones later than told; :meth:`finish` learns from all.

    What is learned is the same to the bit, and in which order does not matter. For shards, the
    methods are collectives.
    """

    def __init__(self, fusion: Fusion) -> None:
        self._fusion = fusion
        self._waiting: defaultdict[Hashable, list[Lesson]] = defaultdict(list)
        self._groups: Counter[Hashable] = Counter()
        self._names: set[str] = set()

    def take(
        self,
        masked: MaskedWeight,
        gradient: Tensor,
        group: Mapping[str, Any],
        *,
        share: float,
        part: int,
    ) -> list[Tensor]:
        """Learn from a gradient, or keep it until there are more of its kind.

        Args:
            masked: The weight, or this rank's part of it.
            gradient: That of the loss in the part, whose memory is used.
            group: The weight's parameter group.
            share: This gradient's share of the step, in (0, 1].
            part: Number of the backward pass in the step, from 0.

        Returns:
            For each gradient that was learned from, whether it is finite, a bool scalar.
        """
        draw = Draw(group["seed"], group["step"] + 1)
        lesson = Lesson(masked, gradient, draw, group["lr"] * share, part)
        if lesson.groups >= _SMALL or masked.layout.may_be_cut:
            return self._learn_alone(lesson)
        kind = lesson.kind
        found: list[Tensor] = []
        full = self._groups[kind] + lesson.groups > block_size(gradient.device)
        if full or masked.name in self._names:  # the next begins where the last has moved to
            found = self.finish()
        self._names.add(masked.name)
        self._waiting[kind].append(lesson)
        self._groups[kind] += lesson.groups
        return found

    def finish(self) -> list[Tensor]:
        """Learn from what was kept; returns what :meth:`take` does."""
        found: list[Tensor] = []
        while self._waiting:
            _, lessons = self._waiting.popitem()
            found += self._learn_together(lessons)
        self.forget()
        return found

    def forget(self) -> None:
        """Let go of what was kept."""
        self._waiting.clear()
        self._groups.clear()
        self._names.clear()

    def _learn_alone(self, lesson: Lesson) -> list[Tensor]:
        masked, gradient = lesson.masked, lesson.gradient
        unit = unit_of(_largest(gradient))
        square = masked.direction(gradient, unit, self._fusion)
        (scale,), finite = _scales([lesson], [square], [unit])
        masked.move(lesson.draw, gradient, scale, lesson.bound, lesson.part, self._fusion)
        return finite

    def _learn_together(self, lessons: Sequence[Lesson]) -> list[Tensor]:
        if len(lessons) == 1:
            return self._learn_alone(lessons[0])
        units = list(unit_of(torch.stack([_largest(each.gradient) for each in lessons])).unbind())
        blocks = [each.masked.one_block(each.gradient) for each in lessons]
        sizes = [len(block.groups_G) for block in blocks]

        def of_each(numbers_W: Iterable[Tensor]) -> Tensor:
            return torch.cat([n.expand(size) for n, size in zip(numbers_W, sizes, strict=True)])

        first, pattern = lessons[0], lessons[0].masked.layout.pattern
        groups_G = torch.cat([block.groups_G for block in blocks])
        gradient, dense, logits = (
            torch.cat([tensor.flatten(0, -2) for tensor in tensors])
            for tensors in zip(*((b.gradient, b.dense, b.logits) for b in blocks), strict=True)
        )
        logits = logits if logits.is_floating_point() else logits.int()
        (found,) = self._fusion(
            directed, pattern, groups_G, (of_each(units),), gradient, dense, logits
        )
        direction = found.to(gradient.dtype)
        _put([block.gradient for block in blocks], direction, sizes)
        # Added up in the order of their memory, each by itself, as for a weight alone.
        squares = [block.gradient.float().square().sum() for block in blocks]
        scales, finite = _scales(lessons, squares, units)
        keys = [each.masked.key(each.draw) for each in lessons]
        # Adding a number does not wait for the device, as copying it there would.
        key = tuple(
            torch.cat(
                [torch.zeros_like(b.groups_G) + k[i] for b, k in zip(blocks, keys, strict=True)]
            )
            for i in (0, 1)
        )
        step = torch.full((), first.draw.step, device=groups_G.device)
        most = torch.full((), first.bound, device=groups_G.device)
        ways = (key, step, (of_each(scales),), most, first.part)
        (logits,) = self._fusion(moved, pattern, groups_G, logits, direction, *ways)
        _put([block.logits for block in blocks], logits, sizes)
        return finite


def _largest(gradient: Tensor) -> Tensor:
    """The largest absolute value, a float32 scalar."""
    if not gradient.numel():
        return torch.zeros((), device=gradient.device)
    return torch.linalg.vector_norm(gradient.detach(), torch.inf).float()


def _scales(
    lessons: Sequence[Lesson], squares: Sequence[Tensor], units: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """How far to go along each direction, and whether it is finite, scalars.

    Args:
        lessons: What is learned from.
        squares: The sum of the squares of each direction, in this rank's unit of it.
        units: The units.
    """
    layouts = [each.masked.layout for each in lessons]
    # Ranks have units of their own, and in float64 there is room for all of them.
    common = [
        square.double() * unit.double().square() if layout.across else square
        for layout, square, unit in zip(layouts, squares, units, strict=True)
    ]
    numbers = [math.prod(layout.shape) for layout in layouts]
    scales, finite = [], []
    for lesson, total, number, unit in zip(
        lessons, sums(layouts, common), numbers, units, strict=True
    ):
        size = (total / number).sqrt()
        fits = size.isfinite()
        scale = (lesson.bound / size).where(fits & (size > 0), 0)
        scales.append((scale * unit).float() if lesson.masked.layout.across else scale)
        finite.append(fits)
    return scales, finite


def _put(places: Sequence[Tensor], values: Tensor, sizes: Sequence[int]) -> None:
    """Put the parts of joined values where they belong, in one call."""
    parts = zip(places, values.split(list(sizes)), strict=True)
    torch._foreach_copy_(list(places), [part.view(place.shape) for place, part in parts])
