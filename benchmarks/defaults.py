"""What the defaults of both estimators were chosen by: the same fits with one of them changed.

    python benchmarks/defaults.py --model vision llama

2:4; 1500 forward-equivalents, from SparseGPT's mask by "straight_through" and from the mask of
"reconstruction" by "policy".
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cases
import methods
import torch
from maskpro_lightning.optim.rule import DEFAULTS, Estimator, policy_lr
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from maskpro_lightning import NMPattern

PATTERN = NMPattern(2, 4)
INITIAL: dict[Estimator, str] = {"straight_through": "sparsegpt", "policy": "reconstruction"}
#: Changes of a default: a factor for ``lr``, other arguments of MaskPro, or logits of one size.
ROWS: dict[str, tuple[Estimator, Mapping[str, Any]]] = {
    "straight-through": ("straight_through", {}),
    "straight-through, logits of one size": ("straight_through", {"one_size": True}),
    "straight-through, sharpness 2": ("straight_through", {"sharpness": 2.0}),
    "straight-through, sharpness 4": ("straight_through", {"sharpness": 4.0}),
    "straight-through, lr x 1.5": ("straight_through", {"factor": 1.5}),
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
    parser.add_argument("--model", nargs="+", choices=("llama", "vision"), default=["vision"])
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forwards", type=int, default=1500)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.model:
        case = cases.llama() if name == "llama" else cases.vision(args.output)
        table = Table("", "before", "after", "groups changed", title=f"{name}, held out")
        for row in args.rows:
            bench = methods.Workbench(case, PATTERN, args.seed)
            before, after, changed = run(bench, row, args.forwards)
            table.add_row(row, f"{before:.4f}", f"{after:.4f}", f"{changed:.1%}")
        Console().print(table)


def run(bench: methods.Workbench, row: str, forwards: int) -> tuple[float, float, float]:
    """Held-out loss before and after, and the share of groups with another mask."""
    estimator, change = ROWS[row]
    rule = {**DEFAULTS[estimator], **change}
    one_size, factor = rule.pop("one_size", False), rule.pop("factor", 1.0)
    with bench.restored():
        masks, spent = bench.one_shot(INITIAL[estimator])
        policy = estimator == "policy"
        steps = methods.steps_within(forwards - spent, bench, policy=policy)
        if policy:
            rule["lr"] = policy_lr(PATTERN, rule["logit_scale"], steps)
        rule["lr"] *= factor
        learner = methods.MaskProLearner(bench, masks, steps, estimator=estimator, **rule)
        if one_size:
            for name, logits in learner.optimizer.logits().items():
                logits.copy_(masks[name] * rule["logit_scale"])
        order: list[int] = []
        for _ in tqdm(range(steps), row, leave=False, mininterval=1):
            order = order or bench.epoch()
            learner.step(order.pop())
        found = learner.masks()
        before, after = (bench.deployed_loss(m, bench.case.reported) for m in (masks, found))
        return before, after, methods.share_changed(masks, found)


if __name__ == "__main__":
    main()
