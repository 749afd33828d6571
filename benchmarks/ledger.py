"""Finished runs, one line of a CSV file each, so that a benchmark goes on where it stopped."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import NamedTuple

#: Methods by name, as tables call them, in their order.
METHODS = {
    "dense": "dense",
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT's mask",
    "sparsegpt_updated": "SparseGPT with weight update",
    "reconstruction": "reconstruction, forward only",
    "published": "published rule, from SparseGPT's mask",
    "policy_from_sparsegpt": "**policy**, from SparseGPT's mask",
    "policy": "**policy**, from reconstruction",
    "categorical": "categorical (MaskLLM), from SparseGPT's mask",
    "straight_through": "**straight-through**, from SparseGPT's mask",
    "distilled": "**straight-through**, distilling",
}


class Key(NamedTuple):
    """What tells runs apart."""

    model: str
    pattern: str
    method: str
    seed: int
    setting: str


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        setting: What was chosen among, such as "lr=5 logit_scale=6"; empty if nothing was.
        loss: Loss on the reported held-out batches under the deployed mask, in nats.
        choosing_loss: That on the other held-out batches, which settings are chosen by.
        forwards: Forward-equivalents spent, calibration included.
        seconds: Time to find the mask.
        bytes_per_weight: Memory held beyond the weight, per masked weight; 0 for one-shot masks.
        curve: ``forwards:loss`` on the way, space-separated.
        elsewhere: Loss on held-out data of another kind, in nats; NaN where there is none.
    """

    model: str
    pattern: str
    method: str
    seed: int
    setting: str
    loss: float
    choosing_loss: float
    forwards: int
    seconds: float
    bytes_per_weight: float
    curve: str
    elsewhere: float

    @property
    def key(self) -> Key:
        return Key(*astuple(self)[: len(Key._fields)])

    @property
    def points(self) -> list[tuple[int, float]]:
        """The curve as pairs of forward-equivalents and loss."""
        pairs = (point.split(":") for point in self.curve.split())
        return [(int(forwards), float(loss)) for forwards, loss in pairs]


class Ledger:
    """The finished runs in a CSV file, which each new one is added to at once.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.results: dict[Key, Result] = {}
        if path.exists():
            with path.open(newline="") as file:
                found = [_read(row) for row in csv.DictReader(file)]
            self.results = {result.key: result for result in found}

    def add(self, result: Result) -> None:
        """Remember a run and append it to the file."""
        new = not self._path.exists()
        with self._path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(field.name for field in fields(Result))
            cells = asdict(result).values()
            writer.writerow(f"{cell:.6g}" if isinstance(cell, float) else cell for cell in cells)
        self.results[result.key] = result

    def best_setting(self, model: str, pattern: str, method: str, seed: int) -> str:
        """The setting of the lowest choosing loss among the runs of one seed."""
        runs = [r for k, r in self.results.items() if k[:4] == (model, pattern, method, seed)]
        return min(runs, key=_choosing_loss).setting

    def tables(self) -> Iterator[tuple[str, str, dict[str, list[Result]]]]:
        """By model and pattern: the results of each method's best setting, one a seed."""
        for model, pattern in dict.fromkeys(key[:2] for key in self.results):
            rows: dict[str, list[Result]] = {}
            for method in METHODS:
                runs = [r for k, r in self.results.items() if k[:3] == (model, pattern, method)]
                if runs:
                    # Only the first seed has run them all.
                    first = min(run.seed for run in runs)
                    best = self.best_setting(model, pattern, method, first)
                    rows[method] = [run for run in runs if run.setting == best]
            yield model, pattern, rows


def share_closed(rows: Mapping[str, Sequence[Result]], result: Result) -> float:
    """How much of the gap between SparseGPT's mask, of the same seed, and dense is closed."""
    dense = rows["dense"][0].loss
    start = next(r.loss for r in rows["sparsegpt"] if r.seed == result.seed)
    return (start - result.loss) / (start - dense)


def _choosing_loss(result: Result) -> float:
    return math.inf if math.isnan(result.choosing_loss) else result.choosing_loss


def _read(row: Mapping[str, str]) -> Result:
    kinds = {"int": int, "float": float, "str": str}
    return Result(**{f.name: kinds[str(f.type)](row[f.name]) for f in fields(Result)})
