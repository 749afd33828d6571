"""Methods that stand in for others for the length of a fit."""

from __future__ import annotations

from typing import Any


class Patches:
    """Attributes put on objects, over those of their classes, until :meth:`undo`."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def put(self, owner: Any, name: str, value: Any) -> Any:
        """Put a value in place of an attribute; returns what was there, or None."""
        inside = getattr(owner, name, None)
        self._before.append((owner, name, vars(owner).get(name)))
        vars(owner)[name] = value
        return inside

    def undo(self) -> None:
        """Leave every object as it was."""
        while self._before:
            owner, name, before = self._before.pop()
            if before is None:
                vars(owner).pop(name, None)
            else:
                vars(owner)[name] = before
