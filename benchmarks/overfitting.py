r"""Loss on seen and on held-out text after learning from 1, 32, 512 and 4096 sequences.

    python benchmarks/overfitting.py --output benchmarks/results
    python benchmarks/overfitting.py --model smollm2 --wikitext FOLDER --steps 60 \
        --sequences 1 32 128
    python benchmarks/overfitting.py --model smollm2 --wikitext FOLDER --steps 45 --distilled \
        --sequences 128 --text wikitext python-docs written

Straight-through learning from SparseGPT's mask with its defaults, for the same number of steps
whatever the number of sequences; ``--distilled`` learns from the dense model's outputs. SmolLM2
learns from WikiText, from the documentation that CPython carries, or from text that it writes
itself. Each run is added to ``overfitting.csv``.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import cases
import methods
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from maskpro_lightning import NMPattern, StraightThrough

ABOUT = ("model", "text", "learned_from", "sequences", "seed")
COLUMNS = (*ABOUT, "step", "seen", "held_out", "elsewhere", "groups_changed")
# Batches that the loss on seen text is measured on.
_SEEN = 32


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("llama", "smollm2"), default="llama")
    parser.add_argument("--wikitext", type=Path, help="valid.txt and test.txt, for SmolLM2")
    parser.add_argument(
        "--text", nargs="+", choices=("wikitext", "python-docs", "written"), help="for SmolLM2"
    )
    parser.add_argument("--distilled", action="store_true")
    parser.add_argument("--sequences", nargs="+", type=int, default=[1, 32, 512, 4096])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--looks", type=int, default=5, help="measurements on the way")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(arguments)
    if args.text and args.model == "llama":
        parser.error("--text is for --model smollm2: the Llama learns from Python's documentation")
    torch.set_num_threads(1)
    texts = ["python-docs"] if args.model == "llama" else args.text or ["wikitext"]

    @cache
    def loaded(text: str) -> cases.Case:
        if args.model == "llama":
            return cases.llama()
        return cases.smollm2(args.wikitext, text=text, sequences=max(args.sequences))

    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "overfitting.csv"
    table = Table(*COLUMNS, title="Straight-through, 2:4")
    for text, count, seed in product(texts, args.sequences, args.seeds):
        learned_from = "outputs" if args.distilled else "labels"
        bench = methods.Workbench(limited(loaded(text), count), NMPattern(2, 4), seed)
        found = run(bench, args.steps, args.looks, distilling=args.distilled)
        about = (args.model, text, learned_from, count, seed)
        rows = [tuple(map(str, (*about, *row))) for row in found]
        new = not path.exists()
        with path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows] if new else rows)
        for cells in rows:
            table.add_row(*cells)
    Console().print(table)


def limited(case: cases.Case, sequences: int) -> cases.Case:
    """The case with the first training sequences alone, in batches of one size or one batch."""
    batches = max(1, sequences // len(case.training[0]))
    return replace(case, training=[batch[:sequences] for batch in case.training[:batches]])


def run(
    bench: methods.Workbench, steps: int, looks: int, *, distilling: bool
) -> Iterator[tuple[int, float, float, float, float]]:
    """Learn, and yield what a row ends with, for the initial mask and for each look."""
    case = bench.case
    with bench.restored():
        masks, _ = bench.one_shot("sparsegpt")
        learner = methods.MaskProLearner(
            bench, masks, steps, StraightThrough(), distilling=distilling
        )
        order: list[int] = []
        for step in tqdm(range(steps + 1), "Learning", leave=False, mininterval=1):
            if step:
                order = order or bench.epoch()
                learner.step(order.pop())
            if step % (steps // looks) == 0:
                found = learner.masks()
                seen, held_out, elsewhere = (
                    round(bench.deployed_loss(found, batches), 4)
                    for batches in (case.training[:_SEEN], case.reported, case.elsewhere)
                )
                changed = round(methods.share_changed(masks, found), 4)
                yield step, seen, held_out, elsewhere, changed


if __name__ == "__main__":
    main()
