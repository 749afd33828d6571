"""A mask for each replica, or one for all: what K ranks gain in the same number of steps.

``python benchmarks/exploration.py`` learns masks of a small regression on K = 1, 2 and 4 ranks of
this machine and prints, as means over seeds with their spread, the share of the initial mask's
excess loss that was removed, and milliseconds per step. On fewer cores than ranks the time says
what a step costs, not what it would take.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist

from maskpro_lightning import MaskPro, NMPattern
from maskpro_lightning.optim.rule import DEFAULTS, Exploration, policy_lr

WIDTH, ROWS, SEEDS = 32, 32, 5


def problem(seed: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network, and inputs on which it should go on computing what it does when dense."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    x = torch.randn(4096, WIDTH) @ torch.randn(WIDTH, WIDTH) / WIDTH**0.5
    with torch.no_grad():
        return model, x, model(x)


def learn(seed: int, exploration: Exploration, steps: int) -> tuple[float, float]:
    """Share of the excess loss removed, and seconds per step; data is split over the ranks."""
    model, x, y = problem(seed)
    named = [(n, p) for n, p in model.named_parameters() if p.dim() > 1]
    lr = policy_lr(NMPattern(2, 4), DEFAULTS["policy"]["logit_scale"], steps)
    optimizer = MaskPro(named, lr=lr, exploration=exploration, seed=seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(seed)

    def loss_on(rows: Tensor) -> Tensor:
        return nn.functional.mse_loss(model(x[rows]), y[rows])

    start = time.perf_counter()
    for _ in range(steps):
        rows = torch.randint(len(x), (ROWS * ranks,), generator=generator).chunk(ranks)[rank]

        def closure(rows: Tensor = rows) -> Tensor:
            loss = loss_on(rows)
            if exploration == "shared":
                dist.all_reduce(loss)
                loss /= ranks
            return loss

        optimizer.step(closure)
        schedule.step()
    seconds = (time.perf_counter() - start) / steps
    losses = {}
    with torch.no_grad():
        for version in ("initial", "mode"):
            optimizer.write(version)
            losses[version] = float(loss_on(torch.arange(len(x))))
    return 1 - losses["mode"] / losses["initial"], seconds


def run(rank: int, ranks: int, port: int, steps: int, path: str) -> None:
    """One rank of all runs; the first writes what was found."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    found = {
        exploration: [learn(seed, exploration, steps) for seed in range(SEEDS)]
        for exploration in get_args(Exploration)
    }
    if rank == 0:
        torch.save(found, path)
    dist.destroy_process_group()


def main() -> None:
    """Run all and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    print(f"{steps} steps, {ROWS} rows per rank and step, {SEEDS} seeds\n")
    print("| ranks | exploration | loss removed | ms per step |\n|---|---|---|---|")
    for ranks in (1, 2, 4):
        with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
            free.bind(("127.0.0.1", 0))
            port, path = free.getsockname()[1], str(Path(folder) / "found.pt")
            free.close()
            multiprocessing.spawn(  # type: ignore[attr-defined,no-untyped-call]
                run, (ranks, port, steps, path), ranks
            )
            found = torch.load(path)
        for exploration, results in found.items():
            gains, seconds = (torch.tensor(values) for values in zip(*results, strict=True))
            print(
                f"| {ranks} | {exploration} | {gains.mean():.1%} ± {gains.std():.1%} "
                f"| {1000 * seconds.median():.1f} |"
            )


if __name__ == "__main__":
    main()
