"""Tables of sharding: is what was learned the same, what do ranks keep and send, what resumes.

``python benchmarks/sharding.py`` runs on 1, 2 and 4 processes of this machine, with gloo, and
prints tables in Markdown. The runs are those of the tests (``tests/process_shards.py``): of the
policy by the strategy's name, of gradients after what else is special about them ("4:8 fsdp1").
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

RANKS = (1, 2, 4)
_RUNS = Path(__file__).parents[1] / "tests" / "process_shards.py"


def read(folder: Path, task: str) -> dict[int, list[dict[str, Any]]]:
    """What each rank told of a task."""
    return {
        ranks: [
            torch.load(folder / f"{task}-{ranks}-{rank}.pt", weights_only=False)
            for rank in range(ranks)
        ]
        for ranks in RANKS
    }


def compared(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """How many groups' masks differ, and by how much logits do."""
    wrong = sum(
        int((found[version][name] != mask).sum())
        for version in ("initial", "drawn", "mode")
        for name, mask in expected[version].items()
    )
    off = max(
        float((found["logits"][name] - logits).abs().max())
        for name, logits in expected["logits"].items()
    )
    return f"equal, {off:.0e}" if not wrong else f"{wrong} differ, {off:.0e}"


def alone(name: str, one: dict[str, Any]) -> dict[str, Any]:
    """What the same run has learned on one device."""
    names = [each for each in one if each.endswith("ddp") and name.startswith(each[:-3])]
    run: dict[str, Any] = one[max(names, key=len)]
    return run


def messages(run: dict[str, Any]) -> str:
    """Messages of a step beyond the strategy's, numbers in them, and how many they once were."""
    steps, found = len(run["losses"]), run["sent"]
    if not found:
        return "none"
    return f"{len(found) / steps:g} of {sum(found) / steps:g}, not {run['split']}"


def print_table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """Print a table in Markdown."""
    print(f"\n{title}\n")
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")


def main() -> None:
    """Run all and print what was found."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        command = [sys.executable, "-W", "ignore", str(_RUNS), temporary]
        subprocess.run([*command, "core", "fit", "resume"], check=True, capture_output=True)
        core, fit, resume = (read(folder, task) for task in ("core", "fit", "resume"))
    one = core[1][0]
    names = [name for name, run in core[4][0].items() if isinstance(run, dict)]
    starts = [name for name in fit[4][0] if " from " in name and not name.startswith("found ")]

    def of(told: dict[str, Any], name: str) -> str:
        return compared(told[name]["end"], alone(name, one)["end"]) if name in told else "-"

    def start(told: dict[str, Any], name: str) -> str:
        _, _, init = name.partition(" from ")
        return compared(told[name], fit[1][0][f"ddp from {init}"]) if name in told else "-"

    head = [f"{ranks} rank{'s' * (ranks > 1)}" for ranks in RANKS]
    print_table(
        "Masks against one rank's after 8 steps, largest difference of a logit",
        ["strategy", *head],
        [[name, *(of(core[ranks][0], name) for ranks in RANKS)] for name in names],
    )
    print_table(
        "Initial masks, and those after a step, against one rank's",
        ["strategy and method", *head],
        [[name, *(start(fit[ranks][0], name) for ranks in RANKS)] for name in starts],
    )
    print_table(
        "Messages of a step beyond the strategy's, of numbers, not one for each split weight",
        ["strategy", *head],
        [
            [
                name,
                *(
                    messages(core[ranks][0][name]["end"]) if name in core[ranks][0] else "-"
                    for ranks in RANKS
                ),
            ]
            for name in names
        ],
    )
    print_table(
        "Bytes of dense weights, logits and masks on the rank that keeps most",
        ["strategy", *head],
        [
            [
                name,
                *(
                    str(max(told[name]["end"]["bytes"] for told in core[ranks]))
                    if name in core[ranks][0]
                    else "-"
                    for ranks in RANKS
                ),
            ]
            for name in names
        ],
    )
    print_table(
        "Fits through Lightning, and fits resumed on other numbers of ranks, against one rank's",
        ["strategy", "saved on", *(f"resumed on {ranks}" for ranks in RANKS)],
        [
            [
                name,
                str(saved),
                *(
                    compared(resume[ranks][0][f"{name} of {saved}"], fit[1][0]["ddp"])
                    if f"{name} of {saved}" in resume[ranks][0]
                    else "-"
                    for ranks in RANKS
                ),
            ]
            for name in fit[4][0]
            if " from " not in name
            for saved in RANKS
            if name in fit[saved][0]
        ],
    )


if __name__ == "__main__":
    main()
