"""What share of each architecture of transformers is masked by default, and why the rest is not.

Builds every model from its default configuration on the meta device, without weights:

    python benchmarks/architectures.py --watch --out architectures.csv

With ``--watch`` those that run there, on inputs without values, are run, and their masks are held
against what each product sums over.
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import logging as transformers_logging
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from maskpro_lightning.weights.contractions import observe
from maskpro_lightning.weights.reasons import UNKNOWN
from maskpro_lightning.weights.summary import Row, rows
from maskpro_lightning.weights.targets import Selection, select
from maskpro_lightning.weights.verification import verify


def main() -> None:
    """Print one line for each architecture, and write all rows as CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types, such as llama; all by default")
    parser.add_argument("--watch", action="store_true", help="run what runs, and watch it")
    parser.add_argument("--out", help="a CSV file of all rows")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable(logging.WARNING)
    found: list[tuple[str, Row]] = []
    failed: list[str] = []
    watched: dict[str, str] = {}
    start = time.perf_counter()
    for name, config in configurations():
        if arguments.names and name not in arguments.names:
            continue
        try:
            model = build(config)
        except Exception as error:  # noqa: BLE001, a default configuration need not be whole
            failed.append(f"{name} ({type(error).__name__})")
            continue
        try:
            selection = select(model, "2:4", on_meta=True)
        except ValueError as error:
            print(f"{name:32} {0:6.1%} masked; {error}", flush=True)
            continue
        some = rows(model, selection)
        found += [(name, row) for row in some]
        told = [f"{row.share:.1%} {row.what}" for row in some[1:] if row.share >= 0.01]
        if arguments.watch:
            told.append(watched[name] if watch(name, model, selection, watched) else "did not run")
        print(f"{name:32} {some[0].share:6.1%} masked; {'; '.join(told)}", flush=True)
    if arguments.out:
        write_csv(found, arguments.out)
    built = len({name for name, _ in found})
    seconds = time.perf_counter() - start
    print(f"{built} architectures in {seconds:.0f} s; not built: {', '.join(failed)}")
    if arguments.watch:
        wrong = [name for name, told in watched.items() if told.startswith("WRONG")]
        print(f"{len(watched)} of them were watched; wrong: {', '.join(wrong) or 'none'}")
    sys.exit(not built)


def configurations() -> Iterator[tuple[str, Any]]:
    """The configurations that transformers has models for, by their types' names."""
    kinds: Any = MODEL_MAPPING
    for config in kinds:
        yield config.model_type or config.__name__, config


def build(config: Any) -> nn.Module:
    """The model of a default configuration, on the meta device."""
    kinds: Any = MODEL_MAPPING
    kind = kinds[config]
    kind = kind[0] if isinstance(kind, tuple) else kind
    with torch.device("meta"):
        model: nn.Module = kind(config())
    return model


def watch(name: str, model: Any, selection: Selection, watched: dict[str, str]) -> bool:
    """Run a model on inputs without values; False if it does not take them."""
    try:
        with torch.no_grad(), observe(model) as seen:
            model.eval()(**inputs(model))
    except Exception:  # noqa: BLE001, most that asks for values or for more inputs
        return False
    try:
        verdict = verify(selection, seen)
    except ValueError as error:
        watched[name] = f"WRONG: {error}"
        return True
    unknown = [each.name for each, _ in verdict.unmasked if each.reason == UNKNOWN]
    watched[name] = f"{len(selection.targets) - len(verdict.idle)} products right"
    watched[name] += f"; multiplied, but not known: {', '.join(unknown[:3])}" if unknown else ""
    return True


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """What a model takes at least, as far as its main input tells."""
    config, main = model.config, getattr(model, "main_input_name", "input_ids")
    size = getattr(config, "image_size", 224)
    side = size if isinstance(size, int) else 224
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "input_ids": ((1, 16), torch.long),
        "pixel_values": ((1, getattr(config, "num_channels", 3), side, side), torch.float32),
        "input_values": ((1, 16000), torch.float32),
    }
    taken = {main: shapes.get(main, ((1, 80, 3000), torch.float32))}
    if getattr(config, "is_encoder_decoder", False):
        taken["decoder_input_ids"] = ((1, 4), torch.long)
    return {
        name: torch.zeros(shape, dtype=dtype, device="meta")
        for name, (shape, dtype) in taken.items()
    }


def write_csv(found: list[tuple[str, Row]], path: str) -> None:
    """All rows of all architectures."""
    with open(path, "w", newline="") as file:  # noqa: PTH123
        writer = csv.writer(file)
        writer.writerow(["architecture", "what", "weights", "numbers", "share", "such as"])
        for name, row in found:
            share = f"{row.share:.4f}"
            writer.writerow([name, row.what, row.weights, row.numbers, share, row.names])


if __name__ == "__main__":
    main()
