"""Memory beside the weights against their number, up to 70 billion: ours and others'.

    python benchmarks/memory.py

Up to SmolLM2 the bytes are those that runs of ``quality.py`` have held (float32 weights). Beyond,
in bfloat16, ours are those of ``maskpro plan`` on one device, and the categorical's are counted:
for each of a group's 6 masks a logit, its gradient and two moments in float32, beside a dense copy
of the weights and their gradients. MaskPro's published code keeps a float32 logit and a mask of one
byte for each weight, and masks the dense weight anew in each forward pass. What a pass itself needs
(activations, one layer's masked weight) counts for none. Writes ``memory.csv`` and ``memory.png``.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from ledger import Ledger
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from maskpro_lightning import NMPattern, find_targets
from maskpro_lightning.commands.plan import plan

#: Hidden and intermediate size, layers, heads, heads of keys and values, as published.
SIZES = {
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8),
    "Llama-3.1-70B": (8192, 28672, 80, 64, 8),
}
PATTERN = NMPattern(2, 4)
WAYS = (
    "ours",
    "ours, lean, logits in bfloat16",
    "categorical (MaskLLM)",
    "policy (MaskPro's published code)",
)
# Bytes that the published code keeps for each weight.
_PUBLISHED = 4 + 1
_WEIGHTS = {"llama": 983_040, "smollm2": 106_168_320}
_COLOURS = ("#b5489c", "#0b76b8", "#d55e00", "#868686")
_INK = "#797979"
Row = tuple[str, int, str, float, str]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the table and the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(arguments)
    rows = [*measured(args.output / "quality.csv"), *planned()]
    with (args.output / "memory.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("model", "weights", "way", "gb", "from"), *rows])
    draw(rows).savefig(args.output / "memory.png", facecolor="none")
    table = Table("model", "masked weights", "way", "GB beside them", "bytes a weight", "from")
    for model, weights, way, size, origin in rows:
        each = f"{1e9 * size / weights:.2f}"
        table.add_row(model, f"{weights:,}", way, f"{size:.3g}", each, origin)
    Console().print(table)


def measured(path: Path) -> Iterator[Row]:
    """What runs that learned have held."""
    ways = {"straight_through": WAYS[0], "categorical": WAYS[2]}
    seen = set()
    for result in Ledger(path).results.values():
        key = result.model, result.method
        if result.pattern == "2:4" and key[0] in _WEIGHTS and key[1] in ways and key not in seen:
            seen.add(key)
            weights = _WEIGHTS[result.model]
            size = result.bytes_per_weight * weights / 1e9
            yield result.model, weights, ways[result.method], size, "a run"
    for name, weights in _WEIGHTS.items():
        yield name, weights, WAYS[3], weights * _PUBLISHED / 1e9, "counted"


def planned() -> Iterator[Row]:
    """What larger models would take."""
    for name, (hidden, intermediate, layers, heads, pairs) in SIZES.items():
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=pairs,
            vocab_size=128_256,
        )
        with torch.device("meta"):
            model: Any = LlamaForCausalLM(config).to(torch.bfloat16)  # type: ignore[arg-type]
        model.requires_grad_(False)
        targets = find_targets(model, PATTERN, on_meta=True)
        weights = sum(target.parameter.numel() for target in targets)
        for way, how in ((WAYS[0], {}), (WAYS[1], {"memory": "lean", "logits_dtype": "bfloat16"})):
            options: dict[str, Any] = {"devices": 1, "strategy": "ddp", **how}
            state = plan(model, targets, **options).state
            beside = sum(size for what, size in state.items() if what != "weights")
            yield name, weights, way, beside / 1e9, "maskpro plan"
        logits = PATTERN.num_sets / PATTERN.m
        yield name, weights, WAYS[2], weights * (logits * (4 + 4 + 8) + 2 + 2) / 1e9, "counted"
        yield name, weights, WAYS[3], weights * _PUBLISHED / 1e9, "counted"


def draw(rows: Sequence[Row]) -> Figure:
    """Gigabytes against the number of weights, a line for each way."""
    figure = Figure((6, 3.6), dpi=150, facecolor="none", layout="constrained")
    axes = figure.subplots()
    for way, colour in zip(WAYS, _COLOURS, strict=True):
        points = sorted((weights, size) for _, weights, which, size, _ in rows if which == way)
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=way, markersize=4)
    axes.axhline(80, color=_INK, linewidth=1, linestyle="--")
    axes.annotate("one GPU of 80 GB", (1e6, 95), color=_INK, fontsize=8)
    axes.set(xscale="log", yscale="log", facecolor="none")
    axes.set_xlabel("masked weights", color=_INK, fontsize=8)
    axes.set_ylabel("GB beside them", color=_INK, fontsize=8)
    axes.set_title("2:4: what is held beside the weights", loc="left", color=_INK, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(colors=_INK, labelsize=8, which="both")
    axes.legend(fontsize=8, frameon=False, labelcolor=_INK)
    return figure


if __name__ == "__main__":
    main()
