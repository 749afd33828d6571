"""Does curvature say better than gradients alone which masks to move to?

    python benchmarks/second_order.py --model llama --steps 60 240 --strengths 100
    python benchmarks/second_order.py --model smollm2 --wikitext FOLDER --seeds 0 --strengths 50

Straight-through takes the loss to be linear in the mask. Here the masks of a group are scored by
``g d + strength / 2 d' H d``, with d the change of the weights from those drawn, and H the running
average of ``g g'``: of its diagonal, or of all M x M products in a group. The expectation of a mean
gradient's square is the empirical Fisher matrix over the number of samples, so a strength that is
the number of tokens in a batch gives H the size of the Hessian. All else is the defaults', from
SparseGPT's mask, 2:4. Each run is a line of ``second_order.csv``, and is not made again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import cases
import methods
import torch
from ledger import Key, Ledger, Result
from torch import Tensor
from tqdm import trange

from maskpro_lightning import NMPattern, StraightThrough
from maskpro_lightning.weights.targets import Target

PATTERN = NMPattern(2, 4)
#: Bytes of H, float32, for a weight.
BYTES = {"diagonal": 4, "group": 4 * PATTERN.m}
# The decay of the running average: it covers some ten steps.
_DECAY = 0.9


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the runs that are missing, and print all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("llama", "vision", "smollm2"), default="llama")
    parser.add_argument("--wikitext", type=Path, help="valid.txt and test.txt, for SmolLM2")
    parser.add_argument("--steps", type=int, nargs="+", default=[60])
    parser.add_argument("--curvatures", nargs="+", choices=tuple(BYTES), default=list(BYTES))
    parser.add_argument("--strengths", type=float, nargs="+", default=[100])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    case = cases.loaders(args.output, args.wikitext)[args.model]()
    ledger = Ledger(args.output / "second_order.csv")
    curved = [f"{kind} {strength:g}" for kind, strength in product(args.curvatures, args.strengths)]
    for steps, seed, method in product(args.steps, args.seeds, ("first order", *curved)):
        key = Key(args.model, str(PATTERN), method, seed, f"steps={steps}")
        if key not in ledger.results:
            ledger.add(run(key, case, steps))
    for key, result in ledger.results.items():
        print(f"{' '.join(map(str, key))}: {result.loss:.3f}, other data {result.elsewhere:.3f}")


def run(key: Key, case: cases.Case, steps: int) -> Result:
    """Learn, and measure."""
    bench, watch = methods.Workbench(case, PATTERN, key.seed), methods.Stopwatch()
    kind, _, strength = key.method.partition(" ")
    with bench.restored():
        with watch:
            masks, spent = bench.one_shot("sparsegpt")
            learner = Learner(bench, masks, steps, kind, float(strength) if kind in BYTES else 0)
        order: list[int] = []
        for _ in trange(steps, desc=" ".join(map(str, key)), leave=False, mininterval=1):
            order = order or bench.epoch()
            with watch:
                spent += learner.step(order.pop())
        kinds = case.reported, case.choosing, case.elsewhere
        loss, choosing, other = (bench.deployed_loss(learner.masks(), each) for each in kinds)
        learner.forget()
    held = learner.bytes / bench.weights + BYTES.get(kind, 0)
    return Result(*key, loss, choosing, spent, watch.seconds, held, "", other)


class Learner(methods.MaskProLearner):
    """Straight-through, from gradients to which the curvature's part is added.

    Args:
        bench: Its model and data.
        masks: The initial masks.
        steps: Steps that will be made.
        kind: "diagonal" or "group"; anything else adds nothing.
        strength: What the average of the products of gradients is multiplied by.
    """

    def __init__(
        self,
        bench: methods.Workbench,
        masks: Mapping[str, Tensor],
        steps: int,
        kind: str,
        strength: float,
    ) -> None:
        super().__init__(bench, masks, steps, StraightThrough())
        self._kind, self._strength = kind, strength
        self._averages: dict[str, Tensor] = {}
        # They run before the optimizer's own hooks, which use up the gradient.
        self._handles = [
            target.parameter.register_post_accumulate_grad_hook(partial(self._curve, target))
            for target in (bench.targets if kind in BYTES else ())
        ]

    def forget(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _curve(self, target: Target, parameter: Tensor) -> None:
        """Change a gradient so that, linear in the mask, it scores masks as the quadratic does."""
        assert parameter.grad is not None
        grouped = partial(PATTERN.group, input_dim=target.input_dim)
        gradient, drawn = grouped(parameter.grad), grouped(parameter.detach())
        dense = grouped(self._bench.dense[target.name])
        mask = drawn != 0
        if self._kind == "diagonal":
            own = self._averaged(target.name, gradient.square()) * self._strength
            # Half the cost of the change that the element would make to what is drawn.
            gradient -= own * dense * (mask.float() - 0.5)
            return
        products = self._averaged(target.name, gradient.unsqueeze(-1) * gradient.unsqueeze(-2))
        sets = PATTERN.sets().to(dense.dtype)
        changes = (sets - mask.to(dense.dtype).unsqueeze(-2)) * dense.unsqueeze(-2)
        costs = torch.einsum("...ci,...ij,...cj->...c", changes, products, changes)
        # The linear scores that fit those of all sets best, in least squares, but for a constant.
        scores = self._strength / 2 * (costs - costs.mean(-1, keepdim=True)) @ sets
        fit = (sets.T @ sets - sets.mean(0).square() * len(sets))[0]
        scores /= fit[0] - fit[1]
        gradient += (scores / dense).nan_to_num(0, 0, 0)

    def _averaged(self, name: str, value: Tensor) -> Tensor:
        average = self._averages.setdefault(name, value.clone())
        return average.lerp_(value, 1 - _DECAY)


if __name__ == "__main__":
    main()
