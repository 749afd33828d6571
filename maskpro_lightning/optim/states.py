"""What is kept of each weight, in either memory, and of which part of it.

The optimizer's ``state`` holds tensors laid out like the weight. Those of a part that cuts groups
are views of padded ones, which are held here; so is what a lean weight's exchange is about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.optim.lean_weight import Held, LeanWeight, loaded
from maskpro_lightning.optim.masked_weight import MaskedWeight
from maskpro_lightning.optim.rule import Memory
from maskpro_lightning.optim.transition import BEST, INITIAL
from maskpro_lightning.weights.layout import Layout, like, local
from maskpro_lightning.weights.sharding import layouts, settle

Tensors = Mapping[str, Tensor]


class States:
    """Makes, keeps and restores the states of weights.

    Args:
        model: What FSDP shards, or None.
        weights: Each weight with its pattern and input dimension.
        memory: "plain" or "lean".
        logits_dtype: float32 or bfloat16.
    """

    def __init__(
        self,
        model: nn.Module | None,
        weights: Sequence[tuple[Tensor, NMPattern, int]],
        memory: Memory,
        logits_dtype: torch.dtype,
    ) -> None:
        self._model, self._memory, self._logits_dtype = model, memory, logits_dtype
        found = layouts(model, weights)
        #: Which part of each weight is this rank's.
        self.layouts: dict[Tensor, Layout] = {
            weight: layout for (weight, _, _), layout in zip(weights, found, strict=True)
        }
        self._padded: dict[Tensor, dict[str, Tensor]] = {}
        self._held: dict[Tensor, Held] = {}

    @property
    def lean(self) -> bool:
        """Whether no dense copy is kept."""
        return self._memory == "lean"

    def check(self, name: str, parameter: Tensor, *, needs_gradients: bool) -> None:
        """Refuse a weight whose part does not go with the estimator or the memory.

        Raises:
            ValueError: groups cut by a shard's edge with gradients, or shards with lean memory.
        """
        layout = self.layouts[parameter]
        if needs_gradients and layout.may_be_cut:
            raise ValueError(
                f"{name!r} is cut within groups of {layout.pattern.m} inputs (FSDP1, or tensor "
                f"parallelism along the inputs), but the estimator 'straight_through' needs "
                f"the gradients of whole groups: use fully_shard (FSDP2), or choose "
                f"estimator='policy'."
            )
        if self.lean and (layout.across or layout.flat):
            raise ValueError(
                f"{name!r} is sharded, but memory='lean' exchanges whole weights: choose "
                f"memory='plain', whose state is sharded like the weights."
            )

    def settle(self) -> None:
        """Make sure that the weights are the shards which the next forward pass gathers."""
        if self._model is not None:
            settle(self._model)

    def new(self, parameter: Tensor, mask: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """The tensors of a weight that starts from a mask and logits of the whole weight."""
        layout = self.layouts[parameter]
        # A copy where it is a part, which would else keep the whole in memory.
        logits = layout.take(logits).to(self._logits_dtype, copy=bool(layout.across))
        about = local(parameter), layout.take(mask), logits
        if self.lean:
            return LeanWeight.state(*about, layout.pattern, layout.input_dim)
        return MaskedWeight.state(*about)

    def keep(self, parameter: Tensor, tensors: Tensors) -> dict[str, Tensor]:
        """Take a weight's tensors, padded where it is cut; what the optimizer's state holds."""
        layout = self.layouts[parameter]
        if layout.cut:
            self._padded[parameter] = {k: v for k, v in tensors.items() if k != "dense"}
        if self.lean:
            self._held[parameter] = Held()
            return dict(tensors)
        return {
            name: like(layout.own(value) if name != "dense" else value, parameter)
            for name, value in tensors.items()
        }

    def masked(self, name: str, parameter: Tensor, state: Tensors) -> MaskedWeight | LeanWeight:
        """A weight with its state, ready for a step; the weights have to be settled."""
        tensors = {key: local(value) for key, value in state.items()}
        tensors |= self._padded.get(parameter, {})
        layout = self.layouts[parameter]
        if self.lean:
            lean = partial(LeanWeight, name, layout.pattern, layout.input_dim, parameter)
            return lean(**tensors, held=self._held[parameter])
        return MaskedWeight(name, layout, local(parameter), **tensors)

    def restored(self, parameter: Tensor, saved: Tensors) -> dict[str, Tensor]:
        """This rank's tensors from a saved state, of the whole weight or of a part; copies.

        A weight of lean memory then holds its dense version.
        """
        own = {name: self._part(parameter, name, value) for name, value in saved.items()}
        own["logits"] = own["logits"].to(self._logits_dtype)
        if not self.lean:
            masks = own["masks"]
            if not (masks & BEST).any():  # saved from lean memory, which does not keep it
                masks |= (masks & INITIAL) * BEST
            return {name: value for name, value in own.items() if name != "redrawn"}
        parameter.copy_(own["dense"])
        layout = self.layouts[parameter]
        return loaded(own, layout.pattern, layout.input_dim)

    def forget(self) -> None:
        """Let go of all tensors."""
        self._padded.clear()

    def _part(self, parameter: Tensor, name: str, value: Tensor) -> Tensor:
        layout = self.layouts[parameter]
        if name == "redrawn":
            return value.to(parameter.device)
        if isinstance(value, DTensor) and not isinstance(parameter, DTensor):
            value = value.full_tensor()
        value = local(value.detach())
        if tuple(value.shape) != layout.size:
            value = layout.take(value)
            value = layout.own(value) if name == "dense" else value
        elif layout.may_be_cut and name != "dense":
            value = layout.take(layout.whole(value.to(parameter.device)))
        return value.to(parameter.device).clone()
