"""The models that masks are learned for, with their batches and their loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shapes
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from maskpro_lightning.modules.language import CausalLM, TextData

#: Training batches of every model, and the sequences of a batch of text.
TRAINING_BATCHES, SEQUENCES = 512, 8
#: Held-out batches of the vision model, in each half.
HELD_OUT_BATCHES = 32


@dataclass(frozen=True)
class Case:
    """A trained model and its data.

    Attributes:
        model: In evaluation mode, without dropout, its parameters frozen.
        loss_of: The mean loss of a batch in nats.
        training: Batches to learn from.
        choosing: Held-out batches that choose among settings.
        reported: Other held-out batches, which nothing is chosen by.
    """

    model: nn.Module
    loss_of: Callable[[Any], Tensor]
    training: Sequence[Any]
    choosing: Sequence[Any]
    reported: Sequence[Any]

    @torch.no_grad()
    def held_out_loss(self, batches: Sequence[Any]) -> float:
        """Mean loss over batches of one size."""
        return sum(float(self.loss_of(batch)) for batch in batches) / len(batches)


def llama() -> Case:
    """The quickstart's Llama on the documentation that every CPython carries."""
    return _language(source="python-docs")


def wikitext(folder: Path) -> Case:
    """The quickstart's Llama on WikiText's ``valid.txt`` and, held out, its ``test.txt``."""
    files = {split: str(folder / f"{split}.txt") for split in ("valid", "test")}
    return _language(
        source="text", data_files=files, train_split="valid", val_split="test", val_sequences=512
    )


def vision(folder: Path) -> Case:
    """The vision transformer of ``shapes``, which is kept in ``folder``."""
    model = shapes.trained(folder).requires_grad_(False)
    model.zero_grad()  # those of its training, if that was just now
    return Case(
        model,
        lambda batch: shapes.loss(model, batch),
        shapes.batches(TRAINING_BATCHES, seed=1),
        shapes.batches(HELD_OUT_BATCHES, seed=2),
        shapes.batches(HELD_OUT_BATCHES, seed=3),
    )


def _language(**source: Any) -> Case:
    model = CausalLM("quickstart/model").eval().requires_grad_(False)
    data = TextData(
        "quickstart/model",
        train_sequences=TRAINING_BATCHES * SEQUENCES,
        batch_size=SEQUENCES,
        **source,
    )
    data.setup("fit")
    training = [tokens for (tokens,) in data.train_dataloader()]
    held_out = [tokens for (tokens,) in data.val_dataloader() if len(tokens) == SEQUENCES]
    half = len(held_out) // 2

    def loss_of(tokens: Tensor) -> Tensor:
        return cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    return Case(model, loss_of, training, held_out[:half], held_out[half:])
