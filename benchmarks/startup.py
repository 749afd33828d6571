"""What it costs to start: ``python benchmarks/startup.py --help``.

CPU seconds (user and system) of processes that import the package, print a command's help, or begin
to work, each a median of some runs; with ``--against`` those of another checkout, run in turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

_HERE = Path(__file__).parents[1]
_NO_WORK = ("--trainer.limit_val_batches", "1", "--trainer.logger", "false")
COMMANDS = {
    "`import torch`": ("-c", "import torch"),
    "`import lightning.pytorch`": ("-c", "import lightning.pytorch"),
    "`from maskpro_lightning import MaskProCallback`": (
        "-c",
        "from maskpro_lightning import MaskProCallback",
    ),
    **{
        f"`maskpro {words}`": ("-m", "maskpro_lightning", *words.split())
        for words in (
            "--help",
            "fit --help",
            "validate --help",
            "export --help",
            "plan --help",
            "plan --config quickstart",
        )
    },
    "`maskpro validate --config quickstart`, a batch": (
        *("-m", "maskpro_lightning", "validate", "--config", "quickstart"),
        *_NO_WORK,
    ),
}


def seconds(arguments: tuple[str, ...], checkout: Path) -> float | None:
    """CPU time of Python with these arguments, on one thread; None if it fails."""
    path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime if process.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    checkouts = {"this checkout": _HERE}
    if options.against is not None:
        checkouts[options.against.name] = options.against.absolute()
    print(f"| CPU seconds | {' | '.join(checkouts)} |")
    print(f"| --- | {' | '.join('---:' for _ in checkouts)} |")
    for name, arguments in COMMANDS.items():
        runs: dict[str, list[float | None]] = {checkout: [] for checkout in checkouts}
        for turn in range(options.repeats + 1):
            for checkout, folder in checkouts.items():
                found = seconds(arguments, folder)
                if turn:  # the first one fills the caches
                    runs[checkout].append(found)
        cells = []
        for times in runs.values():
            known = [time for time in times if time is not None]
            cells.append(f"{statistics.median(known):.2f}" if known else "fails")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
