"""A model dense and sparse, side by side, on held-out data and on WikiText-2."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedTokenizerBase

from maskpro_lightning.weights.targets import Target

Metrics = dict[str, float]
#: The Hub's name of the data set whose test split language models are compared on.
WIKITEXT2 = "Salesforce/wikitext"


def wikitext2(
    tokenizer: PreTrainedTokenizerBase, source: str = WIKITEXT2, window: int = 2048
) -> DataLoader[Any]:
    """WikiText-2's test split as the field measures it.

    Its rows are joined by blank lines and become one stream of tokens, with one start token if the
    tokenizer puts one before a text; the stream is cut into windows, of which an incomplete last
    one is left out. The loss of a window has no context before it, and all windows weigh the same.

    Args:
        tokenizer: The model's tokenizer.
        source: The Hub's name of the data set, or a folder of the same layout.
        window: Tokens of a window, with which perplexity changes: always tell it.

    Returns:
        Batches of one window, int64 (1, window).

    Raises:
        ValueError: the text does not fill a window.
    """
    from datasets import load_dataset

    rows = load_dataset(source, "wikitext-2-raw-v1", split="test", streaming=True)
    text = "\n\n".join(row["text"] for row in rows)
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    if len(tokens) < window:
        raise ValueError(
            f"{source!r} has {len(tokens)} tokens, fewer than a window of {window}: shorten it."
        )
    return DataLoader(TensorDataset(tokens[: len(tokens) // window * window].view(-1, window)))


def measure(trainer: Any, module: pl.LightningModule, sets: Mapping[str, Any]) -> Metrics:
    """What the module's validation logs on each set, by ``SET METRIC``; loggers hear nothing."""
    found: Metrics = {}
    loggers, trainer.loggers = trainer.loggers, []
    try:
        for name, data in sets.items():
            (metrics,) = trainer.validate(module, data, verbose=False)
            found |= {f"{name} {metric}": value for metric, value in metrics.items()}
    finally:
        trainer.loggers = loggers
    return found


def side_by_side(
    trainer: Any,
    module: pl.LightningModule,
    targets: Iterable[Target],
    sets: Mapping[str, Any],
    sparse: Callable[[pl.LightningModule], object] | None,
    more: Callable[[], Metrics] | None = None,
) -> dict[str, Metrics]:
    """Measure a module as it is, and with the weights of a checkpoint.

    Args:
        trainer: Validates; its strategy must not shard the module.
        module: The dense model; holds the checkpoint's weights afterwards.
        targets: The masked weights, whose share of zeros is measured too.
        sets: What ``Trainer.validate`` takes, by name.
        sparse: Loads the weights of a checkpoint of the fit; None measures the module alone.
        more: Measures more of the module as it is.

    Returns:
        Metrics of "dense", and of "sparse" if there is a checkpoint.
    """
    weights = [target.parameter for target in targets]
    found = {}
    for name, load in {"dense": None, "sparse": sparse}.items():
        if name == "sparse" and load is None:
            continue
        if load is not None:
            load(module)
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        share = zeros / sum(weight.numel() for weight in weights)
        found[name] = measure(trainer, module, sets) | ({} if more is None else more())
        found[name]["zeros"] = share
    return found


def table(found: Mapping[str, Metrics], title: str) -> Table:
    """Metrics for a terminal, a model in each column."""
    shown = Table(title=title)
    shown.add_column("")
    for name in found:
        shown.add_column(name, justify="right")
    for metric in next(iter(found.values())):
        form = "{:.2%}" if metric == "zeros" else "{:.5g}"
        shown.add_row(metric, *(form.format(metrics[metric]) for metrics in found.values()))
    return shown
