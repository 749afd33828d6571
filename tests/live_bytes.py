"""Counts the bytes of the tensors that are made within a block and still alive."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """``with LiveBytes() as live: ...``; memory that was there before does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._known.setdefault(storage, 0)
        made = func(*args, **(kwargs or {}))
        for storage in _storages(made):
            if storage not in self._known:
                self._known[storage] = size = storage.nbytes()
                self.now += size
                weakref.finalize(storage, self._freed, size)
        self.peak = max(self.peak, self.now)
        return made

    def _freed(self, size: int) -> None:
        self.now -= size


def _storages(tree: Any) -> list[Any]:
    found = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            leaf = getattr(leaf, "_local_tensor", leaf)  # of a DTensor
            if leaf.layout == torch.strided and not leaf.is_meta:
                found.append(leaf.untyped_storage())
    return found
