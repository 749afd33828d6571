"""Time and memory of the mask step: ``python benchmarks/step.py --help``.

Rows: the published sequence of operations, and MaskPro's step without and with compilation. Times
are ratios of one run, with the CPU time of one thread (wall time on a GPU), medians of steps that
alternate with a plain copy, whose rate is what "of a copy" compares with. "Bytes" are counted, not
measured: what a step has to move per weight.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskpro_lightning import MaskPro, Policy

Step = Callable[[], object]
_LAYER = 2**24


class Published:
    """One step for 2:4 as published: in float32, operation by operation, 1 - p by subtraction."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.weights = weights
        self.dense = [weight.detach().clone() for weight in weights]
        self.logits = [torch.randn(w.numel() // 4, 4, device=w.device) for w in weights]
        self.kept = [torch.multinomial(logits.softmax(-1), 2) for logits in self.logits]

    @torch.no_grad()
    def step(self) -> None:
        for i, (weight, dense, logits) in enumerate(
            zip(self.weights, self.dense, self.logits, strict=True)
        ):
            p = logits.softmax(-1)
            a, b = p.gather(-1, self.kept[i]).unbind(-1)
            orders = 1 / (1 - a) + 1 / (1 - b)
            slopes = [1 / q + (1 - q) ** -2 / orders for q in (a, b)]
            slope = torch.zeros_like(p).scatter_(-1, self.kept[i], torch.stack(slopes, dim=-1))
            logits -= 0.1 * p * (slope - (p * slope).sum(-1, keepdim=True))
            self.kept[i] = torch.multinomial(logits.softmax(-1), 2)
            mask = torch.zeros_like(logits).scatter_(-1, self.kept[i], 1)
            weight.copy_(dense * mask.view_as(dense))


def ours(weights: list[nn.Parameter], **how: Any) -> Step:
    named = [(str(number), weight) for number, weight in enumerate(weights)]
    optimizer = MaskPro(named, estimator=Policy(lr=0.1), **how)
    losses = (
        torch.tensor(0.5, device=weights[0].device),
        torch.tensor(0.2, device=weights[0].device),
    )
    return lambda: optimizer.step(lambda: losses[0], losses[1])


def from_gradients(weights: list[nn.Parameter], *, fused: bool) -> Step:
    """Straight-through, given gradients: a copy of each is part of what is timed."""
    named = [(str(number), weight) for number, weight in enumerate(weights)]
    optimizer = MaskPro(named, estimator="straight_through", fused=fused)
    gradients = [torch.randn_like(weight) for weight in weights]
    loss = torch.tensor(0.5, device=weights[0].device)

    def step() -> None:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        optimizer.step(lambda: loss)

    return step


ROWS: dict[str, Callable[[list[nn.Parameter]], Step]] = {
    "published": lambda weights: Published(weights).step,
    "eager": lambda weights: ours(weights, fused=False),
    "fused": lambda weights: ours(weights, fused=True),
    "fused lean": lambda weights: ours(weights, fused=True, memory="lean"),
    "fused lean bf16": lambda weights: ours(
        weights, fused=True, memory="lean", logits_dtype="bfloat16"
    ),
    "eager gradients": lambda weights: from_gradients(weights, fused=False),
    "fused gradients": lambda weights: from_gradients(weights, fused=True),
}


def weights_of(size: int, dtype: torch.dtype, device: torch.device) -> list[nn.Parameter]:
    """So many weights in square layers, of which the largest have 4096 x 4096."""
    side = 2 ** ((min(size, _LAYER).bit_length() - 1) // 2)
    return [
        nn.Parameter(torch.randn(side, side, device=device).to(dtype), requires_grad=False)
        for _ in range(size // side**2)
    ]


def seconds(step: Step, device: torch.device) -> float:
    if device.type == "cpu":
        start = time.thread_time()
        step()
        return time.thread_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def memory(field: str) -> int:
    """Bytes of this process by Linux: "VmRSS" now, "VmHWM" the most."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def peak(device: torch.device) -> int:
    return memory("VmHWM") if device.type == "cpu" else torch.cuda.max_memory_allocated()


def forget_peak(device: torch.device) -> int:
    """Start to watch for the peak, and return the bytes in use."""
    gc.collect()
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
        return memory("VmRSS")
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def least_bytes(row: str, element: float) -> float:
    """Bytes per weight that a step for 2:4 has to read or write, each once, were the rest free."""
    logits: float = 2 * (2 if "bf16" in row else 4)
    if "lean" in row:  # weight, pruned weights and masks are exchanged
        return logits + 2 * (element + element / 2 + 1 / 4)
    if "gradients" in row:  # turned in their memory, moved along, and then the draw
        logits, element = 2.5 * logits, element * 7 / 3
    return logits + 2 * 1 + 3 * element  # the dense weight is read, the other written and fetched


def measure(row: str, size: int, repeats: int, dtype: torch.dtype, device: torch.device) -> None:
    """Print one row of the table."""
    small = ROWS[row](weights_of(2**16, dtype, device))
    for _ in range(2):  # imports and compiles
        small()
    source = torch.ones(2**26, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    before = forget_peak(device)
    weights = weights_of(size, dtype, device)
    step = ROWS[row](weights)
    for _ in range(2):
        step()
    used = (peak(device) - before) / size
    steps, copies = [], []
    for _ in range(repeats):
        steps.append(seconds(step, device))
        copies.append(seconds(lambda: target.copy_(source), device))
    per_weight = statistics.median(steps) / size
    bandwidth = 2 * source.numel() / statistics.median(copies)
    moved = least_bytes(row, weights[0].element_size())
    if row == "published":
        _published[size] = per_weight
    ratio = f"{per_weight / _published[size]:.3f}" if size in _published else ""
    print(
        f"| {size:,} | {row} | {1e9 * per_weight:.2f} | {ratio} | {moved:g} | "
        f"{1e-9 * moved / per_weight:.2f} | {moved / per_weight / bandwidth:.1%} | {used:.2f} |",
        flush=True,
    )


_published: dict[int, float] = {}


def overhead(dtype: torch.dtype, device: torch.device, tokens: int, repeats: int) -> None:
    """Print the step's time as a share of the forward pass, for the shapes of a Llama layer."""
    print(f"\n| shape | forward of {tokens} tokens, ms | fused step, ms | share | of float32's |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for shape in ((4096, 4096), (11008, 4096)):
        weight = nn.Parameter(torch.randn(shape, device=device).to(dtype), requires_grad=False)
        x = torch.randn(tokens, shape[1], device=device).to(dtype)
        step = ours([weight], fused=True)
        step()
        forward = partial(nn.functional.linear, x, weight)
        exact = partial(nn.functional.linear, x.float(), weight.float())
        times = [[seconds(run, device) for run in (forward, exact, step)] for _ in range(repeats)]
        ahead, full, masks = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"| {shape[0]} x {shape[1]} | {1e3 * ahead:.1f} | {1e3 * masks:.1f} | "
            f"{masks / ahead:.1%} | {masks / full:.1%} |"
        )


def many(dtype: torch.dtype, device: torch.device, layers: int, repeats: int) -> None:
    """Print the step's time for many small layers."""
    print(f"\n| step of {layers} layers of 64 x 64 | us per layer |")
    print("| --- | ---: |")
    for row in ("published", "eager", "fused"):
        weights = [w for _ in range(layers) for w in weights_of(2**12, dtype, device)]
        step = ROWS[row](weights)
        for _ in range(3):
            step()
        spent = statistics.median(seconds(step, device) for _ in range(repeats))
        print(f"| {row} | {1e6 * spent / layers:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--sizes", type=int, nargs="*", default=[20, 22, 24], help="powers of two")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=4096, help="0 leaves the forward pass out")
    parser.add_argument("--layers", type=int, default=200, help="0 leaves small layers out")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    print(f"{torch.__version__} on {device}, {options.dtype} weights, 2:4, one thread\n")
    print(
        "| weights | step | ns per weight | ratio | bytes | GB/s | share of a copy | peak bytes |"
    )
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for size in options.sizes:
        for row in options.rows:
            measure(row, 2**size, options.repeats, dtype, device)
    if options.tokens:
        overhead(dtype, device, options.tokens, max(3, options.repeats // 2))
    if options.layers:
        many(dtype, device, options.layers, options.repeats)


if __name__ == "__main__":
    main()
