"""What larger step sizes do to the policy, which knows no more of one group than its loss tells.

    python benchmarks/policy_rate.py --model vision --factors 1 1.5 2 2.5

Each factor multiplies ``policy_lr``; 1500 forward-equivalents from the mask of "reconstruction".
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import cases
import methods
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from maskpro_lightning import NMPattern
from maskpro_lightning.optim.rule import DEFAULTS, policy_lr


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every factor, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("llama", "vision"), default="vision")
    parser.add_argument("--factors", nargs="+", type=float, default=[1, 1.5, 2, 2.5])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forwards", type=int, default=1500)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    case = cases.llama() if args.model == "llama" else cases.vision(args.output)
    table = Table("factor", "before", "after", "groups changed", title=f"{args.model}, held out")
    for factor in args.factors:
        found = run(methods.Workbench(case, NMPattern(2, 4), args.seed), factor, args.forwards)
        table.add_row(f"{factor:g}", *(f"{value:.4f}" for value in found))
    Console().print(table)


def run(bench: methods.Workbench, factor: float, forwards: int) -> tuple[float, float, float]:
    """Held-out loss before and after, and the share of groups with another mask."""
    with bench.restored():
        masks, spent = bench.one_shot("reconstruction")
        left = forwards - spent
        steps = max(left // 2, left - len(bench.case.training))
        rate = factor * policy_lr(bench.pattern, DEFAULTS["policy"]["logit_scale"], steps)
        learner = methods.MaskProLearner(bench, masks, steps, estimator="policy", lr=rate)
        order: list[int] = []
        for _ in tqdm(range(steps), f"{factor:g}", leave=False, mininterval=1):
            order = order or bench.epoch()
            learner.step(order.pop())
        found = learner.masks()
        before, after = (bench.deployed_loss(m, bench.case.reported) for m in (masks, found))
        return before, after, methods.share_changed(masks, found)


if __name__ == "__main__":
    main()
