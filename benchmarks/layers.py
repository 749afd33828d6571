"""What a step costs with many small layers: ``python benchmarks/layers.py --help``.

Milliseconds per weight and step beside the closure (one loss, with a backward pass where the row
takes gradients), medians of alternating steps in one run, CPU time of one thread. AdamW steps the
same weights, all in one call (``foreach``) or one after the other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from maskpro_lightning import MaskPro, Policy, StraightThrough


class Row:
    """An optimizer over weights of its own.

    Args:
        weights: How many.
        side: Rows and columns of each.
        make: Makes the optimizer of named weights.
    """

    def __init__(self, weights: int, side: int, make: Callable[[Any], Any]) -> None:
        self.weights = [nn.Parameter(torch.randn(side, side)) for _ in range(weights)]
        self.optimizer = make([(str(number), w) for number, w in enumerate(self.weights)])
        self.seconds: list[float] = []
        self.first = 0.0

    def step(self) -> None:
        inside = [0.0]

        def closure() -> Tensor:
            start = time.thread_time()
            loss = sum_of_squares(self.weights)
            if torch.is_grad_enabled() and loss.requires_grad:
                loss.backward()  # hooks of the optimizer work in here
            inside[0] += time.thread_time() - start
            return loss.detach()

        start = time.thread_time()
        if isinstance(self.optimizer, MaskPro):
            self.optimizer.step(closure, torch.zeros(()))
        else:
            self.optimizer.zero_grad()
            self.optimizer.step(closure)
        self.seconds.append(time.thread_time() - start)


def sum_of_squares(weights: list[nn.Parameter]) -> Tensor:
    return torch.stack([weight.square().sum() for weight in weights]).sum()


def closure_alone(weights: list[nn.Parameter], backward: bool) -> float:
    """The seconds of a closure, without an optimizer's hooks."""
    start = time.thread_time()
    with torch.set_grad_enabled(backward):
        loss = sum_of_squares(weights)
        if backward:
            loss.backward()
    return time.thread_time() - start


ROWS: dict[str, Callable[[Any], Any]] = {
    "AdamW, foreach": lambda named: torch.optim.AdamW([w for _, w in named], foreach=True),
    "AdamW, one by one": lambda named: torch.optim.AdamW([w for _, w in named], foreach=False),
    "policy": lambda named: MaskPro(named, estimator=Policy(lr=0.1), fused=False),
    "straight-through": lambda named: MaskPro(named, estimator=StraightThrough(), fused=False),
    "straight-through, lean": lambda named: MaskPro(
        named, estimator=StraightThrough(), fused=False, memory="lean"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=int, nargs="*", default=[1000])
    parser.add_argument("--side", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"{torch.__version__}, weights of {options.side} x {options.side}, one thread\n")
    print("| weights | step | ms per weight and step | of AdamW's, foreach | ms to begin |")
    print("| ---: | --- | ---: | ---: | ---: |")
    for number in options.weights:
        rows = {name: Row(number, options.side, make) for name, make in ROWS.items()}
        begin: dict[str, float] = {}
        for name, row in rows.items():
            start = time.thread_time()
            if isinstance(row.optimizer, MaskPro):
                row.optimizer.begin()
            begin[name] = time.thread_time() - start
            row.step()  # makes what is made once
            row.seconds.clear()
        closures: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(options.repeats):
            for row in rows.values():
                row.step()
            for backward, found in closures.items():
                found.append(closure_alone(next(iter(rows.values())).weights, backward))
        per_weight = {
            name: 1e3
            * (statistics.median(row.seconds) - statistics.median(closures[name != "policy"]))
            / number
            for name, row in rows.items()
        }
        base = per_weight["AdamW, foreach"]
        for name, spent in per_weight.items():
            started = f"{1e3 * begin[name] / number:.2f}" if begin[name] > 1e-3 else ""
            print(
                f"| {number:,} | {name} | {spent:.4f} | {spent / base:.1f} | {started} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
