"""What it costs to train under a mask: ``python benchmarks/kept.py --help``.

A step is forward, backward and AdamW on a stack of linear layers; steps with and without
``keep_sparse`` alternate, so that both see the same machine. Ratios of medians of the CPU time of
one thread, or of wall time on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any

import torch
from step import seconds
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from maskpro_lightning import keep_sparse


def stack(width: int, layers: int, **where: Any) -> nn.Module:
    """Linear layers with something in between, 2:4."""
    linear = [nn.Linear(width, width, **where) for _ in range(layers)]
    for layer in linear:
        groups_GM = layer.weight.detach().view(-1, 4)
        groups_GM[:, 2:] = 0
    return nn.Sequential(*(part for layer in linear for part in (layer, nn.GELU())))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    mse_loss(model(x), x).backward()
    optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 2048, 8192])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    print(
        f"{torch.__version__} on {device}, {options.dtype}, {options.layers} x {options.width}^2\n"
    )
    print("| tokens | plain step, ms | under the mask, ms | cost | bits per weight |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for tokens in options.tokens:
        x = torch.randn(tokens, options.width, device=device, dtype=dtype)
        runs, bits = [], 0.0
        for masked in (False, True):
            model = stack(options.width, options.layers, device=device, dtype=dtype)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            if masked:
                sparse = keep_sparse(optimizer, model)
                bits = 8 * sparse.bytes / (options.layers * options.width**2)

            run = partial(step, model, optimizer, x)
            run()
            runs.append(run)
        times = [[seconds(run, device) for run in runs] for _ in range(options.repeats)]
        plain, under = (statistics.median(column) for column in zip(*times, strict=True))
        cost = statistics.median(after / before - 1 for before, after in times)
        print(f"| {tokens} | {1e3 * plain:.2f} | {1e3 * under:.2f} | {cost:.1%} | {bits:g} |")


if __name__ == "__main__":
    main()
