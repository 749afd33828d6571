"""Hugging Face's image classifiers and image data, as Lightning modules, for recipes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoImageProcessor, AutoModelForImageClassification

from maskpro_lightning.catalog import resolve
from maskpro_lightning.modules.language import ResumableLoader, adamw
from maskpro_lightning.modules.loading import pretrained
from maskpro_lightning.progress import progress


class ImageClassifier(pl.LightningModule):
    """An image classifier with its cross-entropy in nats (natural logarithms) per image.

    Logs ``train_loss``, ``val_loss`` and ``val_accuracy``. It stays in evaluation mode.

    Args:
        model: Path or Hub name of a Hugging Face model, or a path inside ``recipes/``.
        dtype: The weights' dtype, such as "bfloat16"; "auto" takes that of the file.
        lr: Learning rate of the weights where they are trained (:class:`SparseFinetuning`).
    """

    def __init__(self, model: str, dtype: str = "auto", lr: float = 1e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = pretrained(AutoModelForImageClassification, model, dtype)
        self.accuracy = MulticlassAccuracy(self.model.config.num_labels, average="micro")

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (images, classes) of pixels (images, channels, height, width)."""
        logits: Tensor = self.model(pixel_values=pixels).logits
        return logits

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        pixels, labels = batch
        loss = torch.nn.functional.cross_entropy(self(pixels).float(), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        pixels, labels = batch
        logits = self(pixels).float()
        loss = torch.nn.functional.cross_entropy(logits, labels)
        self.log("val_loss", loss, prog_bar=True, batch_size=len(labels), sync_dist=True)
        self.accuracy(logits, labels)
        self.log("val_accuracy", self.accuracy)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW; not used where :class:`MaskProCallback` learns masks."""
        return adamw(self, self.hparams["lr"])


class ImageData(pl.LightningDataModule):
    """Images with labels from ``datasets``, prepared by the model's processor.

    Streams a source, and reads only the images that it takes and ``shuffle_buffer`` more.

    Args:
        processor: Path or Hub name of the model, whose image processor is used.
        source: An argument of ``datasets.load_dataset``: a Hub name, a folder, "imagefolder",
            "parquet".
        name: The data set's configuration, for ``load_dataset``.
        data_files: Files by split, for ``load_dataset``.
        train_split: Split to train on.
        val_split: Split to validate on.
        image_column: Column that holds the image.
        label_column: Column that holds the class's number.
        train_images: Number of training images.
        val_images: Number of validation images.
        shuffle_buffer: The number of images to draw the next one from, as sources are often sorted.
        batch_size: The number of images of a batch.
        num_workers: The number of processes that prepare images.
        seed: Seed of the choice, and of the order in every epoch.
    """

    def __init__(
        self,
        processor: str,
        source: str,
        name: str | None = None,
        data_files: dict[str, str] | None = None,
        train_split: str = "train",
        val_split: str = "test",
        image_column: str = "image",
        label_column: str = "label",
        train_images: int = 2048,
        val_images: int = 2048,
        shuffle_buffer: int = 8192,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.processor: Any = AutoImageProcessor.from_pretrained(resolve(processor))  # type: ignore[no-untyped-call]
        self._sets: dict[str, _Images] = {}

    def setup(self, stage: str) -> None:
        """Fetch the images of both splits, once."""
        if not self._sets:
            self._sets = {part: self._images(part) for part in ("train", "val")}

    def train_dataloader(self) -> ResumableLoader:
        """Batches in an order that depends on seed and epoch alone, so that a fit can resume."""
        sampler: DistributedSampler[Any] | None = None
        if self.trainer is None or self.trainer.world_size == 1:
            sampler = DistributedSampler(self._sets["train"], 1, 0, seed=self.hparams["seed"])
        return self._loader("train", sampler=sampler, shuffle=sampler is None)

    def val_dataloader(self) -> ResumableLoader:
        """Batches in order."""
        return self._loader("val")

    def provenance(self) -> dict[str, str]:
        """The training data's name, digest and source, for :class:`mlflow.entities.Dataset`."""
        source = {"path": self.hparams["source"], "split": self.hparams["train_split"]}
        return {
            "name": self.hparams["source"],
            "digest": f"{self.hparams['train_images']}-{self.hparams['seed']}",
            "source_type": "hugging_face",
            "source": json.dumps(source | {"data_files": self.hparams["data_files"]}),
        }

    def _loader(self, part: str, **kwargs: Any) -> ResumableLoader:
        batch, workers = self.hparams["batch_size"], self.hparams["num_workers"]
        return ResumableLoader(self._sets[part], batch_size=batch, num_workers=workers, **kwargs)

    def _images(self, part: str) -> _Images:
        settings, count = self.hparams, self.hparams[f"{part}_images"]
        from datasets import load_dataset

        stream = load_dataset(
            settings["source"],
            settings["name"],
            data_files=settings["data_files"],
            split=settings[f"{part}_split"],
            streaming=True,
        ).shuffle(seed=settings["seed"], buffer_size=settings["shuffle_buffer"])
        columns = settings["image_column"], settings["label_column"]
        bar = progress(stream.take(count), f"Fetching images ({part})", count)
        rows = [tuple(row[column] for column in columns) for row in bar]
        if len(rows) < count:
            raise ValueError(
                f"The split {settings[f'{part}_split']!r} has {len(rows)} images, but {count} were "
                f"asked for: lower {part}_images."
            )
        return _Images(rows, self.processor)


class _Images(Dataset[tuple[Tensor, int]]):
    """Images that are prepared when they are read, since that makes them larger."""

    def __init__(self, rows: Sequence[tuple[Any, int]], processor: Any) -> None:
        self._rows, self._processor = rows, processor

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        image, label = self._rows[number]
        pixels = self._processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        return pixels[0], label
