"""Learning from gradients: from each as soon as it is there, or from several together.

A weight's logits move by ``lr * share`` along the gradient of the expected loss in them. That is
divided by its root mean square over the whole weight, so that one step size fits all weights, and
no element counts for more than that. Gradients of deep networks are heavy-tailed: without the
bound, a step moves a handful of decisive groups by many units in all layers together, and the loss
runs away. Where the root mean square is not finite or zero nothing is learned.

A gradient of any size will do: it is worked on in a unit of its own, a power of two.

Two kinds of gradients wait for others. Those of shards do until there are enough of them: what
ranks tell each other, the sizes of gradients and the values of groups that are cut, is then one
message each for all. Those of small weights do since starting a step for each would take longer
than the step. What is learned is the same to the bit.

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

#: Numbers of gradients, on each rank, that wait for others to share a message with.
WAITING = 2**26
# Groups of a whole weight below which copying its gradient takes less time than starting a step for
# it alone; and few enough to be one block.
_SMALL = 2**13


@dataclass(frozen=True)
class Lesson:
    """One gradient to learn from.

    Attributes:
        masked: The weight, or this rank's part of it.
        gradient: That of the loss in the part, whose memory is used.
        slabs: Where the weight is cut within groups, see :func:`shared_slabs`.
        draw: The next draw.
        bound: How far a logit may move, ``lr`` times this gradient's share of the step.
        part: Number of the backward pass in the step, from 0.
    """

    masked: MaskedWeight
    gradient: Tensor
    slabs: tuple[int, ...]
    draw: Draw
    bound: float
    part: int

    @property
    def groups(self) -> int:
        """The number of groups on a rank, alike on all of them."""
        layout = self.masked.layout
        return math.prod(layout.shape) // (layout.pattern.m * layout.ranks)

    @property
    def is_small(self) -> bool:
        """Whether a step for it alone would take long; alike on all ranks."""
        return self.groups < _SMALL and not self.masked.layout.may_be_cut

    @property
    def kind(self) -> Hashable:
        """The same for lessons that can be learned as one; alike on all ranks."""
        tensors = (self.gradient, self.masked.weight, self.masked.logits)
        like = [(tensor.dtype, tensor.device) for tensor in tensors]
        return self.masked.layout.pattern, self.draw, self.bound, self.part, tuple(like)


class Lessons:
    """Learns from gradients, from some later than they are given. Collectives for shards.

    Args:
        fusion: Runs the step of a block.

    Attributes:
        finite: Whether each gradient that was learned from was finite, bool scalars.
    """

    def __init__(self, fusion: Fusion) -> None:
        self._fusion = fusion
        self._waiting: dict[str, Lesson] = {}
        self._groups: Counter[Hashable] = Counter()
        self.finite: list[Tensor] = []

    def add(self, lesson: Lesson, *, hold: bool = False) -> None:
        """Learn from a gradient, or put it off.

        Args:
            lesson: The gradient.
            hold: Put it off, whatever waits.
        """
        layout = lesson.masked.layout
        if lesson.masked.name in self._waiting:
            # A weight's second gradient is judged by logits that have learned from the first.
            self.finish()
        elif not (hold or layout.across or lesson.is_small):
            self._learn([lesson])
            return
        self._waiting[lesson.masked.name] = lesson
        # What ranks tell each other is one message for all kinds.
        kind = "across" if layout.across else lesson.kind
        most = WAITING // layout.pattern.m if layout.across else block_size(lesson.gradient.device)
        self._groups[kind] += lesson.groups
        if self._groups[kind] >= most and not hold:
            self.finish()

    def finish(self) -> None:
        """Learn from what waits."""
        lessons = list(self._waiting.values())
        self._waiting.clear()
        self._groups.clear()
        self._learn(lessons)

    @torch.no_grad()
    def _learn(self, lessons: Sequence[Lesson]) -> None:
        about = [(lesson.masked.layout, lesson.gradient, lesson.slabs) for lesson in lessons]
        layouts = [layout for layout, _, _ in about]
        shared = sums(layouts, [layout.shared(own, slabs) for layout, own, slabs in about])
        moves = [
            _Move(lesson, layout.completed(own, slabs, values))
            for lesson, (layout, own, slabs), values in zip(lessons, about, shared, strict=True)
        ]
        _measure(moves)
        batches = list(_batches(moves))
        for batch in batches:
            batch.turn(self._fusion)
        self.finite += _scale(moves)
        for batch in batches:
            batch.make(self._fusion)


class _Move:
    """A gradient on its way to a move of the logits.

    Attributes:
        lesson: Where it comes from.
        direction: The gradient padded with what other ranks have of its groups, then turned into
            the direction of the move.
        unit: What it is divided by, a scalar.
        square: The sum of the squares of the direction, in this rank's unit of it.
        scale: How far to go along it.
    """

    def __init__(self, lesson: Lesson, gradient: Tensor) -> None:
        self.lesson, self.direction = lesson, gradient
        self.unit: Tensor
        self.square: Tensor
        self.scale: Tensor


class _Alone:
    """The move of one weight."""

    def __init__(self, move: _Move) -> None:
        self._move = move

    def turn(self, fusion: Fusion) -> None:
        move = self._move
        move.square = move.lesson.masked.direction(move.direction, move.unit, fusion)

    def make(self, fusion: Fusion) -> None:
        move, lesson = self._move, self._move.lesson
        about = lesson.draw, move.direction, move.scale, lesson.bound, lesson.part
        lesson.masked.move(*about, fusion)


class _Joined:
    """The moves of small weights, made as one."""

    def __init__(self, moves: Sequence[_Move]) -> None:
        self._moves = moves
        self._blocks = [move.lesson.masked.one_block(move.direction) for move in moves]
        self._sizes = [len(block.groups_G) for block in self._blocks]
        self._groups_G = torch.cat([block.groups_G for block in self._blocks])
        logits = torch.cat([block.logits.flatten(0, -2) for block in self._blocks])
        self._logits = logits if logits.is_floating_point() else logits.int()
        self._direction: Tensor

    def turn(self, fusion: Fusion) -> None:
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
            # In the order of its memory, as for a weight alone.
            move.square = block.gradient.float().square().sum()

    def make(self, fusion: Fusion) -> None:
        first, groups_G = self._moves[0].lesson, self._groups_G
        keys = [move.lesson.masked.key(move.lesson.draw) for move in self._moves]
        # Adding a number does not wait for the device, as copying it there would.
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
        """Put the parts of joined values where they belong, in one call."""
        parts = zip(places, values.split(self._sizes), strict=True)
        torch._foreach_copy_(list(places), [part.view(place.shape) for place, part in parts])


def _batches(moves: Iterable[_Move]) -> Iterable[_Alone | _Joined]:
    small: defaultdict[Hashable, list[_Move]] = defaultdict(list)
    for move in moves:
        if move.lesson.is_small:
            small[move.lesson.kind].append(move)
        else:
            yield _Alone(move)
    for together in small.values():
        yield _Joined(together) if len(together) > 1 else _Alone(together[0])


def _measure(moves: Sequence[_Move]) -> None:
    """Give every move a unit, by the largest absolute value of its gradient."""
    ends: defaultdict[Hashable, list[tuple[_Move, Tensor, Tensor]]] = defaultdict(list)
    for move in moves:
        gradient = move.direction.detach()
        if not gradient.numel():
            gradient = gradient.new_zeros(1)
        low, high = gradient.aminmax()  # on a CPU a tenth of the time of an infinity norm
        ends[low.dtype, low.device].append((move, low, high))
    for alike in ends.values():
        of, lows, highs = zip(*alike, strict=True)
        sizes_W = torch.maximum(-torch.stack(lows), torch.stack(highs)).float()
        for move, unit in zip(of, unit_of(sizes_W).unbind(), strict=True):
            move.unit = unit


def _scale(moves: Sequence[_Move]) -> list[Tensor]:
    """Work out how far to go along each direction; returns whether it is finite, bool scalars."""
    layouts = [move.lesson.masked.layout for move in moves]
    # Ranks have units of their own, and in float64 there is room for all of them.
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
        # Numbers go along with the calls: copies of them would wait for the device.
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
