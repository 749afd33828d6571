"""What the typical gap of initial logits, ``logit_scale``, does to a shallow and to a deep model.

    python benchmarks/gaps.py --model llama --steps 494 --gaps 3 6 12
    python benchmarks/gaps.py --model smollm2 --wikitext FOLDER --steps 60 --gaps 6 12 20 32 50

Straight-through from SparseGPT's mask, 2:4, with the step size that belongs to a gap. Prints on the
way the loss on every second held-out batch, the mean loss under the last four drawn masks, and the
share of groups that have changed; at the end the loss on every fourth batch of other data.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import cases
import methods
import torch
from tqdm import trange

from maskpro_lightning import NMPattern, StraightThrough
from maskpro_lightning.optim.estimators import straight_through_lr

PATTERN = NMPattern(2, 4)
# Shares of the steps after which to look.
_LOOKS = (1 / 15, 2 / 15, 1 / 4, 1 / 2, 3 / 4, 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Learn once for every gap."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("llama", "vision", "smollm2"), default="llama")
    parser.add_argument("--wikitext", type=Path, help="valid.txt and test.txt, for SmolLM2")
    parser.add_argument("--gaps", type=float, nargs="+", default=[3, 6, 12])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    case = cases.loaders(args.output, args.wikitext)[args.model]()
    masks, _ = methods.Workbench(case, PATTERN, args.seed).one_shot("sparsegpt")
    print(f"dense: {case.held_out_loss(case.reported[::2]):.3f}")
    for gap in args.gaps:
        bench = methods.Workbench(case, PATTERN, args.seed)
        with bench.restored():
            learn(bench, masks, gap, args.steps)


def learn(bench: methods.Workbench, masks: dict[str, torch.Tensor], gap: float, steps: int) -> None:
    """Learn from a gap, and print what is seen on the way."""
    lr = straight_through_lr(len(bench.targets), gap)
    estimator = StraightThrough(lr=lr, logit_scale=gap)
    learner = methods.MaskProLearner(bench, masks, steps, estimator)
    looks = {max(1, round(share * steps)) for share in _LOOKS}
    order: list[int] = []
    drawn: list[float] = []
    start = bench.deployed_loss(masks, bench.case.reported[::2])
    print(f"gap {gap:g}, lr {lr:.3g}: from {start:.3f}")
    for step in trange(1, steps + 1, leave=False, mininterval=1):
        order = order or bench.epoch()
        learner.step(order.pop())
        drawn.append(float(learner.optimizer.last["loss"]))
        if step in looks:
            found = learner.masks()
            loss = bench.deployed_loss(found, bench.case.reported[::2])
            changed = methods.share_changed(masks, found)
            print(f"  {step}: {loss:.3f}, drawn {mean(drawn[-4:]):.2f}, changed {changed:.2%}")
    other = bench.deployed_loss(learner.masks(), bench.case.elsewhere[::4])
    print(f"  other data: {other:.3f}", flush=True)


if __name__ == "__main__":
    main()
