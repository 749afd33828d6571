"""What logits in bfloat16 cost in quality: ``python benchmarks/logits.py --help``.

The quickstart's Llama, 2:4, from SparseGPT's mask, straight-through; batches of 8 x 128 tokens.
Prints the held-out loss of the deployed mask in nats, as a table with a row for each seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import cases
import methods
import torch
from torch import Tensor

from maskpro_lightning import NMPattern, StraightThrough

DTYPES = ("float32", "bfloat16")


def loss(bench: methods.Workbench, masks: Mapping[str, Tensor], dtype: str, steps: int) -> float:
    """The held-out loss of what is learned with logits of a dtype."""
    with bench.restored():
        learner = methods.MaskProLearner(bench, masks, steps, StraightThrough(), logits_dtype=dtype)
        order = bench.epoch()
        for step in range(steps):
            learner.step(order[step % len(order)])
        return bench.deployed_loss(learner.masks(), bench.case.reported)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=250)
    options = parser.parse_args()
    torch.set_num_threads(1)
    case = cases.llama()
    print(f"| seed | SparseGPT's mask | {' | '.join(DTYPES)} | difference |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for seed in options.seeds:
        found = []
        for dtype in DTYPES:  # each with a bench of its own, so that both see the same batches
            bench = methods.Workbench(case, NMPattern.parse("2:4"), seed)
            masks, _ = bench.one_shot("sparsegpt")
            start = bench.deployed_loss(masks, case.reported)
            found.append(loss(bench, masks, dtype, options.steps))
        cells = [*(f"{each:.4f}" for each in (start, *found)), f"{found[1] - found[0]:+.4f}"]
        print(f"| {seed} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
