"""Gathers a model's state one whole tensor at a time, however it is split over ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import all_reduce, get_rank

from maskpro_lightning.files.distributed import Stored
from maskpro_lightning.files.grouping import check_sparse
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.weights.layout import Layout, local
from maskpro_lightning.weights.names import clean_name
from maskpro_lightning.weights.sharding import layouts, own_state
from maskpro_lightning.weights.targets import Target

Named = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class WholeState:
    """The state of a model, of which this rank may have only parts.

    Attributes:
        values: The model's own tensors, or this rank's parts, by name.
        layouts: Where these parts lie in the whole tensors.
        targets: The weights that have to be N:M, by name.
        stored: The checkpoint that holds the values, if the model does not.
    """

    values: Mapping[str, Tensor]
    layouts: Mapping[str, Layout]
    targets: Mapping[str, Target]
    stored: Stored | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        values: Mapping[str, Tensor],
        pattern: NMPattern,
        targets: Sequence[Target],
        stored: Stored | None = None,
    ) -> WholeState:
        """The state of a model, from what :func:`state_of` returned.

        Raises:
            ValueError: a whole weight is not N:M (sharded and stored ones are checked when they are
                gathered); or the checkpoint is of another model.
        """
        masked = {id(target.parameter): target for target in targets}
        found = {name: masked[id(value)] for name, value in values.items() if id(value) in masked}
        parts = [
            (value, pattern, found[name].input_dim if name in found else -1)
            for name, value in values.items()
        ]
        places = dict(zip(values, layouts(model, parts), strict=True))
        state = cls(values, places, found, stored)
        for name in found if stored is None else ():
            if not state.layouts[name].across:
                state._check(name, values[name])
        if stored is not None:
            for name, value in values.items():
                stored.check_shape(name, value)
        return state

    @property
    def sharded(self) -> bool:
        """Whether a tensor is split over ranks, so that all ranks have to gather."""
        return any(layout.across for layout in self.layouts.values())

    def shape(self, name: str) -> Tensor:
        """A whole tensor's shape and dtype, on the meta device."""
        shape, dtype = self.layouts[name].shape, self.values[name].dtype
        return torch.empty(shape, dtype=dtype, device="meta")

    @torch.no_grad()
    def whole(self, name: str) -> Tensor:
        """A whole tensor; a collective if it is sharded.

        Raises:
            ValueError: a weight that should be N:M is not.
        """
        layout, value = self.layouts[name], self.values[name]
        if self.stored is None:
            found = layout.whole(local(value.detach()))
        else:
            found = self.stored[name].to(value.dtype)
        if (layout.across or self.stored is not None) and name in self.targets:
            self._check(name, found)
        return found

    def hand_over(self, tensors: Named, write: Callable[[Named], None]) -> None:
        """Let rank 0 write what all ranks gather; an error on one rank is an error on all.

        Args:
            tensors: Names and tensors from :meth:`whole`.
            write: Writes them.

        Raises:
            RuntimeError: another rank has failed.
        """
        if not self.sharded:
            write(tensors)
            return
        device = next(local(self.values[n]).device for n, at in self.layouts.items() if at.across)
        failed = torch.ones((), device=device)
        try:
            if get_rank() == 0:
                write(tensors)
            else:
                _drop(tensors)
            failed.zero_()
        finally:
            _drop(tensors)  # after an error, too, since the other ranks go on gathering
            all_reduce(failed)
        if failed:
            raise RuntimeError("The model was not written: see the error of another rank.")

    def _check(self, name: str, weight: Tensor) -> None:
        target = self.targets[name]
        check_sparse(weight, self.layouts[name].pattern, target.input_dim, target.name)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's state: its own tensors, not copies, or this rank's parts of sharded ones.

    Names are without the parts that PyTorch's wrappers insert, so that the bare model loads it.

    Raises:
        TypeError: something in it is not a tensor, which a file of tensors could not hold.
    """
    state = {clean_name(name): value for name, value in own_state(model).items()}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"The state of {type(model).__name__} holds {name!r}, of type "
                f"{type(value).__name__}, which a file of tensors would lose: use torch.save."
            )
    return state


def _drop(tensors: Iterable[object]) -> None:
    deque(tensors, maxlen=0)
