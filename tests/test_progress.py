"""Laws of progress: nothing of the work changes, and who cannot be drawn over gets whole lines."""

from __future__ import annotations

import io
import sys
from itertools import islice
from typing import Any

import pytest

from maskpro_lightning import progress as module
from maskpro_lightning.progress import progress


class Stream(io.StringIO):
    """Standard error as a terminal, a file, or under Rich, that remembers each write."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal
        self.writes: list[str] = []

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)


class FileProxy(Stream):
    """Rich's, by its name."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A second for every look at it."""
    seen = [0.0]

    def look() -> float:
        seen[0] += 1
        return seen[0]

    monkeypatch.setattr(module.time, "monotonic", look)
    return seen


@pytest.mark.parametrize(("kind", "terminal"), [(Stream, 0), (Stream, 1), (FileProxy, 1)])
@pytest.mark.parametrize("visible", [True, False])
def test_the_items_are_the_same_wherever_it_is_shown(
    kind: type[Stream], terminal: bool, visible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = kind(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress(range(5), "Working", 5, visible=visible)) == [0, 1, 2, 3, 4]
    assert list(islice(progress(iter("abc"), "Working", visible=visible), 2)) == ["a", "b"]
    assert visible or stream.writes == []


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("stream", [Stream(False), FileProxy(True)])
def test_a_file_a_notebook_and_rich_get_whole_lines(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    assert len(list(progress(range(16), "Working", 16))) == 16
    lines = ["Working: 3 of 16, about 13 s left\n", "Working: 13 of 16, about 3 s left\n"]
    assert stream.writes == lines
    list(progress(iter(range(4)), "Searching"))
    assert stream.writes[2:] == ["Searching: 3 after 3 s\n"]


def test_what_knows_its_length_need_not_be_told(
    clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(False)
    monkeypatch.setattr(sys, "stderr", stream)
    list(progress(list(range(9)), "Working"))
    assert stream.writes[0].startswith("Working: 3 of 9, about ")


def test_a_terminal_gets_a_bar_that_is_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(True)
    monkeypatch.setattr(sys, "stderr", stream)
    list(progress(range(3), "Working", 3))
    assert "Working: " in stream.getvalue()
    assert not any("\n" in text for text in stream.writes)
    assert stream.getvalue().endswith("\r")


def test_rich_prints_the_lines_above_its_own_bars(clock: Any) -> None:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with Progress(console=console, redirect_stderr=True):
        list(progress(range(4), "Working", 4))
    assert "Working: 3 of 4, about 1 s left\n" in console.file.getvalue()
