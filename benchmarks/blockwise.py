"""Masks learned block by block against the dense model's blocks, beside those from the whole loss.

    python benchmarks/blockwise.py --model llama --forwards 1500 --seeds 0 1
    python benchmarks/blockwise.py --model smollm2 --wikitext FOLDER --forwards 196

Straight-through with its defaults from SparseGPT's mask, 2:4. A step of block-local learning runs
the dense model once, which says what goes into each block and what comes out; under the drawn masks
each block then learns from how far it comes out elsewhere, and no gradient leaves it. That takes
four forward-equivalents. Each run is a line of ``blockwise.csv``, and is not made again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import cases
import methods
import torch
from ledger import Key, Ledger, Result, share_closed
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import trange

from maskpro_lightning import NMPattern, StraightThrough

PATTERN = NMPattern(2, 4)
#: What a step learns from in the first and in the second half of the steps, by row.
ROWS = {
    "labels": ("labels", "labels"),
    "distilled": ("distilled", "distilled"),
    "blocks": ("blocks", "blocks"),
    "blocks, own inputs": ("own inputs", "own inputs"),
    "blocks, then distilled": ("blocks", "distilled"),
    "blocks, then labels": ("blocks", "labels"),
}
COSTS = {"labels": 3, "distilled": 4, "blocks": 4, "own inputs": 4}


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the runs that are missing, and print all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("llama", "smollm2"), default="llama")
    parser.add_argument("--wikitext", type=Path, help="valid.txt and test.txt, for SmolLM2")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS))
    parser.add_argument("--forwards", type=int, default=1500, help="for each row")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    case = cases.loaders(args.output, args.wikitext)[args.model]()
    ledger = Ledger(args.output / "blockwise.csv")
    for seed, row in product(args.seeds, ("dense", "sparsegpt", *args.rows)):
        key = Key(args.model, str(PATTERN), row, seed, "")
        if key not in ledger.results and (row != "dense" or seed == args.seeds[0]):
            ledger.add(run(key, case, args.forwards))
    Console().print(table(ledger, args.model))


def run(key: Key, case: cases.Case, forwards: int) -> Result:
    """Learn, and measure."""
    bench, watch = methods.Workbench(case, PATTERN, key.seed), methods.Stopwatch()
    spent = 0
    with bench.restored():
        if key.method != "dense":
            with watch:
                masks, spent = bench.one_shot("sparsegpt")
                if key.method in ROWS:
                    masks, spent = learned(bench, masks, ROWS[key.method], forwards, spent)
            bench.write(masks)
        kinds = case.reported, case.choosing, case.elsewhere
        loss, choosing, other = (case.held_out_loss(batches) for batches in kinds)
    return Result(*key, loss, choosing, spent, watch.seconds, 0, "", other)


def learned(
    bench: methods.Workbench,
    masks: Mapping[str, Tensor],
    halves: tuple[str, str],
    forwards: int,
    spent: int,
) -> tuple[dict[str, Tensor], int]:
    """The masks, and the forward-equivalents spent."""
    steps = 2 * (forwards - spent) // sum(COSTS[each] for each in halves)
    learner = Learner(bench, masks, steps)
    order: list[int] = []
    for number in trange(steps, desc=" ".join(halves), leave=False, mininterval=1):
        order = order or bench.epoch()
        learner.learns_from(halves[2 * number // steps])
        spent += learner.step(order.pop())
    return learner.masks(), spent


class Learner(methods.MaskProLearner):
    """Learns from labels, from the dense model's logits or from its blocks, as is said."""

    def __init__(self, bench: methods.Workbench, masks: Mapping[str, Tensor], steps: int) -> None:
        super().__init__(bench, masks, steps, StraightThrough())
        self._blocks = blocks_of(bench.case.model)
        self._signal = "labels"

    def learns_from(self, signal: str) -> None:
        """Say what the next step learns from."""
        self._signal, self._distilling = signal, signal == "distilled"

    def _from_gradients(self, number: int) -> int:
        if self._signal in ("labels", "distilled"):
            return super()._from_gradients(number)
        case = self._bench.case
        batch = case.training[number]
        with torch.no_grad(), self.optimizer.applied("dense"), recorded(self._blocks) as calls:
            case.logits_of(batch)

        def closure() -> Tensor:
            given = None if self._signal == "own inputs" else calls
            with errors(self._blocks, calls, given) as found:
                case.logits_of(batch)
            loss = torch.stack(found).sum()
            loss.backward()
            return loss

        self.optimizer.step(closure)
        return 4


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules of the longest list: the transformer's blocks."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


@contextmanager
def recorded(blocks: Sequence[nn.Module]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What goes into each block and what comes out."""
    calls: list[tuple[Tensor, Tensor]] = []

    def look(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.append((args[0], _first(output)))

    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_hook(look))
        yield calls


@contextmanager
def errors(
    blocks: Sequence[nn.Module],
    calls: Sequence[tuple[Tensor, Tensor]],
    given: Sequence[tuple[Tensor, Tensor]] | None,
) -> Iterator[list[Tensor]]:
    """How far each block's tokens come out from where they should, as a share of their way.

    Args:
        blocks: The blocks.
        calls: Their inputs and outputs in the dense model.
        given: Whose inputs to put in; None leaves the blocks what they get.
    """
    found: list[Tensor] = []

    def detached(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        own = args[0] if given is None else given[blocks.index(block)][0]
        return (own.detach(), *args[1:])

    def compare(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        before, after = calls[blocks.index(block)]
        error = (_first(output) - after).float().square().sum(-1)
        way = (after - before).float().square().sum(-1)
        found.append((error / way).mean())

    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_pre_hook(detached))
            hooks.enter_context(block.register_forward_hook(compare))
        yield found


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def table(ledger: Ledger, model: str) -> Table:
    """What was found."""
    shown = Table("learned from", "seed", "held-out loss", "gap closed", "other data", "spent")
    rows: dict[str, list[Result]] = {}
    for key, result in ledger.results.items():
        if key.model == model:
            rows.setdefault(key.method, []).append(result)
    for method, results in rows.items():
        for result in results:
            closed = "" if method == "dense" else f"{share_closed(rows, result):.0%}"
            shown.add_row(
                method,
                str(result.seed),
                f"{result.loss:.3f}",
                closed,
                f"{result.elsewhere:.3f}",
                f"{result.forwards:,}",
            )
    return shown


if __name__ == "__main__":
    main()
