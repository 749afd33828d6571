"""How long a model's masked layers take, dense and 2:4, on a device: measured, never promised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear
from torch.sparse import to_sparse_semi_structured
from torch.utils.benchmark import Timer

from maskpro_lightning.files.semi_structured import no_kernel_for, no_kernel_on
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.weights.targets import Target

_PATTERN = NMPattern(2, 4)
# Speeds closer together than this are not told apart.
_NOISE = 0.02


@dataclass(frozen=True)
class Timing:
    """One pass through all the layers, one after the other.

    Attributes:
        batch: Rows of the input, such as tokens.
        dense: Seconds with dense weights.
        sparse: Seconds with 2:4 weights where a kernel takes them; None if none does.
    """

    batch: int
    dense: float
    sparse: float | None

    @property
    def speedup(self) -> float | None:
        """Dense time over 2:4 time; below 1, 2:4 is slower."""
        return None if self.sparse is None else self.dense / self.sparse


class _Layer(NamedTuple):
    copies: int  # how many layers of the model have this shape
    dense: Tensor
    sparse: Tensor | None


@dataclass(frozen=True)
class Measurement:
    """Timings of a model's layers on one device.

    Attributes:
        device: The device's name.
        dtype: The weights' dtype.
        timings: One for each batch size.
        layers: Number of layers.
        refused: Why no kernel takes some of the layers, and how many; they stay dense.
    """

    device: str
    dtype: torch.dtype
    timings: list[Timing]
    layers: int
    refused: dict[str, int]


def measure(
    targets: Sequence[Target],
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    batch_sizes: Sequence[int] = (1, 16, 256, 4096),
    seconds: float = 0.2,
) -> Measurement:
    """Time the products of layers of the targets' shapes, with weights of random numbers.

    Args:
        targets: The layers; those that are not (outputs, inputs) matrices stay out.
        device: Where to run.
        dtype: What to run in.
        batch_sizes: Rows of the input.
        seconds: How long to repeat each product.

    Raises:
        ValueError: there is no matrix among the targets, or a batch size is not positive.
    """
    shapes = Counter(tuple(t.parameter.shape) for t in targets if t.parameter.dim() == 2)
    if not shapes or not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(
            f"Nothing to time: {len(targets)} layers, of which {shapes.total()} are linear, and "
            f"batch sizes {list(batch_sizes)}; both must be there, the sizes at least 1."
        )
    refused: Counter[str] = Counter()
    layers = []
    for shape, count in shapes.items():
        dense = _random_sparse(shape, device, dtype)
        sparse, reason = _converted(dense)
        layers.append(_Layer(count, dense, sparse))
        if reason is not None:
            refused[reason] += count
    timings = [_timing(layers, batch, seconds) for batch in batch_sizes]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Measurement(name, dtype, timings, shapes.total(), dict(refused))


def table(found: Measurement) -> Table:
    """The timings for a terminal."""
    printed = Table(title=f"{found.layers} layers on {found.device}, {found.dtype}")
    for column in ("rows", "dense, ms", "2:4, ms", "2:4 against dense"):
        printed.add_column(column, justify="right")
    for timing in found.timings:
        sparse = "-" if timing.sparse is None else f"{1e3 * timing.sparse:.3f}"
        printed.add_row(f"{timing.batch}", f"{1e3 * timing.dense:.3f}", sparse, _verdict(timing))
    return printed


def conclusion(found: Measurement) -> str:
    """What the timings say, in words."""
    lines = [f"{n} of {found.layers} layers stay dense: {why}." for why, n in found.refused.items()]
    if any(timing.sparse is None for timing in found.timings):
        lines.append("No 2:4 kernel runs these layers here: zeros save storage, and no time.")
        return "\n".join(lines)
    slower = [t.batch for t in found.timings if t.speedup is not None and t.speedup < 1 - _NOISE]
    if slower:
        lines.append(f"2:4 is SLOWER than dense at {', '.join(map(str, slower))} rows.")
    else:
        lines.append("2:4 is nowhere slower than dense here.")
    return "\n".join(lines)


def _verdict(timing: Timing) -> str:
    if timing.speedup is None:
        return "no kernel"
    if abs(timing.speedup - 1) <= _NOISE:
        return "the same"
    word = "faster" if timing.speedup > 1 else "slower"
    return f"{max(timing.speedup, 1 / timing.speedup):.2f} times {word}"


def _timing(layers: Sequence[_Layer], batch: int, seconds: float) -> Timing:
    dense = sparse = 0.0
    for layer in layers:
        rows = layer.dense.new_empty(batch, layer.dense.shape[1]).normal_()
        took = _time(rows, layer.dense, seconds)
        dense += layer.copies * took
        if layer.sparse is not None:
            took = _time(rows, layer.sparse, seconds)
        sparse += layer.copies * took
    runs = any(layer.sparse is not None for layer in layers)
    return Timing(batch, dense, sparse if runs else None)


def _random_sparse(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(shape, device=device)
    if shape[1] % _PATTERN.m == 0:
        groups = _PATTERN.group(weight)
        groups *= _PATTERN.top(groups.abs())
    return weight.to(dtype)


def _converted(weight: Tensor) -> tuple[Tensor | None, str | None]:
    """The weight for a 2:4 kernel, or the reason why there is none."""
    reason = no_kernel_on(weight.device)
    if reason is None and (unfit := no_kernel_for(weight)) is not None:
        reason = f"their weight {unfit}"
    if reason is not None:
        return None, reason
    try:
        sparse = to_sparse_semi_structured(weight)
        linear(weight.new_zeros(1, weight.shape[1]), sparse)
    except (RuntimeError, NotImplementedError) as error:
        return None, f"PyTorch fails on {tuple(weight.shape)} ({str(error).splitlines()[0]})"
    return sparse, None


def _time(rows: Tensor, weight: Tensor, seconds: float) -> float:
    timer = Timer(
        "linear(rows, weight)",
        globals={"linear": linear, "rows": rows, "weight": weight},
        num_threads=torch.get_num_threads(),
    )
    with torch.inference_mode():
        return float(timer.blocked_autorange(min_run_time=seconds).median)
