"""Watches one forward pass: which dimension of which weight does each product sum over?

A dispatch mode sees every operation of PyTorch, below autograd and autocast. A storage is *known*
if nothing in it depends on the batch: parameters, buffers, and what is made from those alone. For
each known storage the watch records where which parameter lies. So it understands a view by its
strides, and a copy (a cast, ``contiguous``, ``cat``, an expert picked by its number) by the view
that was copied.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from maskpro_lightning.weights.layers import own_parameters
from maskpro_lightning.weights.operations import (
    FORGETS,
    KEEPS_ZEROS,
    PRODUCTS,
    Operands,
    tensors,
)
from maskpro_lightning.weights.pieces import Piece, extent, fits
from maskpro_lightning.weights.sharding import flat_shapes


@dataclass(frozen=True)
class Product:
    """One way in which a weight was multiplied.

    Attributes:
        dims: The dimensions of the parameter that were summed over.
        operation: PyTorch's name of the product.
        computed_by: The operation that computed other values from the weight before the product,
            which need not be zero where the weight is; None if it kept the zeros, as a cast does.
    """

    dims: frozenset[int]
    operation: str
    computed_by: str | None = None


@dataclass
class Observed:
    """The findings of :func:`observe`, by the parameter's id.

    Attributes:
        products: The products that a parameter took part in.
        with_data: Parameters that were multiplied with something that depends on the batch.
        hidden: Whether a part of the model is sharded, so that products can be missed.
    """

    products: dict[int, set[Product]] = field(default_factory=dict)
    with_data: set[int] = field(default_factory=set)
    hidden: bool = False


@contextmanager
def observe(model: nn.Module) -> Iterator[Observed]:
    """Watch the products of all forward passes in the block.

    Changes nothing and leaves nothing behind. Compiled modules run uncompiled meanwhile; autograd,
    autocast and wrappers work as always. Costs some ten microseconds per operation.

    Args:
        model: Its parameters are watched.
    """
    watch = Watch(model)
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and the import is slow
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(watch)
        yield watch.observed


class Watch(TorchDispatchMode):
    """The dispatch mode that sees every operation and records the products of parameters.

    Args:
        model: Its parameters are watched.
    """

    #: Operations through which a parameter stays known as such.
    keeps: Collection[str] = KEEPS_ZEROS

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.observed = Observed()
        # The pieces in each known storage. A weak reference keeps the address of a storage that is
        # gone from being used again.
        self._known: dict[int, list[Piece]] = {}
        self._references: list[StorageWeakRef] = []
        self._parameters: set[int] = set()  # storages
        self._missing: list[tuple[nn.Module, str, int, torch.Size]] = []
        self._take_stock(model)

    def _take_stock(self, model: nn.Module) -> None:
        shapes = flat_shapes(model)
        for module in model.modules():
            for buffer in module.buffers(recurse=False):
                if not isinstance(buffer, DTensor):
                    self._learn(buffer, [])
            for name, parameter in own_parameters(module).items():
                if nn.parameter.is_lazy(parameter):
                    continue
                key = id(parameter)
                if isinstance(parameter, DTensor) or key in shapes:
                    shape = shapes.get(key, parameter.shape)
                    self._missing.append((module, name, key, shape))
                else:
                    self._watch(parameter, key)
        self.observed.hidden = bool(self._missing)

    def _watch(self, weight: Tensor, key: int) -> None:
        storage = storage_of(weight)
        if storage is not None:
            before = self._known.get(storage, [])
            if all(piece.parameter != key for piece in before):  # not under a second name
                self._learn(weight, [*before, Piece.of(weight, key)])
                self._parameters.add(storage)

    def _gather(self) -> None:
        """Watch whole weights that a wrapper has put in the place of shards by now."""
        for module, name, key, shape in self._missing:
            weight: Any = getattr(module, name, None)
            whole = isinstance(weight, Tensor) and not isinstance(weight, DTensor)
            if whole and weight.shape == shape:
                self._watch(weight, key)

    def _learn(self, tensor: Tensor, pieces: list[Piece]) -> None:
        storage = storage_of(tensor)
        if storage is None:
            return
        if storage not in self._known:
            self._references.append(StorageWeakRef(tensor.untyped_storage()))
        self._known[storage] = pieces

    def _pieces(self, tensor: Tensor) -> list[Piece]:
        """The pieces of parameters within a tensor's extent."""
        pieces = self._known.get(storage_of(tensor) or 0, [])
        if not pieces:
            return pieces
        start, stop = extent(tensor)
        return [piece for piece in pieces if piece.start < stop and start < piece.stop]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload) or func.namespace == "prim":
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if name not in PRODUCTS:
            with self:  # in inference mode composed operations come whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:  # else it is not composed
                return result
        result = func(*args, **kwargs)
        if name in PRODUCTS and func.namespace == "aten":
            self.see_product(name, PRODUCTS[name](args), args, result)
        else:
            self._see_other(func, name, args, kwargs, result)
        return result

    def _see_other(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        inputs = [*tensors(args), *tensors(kwargs.values())]
        if all(storage_of(each) in self._known for each in inputs):
            self.see_made(name, args, inputs, result)
            return
        if name == "index" and self._pieces(args[0]) and args[0].dim() > 2:
            self.see_picked(args, result)
        elif func._schema.is_mutable:
            # Something of the batch is written into a buffer; weights stay weights.
            for declared, each in zip(func._schema.arguments, args, strict=False):
                if declared.is_out or (declared.alias_info and declared.alias_info.is_write):
                    for written in tensors(each):
                        storage = storage_of(written)
                        if storage is not None and storage not in self._parameters:
                            self._known.pop(storage, None)

    def see_product(
        self, name: str, operands: Operands, args: tuple[Any, ...], result: Any
    ) -> None:
        """A product has been formed.

        Args:
            name: PyTorch's name of it.
            operands: What was multiplied.
            args: All of its arguments.
            result: What it returned.
        """
        found = self.pieces_of(operands)
        for place, ((operand, dims), pieces) in enumerate(zip(operands, found, strict=True)):
            others = [each for other, each in enumerate(found) if other != place]
            for piece in pieces:
                if not all(others):
                    self.observed.with_data.add(piece.parameter)
                summed = piece.summed(operand, dims)
                if summed:
                    product = Product(summed, name, piece.computed_by)
                    self.observed.products.setdefault(piece.parameter, set()).add(product)
        if all(found):  # of weights alone, as of LoRA's factors
            for each in tensors(result):
                self._learn(each, [])

    def pieces_of(self, operands: Operands) -> list[list[Piece]]:
        """The pieces of parameters in each operand of a product."""
        found = [self._pieces(operand) for operand, _ in operands]
        if self._missing and not any(found):
            self._gather()
            found = [self._pieces(operand) for operand, _ in operands]
        return found

    def see_made(
        self, name: str, args: tuple[Any, ...], inputs: Sequence[Tensor], result: Any
    ) -> None:
        """Something was made of known tensors alone."""
        for made in tensors(result):
            storage = storage_of(made)
            if storage is None or storage in self._parameters:
                continue
            if name == "copy_":
                start, stop = extent(made)
                kept = [p for p in self._known[storage] if p.stop <= start or stop <= p.start]
                self._learn(made, [*kept, *self._copied(args[1], made)])
            elif any(storage_of(each) == storage for each in inputs):  # a view, or in place
                if name.endswith("_") and name not in self.keeps:
                    self._known[storage] = [p.changed(name) for p in self._known[storage]]
            elif not made.is_floating_point() or name.endswith(FORGETS):
                self._learn(made, [])
            elif name in ("cat", "stack"):
                self._see_joined(name, args, made)
            elif name == "index":
                self.see_picked(args, made)
            else:
                changed_by = None if name in self.keeps else name
                pieces = [piece for each in inputs for piece in self._copied(each, made)]
                self._learn(made, [piece.changed(changed_by) for piece in pieces])

    def _see_joined(self, name: str, args: tuple[Any, ...], made: Tensor) -> None:
        """Tensors were put side by side."""
        dim = (args[1] if len(args) > 1 else 0) % max(1, made.dim())
        first, pieces = 0, []
        for place, part in enumerate(args[0]):
            if name == "stack":
                pieces += self._copied(part, made.select(dim, place))
            elif part.dim() == made.dim():  # else it is empty
                pieces += self._copied(part, made.narrow(dim, first, part.shape[dim]))
                first += part.shape[dim]
        self._learn(made, pieces)

    def see_picked(self, args: tuple[Any, ...], made: Tensor) -> None:
        """Slices of a weight were picked by number, such as some of its experts."""
        source, indices = args[:2]
        kept = source.dim() - len(indices)
        whole = kept > 0 and all(index is not None and not _is_mask(index) for index in indices)
        pieces: list[Piece] = []
        if whole and source.numel():
            pieces = list(self._copied(source[(0,) * len(indices)], made))
        self._learn(made, pieces)

    def _copied(self, source: Tensor, made: Tensor) -> list[Piece]:
        """The pieces of a tensor in a copy of it, which may be broadcast to more dimensions."""
        if not fits(source, made):
            return []
        copies = (piece.copied(source, made) for piece in self._pieces(source))
        return [copy for copy in copies if copy is not None]


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def storage_of(tensor: Tensor) -> int | None:
    """The address of a tensor's storage; None for a tensor without one, such as a sparse one."""
    if isinstance(tensor, DTensor) or tensor.layout != torch.strided:
        return None
    try:
        return int(StorageWeakRef(tensor.untyped_storage()).cdata)
    except (NotImplementedError, RuntimeError):
        return None
