"""What the defaults of both estimators were chosen by: the same fits with one of them changed.

    python benchmarks/defaults.py --model vision llama
    python benchmarks/defaults.py --model smollm2 --wikitext FOLDER --forwards 70

2:4, from SparseGPT's mask by "straight_through" and from the mask of "reconstruction" by "policy";
1500 forward-equivalents unless told, the 16 or 112 of the initial mask included.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cases
import methods
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from maskpro_lightning import NMPattern
from maskpro_lightning.optim.estimators import EstimatorName, estimator_of

PATTERN = NMPattern(2, 4)
INITIAL: dict[EstimatorName, str] = {"straight_through": "sparsegpt", "policy": "reconstruction"}
#: Changes of a default: a factor for ``lr`` or ``logit_scale``, or logits of one size.
ROWS: dict[str, tuple[EstimatorName, Mapping[str, Any]]] = {
    "straight-through": ("straight_through", {}),
    "straight-through, logits of one size": ("straight_through", {"one_size": True}),
    "straight-through, lr / 2": ("straight_through", {"factor": 0.5}),
    "straight-through, lr x 2": ("straight_through", {"factor": 2.0}),
    "straight-through, logit_scale x 2": ("straight_through", {"scale": 2.0}),
    "straight-through, logit_scale x 4": ("straight_through", {"scale": 4.0}),
    "policy": ("policy", {}),
    "policy, logits of one size": ("policy", {"one_size": True}),
    "policy, logits of one size, lr x 3.4": ("policy", {"one_size": True, "factor": 3.4}),
    "policy, lr x 2": ("policy", {"factor": 2.0}),
    "policy, lr x 4": ("policy", {"factor": 4.0}),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every row, then print a table for each model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("llama", "vision", "smollm2")
    parser.add_argument("--model", nargs="+", choices=names, default=["vision"])
    parser.add_argument("--wikitext", type=Path, help="valid.txt and test.txt, for SmolLM2")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forwards", type=int, default=1500)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    loaders = cases.loaders(args.output, args.wikitext)
    for name in args.model:
        case = loaders[name]()
        table = Table("", "before", "after", "groups changed", title=f"{name}, held out")
        for row in args.rows:
            bench = methods.Workbench(case, PATTERN, args.seed)
            before, after, changed = run(bench, row, args.forwards)
            table.add_row(row, f"{before:.4f}", f"{after:.4f}", f"{changed:.1%}")
        Console().print(table)


def run(bench: methods.Workbench, row: str, forwards: int) -> tuple[float, float, float]:
    """Held-out loss before and after, and the share of groups with another mask."""
    name, change = ROWS[row]
    with bench.restored():
        masks, spent = bench.one_shot(INITIAL[name])
        steps = methods.steps_within(forwards - spent, bench, policy=name == "policy")
        estimator = estimator_of(name).for_fit(PATTERN, len(bench.targets), steps)
        rule = estimator.rule()
        lr, scale = rule["lr"] * change.get("factor", 1.0), change.get("scale", 1.0)
        scale *= rule["logit_scale"]
        estimator = replace(estimator, lr=lr, logit_scale=scale)
        learner = methods.MaskProLearner(bench, masks, steps, estimator)
        if change.get("one_size", False):
            for weight, logits in learner.optimizer.logits().items():
                logits.copy_(masks[weight] * scale)
        order: list[int] = []
        for _ in tqdm(range(steps), row, leave=False, mininterval=1):
            order = order or bench.epoch()
            learner.step(order.pop())
        found = learner.masks()
        before, after = (bench.deployed_loss(m, bench.case.reported) for m in (masks, found))
        return before, after, methods.share_changed(masks, found)


if __name__ == "__main__":
    main()
