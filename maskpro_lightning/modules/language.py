"""Hugging Face's causal language models and packed text, as Lightning modules, for recipes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain, islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics.text import Perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from maskpro_lightning.catalog import resolve
from maskpro_lightning.modules.loading import loads_late, mapped, pretrained
from maskpro_lightning.modules.python_docs import python_docs
from maskpro_lightning.modules.written import written
from maskpro_lightning.progress import progress


class CausalLM(pl.LightningModule):
    """A causal language model with its next-token loss in nats (natural logarithms) per token.

    Logs ``train_loss``, ``val_loss`` and ``val_perplexity``. It stays in evaluation mode, so that
    dropout adds no noise to the comparison of two masks. ``ModelParallelStrategy`` shards it block
    by block (FSDP2). Made on the meta device (``trainer.init_module(empty_init=True)``), it loads
    its weights in ``configure_model``: each rank then holds only its shards and one block.

    Args:
        model: Path or Hub name of a Hugging Face model, or a path inside ``recipes/``.
        dtype: The weights' dtype, such as "bfloat16"; "auto" takes that of the file.
        lr: Learning rate of the weights where they are trained (:class:`SparseFinetuning`).
    """

    def __init__(self, model: str, dtype: str = "auto", lr: float = 1e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        late = loads_late() and type(self).configure_model is CausalLM.configure_model
        with torch.device("meta") if late else nullcontext():
            self.model = pretrained(AutoModelForCausalLM, model, dtype)
        with torch.device("cpu"):
            self.perplexity = Perplexity(ignore_index=-100)

    def configure_model(self) -> None:
        late = any(parameter.is_meta for parameter in self.model.parameters())
        kind, given = AutoModelForCausalLM, (self.hparams["model"], self.hparams["dtype"])
        if self.device_mesh is None and late:
            with torch.device("cpu"):
                self.model = pretrained(kind, *given)
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return
        tensor_parallel = self.device_mesh["tensor_parallel"].size()
        if tensor_parallel > 1:
            raise ValueError(
                f"tensor_parallel_size is {tensor_parallel}, but CausalLM splits its model over "
                f"data-parallel ranks alone (FSDP2): set tensor_parallel_size=1 and "
                f"data_parallel_size to the number of devices; or parallelize the model in "
                f"configure_model of a module of your own."
            )
        mesh = self.device_mesh["data_parallel"]
        convert: Callable[[nn.Module], None] = lambda part: None  # noqa: E731
        if late:
            with torch.device("cpu"):
                self.model, convert = mapped(kind, *given, self.model)
        kinds = self.model._no_split_modules or ()
        for block in [part for part in self.model.modules() if type(part).__name__ in kinds]:
            convert(block)
            fully_shard(block, mesh=mesh)
        convert(self.model)
        fully_shard(self.model, mesh=mesh)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) of token ids (batch, length)."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(self(batch[0]), batch[0])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        (tokens,) = batch
        logits = self(tokens)
        loss = self._loss(logits, tokens)
        self.log("val_loss", loss, prog_bar=True, batch_size=len(tokens), sync_dist=True)
        self.perplexity(logits[:, :-1].float(), tokens[:, 1:])
        self.log("val_perplexity", self.perplexity)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW; not used where :class:`MaskProCallback` learns masks."""
        return adamw(self, self.hparams["lr"])

    @staticmethod
    def _loss(logits: Tensor, tokens: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten()
        )


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that can resume in the middle of an epoch; Lightning saves its state."""

    _taken = 0
    _skip = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, so that the sampler is asked for its order only once the epoch is set.
        self._taken, self._skip = self._skip, 0
        for batch in islice(super().__iter__(), self._taken, None):
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The number of batches taken in this epoch."""
        return {"taken": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after as many batches; an epoch that was complete starts over."""
        self._skip = state["taken"] % len(self)


class TextData(pl.LightningDataModule):
    """Text, tokenised and packed into sequences of one length, an end-of-text after each document.

    Reads no more of a source than the number of sequences takes.

    Args:
        tokenizer: Path or Hub name of a tokenizer, or a path inside ``recipes/``.
        source: "python-docs" (the documentation that comes with CPython; no network); "model"
            (text that the model beside the tokenizer writes, see :func:`written`); or an argument
            of ``datasets.load_dataset``: a Hub name, a folder, "text", "json" or "parquet".
        name: The data set's configuration, for ``load_dataset``.
        data_files: Files by split, for ``load_dataset``.
        train_split: Split to train on.
        val_split: Split to validate on.
        text_column: Column that holds the text.
        length: The number of tokens of a sequence.
        train_sequences: The number of training sequences; None packs the whole split.
        val_sequences: The number of validation sequences; None packs the whole split, or takes 64
            from "model".
        batch_size: The number of sequences of a batch.
        num_workers: The number of processes that load data.
        seed: Seed of the order, which differs in every epoch.
    """

    def __init__(
        self,
        tokenizer: str,
        source: str = "python-docs",
        name: str | None = None,
        data_files: dict[str, str] | None = None,
        train_split: str = "train",
        val_split: str = "validation",
        text_column: str = "text",
        length: int = 128,
        train_sequences: int | None = 512,
        val_sequences: int | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.tokenizer = AutoTokenizer.from_pretrained(resolve(tokenizer))
        self._sets: dict[str, Tensor] = {}

    def prepare_data(self) -> None:
        """For source "model", let one rank write the text that all ranks read."""
        if self.hparams["source"] == "model":
            self._written()

    def setup(self, stage: str) -> None:
        """Pack both splits, once."""
        if self._sets:
            return
        if self.hparams["source"] == "model":
            self._sets = self._written()
            return
        for part in ("train", "val"):
            texts = self._texts(self.hparams[f"{part}_split"])
            count = self.hparams[f"{part}_sequences"]
            self._sets[part] = self.tokenise(texts, count)

    def _written(self) -> dict[str, Tensor]:
        hparams = self.hparams
        counts = {"train": hparams["train_sequences"], "val": hparams["val_sequences"] or 64}
        if counts["train"] is None:
            raise ValueError("A model writes without end: give train_sequences a number.")
        device = "cpu" if self.trainer is None else self.trainer.strategy.root_device
        about = hparams["tokenizer"], hparams["length"], device
        return {
            part: written(about[0], count, about[1], hparams["seed"] + offset, about[2])
            for offset, (part, count) in enumerate(counts.items())
        }

    def tokenise(self, texts: Iterable[str], count: int | None) -> Tensor:
        """Tokens of a split, int64 with a sequence in each row; see :func:`pack`."""
        return pack(texts, self.tokenizer, self.hparams["length"], count)

    def provenance(self) -> dict[str, str]:
        """The training data's name, digest and source, for :class:`mlflow.entities.Dataset`."""
        local = self.hparams["source"] in ("python-docs", "model")
        uri = {"model": self.hparams["tokenizer"]}.get(self.hparams["source"], "python-docs")
        source = {"uri": uri} if local else {"path": self.hparams["source"]}
        for key, value in {"config_name": "name", "data_files": "data_files"}.items():
            source |= {} if self.hparams[value] is None else {key: self.hparams[value]}
        return {
            "name": self.hparams["source"],
            "digest": hashlib.sha256(self._sets["train"].numpy().tobytes()).hexdigest()[:16],
            "source_type": "local" if local else "hugging_face",
            "source": json.dumps(source | {"split": self.hparams["train_split"]}),
        }

    def train_dataloader(self) -> ResumableLoader:
        """Batches in an order that depends on seed and epoch alone, so that a fit can resume.

        A batch holds the same sequences in every epoch, so that its baseline can be remembered. The
        last sequences are left out if they do not fill a batch.
        """
        size = self.hparams["batch_size"]
        batches = self._sets["train"][: len(self._sets["train"]) // size * size].unflatten(
            0, (-1, size)
        )
        dataset = TensorDataset(batches)
        sampler: DistributedSampler[Any] | None = None
        if self.trainer is None or self.trainer.world_size == 1:
            sampler = DistributedSampler(dataset, 1, 0, seed=self.hparams["seed"])
        return ResumableLoader(
            dataset,
            batch_size=None,
            shuffle=sampler is None,
            sampler=sampler,
            num_workers=self.hparams["num_workers"],
        )

    def val_dataloader(self) -> ResumableLoader:
        """Batches in order."""
        return ResumableLoader(
            TensorDataset(self._sets["val"]),
            batch_size=self.hparams["batch_size"],
            num_workers=self.hparams["num_workers"],
        )

    def _texts(self, split: str) -> Iterable[str]:
        if self.hparams["source"] == "python-docs":
            return iter(python_docs("train" if split == "train" else "validation"))
        from datasets import load_dataset

        rows = load_dataset(
            self.hparams["source"],
            self.hparams["name"],
            data_files=self.hparams["data_files"],
            split=split,
            streaming=True,
        )
        return (row[self.hparams["text_column"]] for row in rows)


def adamw(module: pl.LightningModule, lr: float) -> OptimizerLRScheduler:
    """AdamW without weight decay; the rate falls linearly to 0 over a fit of known length."""
    optimizer = AdamW(module.parameters(), lr=lr, weight_decay=0.0)
    steps = module.trainer.estimated_stepping_batches
    fall = 1 / steps if 0 < steps < math.inf else 0.0
    scheduler = LambdaLR(optimizer, lambda step: max(0.0, 1 - fall * step))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def pack(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int | None
) -> Tensor:
    """Cut the concatenation of texts, an end-of-text after each, into sequences of one length.

    Args:
        texts: The documents.
        tokenizer: Any tokenizer with an end-of-text token.
        length: The number of tokens of a sequence.
        count: The number of sequences; None takes all.

    Returns:
        int64 (sequences, length).

    Raises:
        ValueError: the texts give fewer than ``count`` sequences, or none.
    """

    def sequences() -> Iterator[list[int]]:
        tokens: list[int] = []
        for text in texts:
            tokens += tokenizer(text, verbose=False)["input_ids"] + [tokenizer.eos_token_id]
            whole = len(tokens) // length
            for i in range(whole):
                yield tokens[i * length : (i + 1) * length]
            tokens = tokens[whole * length :]

    packed = list(progress(islice(sequences(), count), "Packing text", count))
    if not packed or (count is not None and len(packed) < count):
        raise ValueError(
            f"The texts give {len(packed)} sequences of {length} tokens, but {count} were asked "
            f"for: lower train_sequences or val_sequences, or add text."
        )
    return torch.tensor(list(chain.from_iterable(packed))).view(-1, length)
