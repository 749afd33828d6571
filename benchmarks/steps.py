"""How much of the gap to the dense model is left after so many steps on batches of a size.

    python benchmarks/steps.py --model llama vision --steps 15 60 240 960
    python benchmarks/steps.py --model llama --steps 60 240 --sequences 2 32 --signal distilled
    python benchmarks/steps.py --model smollm2 --wikitext FOLDER --steps 15 60 240

Straight-through with its defaults from SparseGPT's mask, 2:4. Each length is a fit of its own, as
the rate falls over all of it. The loss is measured on every second held-out batch. Each fit is a
line of ``steps.csv``, and fits that are in it are not made again. The rule of thumb that figure and
table compare with: steps^-0.4 of the gap is left.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import cases
import matplotlib as mpl
import methods
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, ScalarFormatter
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import trange

from maskpro_lightning import NMPattern, StraightThrough

#: Of the gap, steps to this power are left.
POWER = -0.4
SIGNALS = ("labels", "distilled")
PATTERN = NMPattern(2, 4)


@dataclass(frozen=True, order=True)
class Fit:
    """One fit.

    Attributes:
        model: The model.
        signal: What is learned from.
        sequences: Sequences, or images, of a batch.
        steps: Length of the fit.
        seed: Its seed.
        dense: Held-out loss of the dense model, in nats.
        initial: That of the initial mask.
        loss: That of the mask found.
    """

    model: str
    signal: str
    sequences: int
    steps: int
    seed: int
    dense: float = 0.0
    initial: float = 0.0
    loss: float = 0.0

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells one fit from another."""
        return astuple(self)[:5]

    @property
    def left(self) -> float:
        """The share of the gap that is left."""
        return (self.loss - self.dense) / (self.initial - self.dense)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the fits that are missing, then draw and print all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", nargs="+", choices=("llama", "vision", "smollm2"), default=["llama"]
    )
    parser.add_argument("--wikitext", type=Path, help="valid.txt and test.txt, for SmolLM2")
    parser.add_argument("--signal", nargs="+", choices=SIGNALS, default=list(SIGNALS))
    parser.add_argument("--sequences", type=int, nargs="+", help="of a batch; the model's own")
    parser.add_argument("--steps", type=int, nargs="+", default=[15, 60, 240])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "steps.csv"
    done = {fit.key: fit for fit in read(path)}
    loaders = cases.loaders(args.output, args.wikitext)
    for name in args.model:
        case = loaders[name]()
        sizes = args.sequences or [len(_first(case.training[0]))]
        for fit in (Fit(name, *how) for how in product(args.signal, sizes, args.steps, args.seeds)):
            if fit.key not in done:
                done[fit.key] = found = run(fit, case)
                add(found, path)
    draw(sorted(done.values()), args.output / "steps.png")
    Console().print(table(sorted(done.values())))


def run(fit: Fit, case: cases.Case) -> Fit:
    """Learn, and measure."""
    held_out = case.reported[::2]
    masks, _ = methods.Workbench(case, PATTERN, fit.seed).one_shot("sparsegpt")
    resized = replace(case, training=regrouped(case.training, fit.sequences))
    bench = methods.Workbench(resized, PATTERN, fit.seed)
    with bench.restored():
        dense, initial = case.held_out_loss(held_out), bench.deployed_loss(masks, held_out)
        learner = methods.MaskProLearner(
            bench, masks, fit.steps, StraightThrough(), distilling=fit.signal == "distilled"
        )
        order: list[int] = []
        for _ in trange(fit.steps, desc=f"{fit.model} {fit.signal}", leave=False, mininterval=1):
            order = order or bench.epoch()
            learner.step(order.pop())
        loss = bench.deployed_loss(learner.masks(), held_out)
    return replace(fit, dense=round(dense, 4), initial=round(initial, 4), loss=round(loss, 4))


def regrouped(batches: Sequence[Any], sequences: int) -> list[Any]:
    """The same data in batches of so many sequences."""
    if isinstance(batches[0], Tensor):
        return [
            part for part in torch.cat(list(batches)).split(sequences) if len(part) == sequences
        ]
    parts = (regrouped(part, sequences) for part in zip(*batches, strict=True))
    return list(zip(*parts, strict=True))


def _first(batch: Any) -> Tensor:
    found: Tensor = batch if isinstance(batch, Tensor) else batch[0]
    return found


def read(path: Path) -> Iterator[Fit]:
    """The fits of a file, if there is one."""
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                numbers = (int(row[name]) for name in ("sequences", "steps", "seed"))
                losses = (float(row[name]) for name in ("dense", "initial", "loss"))
                yield Fit(row["model"], row["signal"], *numbers, *losses)


def add(fit: Fit, path: Path) -> None:
    """Write one more line."""
    names = tuple(field.name for field in fields(Fit))
    rows = [astuple(fit)] if path.exists() else [names, astuple(fit)]
    with path.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def table(fits: Sequence[Fit]) -> Table:
    """What was found."""
    shown = Table("model", "signal", "batch", "steps", "seed", "loss", "gap left", "/ rule")
    for fit in fits:
        numbers = f"{fit.loss:.3f}", f"{fit.left:.0%}", f"{fit.left / fit.steps**POWER:.1f}"
        shown.add_row(*map(str, fit.key), *numbers)
    return shown


def draw(fits: Sequence[Fit], path: Path) -> None:
    """Draw the gap left against steps, beside the rule."""
    with mpl.rc_context({"font.size": 10}):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        groups = sorted({(fit.model, fit.signal, fit.sequences) for fit in fits})
        colours = {
            model: f"C{number}" for number, model in enumerate(sorted({g[0] for g in groups}))
        }
        named = set()
        for model, signal, sequences in groups:
            of_group = [
                f for f in fits if (f.model, f.signal, f.sequences) == (model, signal, sequences)
            ]
            steps = sorted({fit.steps for fit in of_group})
            left = [mean(fit.left for fit in of_group if fit.steps == each) for each in steps]
            if len(steps) > 1:
                label = f"{model}, {signal}"
                axes.plot(
                    steps,
                    left,
                    marker="o" if signal == "distilled" else "s",
                    linestyle="-" if signal == "distilled" else ":",
                    color=colours[model],
                    label=None if label in named else label,
                )
                named.add(label)
                axes.annotate(
                    f"batches of {sequences}",
                    (steps[-1], left[-1]),
                    (8, -4),
                    textcoords="offset points",
                    color=colours[model],
                    fontsize=8,
                )
        every = sorted({fit.steps for fit in fits})
        rule = [n**POWER for n in every]
        axes.plot(every, rule, color="grey", lw=6, alpha=0.3, zorder=0, label=f"steps^{POWER:g}")
        axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="gap left")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_xticks(every)
        axes.set_yticks([0.05, 0.1, 0.2, 0.4])
        axes.minorticks_off()
        axes.margins(x=0.2)
        axes.set_title(
            "Share of the gap to the dense model that is left", loc="left", fontweight="bold"
        )
        axes.legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
