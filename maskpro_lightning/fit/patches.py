"""Replaces attributes of objects for the length of a fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Patches:
    """Attributes put on objects, over those of their classes, until :meth:`undo`.

    Copies and pickles of a module that are made meanwhile do not have them.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self._on_modules: dict[int, dict[str, Any]] = {}

    def put(self, owner: Any, name: str, value: Any) -> Any:
        """Put a value in place of an attribute; returns the old value, or None."""
        if isinstance(owner, nn.Module) and id(owner) not in self._on_modules:
            before_all = self._on_modules[id(owner)] = {}
            self.put(owner, "__getstate__", lambda: _state_of(owner, before_all))
        inside = getattr(owner, name, None)
        own = vars(owner)
        if id(owner) in self._on_modules:
            self._on_modules[id(owner)].setdefault(name, own.get(name, _NOTHING))
        if isinstance(getattr(type(owner), name, None), property):
            setattr(owner, name, value)
            self.finally_do(lambda: setattr(owner, name, inside))
        elif name in own:
            before = own[name]
            self.finally_do(lambda: own.__setitem__(name, before))
            own[name] = value
        else:
            self.finally_do(lambda: own.pop(name, None))
            own[name] = value
        return inside

    def finally_do(self, act: Callable[[], object]) -> None:
        """Call ``act`` at :meth:`undo`, the last one first."""
        self._undo.append(act)

    def undo(self) -> None:
        """Leave every object as it was."""
        while self._undo:
            self._undo.pop()()
        self._on_modules.clear()


_NOTHING = object()


def _state_of(module: nn.Module, before: dict[str, Any]) -> Any:
    """A module's state for copies and pickles, as it was ``before`` attributes were put on it."""
    state = type(module).__getstate__(module)
    if not isinstance(state, dict):
        return state
    state = {name: value for name, value in state.items() if name not in before}
    return state | {name: value for name, value in before.items() if value is not _NOTHING}
