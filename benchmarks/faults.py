"""Run the tests of faults and print a table of what was tried and what was survived.

In a clone, with the tests' requirements: ``python benchmarks/faults.py``. The exit status is
pytest's.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

TESTS = Path(__file__).parents[1] / "tests"
#: By file, or by a part of a test's name where a file holds tests of several kinds.
KINDS = {
    "killed": "process killed, resumed",
    "breaks_at_any": "broken off at any operation, resumed",
    "terminated": "SIGTERM",
    "slurm": "SLURM's requeue",
    "one_rank": "NaN on one rank of two",
    "test_interruptions": "copies, pickles and fits afterwards",
    "test_callback_failures": "error or Ctrl-C in a step or hook",
    "test_numbers": "loss not finite, constant or huge",
    "test_bad_input": "bad input, told by name",
    "test_properties": "any shape, dtype, layout and seed",
    "truncated": "checkpoint cut off or flipped",
    "test_damaged": "damaged state, foreign code",
    "test_standin": "tracker down at the start; sent later",
    "test_tracker_faults": "tracker down, slow or full; secrets",
    "test_long_runs": "long runs, repeated runs",
}
FILES = [
    *(f"{name}.py" for name in KINDS if name.startswith("test_")),
    "test_resume.py",
]


class Counts:
    """A pytest plugin that counts faults by kind; a test may say that it tries several."""

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.survived: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if kind_of(item.nodeid) is not None]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        kind = kind_of(report.nodeid)
        if kind is None or report.skipped:
            return
        self.seconds[kind] += report.duration
        if report.when == "call" or report.failed:
            faults = int(dict(report.user_properties).get("tried", 1))  # type: ignore[call-overload]
            self.tried[kind] += faults
            self.survived[kind] += faults if report.passed else 0


def kind_of(test: str) -> str | None:
    """What kind of fault a test tries."""
    return next((kind for part, kind in KINDS.items() if part in test), None)


def main() -> int:
    """Run the tests, print the table, return the exit status of pytest."""
    counts = Counts()
    status = pytest.main(["-q", *(str(TESTS / name) for name in FILES)], plugins=[counts])
    table = Table("fault", title="Faults tried and survived")
    for name in ("tried", "survived", "seconds"):
        table.add_column(name, justify="right")
    for kind in dict.fromkeys(KINDS.values()):
        tried, survived = counts.tried[kind], counts.survived[kind]
        style = None if tried == survived else "bold red"
        table.add_row(kind, f"{tried}", f"{survived}", f"{counts.seconds[kind]:.0f}", style=style)
    table.add_section()
    sums = [sum(c.values()) for c in (counts.tried, counts.survived, counts.seconds)]
    table.add_row("all", *(f"{value:.0f}" for value in sums))
    Console().print(table)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
