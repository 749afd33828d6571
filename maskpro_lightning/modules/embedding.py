"""Hugging Face's text encoders, whose masks are learned by distillation, and data; for recipes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from itertools import islice

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModel

from maskpro_lightning.modules.language import TextData
from maskpro_lightning.modules.loading import pretrained
from maskpro_lightning.progress import progress


class TextEmbedder(pl.LightningModule):
    """An encoder; a text's embedding is the mean of its tokens' last hidden states.

    It has no labels and so no loss of its own. Learn its masks with
    ``MaskProCallback(distillation=Distillation("", "cosine"))``, which compares with the dense
    embeddings. Logs ``val_distance``: one minus the cosine similarity to the embeddings of the
    weights that it was made with, mean over texts.

    Args:
        model: Path or Hub name of a Hugging Face model, or a path inside ``recipes/``.
        dtype: The weights' dtype, such as "bfloat16"; "auto" takes that of the file.
    """

    def __init__(self, model: str, dtype: str = "auto") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = pretrained(AutoModel, model, dtype)
        # In a list, so that it is no submodule, which would be masked and saved.
        self._dense = [deepcopy(self.model)]

    def forward(self, texts: Tensor) -> Tensor:
        """Embeddings (texts, width) of token ids and attention masks (texts, 2, length)."""
        return _embed(self.model, texts)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        embeddings: Tensor = self(batch[0])
        return embeddings.new_zeros(())

    def on_validation_start(self) -> None:
        self._dense[0].to(self.device)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        (texts,) = batch
        similarity = cosine_similarity(self(texts).float(), _embed(self._dense[0], texts).float())
        distance = 1 - similarity.mean()
        self.log("val_distance", distance, prog_bar=True, batch_size=len(texts), sync_dist=True)

    def configure_optimizers(self) -> None:
        """None: the masks are learned by :class:`MaskProCallback`."""


class Texts(TextData):
    """Texts, one in each row, cut or padded to one length; arguments as for :class:`TextData`."""

    def tokenise(self, texts: Iterable[str], count: int | None) -> Tensor:
        """Token ids and attention masks, int64 (texts, 2, length).

        Raises:
            ValueError: there are fewer texts than ``count``, or none.
        """
        length = self.hparams["length"]
        rows = [
            self.tokenizer(text, padding="max_length", truncation=True, max_length=length)
            for text in progress(islice(texts, count), "Tokenising", count)
        ]
        if not rows or (count is not None and len(rows) < count):
            raise ValueError(
                f"There are {len(rows)} texts, but {count} were asked for: lower train_sequences "
                f"or val_sequences, or add text."
            )
        return torch.tensor([[row["input_ids"], row["attention_mask"]] for row in rows])


def _embed(model: torch.nn.Module, texts: Tensor) -> Tensor:
    tokens, attended = texts.unbind(1)
    states: Tensor = model(input_ids=tokens, attention_mask=attended).last_hidden_state
    weights = attended[..., None].to(states.dtype)
    means: Tensor = (states * weights).sum(1) / weights.sum(1)
    return means
