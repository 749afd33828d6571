"""What share of each architecture of transformers is masked by default, and why the rest is not.

Builds every model from its default configuration on the meta device, without weights:

    python benchmarks/architectures.py --out architectures.csv
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

from maskpro_lightning.weights.summary import Row, rows
from maskpro_lightning.weights.targets import select


def main() -> None:
    """Print one line for each architecture, and write all rows as CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types, such as llama; all by default")
    parser.add_argument("--out", help="a CSV file of all rows")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    found: list[tuple[str, Row]] = []
    failed: list[str] = []
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
            some = rows(model, select(model, "2:4", on_meta=True))
        except ValueError as error:
            print(f"{name:32} {0:6.1%} masked; {error}", flush=True)
            continue
        found += [(name, row) for row in some]
        rest = "; ".join(f"{row.share:.1%} {row.what}" for row in some[1:] if row.share >= 0.01)
        print(f"{name:32} {some[0].share:6.1%} masked; {rest}", flush=True)
    if arguments.out:
        write_csv(found, arguments.out)
    built = len({name for name, _ in found})
    seconds = time.perf_counter() - start
    print(f"{built} architectures in {seconds:.0f} s; not built: {', '.join(failed)}")
    sys.exit(not built)


def configurations() -> Iterator[tuple[str, Any]]:
    """The configurations that transformers has models for, by their types' names."""
    for config in MODEL_MAPPING:
        yield config.model_type or config.__name__, config


def build(config: Any) -> nn.Module:
    """The model of a default configuration, on the meta device."""
    kind = MODEL_MAPPING[config]
    kind = kind[0] if isinstance(kind, tuple) else kind
    with torch.device("meta"):
        model: nn.Module = kind(config())
    return model


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
