"""Where parameters, and copies of parts of them, lie in storages: the memory of the watch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """A sequence of elements in a storage that runs along one dimension of a parameter.

    Attributes:
        stride: Bytes from one element to the next.
        size: The number of elements.
        dim: The parameter's dimension.
        step: How far each step goes along that dimension.
    """

    stride: int
    size: int
    dim: int
    step: int = 1


@dataclass(frozen=True)
class Piece:
    """A parameter, or a copy of a part of it, in a storage.

    Attributes:
        parameter: The parameter's id.
        start: Its first byte in the storage.
        stop: The byte after its last.
        axes: How its dimensions lie, the shortest stride first.
        computed_by: The operation that computed other values from the parameter's, if any.
        origin: The parameter's index of the element at ``start``; None if that is not known.
    """

    parameter: int
    start: int
    stop: int
    axes: tuple[Axis, ...]
    computed_by: str | None = None
    origin: tuple[int, ...] | None = None

    @classmethod
    def of(cls, parameter: Tensor, key: int) -> Piece:
        """The piece of a whole parameter, with its id."""
        item = parameter.element_size()
        sizes = zip(parameter.stride(), parameter.shape, strict=True)
        axes = [
            Axis(stride * item, size, dim)
            for dim, (stride, size) in enumerate(sizes)
            if size > 1 and stride > 0
        ]
        return cls(key, *extent(parameter), _in_order(axes), origin=(0,) * parameter.dim())

    def along(self, stride: int, size: int) -> list[Axis] | None:
        """The axes along which ``size`` steps of ``stride`` bytes move; None if unclear."""
        found: list[Axis] = []
        for axis in self.axes:
            if size == 1 or stride == 0 or stride * size <= axis.stride:
                break
            if stride >= axis.stride * axis.size:
                continue
            if stride % axis.stride:
                return None
            count = min(size, math.ceil(axis.size * axis.stride / stride))
            found.append(Axis(stride, count, axis.dim, axis.step * (stride // axis.stride)))
            if count < size and (size % count or count * stride != axis.size * axis.stride):
                break  # it goes on in what lies beside this piece
            size, stride = size // count, stride * count
        return found

    def summed(self, view: Tensor, dims: Iterable[int]) -> frozenset[int]:
        """The parameter's dimensions that some of a view's dimensions are; empty if unclear."""
        found: set[int] = set()
        for dim in dims:
            axes = self.along(view.stride(dim) * view.element_size(), view.shape[dim])
            if axes is None:
                return frozenset()
            found.update(axis.dim for axis in axes)
        return frozenset(found)

    def copied(self, source: Tensor, made: Tensor) -> Piece | None:
        """This piece in a copy of a view of it, which may be broadcast; None if unclear."""
        more = made.dim() - source.dim()
        axes: list[Axis] = []
        for dim, size in enumerate(source.shape):
            found = self.along(source.stride(dim) * source.element_size(), size)
            if found is None:
                return None
            stride = made.stride(dim + more) * made.element_size()
            for axis in found:
                axes.append(Axis(stride, axis.size, axis.dim, axis.step))
                stride *= axis.size
        start, stop = extent(made)
        place = self.place(source)
        return replace(self, start=start, stop=stop, axes=_in_order(axes), origin=place)

    def place(self, view: Tensor) -> tuple[int, ...] | None:
        """The parameter's index of a view's first element; None if it is not in this piece."""
        left = extent(view)[0] - self.start
        if self.origin is None or left < 0:
            return None
        place = list(self.origin)
        for axis in reversed(self.axes):
            steps, left = divmod(left, axis.stride)
            if steps >= axis.size:
                return None
            place[axis.dim] += steps * axis.step
        return None if left else tuple(place)

    def changed(self, by: str | None) -> Piece:
        """This piece after an operation has changed its values; the first such one counts."""
        return replace(self, computed_by=self.computed_by or by)


def extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its storage, and the byte after its last."""
    if not tensor.numel():
        return 0, 0
    item, first = tensor.element_size(), int(tensor.storage_offset())
    steps = zip(tensor.stride(), tensor.shape, strict=True)
    return first * item, (first + sum(stride * (size - 1) for stride, size in steps) + 1) * item


def fits(source: Tensor, made: Tensor) -> bool:
    """Whether ``made`` may be a copy of ``source``, broadcast or not, by its shape."""
    more = made.dim() - source.dim()
    return (
        source.numel() > 1
        and more >= 0
        and all(a in (1, b) for a, b in zip(source.shape, made.shape[more:], strict=True))
    )


def _in_order(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    return tuple(sorted(axes, key=lambda axis: axis.stride))
