"""Held-out loss of masks by every method at the same compute, in one table and one figure.

    python benchmarks/quality.py --model llama vision --pattern 2:4 --output benchmarks/results

Each finished run is added to ``quality.csv`` at once, and runs that are in it are not made again.
Settings of the methods that need some are chosen on the first seed, by held-out data that is not
reported.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path

import cases
import methods
import report
import torch
from ledger import METHODS, Key, Ledger, Result
from rich.console import Console
from tqdm import tqdm

from maskpro_lightning import NMPattern

# Where the held-out loss is measured on the way, as shares of the steps.
_LOOKS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the table and the figure."""
    args = parse(arguments)
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    loaders = cases.loaders(args.output, args.wikitext)
    models = {name: loaders[name] for name in args.model}
    if args.wikitext is not None and "llama" in args.model:
        models["llama on WikiText-2"] = cache(partial(cases.wikitext, args.wikitext))
    ledger = Ledger(args.output / "quality.csv")
    for (name, loaded), pattern in product(models.items(), args.pattern):
        for key in wanted(ledger, name, pattern, args.rows, args.seeds):
            if key not in ledger.results:
                ledger.add(run(key, loaded(), args.forwards))
        publish(ledger, args.output)
    for table in ledger.tables():
        Console().print(report.table(*table))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", nargs="+", choices=("llama", "vision", "smollm2"), default=["llama"]
    )
    parser.add_argument("--pattern", nargs="+", type=NMPattern.parse, default=[NMPattern(2, 4)])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--forwards", type=int, default=1500, help="for each learner")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument(
        "--wikitext",
        type=Path,
        help="folder of valid.txt and test.txt: the Llama on them, too; SmolLM2 needs it",
    )
    args = parser.parse_args(arguments)
    if "smollm2" in args.model and args.wikitext is None:
        parser.error("--model smollm2 needs --wikitext FOLDER")
    return args


def wanted(
    ledger: Ledger, model: str, pattern: NMPattern, rows: Sequence[str], seeds: Sequence[int]
) -> Iterator[Key]:
    """The runs of one table; those of later seeds depend on what the first has found."""
    for seed, method in product(seeds, rows):
        settings = methods.settings_of(method, model)
        first = seed == seeds[0]
        if not first and method in ("dense", "magnitude"):
            continue  # the same for all seeds
        texts = [" ".join(f"{k}={v:g}" for k, v in setting.items()) for setting in settings]
        if not first:
            texts = [ledger.best_setting(model, str(pattern), method, seeds[0])]
        for text in texts:
            yield Key(model, str(pattern), method, seed, text)


def publish(ledger: Ledger, folder: Path) -> None:
    """Write the tables and the figure."""
    (folder / "quality.md").write_text(report.markdown(ledger), encoding="utf-8")
    report.draw(ledger, folder)


def run(key: Key, case: cases.Case, forwards: int) -> Result:
    """Find a mask and measure it; the model is left dense."""
    bench = methods.Workbench(case, NMPattern.parse(key.pattern), key.seed)
    with bench.restored():
        if key.method in methods.LEARNERS:
            setting = dict(part.split("=") for part in key.setting.split())
            return learn(key, bench, forwards, {k: float(v) for k, v in setting.items()})
        watch, spent = methods.Stopwatch(), 0
        with watch:
            if key.method == "sparsegpt_updated":
                spent = methods.sparsegpt_with_update(bench)
            elif key.method != "dense":
                masks, spent = bench.one_shot(key.method)
                bench.write(masks)
        kinds = (case.reported, case.choosing, case.elsewhere)
        loss, choosing, elsewhere = map(case.held_out_loss, kinds)
        return Result(*key, loss, choosing, spent, watch.seconds, 0, "", elsewhere)


def learn(
    key: Key, bench: methods.Workbench, forwards: int, setting: Mapping[str, float]
) -> Result:
    """Learn masks for ``forwards`` forward-equivalents, those of the initial mask included."""
    watch, case = methods.Stopwatch(), bench.case
    with watch:
        masks, spent = bench.one_shot(methods.LEARNERS[key.method][0])
        learner, steps = methods.learner(key.method, bench, masks, forwards - spent, setting)
    curve = [f"{spent}:{bench.deployed_loss(masks, case.reported):.5f}"]
    looks = {max(1, round(share * steps)) for share in _LOOKS}
    order: list[int] = []
    name = " ".join(map(str, key))
    for step in tqdm(range(1, steps + 1), desc=name, unit="step", leave=False, mininterval=1):
        order = order or bench.epoch()
        with watch:
            spent += learner.step(order.pop())
        if step in looks:
            loss = bench.deployed_loss(learner.masks(), case.reported)
            curve.append(f"{spent}:{loss:.5f}")
    choosing, elsewhere = (
        bench.deployed_loss(learner.masks(), kind) for kind in (case.choosing, case.elsewhere)
    )
    held = learner.bytes / bench.weights
    return Result(*key, loss, choosing, spent, watch.seconds, held, " ".join(curve), elsewhere)


if __name__ == "__main__":
    main()
