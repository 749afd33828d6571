"""What weights are multiplied with that no layer of their own is called for.

Experts in one parameter, recurrent layers, attention and parameters in ``einsum`` do not get what
they multiply by way of a layer's call. The products themselves are watched: the other operand holds
the rows of inputs, and the weight's strides tell which part of the parameter they are for.

Shape suffixes: ``K`` weights of one output, ``T`` rows of input, ``B`` products side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskpro_lightning.weights.contractions import Watch, storage_of
from maskpro_lightning.weights.operations import Operands
from maskpro_lightning.weights.pieces import Axis, Piece
from maskpro_lightning.weights.targets import Target

_MATRICES = {
    *("mm", "bmm", "mv", "linear", "_grouped_mm", "_addmm_activation"),
    *("addmm", "addmv", "baddbmm", "addmm_", "addmv_", "baddbmm_"),
}
_COPIES = {
    *("_to_copy", "clone", "copy_", "contiguous", "to", "alias", "detach", "lift_fresh"),
    *("expand_copy", "view_copy"),
}


class Lying(NamedTuple):
    """Which outputs of a weight have inputs of their own.

    Attributes:
        parts: Into how many equal parts of its first dimension they cut it.
        columns: Weights of one output.
    """

    parts: int
    columns: int


@dataclass(frozen=True)
class _Use:
    """One product of a part of a weight.

    Attributes:
        summed: Dimensions of the weight that it sums over.
        columns: Weights of one output.
        units: Length of the first dimension, 1 if that is summed over.
        first: Where the part begins in it.
        size: Its length.
    """

    summed: frozenset[int]
    columns: int
    units: int
    first: int
    size: int


def lying(
    targets: Sequence[Target], run: Callable[[], object], sum_: Callable[[Tensor], Tensor] | None
) -> dict[str, Lying]:
    """Find out how weights are multiplied, in one forward pass.

    Args:
        targets: The weights.
        run: Runs the model on a batch.
        sum_: Sums a tensor over the processes, all of which have to call this.

    Returns:
        How weights lie, by name, without those of which not every product is understood.
    """
    uses: dict[str, list[_Use | None]] = {target.name: [] for target in targets}
    with watched(targets, lambda name, use, _: uses[name].append(use)):
        run()
    found = {}
    for target in targets:
        dims, units = len(target.shape), target.shape[0] if target.shape else 1
        # One-hot, so that the sum over processes shows what each has seen.
        seen = torch.zeros(1 + 2**dims + units + 1, device=target.parameter.device)
        for use in uses[target.name]:
            if use is None:
                seen[0] = 1
            else:
                seen[1 + sum(2**dim for dim in use.summed)] = 1
                seen[1 + 2**dims + math.gcd(use.first, use.size, use.units)] = 1
        failed, *flags = (seen if sum_ is None else sum_(seen)).bool().tolist()
        ways = [way for way in range(2**dims) if flags[way]]
        if failed or len(ways) != 1:
            continue
        sizes = [size for dim, size in enumerate(target.shape) if ways[0] >> dim & 1]
        steps = [step for step in range(units + 1) if flags[2**dims + step]]
        whole = 1 if ways[0] & 1 else units
        found[target.name] = Lying(whole // math.gcd(*steps), math.prod(sizes))
    return found


@contextmanager
def inputs_of(
    targets: Sequence[Target],
    lying: Mapping[str, Lying],
    see: Callable[[str, slice, Tensor], None],
) -> Iterator[None]:
    """Hand over the rows of input of products of weights while the block runs the model.

    Args:
        targets: The weights.
        lying: How they lie, for some of them; the others are left alone.
        see: Gets a weight's name, the parts that rows are for, and rows (T, K).

    Raises:
        RuntimeError: in the forward pass, when a weight is multiplied otherwise than was found.
    """

    def hand_over(name: str, use: _Use | None, rows_TK: Tensor) -> None:
        how = lying[name]
        step = 0 if use is None else use.units // how.parts
        if use is None or how.columns != use.columns or use.first % step or use.size % step:
            raise RuntimeError(
                f"{name!r} is not multiplied alike in all batches, so that what a calibration has "
                f"seen of its inputs is not all: choose init='magnitude', or exclude it."
            )
        see(name, slice(use.first // step, (use.first + use.size) // step), rows_TK)

    with watched([target for target in targets if target.name in lying], hand_over):
        yield


@contextmanager
def watched(
    targets: Sequence[Target], see: Callable[[str, _Use | None, Tensor], None]
) -> Iterator[None]:
    """Watch the products of weights, with None for one that is not understood."""
    if not targets:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        # A whole layer in one operation hides its products.
        fast = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(target.module, nn.RNNBase) for target in targets):
            backends: Sequence[Any] = torch.backends.cudnn, torch.backends.mkldnn
            for backend in backends:
                stack.callback(setattr, backend, "enabled", backend.enabled)
                backend.enabled = False
        stack.enter_context(_OperandWatch(targets, see))
        yield


class _OperandWatch(Watch):
    keeps = _COPIES

    def __init__(
        self, targets: Sequence[Target], see: Callable[[str, _Use | None, Tensor], None]
    ) -> None:
        super().__init__(nn.ModuleList(dict.fromkeys(target.module for target in targets)))
        self._targets = {id(target.parameter): target for target in targets}
        self._see = see
        self._picked: dict[int, Tensor] = {}  # numbers of slices, by the storage of their copies
        self._views: dict[tuple[object, ...], _View | None] = {}

    def see_picked(self, args: tuple[Any, ...], made: Tensor) -> None:
        super().see_picked(args, made)
        storage, indices = storage_of(made), args[1]
        if storage is None or storage not in self._known:
            return
        self._known[storage] = [piece.changed("index") for piece in self._known[storage]]
        if len(indices) == 1 and indices[0].dim() == 1:
            self._picked[storage] = indices[0]

    def see_made(
        self, name: str, args: tuple[Any, ...], inputs: Sequence[Tensor], result: Any
    ) -> None:
        super().see_made(name, args, inputs, result)
        picked = self._picked.get(storage_of(inputs[0]) or 0) if inputs else None
        if picked is not None and name in self.keeps:
            self._picked[storage_of(result) or 0] = picked

    @torch.no_grad()
    def see_product(
        self, name: str, operands: Operands, args: tuple[Any, ...], result: Any
    ) -> None:
        if torch._C._current_graph_task_id() != -1:  # of a backward pass
            return
        found = self.pieces_of(operands)
        matrices = name in _MATRICES and len(operands) == 2
        ends = args[2] if name == "_grouped_mm" and len(args) > 2 else None
        for place, ((weight, dims), pieces) in enumerate(zip(operands, found, strict=True)):
            alone = matrices and len(pieces) == 1 and not found[1 - place]
            for piece in pieces:
                target = self._targets.get(piece.parameter)
                if target is None:
                    continue
                uses: Iterable[tuple[_Use, Tensor]] | None = None
                if alone:
                    other, along = operands[1 - place]
                    inputs = other.movedim(max(along), -1)
                    uses = self._uses(target, piece, weight, max(dims), inputs, ends)
                if uses is None:
                    self._see(target.name, None, weight)
                for use, rows_TK in uses or ():
                    self._see(target.name, use, rows_TK)

    def _uses(
        self,
        target: Target,
        piece: Piece,
        weight: Tensor,
        dim: int,
        inputs: Tensor,
        ends: Tensor | None,
    ) -> Iterable[tuple[_Use, Tensor]] | None:
        """Which rows go to which part of a parameter; None if that cannot be told."""
        lies = (weight.shape, weight.stride(), weight.storage_offset(), weight.dtype)
        key = (piece, dim, *lies)
        if key not in self._views:
            self._views[key] = _View.of(target, piece, weight, dim)
        view = self._views[key]
        if view is None:
            return None
        first_B = view.first_B
        if piece.computed_by is not None:
            picked = self._picked.get(storage_of(weight) or 0)
            if piece.computed_by != "index" or picked is None or not view.is_slice:
                return None
            first_B = picked.cpu() % view.units
        if view.products != len(first_B):
            return None
        rows_B: Sequence[Tensor] = (inputs,)
        if ends is not None:
            rows_B = inputs.tensor_split(ends.cpu().long())[: len(first_B)]
        elif len(first_B) > 1:
            rows_B = inputs.unbind(0)
        return view.uses(first_B, rows_B)


class _View(NamedTuple):
    """What a product's view of a weight is of the whole.

    Attributes:
        summed: Dimensions of the weight that the product sums over.
        columns: Weights of one output.
        order_K: Where in the product each of them is.
        units: Length of the weight's first dimension, 1 if that is summed over.
        first_B: Where in it each of the products side by side begins.
        size: How far each goes.
        products: How many there are with weights of their own.
    """

    summed: frozenset[int]
    columns: int
    order_K: Tensor | slice
    units: int
    first_B: Tensor
    size: int
    products: int

    @classmethod
    def of(cls, target: Target, piece: Piece, view: Tensor, dim: int) -> _View | None:
        """Find out by the strides; None if it cannot be told, or is a part that has no place.

        Args:
            target: The weight.
            piece: Where it lies.
            view: The operand of the product.
            dim: The view's dimension that the product sums over.
        """
        rest = [each for each in range(view.dim()) if each != dim]
        side_by_side = rest[:1] if view.dim() == 3 else []
        along = [_axes(piece, view, dims) for dims in ([dim], side_by_side, rest)]
        origin = piece.place(view)
        if origin is None or any(axes is None for axes in along):
            return None
        columns, batch, outputs = (axes or [] for axes in along)
        outputs = outputs[len(batch) :]
        summed = frozenset(axis.dim for axis in columns)
        order_K = _order(target, columns)
        whole = [size for d, size in enumerate(target.shape) if d and d not in summed]
        first = _places([axis for axis in outputs if axis.dim == 0], (1,))
        if (
            order_K is None
            or any(axis.dim != 0 for axis in batch)
            # Other outputs may have other inputs.
            or math.prod(axis.size for axis in outputs if axis.dim) != math.prod(whole)
            or not torch.equal(first, torch.arange(len(first)))
        ):
            return None
        length = math.prod(target.shape[d] for d in summed)
        products = math.prod(view.shape[d] for d in side_by_side if view.stride(d))
        units, start = (1, 0) if 0 in summed else (target.shape[0], origin[0])
        places_B = start + _places(batch, (1,))
        return cls(summed, length, order_K, units, places_B, len(first), products)

    @property
    def is_slice(self) -> bool:
        """Whether it shows slices of the first dimension that all begin alike in its memory."""
        return self.size == 1 and self.first_B.tolist() == [0] and 0 not in self.summed

    def uses(self, first_B: Tensor, rows_B: Sequence[Tensor]) -> Iterator[tuple[_Use, Tensor]]:
        """Rows for each part of the weight, (T, K)."""
        places: dict[int, list[int]] = {}
        for place, first in enumerate(first_B.tolist()):
            places.setdefault(first, []).append(place)
        for first, some in places.items():
            rows_TK = torch.cat([rows_B[place].reshape(-1, self.columns) for place in some])
            use = _Use(self.summed, self.columns, self.units, first, self.size)
            yield use, rows_TK[:, self.order_K]


def _order(target: Target, columns: Sequence[Axis]) -> Tensor | slice | None:
    """Where each weight of an output is among columns; None if those are not all."""
    input_dim = target.input_dim % len(target.shape)
    summed = {axis.dim for axis in columns}
    others = [each for each in range(len(target.shape)) if each != input_dim]
    dims = [*others[len(others) + 1 - len(summed) :], input_dim]
    if summed != set(dims):  # so are columns not numbered
        return None
    steps, length = {}, 1
    for dim in reversed(dims):
        steps[dim] = length
        length *= target.shape[dim]
    places, whole = _places(columns, steps), torch.arange(length)
    order = places.argsort()
    if not torch.equal(places[order], whole):
        return None
    return slice(None) if torch.equal(order, whole) else order


def _axes(piece: Piece, view: Tensor, dims: Iterable[int]) -> list[Axis] | None:
    """What dimensions of a view move along, the innermost last; None if that cannot be told."""
    found: list[Axis] = []
    for dim in dims:
        axes = piece.along(view.stride(dim) * view.element_size(), view.shape[dim])
        if axes is None:
            return None
        found.extend(reversed(axes))
    return found


def _places(axes: Iterable[Axis], lengths: Mapping[int, int] | Sequence[int]) -> Tensor:
    """Numbers that steps along axes go through, the last axis fastest."""
    places = torch.zeros(1, dtype=torch.int64)
    for axis in axes:
        steps = torch.arange(axis.size) * (axis.step * lengths[axis.dim])
        places = (places[:, None] + steps).flatten()
    return places
