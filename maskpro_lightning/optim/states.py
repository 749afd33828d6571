"""The tensors that the optimizer keeps for each weight, and the part of it that is this rank's.

Those of the weight's shape lie in the optimizer's ``state``, laid out like the weight. Where this
rank's part cuts a group, they are views of padded tensors, which are held here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.optim.masked_weight import BITS, Held, MaskedWeight, bits_in
from maskpro_lightning.weights.layout import Layout, like, local, shared_slabs
from maskpro_lightning.weights.sharding import free_gradients, layouts, reshard

Memory = Literal["plain", "lean"]
LogitsDtype = Literal["float32", "bfloat16"]
Tensors = Mapping[str, Tensor]

_SHAPED = ("dense", "logits")


class States:
    """Makes, keeps and restores the states of weights.

    Args:
        model: The model that FSDP shards, or None.
        weights: Each weight with its pattern and input dimension.
        memory: "plain" or "lean".
        logits_dtype: "float32" or "bfloat16".
    """

    def __init__(
        self,
        model: nn.Module | None,
        weights: Sequence[tuple[Tensor, NMPattern, int]],
        memory: Memory,
        logits_dtype: LogitsDtype,
    ) -> None:
        self._model, self._lean = model, memory == "lean"
        self._logits_dtype: torch.dtype = getattr(torch, logits_dtype)
        found = layouts(model, weights)
        #: Which part of each weight is this rank's.
        self.layouts: dict[Tensor, Layout] = {
            weight: layout for (weight, _, _), layout in zip(weights, found, strict=True)
        }
        self.held: dict[Tensor, Held] = {}
        self._padded: dict[Tensor, dict[str, Tensor]] = {}

    def reshard(self) -> None:
        """Drop whole weights that FSDP holds, so that the parameters are the shards again."""
        if self._model is not None:
            reshard(self._model)

    def free_gradients(self) -> None:
        """Let FSDP1 free flat gradients that are used up."""
        if self._model is not None:
            free_gradients(self._model)

    @cached_property
    def slabs(self) -> dict[Tensor, tuple[int, ...]]:
        """Where each weight is cut within groups, see :func:`shared_slabs`; a collective."""
        found = shared_slabs(list(self.layouts.values()), local(next(iter(self.layouts))).device)
        return dict(zip(self.layouts, found, strict=True))

    def new(
        self, parameter: Tensor, whole: Tensor, mask: Tensor, logits: Tensor
    ) -> dict[str, Tensor]:
        """The tensors of a weight that starts from a mask and logits of the whole weight."""
        layout = self.layouts[parameter]
        dense = layout.take(whole) if layout.cut else local(parameter)
        mask = layout.take(mask)
        # A part is copied, since a view would keep the whole in memory.
        logits = layout.take(logits).to(self._logits_dtype, copy=bool(layout.across))
        return self._state(parameter, dense, mask, mask, logits)

    def keep(self, parameter: Tensor, tensors: Tensors) -> dict[str, Tensor]:
        """Hold a weight's tensors, padded if it is cut; returns those for the optimizer's state."""
        layout = self.layouts[parameter]
        lean = "pruned" in tensors
        self.held[parameter] = Held(bits=bits_in(local(parameter)) if lean else None)
        if layout.cut:
            self._padded[parameter] = dict(tensors)
        return {
            name: like(layout.own(value), parameter) if name in _SHAPED else value
            for name, value in tensors.items()
        }

    def masked(self, name: str, parameter: Tensor, state: Tensors) -> MaskedWeight:
        """A weight with its state, ready for a step; :meth:`reshard` has to come first."""
        tensors = {key: local(value) for key, value in state.items()}
        tensors |= self._padded.get(parameter, {})
        lean = "pruned" in tensors
        return MaskedWeight(
            name,
            self.layouts[parameter],
            local(parameter),
            self.held[parameter],
            lean,
            tensors.pop("pruned" if lean else "dense"),
            **tensors,
        )

    def restored(self, parameter: Tensor, saved: Tensors) -> dict[str, Tensor]:
        """Copies of this rank's tensors in a saved state, which is of the whole weight or a part.

        In lean memory, this writes the dense values into the weight.
        """
        dense, logits, masks = (
            self._part(parameter, saved[name]) for name in ("dense", "logits", "masks")
        )
        initial, drawn, best = ((masks & bit).bool() for bit in BITS.values())
        logits = logits.to(self._logits_dtype)
        state = self._state(parameter, dense, initial, drawn, logits)
        if "pruned" in state:
            local(parameter).copy_(dense)
        if best.any() and not torch.equal(best, initial):
            state["best"] = torch.from_numpy(np.packbits(best.cpu().numpy()))
        return state

    def forget(self) -> None:
        """Let go of all tensors."""
        self._padded.clear()
        self.held.clear()

    def _state(
        self, parameter: Tensor, dense: Tensor, initial: Tensor, drawn: Tensor, logits: Tensor
    ) -> dict[str, Tensor]:
        layout = self.layouts[parameter]
        # A part that cuts groups is worked on in a padded copy, and in lean memory an interrupted
        # exchange would lose what the copy holds.
        lean = self._lean and not layout.cut
        return MaskedWeight.state(layout, dense, initial, drawn, logits, lean=lean)

    def _part(self, parameter: Tensor, value: Tensor) -> Tensor:
        """This rank's part, padded with other ranks' values of its groups."""
        layout = self.layouts[parameter]
        if isinstance(value, DTensor) and not isinstance(parameter, DTensor):
            value = value.full_tensor()
        value = local(value.detach())
        if tuple(value.shape) != layout.size:
            value = layout.take(value)
        elif layout.may_be_cut:
            value = layout.take(layout.whole(value.to(parameter.device)))
        return value.to(parameter.device).clone()
