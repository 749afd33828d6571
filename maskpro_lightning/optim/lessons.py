"""Straight-through's move of the logits from a gradient, of one weight or of several joined.

With g the gradient of the expected loss in a weight's logits, they move by
``-lr * share * clip(g / rms(g), -1, 1)``. The root mean square is over the whole weight, so that
one step size fits all weights. Gradients of deep networks are heavy-tailed: without the clipping, a
step moves a few groups by many units in all layers at once, and the loss diverges. Where the root
mean square is zero or not finite, nothing is learned.

Gradients can be of any size: each is computed in a unit of its own, a power of two.

Two kinds of gradients wait for others, which changes no bit of the result:

- those of shards, so that ranks exchange the sums of squares, and the values of groups that are
  cut, in one message for many weights;
- those of small weights, since to start a step takes longer than to run it.

Shape suffixes: ``G`` groups, ``W`` weights.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maskpro_lightning.optim.fusion import Fusion
from maskpro_lightning.optim.masked_weight import Draw, MaskedWeight
from maskpro_lightning.optim.transition import directed, moved
from maskpro_lightning.optim.units import unit_of
from maskpro_lightning.weights.layout import block_size, sums

#: Once gradients of shards hold this many numbers on each rank, they wait no longer.
WAITING = 2**26
# With fewer groups than this, a weight's gradient is copied in less time than its own step takes to
# start, and the weight is a single block.
_SMALL = 2**13


@dataclass(frozen=True)
class Lesson:
    """One gradient to learn from.

    Attributes:
        masked: The weight, or this rank's part of it.
        gradient: The gradient of the loss in the part; it is overwritten.
        slabs: Where the weight is cut within groups, see :func:`shared_slabs`.
        draw: The next draw.
        bound: The largest move of a logit: ``lr`` times this gradient's share of the step.
        part: The number of the backward pass in the step, from 0.
    """

    masked: MaskedWeight
    gradient: Tensor
    slabs: tuple[int, ...]
    draw: Draw
    bound: float
    part: int

    @property
    def groups(self) -> int:
        """The mean number of groups on a rank; the same on all ranks."""
        layout = self.masked.layout
        return math.prod(layout.shape) // (layout.pattern.m * layout.ranks)

    @property
    def is_small(self) -> bool:
        """Whether it is to be joined with others; the same on all ranks."""
        return self.groups < _SMALL and not self.masked.layout.may_be_cut

    @property
    def kind(self) -> Hashable:
        """Equal for lessons that can be joined; the same on all ranks."""
        tensors = (self.gradient, self.masked.weight, self.masked.logits)
        like = [(tensor.dtype, tensor.device) for tensor in tensors]
        return self.masked.layout.pattern, self.draw, self.bound, self.part, tuple(like)


class Lessons:
    """Learns from gradients, at once or after some have been collected. For shards a collective.

    Args:
        fusion: Runs the step of a block.

    Attributes:
        finite: For each gradient so far, whether it was finite; bool scalars.
    """

    def __init__(self, fusion: Fusion) -> None:
        self._fusion = fusion
        self._waiting: dict[str, Lesson] = {}
        self._groups: Counter[Hashable] = Counter()
        self.finite: list[Tensor] = []

    def add(self, lesson: Lesson, *, hold: bool = False) -> None:
        """Learn from a gradient, or let it wait for others.

        Args:
            lesson: The gradient.
            hold: Let it wait until :meth:`finish` in any case.
        """
        layout = lesson.masked.layout
        if lesson.masked.name in self._waiting:
            # A weight's second gradient is for logits that have learned from the first.
            self.finish()
        elif not (hold or layout.across or lesson.is_small):
            self._learn([lesson])
            return
        self._waiting[lesson.masked.name] = lesson
        # Ranks exchange one message for all kinds.
        kind = "across" if layout.across else lesson.kind
        most = WAITING // layout.pattern.m if layout.across else block_size(lesson.gradient.device)
        self._groups[kind] += lesson.groups
        if self._groups[kind] >= most and not hold:
            self.finish()

    def finish(self) -> None:
        """Learn from all gradients that wait."""
        lessons = list(self._waiting.values())
        self._waiting.clear()
        self._groups.clear()
        self._learn(lessons)

    @torch.no_grad()
    def _learn(self, lessons: Sequence[Lesson]) -> None:
        """Move the logits of some weights, each by its gradient."""
        about = [(lesson.masked.layout, lesson.gradient, lesson.slabs) for lesson in lessons]
        layouts = [layout for layout, _, _ in about]
        shared = sums(layouts, [layout.shared(own, slabs) for layout, own, slabs in about])
        moves = [
            _Move(lesson, layout.completed(own, slabs, values))
            for lesson, (layout, own, slabs), values in zip(lessons, about, shared, strict=True)
        ]
        _choose_units(moves)
        batches = list(_batches(moves))
        for batch in batches:
            batch.find_directions(self._fusion)  # g, and the sum of its squares
        self.finite += _choose_scales(moves)  # lr * share / rms(g)
        for batch in batches:
            batch.move_logits(self._fusion)


class _Move:
    """A gradient that becomes a move of the logits.

    Attributes:
        lesson: The gradient's lesson.
        direction: The gradient in the weights, padded with other ranks' values of its groups; then
            in its place g, the gradient in the logits, in units.
        unit: The power of two that the gradient is divided by, a scalar.
        square: The sum of the squares of g over this rank's groups, in units.
        scale: What g in units is multiplied by.
    """

    def __init__(self, lesson: Lesson, gradient: Tensor) -> None:
        self.lesson, self.direction = lesson, gradient
        self.unit: Tensor
        self.square: Tensor
        self.scale: Tensor


class _SingleMove:
    """The move of one weight."""

    def __init__(self, move: _Move) -> None:
        self._move = move

    def find_directions(self, fusion: Fusion) -> None:
        move = self._move
        move.square = move.lesson.masked.direction(move.direction, move.unit, fusion)

    def move_logits(self, fusion: Fusion) -> None:
        move, lesson = self._move, self._move.lesson
        about = lesson.draw, move.direction, move.scale, lesson.bound, lesson.part
        lesson.masked.move(*about, fusion)


class _JoinedMoves:
    """The moves of several small weights, joined into one step."""

    def __init__(self, moves: Sequence[_Move]) -> None:
        self._moves = moves
        self._blocks = [move.lesson.masked.one_block(move.direction) for move in moves]
        self._sizes = [len(block.groups_G) for block in self._blocks]
        self._groups_G = torch.cat([block.groups_G for block in self._blocks])
        logits = torch.cat([block.logits.flatten(0, -2) for block in self._blocks])
        self._logits = logits if logits.is_floating_point() else logits.int()
        self._direction: Tensor

    def find_directions(self, fusion: Fusion) -> None:
        pattern, blocks = self._moves[0].lesson.masked.layout.pattern, self._blocks
        gradient, dense = (
            torch.cat([tensor.flatten(0, -2) for tensor in tensors])
            for tensors in zip(*((block.gradient, block.dense) for block in blocks), strict=True)
        )
        units = self._of_each(move.unit for move in self._moves)
        (found,) = fusion(
            directed, pattern, self._groups_G, (units,), gradient, dense, self._logits
        )
        self._direction = found.to(gradient.dtype)
        self._put([block.gradient for block in blocks], self._direction)
        for move, block in zip(self._moves, blocks, strict=True):
            # Summed in the order of its memory, as for a single weight.
            move.square = block.gradient.float().square().sum()

    def move_logits(self, fusion: Fusion) -> None:
        first, groups_G = self._moves[0].lesson, self._groups_G
        keys = [move.lesson.masked.key(move.lesson.draw) for move in self._moves]
        # Added to zeros, since copying a number to a device would wait for the device.
        key = tuple(
            torch.cat(
                [
                    torch.zeros_like(block.groups_G) + own[i]
                    for block, own in zip(self._blocks, keys, strict=True)
                ]
            )
            for i in (0, 1)
        )
        step = torch.full((), first.draw.step, device=groups_G.device)
        most = torch.full((), first.bound, device=groups_G.device)
        scales = self._of_each(move.scale for move in self._moves)
        ways = self._direction, key, step, (scales,), most, first.part
        pattern = first.masked.layout.pattern
        (logits,) = fusion(moved, pattern, groups_G, self._logits, *ways)
        self._put([block.logits for block in self._blocks], logits)

    def _of_each(self, numbers_W: Iterable[Tensor]) -> Tensor:
        """Each weight's number for each of its groups."""
        pairs = zip(numbers_W, self._sizes, strict=True)
        return torch.cat([number.expand(size) for number, size in pairs])

    def _put(self, places: Sequence[Tensor], values: Tensor) -> None:
        """Copy the parts of joined values into their places, in one call."""
        parts = zip(places, values.split(self._sizes), strict=True)
        torch._foreach_copy_(list(places), [part.view(place.shape) for place, part in parts])


def _batches(moves: Iterable[_Move]) -> Iterable[_SingleMove | _JoinedMoves]:
    """Moves of small weights joined by kind, the others singly."""
    small: defaultdict[Hashable, list[_Move]] = defaultdict(list)
    for move in moves:
        if move.lesson.is_small:
            small[move.lesson.kind].append(move)
        else:
            yield _SingleMove(move)
    for together in small.values():
        yield _JoinedMoves(together) if len(together) > 1 else _SingleMove(together[0])


def _choose_units(moves: Sequence[_Move]) -> None:
    """Set each move's unit by the largest absolute value of its gradient."""
    ends: defaultdict[Hashable, list[tuple[_Move, Tensor, Tensor]]] = defaultdict(list)
    for move in moves:
        gradient = move.direction.detach()
        if not gradient.numel():
            gradient = gradient.new_zeros(1)
        low, high = gradient.aminmax()  # on a CPU ten times as fast as an infinity norm
        ends[low.dtype, low.device].append((move, low, high))
    for alike in ends.values():
        of, lows, highs = zip(*alike, strict=True)
        sizes_W = torch.maximum(-torch.stack(lows), torch.stack(highs)).float()
        for move, unit in zip(of, unit_of(sizes_W).unbind(), strict=True):
            move.unit = unit


def _choose_scales(moves: Sequence[_Move]) -> list[Tensor]:
    """Set each move's scale; returns whether its gradient is finite, bool scalars."""
    layouts = [move.lesson.masked.layout for move in moves]
    # Ranks have different units, so their sums of squares are added in float64 without units.
    common = [
        move.square.double() * move.unit.double().square() if layout.across else move.square
        for layout, move in zip(layouts, moves, strict=True)
    ]
    alike: defaultdict[Hashable, list[tuple[_Move, Tensor]]] = defaultdict(list)
    for move, total in zip(moves, sums(layouts, common), strict=True):
        alike[total.dtype, total.device].append((move, total))
    found: list[Tensor] = []
    for several in alike.values():
        of, totals = zip(*several, strict=True)
        # Python numbers, since copying them to a device would wait for the device.
        numbers = [math.prod(move.lesson.masked.layout.shape) for move in of]
        sizes_W = torch.stack(torch._foreach_div(totals, numbers)).sqrt()
        finite_W = sizes_W.isfinite()
        ways_W = sizes_W.reciprocal().where(finite_W & (sizes_W > 0), 0)
        scales = torch._foreach_mul(ways_W.unbind(), [move.lesson.bound for move in of])
        for move, scale in zip(of, scales, strict=True):
            across = move.lesson.masked.layout.across
            move.scale = (scale * move.unit).float() if across else scale
        found += finite_W.unbind()
    return found
