"""Remembers baselines, the initial mask's losses, by a hash of the batch's content."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Remembered baselines that are measured again when they are asked for: the first ones, since a loss
# that follows a schedule differs at once, and later one in so many.
_AUDITED, _AUDIT_EVERY = 4, 32


class BaselineCache:
    """Baselines by the content of their batch, so that the order of batches does not matter.

    Args:
        size: The number of batches to remember; the one not seen for longest is forgotten first.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        #: Why nothing is remembered any more; None while baselines are.
        self.given_up: str | None = None
        self.hits = 0
        self.lookups = 0
        self._losses: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, key: str | None) -> Tensor | None:
        """The baseline of a batch, or None if it has to be measured."""
        self.lookups += 1
        if key is None or key not in self._losses:
            return None
        self.hits += 1
        self._losses.move_to_end(key)
        return self._losses[key]

    @property
    def audits(self) -> bool:
        """Whether the last hit is to be measured again: each of the first ones, then one in 32."""
        return self.hits <= _AUDITED or self.hits % _AUDIT_EVERY == 0

    def audit(self, known: Tensor, measured: Tensor, dtype: torch.dtype) -> None:
        """Stop remembering if a baseline has changed, as it does if the loss follows a schedule.

        Args:
            known: The remembered baseline.
            measured: The same baseline, measured again.
            dtype: The dtype that the loss was computed in, which bounds its rounding errors.
        """
        allowed = 8 * max(torch.finfo(dtype).eps, 1e-5) * float(measured.abs())
        if abs(float(known) - float(measured)) <= allowed:
            return
        self.given_up = (
            f"the initial mask's loss on a batch was {float(known):.6g} and is now "
            f"{float(measured):.6g}"
        )
        self.size = 0
        self._losses.clear()

    def put(self, key: str | None, loss: Tensor) -> None:
        if key is None:
            return
        self._losses[key] = loss.detach().clone()  # a view could hold a large tensor
        while len(self._losses) > self.size:
            self._losses.popitem(last=False)

    @property
    def hit_rate(self) -> float:
        """Share of lookups that were answered, in [0, 1]."""
        return self.hits / max(1, self.lookups)

    def state_dict(self) -> dict[str, Any]:
        """The baselines of all ranks as plain numbers; a collective."""
        losses = {key: float(loss) for key, loss in self._losses.items()}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            everyone: list[dict[str, float]] = [{}] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, losses)
            losses = {key: loss for one in everyone for key, loss in one.items()}
        return {"losses": losses, "hits": self.hits, "lookups": self.lookups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with saved baselines."""
        first = max(0, len(state["losses"]) - self.size)
        losses = islice(state["losses"].items(), first, None)
        self._losses = OrderedDict((str(k), torch.tensor(float(loss))) for k, loss in losses)
        self.hits, self.lookups = int(state["hits"]), int(state["lookups"])


def fingerprint(batch: Any) -> str | None:
    """A hash of a batch's content, or None if it holds something that cannot be hashed.

    It covers what is in mappings, sequences and objects with attributes.
    """
    content = blake2b(digest_size=16)
    try:
        return content.hexdigest() if _feed(content, batch) else None
    except RecursionError:  # it holds itself
        return None


def _feed(content: blake2b, item: Any) -> bool:
    if isinstance(item, Tensor):
        if item.layout != torch.strided:
            return False
        content.update(f"{item.dtype}{tuple(item.shape)}".encode())
        plain = item.detach().cpu().resolve_conj().resolve_neg().contiguous()
        content.update(plain.flatten().view(torch.uint8).numpy().data)
        return True
    if isinstance(item, np.ndarray) and item.dtype != object:
        content.update(f"{item.dtype}{item.shape}".encode())
        content.update(np.ascontiguousarray(item).tobytes())
        return True
    if item is None or isinstance(item, str | bytes | int | float | complex | np.generic):
        content.update(repr(item).encode() + b"\0")
        return True
    kind = "mapping" if isinstance(item, Mapping) else type(item).__name__
    if isinstance(item, Mapping):
        item = [entry for pair in item.items() for entry in pair]
    elif not isinstance(item, Sequence):
        if not getattr(item, "__dict__", None):
            return False
        item = [entry for pair in vars(item).items() for entry in pair]
    content.update(f"{kind}{len(item)}".encode())
    return all(_feed(content, entry) for entry in item)
