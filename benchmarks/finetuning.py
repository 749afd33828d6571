r"""Held-out loss of sparse models whose kept weights are trained, beside a learned mask's alone.

    python benchmarks/finetuning.py --model llama vision --output benchmarks/results
    python benchmarks/finetuning.py --model smollm2 --wikitext FOLDER --forwards 196 --seeds 0 \
        --rows dense sparsegpt sparsegpt_trained learned_trained

Every row gets the same forward-equivalents and has to end exactly N:M. Beside data of the kind that
was trained on, the loss is measured on data of another kind. Each finished run is added to
``finetuning.csv`` at once, and runs that are in it are not made again. Learning rates, and how
much of the compute goes to the mask, are chosen on the first seed by held-out data that is not
reported.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean

import cases
import methods
import report
import torch
from ledger import Key, Ledger, Result, share_closed
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from tqdm import trange

from maskpro_lightning import NMPattern, keep_sparse

#: Learning rates to choose among; SmolLM2, a hundred times as large, wants smaller ones.
RATES = {
    "llama": (3e-4, 1e-3, 3e-3),
    "vision": (3e-4, 1e-3, 3e-3),
    "smollm2": (3e-5, 1e-4, 3e-4, 1e-3),
}
#: More of them where less than half of the weights are kept, which have further to go.
LARGER_RATES = (1e-2,)
SHARES = (0.25, 0.5, 0.75)
#: What pulls pruned weights to zero in SR-STE (arXiv 2102.04010, equation 9 and its appendix).
DECAY = 2e-4
#: Methods by name, as the table calls them, in its order.
ROWS = {
    "dense": "dense",
    "sparsegpt": "SparseGPT's mask",
    "straight_through": "**learned mask** alone",
    "magnitude_trained": "magnitude, trained (ASP)",
    "sr_ste": "SR-STE, mask and weights together",
    "sparsegpt_trained": "SparseGPT's mask, trained",
    "sparsegpt_updated_trained": "SparseGPT with weight update, trained",
    "learned_trained": "**learned mask, then trained**",
}
#: How the names of those rows end that are worth a dot: one-shot masks are far off.
_SHOWN = ("_trained", "straight_through", "sr_ste")
COLUMNS = ("method", "seeds", "held-out loss", "gap closed", "other kind of data", "spent")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the table."""
    args = parse(arguments)
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    models = cases.loaders(args.output, args.wikitext)
    ledger = Ledger(args.output / "finetuning.csv")
    for name, pattern in product(args.model, args.pattern):
        for key in wanted(ledger, name, pattern, args.rows, args.seeds):
            if key not in ledger.results:
                ledger.add(run(key, models[name](), args.forwards))
        (args.output / "finetuning.md").write_text(markdown(ledger), encoding="utf-8")
        draw(ledger, args.output / "finetuning.png")
    print(markdown(ledger).replace("**", ""))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=tuple(RATES), default=["llama"])
    parser.add_argument("--wikitext", type=Path, help="valid.txt and test.txt, for SmolLM2")
    parser.add_argument("--pattern", nargs="+", type=NMPattern.parse, default=[NMPattern(2, 4)])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS))
    parser.add_argument("--forwards", type=int, default=1500, help="for each row")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args(arguments)


def wanted(
    ledger: Ledger, model: str, pattern: NMPattern, rows: Sequence[str], seeds: Sequence[int]
) -> Iterator[Key]:
    """The runs of one table; some depend on what those before have found."""
    for seed, method in product(seeds, rows):
        if method == "dense" and seed != seeds[0]:
            continue  # the same for all seeds
        settings = [""]
        if method == "sr_ste" or method.endswith("_trained"):
            sparse = pattern.n / pattern.m < 1 / 2
            rates = RATES[model] + (LARGER_RATES if sparse else ())
            settings = [f"lr={rate:g}" for rate in rates]
        if method == "learned_trained":
            # At the rate that was best for the mask it starts from; else the grid would be larger.
            rate = ledger.best_setting(model, str(pattern), "sparsegpt_trained", seeds[0])
            settings = [f"{rate} share={share:g}" for share in SHARES]
        if seed != seeds[0]:
            settings = [ledger.best_setting(model, str(pattern), method, seeds[0])]
        for setting in settings:
            yield Key(model, str(pattern), method, seed, setting)


def run(key: Key, case: cases.Case, forwards: int) -> Result:
    """Find a mask, train, and measure; the model is left as it was."""
    bench = methods.Workbench(case, NMPattern.parse(key.pattern), key.seed)
    setting = {k: float(v) for k, v in (part.split("=") for part in key.setting.split())}
    watch = methods.Stopwatch()
    with restored(case.model), bench.restored():
        with watch:
            spent = METHODS[key.method](bench, forwards, **setting)
        for target in bench.targets if key.method != "dense" else ():
            kept_GM = bench.pattern.group(target.parameter.detach(), target.input_dim) != 0
            assert (kept_GM.sum(-1) <= bench.pattern.n).all(), target.name
        kinds = (case.reported, case.choosing, case.elsewhere)
        loss, choosing, other = (case.held_out_loss(batches) for batches in kinds)
    return Result(*key, loss, choosing, spent, watch.seconds, 0, "", other)


@contextmanager
def restored(model: torch.nn.Module) -> Iterator[None]:
    """Give a model all its weights back after a ``with`` block, and freeze it."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        yield
    finally:
        model.load_state_dict(before)
        model.requires_grad_(False).zero_grad()


# --- methods: each leaves a sparse model and returns the forward-equivalents spent ----------------


def nothing(bench: methods.Workbench, forwards: int) -> int:
    return 0


def sparsegpt(bench: methods.Workbench, forwards: int) -> int:
    masks, spent = bench.one_shot("sparsegpt")
    bench.write(masks)
    return spent


def learned(bench: methods.Workbench, forwards: int) -> int:
    """The mask of straight-through from SparseGPT's, with its defaults."""
    masks, spent = bench.one_shot("sparsegpt")
    learner, steps = methods.learner("straight_through", bench, masks, forwards - spent, {})
    order: list[int] = []
    for _ in trange(steps, desc="mask", unit="step", leave=False, mininterval=1):
        order = order or bench.epoch()
        spent += learner.step(order.pop())
    bench.write(learner.masks())
    return spent


def trained(bench: methods.Workbench, forwards: int, start: str, lr: float) -> int:
    """Train under a mask that costs little."""
    if start == "sparsegpt_updated":
        spent = methods.sparsegpt_with_update(bench)
    else:
        masks, spent = bench.one_shot(start)
        bench.write(masks)
    return spent + train(bench, forwards - spent, lr)


def learned_and_trained(bench: methods.Workbench, forwards: int, lr: float, share: float) -> int:
    """Spend a share of the compute on the mask, the rest on the weights under it."""
    spent = learned(bench, round(share * forwards))
    return spent + train(bench, forwards - spent, lr)


def train(bench: methods.Workbench, forwards: int, lr: float) -> int:
    """AdamW on all weights, its rate falling linearly to 0, under the zeros that are there."""
    model = bench.case.model.requires_grad_()
    optimizer = AdamW(model.parameters(), lr=lr)
    sparse = keep_sparse(optimizer, model, bench.pattern)
    for number, scheduler in steps_of(bench, optimizer, forwards):
        optimizer.zero_grad()
        bench.loss(number).backward()
        optimizer.step()
        scheduler.step()
    sparse.release()
    return forwards // 3 * 3


def sr_ste(bench: methods.Workbench, forwards: int, lr: float) -> int:
    """Forward passes see the largest N of each group, gradients reach all, and decay the others."""
    model = bench.case.model.requires_grad_()
    optimizer = AdamW(model.parameters(), lr=lr)
    dense = [target.parameter.detach().clone() for target in bench.targets]

    def masks() -> list[Tensor]:
        scores = zip(dense, bench.targets, strict=True)
        return [_largest(weight.abs(), bench.pattern, t.input_dim) for weight, t in scores]

    for number, scheduler in steps_of(bench, optimizer, forwards):
        found = masks()
        for target, weight, mask in zip(bench.targets, dense, found, strict=True):
            target.parameter.detach().copy_(weight.where(mask, 0))
        optimizer.zero_grad()
        bench.loss(number).backward()
        for target, weight, mask in zip(bench.targets, dense, found, strict=True):
            assert target.parameter.grad is not None
            target.parameter.grad += DECAY * weight.where(~mask, 0)
            target.parameter.detach().copy_(weight)
        optimizer.step()
        scheduler.step()
        for target, weight in zip(bench.targets, dense, strict=True):
            weight.copy_(target.parameter.detach())
    for target, mask in zip(bench.targets, masks(), strict=True):
        target.parameter.detach().mul_(mask)
    return forwards // 3 * 3


def steps_of(
    bench: methods.Workbench, optimizer: AdamW, forwards: int
) -> Iterator[tuple[int, LambdaLR]]:
    """The batches of so many forward-equivalents, a gradient step costing three of them."""
    steps, order = forwards // 3, list[int]()
    scheduler = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    for _ in trange(steps, desc="weights", unit="step", leave=False, mininterval=1):
        order = order or bench.epoch()
        yield order.pop(), scheduler


def _largest(scores: Tensor, pattern: NMPattern, input_dim: int) -> Tensor:
    mask_GM = pattern.top(pattern.group(scores, input_dim))
    return mask_GM.flatten(-2).movedim(-1, input_dim)


METHODS: Mapping[str, Callable[..., int]] = {
    "dense": nothing,
    "sparsegpt": sparsegpt,
    "straight_through": learned,
    "magnitude_trained": partial(trained, start="magnitude"),
    "sr_ste": sr_ste,
    "sparsegpt_trained": partial(trained, start="sparsegpt"),
    "sparsegpt_updated_trained": partial(trained, start="sparsegpt_updated"),
    "learned_trained": learned_and_trained,
}


# --- tables and figure ----------------------------------------------------------------------------


def tables(ledger: Ledger) -> Iterator[tuple[str, str, dict[str, list[Result]]]]:
    """By model and pattern: the results of each method's best setting, one a seed."""
    found = dict.fromkeys(key[:2] for key in ledger.results)
    for model, pattern in sorted(found, key=lambda table: list(RATES).index(table[0])):
        rows: dict[str, list[Result]] = {}
        for method in ROWS:
            runs = [r for k, r in ledger.results.items() if k[:3] == (model, pattern, method)]
            if runs:
                best = ledger.best_setting(model, pattern, method, min(r.seed for r in runs))
                rows[method] = [r for r in runs if r.setting == best]
        yield model, pattern, rows


def markdown(ledger: Ledger) -> str:
    """All tables for a page."""
    parts = []
    for model, pattern, rows in tables(ledger):
        align = ["---", *["---:"] * (len(COLUMNS) - 1), "---"]
        cells = [[*COLUMNS, "setting"], align, *(_line(rows, method) for method in rows)]
        body = "\n".join(f"| {' | '.join(line)} |" for line in cells)
        parts.append(f"### {model}, {pattern}\n\n{body}\n")
    return "\n".join(parts)


def _line(rows: Mapping[str, list[Result]], method: str) -> list[str]:
    runs = rows[method]
    closed = ""
    if method != "dense" and {"dense", "sparsegpt"} <= rows.keys():
        closed = f"{mean(share_closed(rows, run) for run in runs):.0%}"
    return [
        ROWS[method],
        str(len(runs)),
        report.spread([run.loss for run in runs], "{:.3f}".format),
        closed,
        report.elsewhere(runs),
        f"{runs[0].forwards:,}",
        runs[0].setting,
    ]


def draw(ledger: Ledger, path: Path) -> None:
    """Draw each method's losses, a dot a seed, on both kinds of data."""
    found = list(tables(ledger))
    shown = [sum(method.endswith(_SHOWN) for method in rows) for _, _, rows in found]
    size = 8, 0.6 + 0.9 * len(found) + 0.28 * sum(shown)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.subplots(len(found), 2, squeeze=False, height_ratios=shown)
    kinds = (("loss", "held out"), ("elsewhere", "other kind of data"))
    for line, (model, pattern, rows) in zip(grid, found, strict=True):
        learned = {method: runs for method, runs in rows.items() if method.endswith(_SHOWN)}
        for axes, (value, told) in zip(line, kinds, strict=True):
            for height, (method, runs) in enumerate(learned.items()):
                colour = "#b5489c" if "**" in ROWS[method] else "#555555"
                losses = [getattr(run, value) for run in runs]
                axes.plot(losses, [height] * len(losses), "o", color=colour, alpha=0.7)
            dense = getattr(rows["dense"][0], value)
            axes.axvline(dense, color="#555555", linestyle="--", linewidth=1)
            axes.annotate(
                "dense",
                (dense, 1.01),
                (3, 0),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                fontsize=7,
                color="#555555",
            )
            axes.set_title(f"{model}, {pattern}: {told}", loc="left", fontsize=9, pad=12)
            axes.set_yticks(range(len(learned)), [ROWS[m].replace("**", "") for m in learned])
            axes.tick_params(labelsize=8, labelleft=value == "loss")
            axes.set_ylim(len(learned) - 0.5, -0.5)
            axes.grid(axis="x", alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xlabel("loss (nats)", fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
