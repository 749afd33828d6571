"""Where one rank's part of a weight lies in the whole weight, and how it falls into groups.

A draw depends on a group's number in the whole weight. So ranks that know their place draw the same
masks without communication. A part is a *box* of the weight (DTensor: FSDP2, tensor parallelism) or
a *run* of its elements in memory order (the flat parameters of FSDP1). Both can cut a group. Then
the part is *padded* to whole groups, and all ranks that have a piece of the group keep, draw and
update all of it alike.

Shape suffixes: ``G`` groups of a block, ``M`` group size. Of a run: ``S`` slabs, the shortest
pieces of memory that consist of whole groups, and ``B`` groups of a slab.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed import (
    ProcessGroup,
    all_gather,
    all_reduce,
    get_process_group_ranks,
    get_world_size,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from maskpro_lightning.masks.pattern import NMPattern

# Groups of a block: on a CPU as many as its cache holds, on other devices more, since each block
# costs the launch of kernels.
_BLOCK, _DEVICE_BLOCK = 2**16, 2**22
#: Integer dtypes by their size in bytes, to view the bits of other numbers.
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Layout:
    """One rank's part of one weight.

    Attributes:
        pattern: The pattern.
        shape: Shape of the whole weight.
        input_dim: The dimension that groups lie along, not negative.
        size: Shape of the part; of a run, its length.
        offset: Where the part begins in the whole, for each dimension of ``size``.
        across: The process groups that the weight is split over, one for each dimension of the
            device mesh that splits it.
        input_ranks: The number of ranks that the input dimension of a box is split over.
        flat: Whether the part is a run.
    """

    pattern: NMPattern
    shape: tuple[int, ...]
    input_dim: int
    size: tuple[int, ...]
    offset: tuple[int, ...]
    across: tuple[ProcessGroup, ...] = ()
    input_ranks: int = 1
    flat: bool = False

    @classmethod
    def of(cls, weight: Tensor, pattern: NMPattern, input_dim: int) -> Layout:
        """The layout of a whole weight, or of a DTensor."""
        shape, input_dim = tuple(weight.shape), input_dim % max(1, weight.dim())
        if not isinstance(weight, DTensor):
            return cls(pattern, shape, input_dim, shape, (0,) * len(shape))
        mesh, placements = weight.device_mesh, weight.placements
        _, offset = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
        size = tuple(weight.to_local().shape)
        across, input_ranks = [], 1
        for dim, placement in enumerate(placements):
            if not placement.is_replicate() and mesh.size(dim) > 1:
                across.append(mesh.get_group(dim))
                input_ranks *= mesh.size(dim) if placement.is_shard(input_dim) else 1
        return cls(pattern, shape, input_dim, size, tuple(offset), tuple(across), input_ranks)

    @classmethod
    def run(
        cls, whole: Layout, start: int, length: int, across: tuple[ProcessGroup, ...]
    ) -> Layout:
        """The layout of ``length`` elements from number ``start`` on of a contiguous weight."""
        return replace(whole, size=(length,), offset=(start,), across=across, flat=True)

    @property
    def ranks(self) -> int:
        """The number of ranks that the weight is split over; further ranks hold copies."""
        return math.prod(group.size() for group in self.across)

    @cached_property
    def padded_size(self) -> tuple[int, ...]:
        """Shape of the part padded to whole groups."""
        size = list(self.size)
        size[self._axis] += self._before + self._after
        return tuple(size)

    @cached_property
    def cut(self) -> bool:
        """Whether this rank's part cuts a group."""
        return self._before + self._after > 0

    @property
    def may_be_cut(self) -> bool:
        """Whether any rank's part cuts a group; the same on all ranks."""
        return self.flat or self.shape[self.input_dim] % (self.input_ranks * self.pattern.m) > 0

    def own(self, padded: Tensor) -> Tensor:
        """The view of this rank's own values in a padded part."""
        return padded.narrow(self._axis, self._before, self.size[self._axis])

    def padded(self, own: Tensor) -> Tensor:
        """A copy of a part, padded with zeros; the part itself if it cuts no group."""
        if not self.cut:
            return own
        padded = own.new_zeros(self.padded_size)
        self.own(padded).copy_(own)
        return padded

    def shared(self, own: Tensor, slabs: Sequence[int]) -> Tensor:
        """This part's values in slabs that several parts share; zeros for other parts' values.

        Args:
            own: The part, of any dtype.
            slabs: The slabs' numbers along the dimension that groups lie along.

        Returns:
            float32 (slabs, length of a slab, ...), with the whole weight's other dimensions.
        """
        others = () if self.flat else self.shape[: self._axis] + self.shape[self._axis + 1 :]
        values = torch.zeros(len(slabs), self._unit, *others, device=own.device)
        if not own.numel():
            return values
        own, start = own.movedim(self._axis, 0), self.offset[self._axis]
        for values_of_slab, slab in zip(self._at_place(values, own), slabs, strict=True):
            first = max(start, slab * self._unit)
            last = min(start + len(own), (slab + 1) * self._unit)
            if first < last:
                kept = values_of_slab.narrow(0, first - slab * self._unit, last - first)
                kept.copy_(own.narrow(0, first - start, last - first))
        return values

    def completed(self, own: Tensor, slabs: Sequence[int], values: Tensor) -> Tensor:
        """A part padded with other ranks' values of its groups; itself if it cuts no group.

        Args:
            own: The part.
            slabs: As for :meth:`shared`.
            values: The sum over all ranks of what :meth:`shared` returned.
        """
        padded = self.padded(own)
        if not self.cut:
            return padded
        rows, start = padded.movedim(self._axis, 0), self.offset[self._axis] - self._before
        for value, slab in zip(self._at_place(values, rows), slabs, strict=True):
            first = slab * self._unit - start
            if 0 <= first < len(rows):
                rows.narrow(0, first, self._unit).copy_(value)
        return padded

    def _at_place(self, values: Tensor, rows: Tensor) -> Tensor:
        """The view of slabs of the whole weight at this part's place in the other dimensions."""
        places = [place for dim, place in enumerate(self.offset) if dim != self._axis]
        for dim, (place, size) in enumerate(zip(places, rows.shape[1:], strict=True), start=2):
            values = values.narrow(dim, place, size)
        return values

    @property
    def shares(self) -> int:
        """The number of the slab that this part shares with an earlier one, or -1."""
        return self.offset[self._axis] // self._unit if self._before else -1

    def uncut(self, own: Tensor) -> tuple[Layout, Tensor]:
        """A part without the groups that its edges cut: its layout, and a view of it."""
        skip = min(-self.offset[self._axis] % self._unit, self.size[self._axis])
        length = (self.size[self._axis] - skip) // self._unit * self._unit
        size, offset = list(self.size), list(self.offset)
        size[self._axis], offset[self._axis] = length, offset[self._axis] + skip
        where = replace(self, size=tuple(size), offset=tuple(offset))
        return where, own.narrow(self._axis, skip, length)

    def take(self, whole: Tensor) -> Tensor:
        """This rank's padded part of a tensor of the whole weight's shape; a view."""
        if self.flat:
            return whole.reshape(-1).narrow(0, self.offset[0] - self._before, *self.padded_size)
        for dim, (offset, size) in enumerate(zip(self.offset, self.padded_size, strict=True)):
            start = offset - self._before if dim == self._axis else offset
            whole = whole.narrow(dim, start if size else 0, size)
        return whole

    def whole(self, own: Tensor) -> Tensor:
        """The whole tensor from this rank's part; a collective of the ranks of ``across``."""
        if not self.across:
            return own
        whole = own.new_zeros(self.shape)
        part = whole.view(-1) if self.flat else whole
        for dim, (offset, size) in enumerate(zip(self.offset, self.size, strict=True)):
            part = part.narrow(dim, offset if size else 0, size)
        part.copy_(own)
        # As bytes, since a floating-point sum would turn -0 into 0.
        for group in self.across:
            all_reduce(whole.view(torch.uint8), group=group)
        return whole

    def size_of(self, padded: Sequence[int], each: int) -> list[int]:
        """The size of a tensor with ``each`` values for a group, from that of a padded part."""
        size = list(padded)
        size[self._axis] = size[self._axis] // self.pattern.m * each
        return size

    def seen_first(self, block: int, values: Tensor) -> Tensor:
        """Of values for the groups of a block, those of groups that begin in this part."""
        if not self._before:
            return values
        if not self.flat and values.dim() > 1:
            return values[..., 1:]
        return values if block else values[1:]

    def blocks(
        self,
        *parts: Tensor,
        state: Sequence[Tensor] = (),
        once: bool = False,
        share: int = 1,
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """Go through parts, and state beside them, in blocks of whole groups.

        If the part cuts a group, the blocks are views of a padded copy, which is written back after
        the last block.

        Args:
            parts: This rank's parts of tensors of the weight's shape.
            state: Tensors with a fixed number of values for each group, padded to whole groups.
            once: Leave out the groups that begin in an earlier part.
            share: Make blocks smaller by this factor.

        Yields:
            int64 (G,), the groups' numbers in the weight, and a view of each tensor, whose last
            dimension holds the values of a group.
        """
        tensors = tuple(tensor.detach() for tensor in parts)
        padded = [self.padded(tensor) for tensor in tensors]
        views = [self._grouped(t) for t in (*padded, *(tensor.detach() for tensor in state))]
        skip = int(once and self._before > 0)
        if skip:
            along = 0 if self.flat else -2
            views = [view.narrow(along, skip, view.shape[along] - skip) for view in views]
        shape = views[0].shape[:-1]
        in_row = shape[1:].numel()
        rows = max(1, block_size(views[0].device) // share // max(1, in_row))
        if 0 < shape[0] <= rows and in_row:  # nothing to cut up
            yield self._numbers(0, shape, skip, views[0].device), tuple(views)
        else:
            for first in range(0, shape[0] if in_row else 0, rows):
                block = tuple(view[first : first + rows] for view in views)
                numbers = self._numbers(first, block[0].shape[:-1], skip, views[0].device)
                yield numbers, block
        for tensor, copy in zip(tensors, padded, strict=True):
            if copy is not tensor:
                tensor.copy_(self.own(copy))

    @cached_property
    def _axis(self) -> int:
        return 0 if self.flat else self.input_dim

    @cached_property
    def _unit(self) -> int:
        """The length along ``_axis`` of the shortest piece of whole groups."""
        return self.pattern.m * (math.prod(self.shape[self.input_dim + 1 :]) if self.flat else 1)

    @cached_property
    def _before(self) -> int:
        return self.offset[self._axis] % self._unit if math.prod(self.size) else 0

    @cached_property
    def _after(self) -> int:
        end = self.offset[self._axis] + self.size[self._axis]
        return -end % self._unit if math.prod(self.size) else 0

    def _grouped(self, padded: Tensor) -> Tensor:
        """A view by groups of V values: (..., G of a row, V), or (S, B, V) of a run."""
        units = self.padded_size[self._axis] // self._unit
        each = padded.shape[self._axis] // units if units else self._unit
        if not self.flat:
            last = self._axis == padded.dim() - 1
            along = padded if last else padded.movedim(self._axis, -1)
            groups: Tensor = along.unflatten(-1, (units, each))
            return groups
        in_slab = self._unit // self.pattern.m
        return padded.view(units, each // in_slab, in_slab).movedim(1, -1)

    def _numbers(self, first: int, block: torch.Size, skip: int, device: torch.device) -> Tensor:
        """The numbers of a block's groups in the whole weight, int64 (G,)."""
        if self.size == self.shape and not skip:
            start = first * block[1:].numel()
            return torch.arange(start, start + block.numel(), device=device)
        groups_in_row = self.shape[self.input_dim] // self.pattern.m
        if self.flat:
            slab = self.offset[0] // self._unit + skip + first
            slabs_S1 = torch.arange(slab, slab + block[0], device=device)[:, None]
            row_SB = slabs_S1 // groups_in_row * block[1] + torch.arange(block[1], device=device)
            return (row_SB * groups_in_row + slabs_S1 % groups_in_row).flatten()
        others = [dim for dim in range(len(self.shape)) if dim != self.input_dim]
        sizes = [self.shape[dim] for dim in others] + [groups_in_row]
        starts = [self.offset[dim] for dim in others]
        starts.append(self.offset[self.input_dim] // self.pattern.m + skip)
        starts[0] += first
        numbers = torch.zeros((), dtype=torch.int64, device=device)
        for size, start, count in zip(sizes, starts, block, strict=True):
            place = torch.arange(start, start + count, device=device)
            numbers = numbers[..., None] * size + place
        return numbers.flatten()


def block_size(device: torch.device) -> int:
    """The number of groups of a block on a device."""
    return _BLOCK if device.type == "cpu" else _DEVICE_BLOCK


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def like(own: Tensor, weight: Tensor) -> Tensor:
    """A part laid out like a weight: as a DTensor on the same memory if the weight is one."""
    if not isinstance(weight, DTensor):
        return own
    distributed: Tensor = DTensor.from_local(
        own,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
    return distributed


def whole_of(tensor: Tensor) -> Tensor:
    """All of a DTensor, a collective; any other tensor itself."""
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


def sums(parts: Sequence[Layout], values: Sequence[Tensor]) -> list[Tensor]:
    """Sum each tensor over all ranks that have a part of its weight, with few collectives.

    All ranks give tensors of the same weights in the same order.
    """
    found = list(values)
    # By ranks, as several process groups can have the same ones.
    together: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for place, (layout, value) in enumerate(zip(parts, values, strict=True)):
        if layout.across and value.numel():
            ranks = tuple(tuple(get_process_group_ranks(group)) for group in layout.across)
            together.setdefault(ranks, []).append(place)
    for places in together.values():
        total = torch.cat([values[place].flatten() for place in places])
        for group in parts[places[0]].across:
            all_reduce(total, group=group)
        sizes = [values[place].numel() for place in places]
        for place, value in zip(places, total.split(sizes), strict=True):
            found[place] = value.view(values[place].shape)
    return found


def shared_slabs(parts: Sequence[Layout], device: torch.device) -> list[tuple[int, ...]]:
    """For each weight the slabs of which several ranks have pieces; the same on all ranks.

    A collective if any weight may be cut within groups.

    Args:
        parts: This rank's part of each weight; all ranks give the same weights in the same order.
        device: Where collectives happen.
    """
    if not any(part.across and part.may_be_cut for part in parts):
        return [()] * len(parts)
    own = torch.tensor([part.shares for part in parts], device=device)
    found = [torch.empty_like(own) for _ in range(get_world_size())]
    all_gather(found, own)
    return [tuple(sorted({n for n in of if n >= 0})) for of in torch.stack(found, 1).tolist()]
