"""Which masks the copies of a model evaluate: one for all, or each one of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributed import all_reduce, get_world_size, is_initialized

from maskpro_lightning.optim.masked_weight import Draw
from maskpro_lightning.weights.layout import Layout, local
from maskpro_lightning.weights.sharding import Replicas, find_replicas


class MaskSharing:
    """How ranks share masks and what they learn from them.

    Args:
        apart: Whether each replica draws a mask of its own.
        layouts: Where the parts of all weights lie.
        device: Where collectives happen.
    """

    def __init__(self, apart: bool, layouts: Sequence[Layout], device: torch.device) -> None:
        self.apart = apart
        self._layouts, self._device = layouts, device

    @cached_property
    def _replicas(self) -> Replicas:
        return find_replicas(self._layouts, self._device)

    def draws(self, group: Mapping[str, Any], step: int, sharpness: float) -> list[Draw]:
        """This rank's draw of a parameter group, followed by those of all replicas, if apart."""
        if not self.apart:
            return [Draw(group["seed"], step, sharpness)]
        replicas = self._replicas
        draws = [
            Draw(group["seed"], step, sharpness, replica)
            for replica in range(len(replicas.members))
        ]
        return [draws[replicas.index], *draws]

    def gather(self, values_V: Tensor) -> Tensor:
        """A rank's numbers as those of K masks, (K, V)."""
        return self._replicas.gather(values_V) if self.apart else values_V[None]

    def over_ranks(self, numbers: Tensor) -> Tensor:
        """Add up what ranks have counted in their parts of each weight, a row for a weight.

        Copies of a part count once, or by their mean, where they have masks of their own.
        """
        sharded = any(layout.across for layout in self._layouts)
        if not sharded and not (self.apart and is_initialized()):
            return numbers
        shares = torch.tensor([layout.ranks / get_world_size() for layout in self._layouts])
        numbers = (numbers * shares[:, None]).to(self._device)
        all_reduce(numbers)
        return numbers.cpu()

    def refuse_drift(self, logits: Iterable[Tensor]) -> None:
        """Compare the logits of replicas, which must never differ in a bit.

        Raises:
            RuntimeError: they do.
        """
        checksum = torch.zeros((), dtype=torch.int64, device=self._device)
        for value in logits:
            checksum += local(value).float().contiguous().view(torch.int32).sum(dtype=torch.int64)
        if not self._replicas.agree(checksum):
            raise RuntimeError(
                "The logits of the ranks have drifted apart: they were given different losses. "
                "Average the closure's loss over all ranks, or set exploration='per_replica'."
            )
