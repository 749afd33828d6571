"""How far long work is: a bar in a terminal, now and then a line anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

_T = TypeVar("_T")
# Seconds before the first line, and between two.
_FIRST, _BETWEEN = 3.0, 10.0


def progress(
    items: Iterable[_T], title: str, total: int | None = None, *, visible: bool = True
) -> Iterator[_T]:
    """Go through items and show how far that is, on standard error.

    Args:
        items: What takes long to come, or to work on.
        title: What is done.
        total: How many there will be, where the items do not know and it is known all the same.
        visible: Whether to show anything.
    """
    if not visible:
        return iter(items)
    if total is None and isinstance(items, Sized):
        total = len(items)
    if _is_free_terminal():
        return iter(tqdm(items, title, total, leave=False))
    return _with_lines(items, title, total)


def _is_free_terminal() -> bool:
    """Whether a line can be drawn over: not in a notebook or a file, nor where Rich draws.

    Rich redirects what others write and prints it above its own bars, but whole lines only: a line
    without an end, such as tqdm's, it prints without end in a notebook.
    """
    return sys.stderr.isatty() and type(sys.stderr).__name__ != "FileProxy"


def _with_lines(items: Iterable[_T], title: str, total: int | None) -> Iterator[_T]:
    start = due = 0.0
    for done, item in enumerate(items):
        now = time.monotonic()
        if not done:  # what comes before the first one says nothing about the others
            start, due = now, now + _FIRST
        if now >= due:
            sys.stderr.write(f"{title}: {_how_far(done, total, now - start)}\n")
            due = now + _BETWEEN
        yield item


def _how_far(done: int, total: int | None, seconds: float) -> str:
    if total is None:
        return f"{done} after {seconds:.0f} s"
    return f"{done} of {total}, about {seconds * (total - done) / done:.0f} s left"
