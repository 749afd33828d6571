"""What ``measure`` says: where 2:4 is slower, and where there is none."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from maskpro_lightning import NMPattern, find_targets
from maskpro_lightning.commands import measure
from maskpro_lightning.commands.measure import Measurement, Timing, conclusion, table

CPU = torch.device("cpu")


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 24))


def printed(found: Measurement) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table(found))
    return capture.get()


def test_on_a_cpu_the_dense_times_are_there_and_no_kernel_is() -> None:
    targets = find_targets(model(), "2:4")
    found = measure.measure(targets, CPU, batch_sizes=[1, 7], seconds=1e-3)
    assert [timing.batch for timing in found.timings] == [1, 7]
    assert all(timing.dense > 0 for timing in found.timings)
    assert all(timing.sparse is None for timing in found.timings)
    assert found.layers == 3
    text = printed(found)
    assert "3 layers on cpu, torch.bfloat16" in text
    assert text.count("no kernel") == 2
    assert conclusion(found) == (
        "3 of 3 layers stay dense: PyTorch's 2:4 kernels run on NVIDIA GPUs (CUDA), there is none "
        "for 'cpu'.\nNo 2:4 kernel runs these layers here: zeros save storage, and no time."
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A machine with 2:4 kernels, dense products of 8 s a row and sparse ones of 1 s + 4 s a row.

    Returns:
        The weights that were timed.
    """

    class Sparse(nn.Parameter):
        pass

    timed = []

    def took(rows: Tensor, weight: Tensor, seconds: float) -> float:
        timed.append(weight)
        return 1.0 + 4 * len(rows) if isinstance(weight, Sparse) else 4.5 * len(rows)

    monkeypatch.setattr(measure, "no_kernel_on", lambda device: None)
    monkeypatch.setattr(measure, "to_sparse_semi_structured", Sparse)
    monkeypatch.setattr(measure, "_time", took)
    return timed


def test_layers_are_counted_and_those_without_a_kernel_stay_dense(clock: list[Tensor]) -> None:
    targets = find_targets(model(), "2:4")
    found = measure.measure(targets, CPU, torch.float16, batch_sizes=[1, 16])
    # Two layers of (32, 32), one of (24, 32), which no kernel takes.
    assert found.timings == [
        Timing(1, 3 * 4.5, 2 * 5.0 + 4.5),
        Timing(16, 3 * 72.0, 2 * 65.0 + 72.0),
    ]
    reason = "their weight has shape (24, 32), not multiples of (16, 16)"
    assert found.refused == {reason: 1}
    assert conclusion(found) == (
        f"1 of 3 layers stay dense: {reason}.\n2:4 is SLOWER than dense at 1 rows."
    )
    text = printed(found)
    assert "1.07 times slower" in text
    assert "1.07 times faster" in text
    assert all(bool(((NMPattern(2, 4).group(w) != 0).sum(-1) <= 2).all()) for w in clock)


def test_a_dtype_without_a_kernel_is_told(clock: list[Tensor]) -> None:
    targets = find_targets(model(), "2:4")
    found = measure.measure(targets, CPU, torch.float32, batch_sizes=[1])
    problem = "their weight is torch.float32, not torch.float16 or torch.bfloat16"
    assert found.refused == {problem: 3}
    assert found.timings == [Timing(1, 3 * 4.5, None)]
    assert "No 2:4 kernel runs these layers here" in conclusion(found)


def test_a_kernel_that_fails_is_told(clock: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(weight: Tensor) -> Any:
        raise RuntimeError("CUDA error: no algorithm\nand more")

    monkeypatch.setattr(measure, "to_sparse_semi_structured", fail)
    targets = find_targets(model(), "2:4", exclude=["2"])
    found = measure.measure(targets, CPU, torch.float16, batch_sizes=[1])
    assert found.refused == {"PyTorch fails on (32, 32) (CUDA error: no algorithm)": 2}


@pytest.mark.parametrize(
    ("sparse", "word", "end"),
    [
        (0.5, "2.00 times faster", "2:4 is nowhere slower than dense here."),
        (1.01, "the same", "2:4 is nowhere slower than dense here."),
        (0.99, "the same", "2:4 is nowhere slower than dense here."),
        (3.0, "3.00 times slower", "2:4 is SLOWER than dense at 8 rows."),
    ],
)
def test_what_is_slower_is_called_slower(sparse: float, word: str, end: str) -> None:
    found = Measurement("Card", torch.float16, [Timing(8, 1.0, sparse)], 2, {})
    assert word in printed(found)
    assert conclusion(found) == end


@pytest.mark.parametrize(("layers", "sizes"), [("linear", []), ("linear", [0]), ("conv", [1])])
def test_nothing_to_time_is_an_error(layers: str, sizes: list[int]) -> None:
    layer = nn.Linear(4, 4) if layers == "linear" else nn.Conv2d(4, 4, 1)
    targets = find_targets(nn.Sequential(layer), "2:4")
    problem = f"1 layers, of which {int(layers == 'linear')} are linear, and batch sizes {sizes};"
    with pytest.raises(ValueError, match=re.escape(problem)):
        measure.measure(targets, CPU, batch_sizes=sizes)
