"""Packed text and the language model of the recipes."""

import gzip
import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from datasets import Dataset
from lightning.pytorch.callbacks import ModelCheckpoint
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from maskpro_lightning.modules.language import CausalLM, ResumableLoader, TextData, pack
from maskpro_lightning.modules.python_docs import python_docs


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<end>": 0, "a": 1, "b": 2, "c": 3, "<unknown>": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def test_packing_puts_an_end_after_each_text_and_drops_the_rest(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    packed = pack(["a b", "c", "a b c"], tokenizer, length=3, count=None)
    assert packed.tolist() == [[1, 2, 0], [3, 0, 1], [2, 3, 0]]


def test_packing_reads_no_more_texts_than_it_needs(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = iter(["a b"] * 10)
    assert pack(texts, tokenizer, length=3, count=2).shape == (2, 3)
    assert len(list(texts)) == 8


def test_tensor_parallelism_is_refused_by_name() -> None:
    with torch.device("meta"):
        module = CausalLM("quickstart/model")
    mesh = {"data_parallel": mock.Mock(), "tensor_parallel": mock.Mock(size=lambda: 2)}
    with (
        mock.patch.object(CausalLM, "device_mesh", mesh),
        pytest.raises(
            ValueError, match=r"^tensor_parallel_size is 2, but .* set tensor_parallel_size=1"
        ),
    ):
        module.configure_model()


def test_too_little_text_is_refused_with_the_number_it_gives(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(ValueError, match="give 1 sequences of 3 tokens, but 2 were asked for"):
        pack(["a b"], tokenizer, length=3, count=2)
    with pytest.raises(ValueError, match="give 0 sequences of 3 tokens"):
        pack([], tokenizer, length=3, count=None)


def test_few_sequences_read_few_texts_and_not_the_rest_of_their_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.save_pretrained(tmp_path)
    row = json.dumps({"text": "a b c " * 100, "more": "x" * 20_000}) + "\n"
    good = gzip.compress((row * 1200).encode(), 1)  # 24 MB; ``datasets`` reads 10 MB ahead
    broken = b"\x1f\x8b no gzip file"
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "shard.json.gz").write_bytes(good + broken)
    read: list[str] = []

    class Counted(TextData):
        def tokenise(self, texts: Iterable[str], count: int | None) -> Tensor:
            return super().tokenise((read.append(text) or text for text in texts), count)

    def setup(count: int | None) -> TextData:
        data = Counted(
            str(tmp_path),
            str(tmp_path / "c4"),
            data_files={"train": "shard.json.gz", "validation": "shard.json.gz"},
            train_sequences=count,
            val_sequences=1,
        )
        data.setup("fit")
        return data

    assert len(setup(512).train_dataloader()) == 512 // 32
    # 512 sequences of 128 tokens are 218 texts of 301, and one sequence is one text.
    assert len(read) == 218 + 1
    with pytest.raises(Exception, match=r"(?i)gzip|compress|header|generating"):
        setup(None)


def test_provenance_tells_the_source_and_the_tokens(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.save_pretrained(tmp_path)

    names = {"train": "text", "validation": "other"}

    def told(text: str) -> dict[str, str]:
        (tmp_path / "text.txt").write_text(text)
        (tmp_path / "other.txt").write_text("c c")
        files = {split: str(tmp_path / f"{name}.txt") for split, name in names.items()}
        data = TextData(str(tmp_path), "text", data_files=files, length=2, train_sequences=2)
        data.setup("fit")
        return data.provenance()

    found = told("a b c")
    assert found["name"] == "text"
    assert json.loads(found["source"])["data_files"]["train"] == str(tmp_path / "text.txt")
    assert json.loads(found["source"])["split"] == "train"
    assert found == told("a b c")
    assert found["digest"] != told("a b b")["digest"]


def test_files_and_python_docs_come_through_the_same_code(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "train.txt").write_text("a b c\n" * 8)
    (tmp_path / "val.jsonl").write_text('{"text": "c c c"}\n' * 4)
    files = {"train": str(tmp_path / "train.txt"), "validation": str(tmp_path / "train.txt")}
    data = TextData(str(tmp_path), "text", data_files=files, length=4, train_sequences=8)
    data.setup("fit")
    assert next(iter(data.val_dataloader()))[0].tolist() == [[1, 2, 3, 0]] * 8
    files = {"validation": str(tmp_path / "val.jsonl"), "train": str(tmp_path / "val.jsonl")}
    data = TextData(str(tmp_path), "json", data_files=files, length=4, train_sequences=4)
    data.setup("fit")
    assert next(iter(data.val_dataloader()))[0].tolist() == [[3, 3, 3, 0]] * 4
    rows = Dataset.from_dict({"words": ["b b b"] * 4})
    for split in ("train", "validation"):
        rows.to_parquet(tmp_path / "rows" / f"{split}.parquet")
    data = TextData(
        str(tmp_path), str(tmp_path / "rows"), text_column="words", length=4, train_sequences=4
    )
    data.setup("fit")
    assert next(iter(data.val_dataloader()))[0].tolist() == [[2, 2, 2, 0]] * 4
    data = TextData(str(tmp_path), length=16, train_sequences=4, val_sequences=2, batch_size=2)
    data.setup("fit")
    assert next(iter(data.val_dataloader()))[0].shape == (2, 16)


def test_batches_keep_their_sequences_and_change_their_order_with_the_epoch(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "train.txt").write_text("\n".join(["a", "b", "c"] * 20))
    files = dict.fromkeys(("train", "validation"), str(tmp_path / "train.txt"))
    data = TextData(
        str(tmp_path), "text", data_files=files, length=5, train_sequences=24, batch_size=4
    )
    data.setup("fit")
    loader = data.train_dataloader()
    first = [batch.tolist() for (batch,) in loader]
    loader.sampler.set_epoch(1)  # type: ignore[attr-defined]
    second = [batch.tolist() for (batch,) in loader]
    assert len(first) == 6
    assert first != second
    assert sorted(first) == sorted(second)


def test_a_loader_continues_after_the_batches_it_gave() -> None:
    loader = ResumableLoader(range(10), batch_size=2)  # type: ignore[arg-type]
    begun = iter(loader)
    taken = [next(begun).tolist() for _ in range(3)]
    again = ResumableLoader(range(10), batch_size=2)  # type: ignore[arg-type]
    again.load_state_dict(loader.state_dict())
    rest = [batch.tolist() for batch in again]
    assert taken + rest == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert [batch.tolist() for batch in again] == taken + rest
    fresh = ResumableLoader(range(10), batch_size=2)  # type: ignore[arg-type]
    fresh.load_state_dict(again.state_dict())
    assert len(list(fresh)) == 5


def test_a_fit_stopped_within_an_epoch_sees_the_batches_that_it_would_have_seen(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.save_pretrained(tmp_path)

    class Reader(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))
            self.seen: list[Any] = []

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.seen.append(batch[0].tolist())
            return self.weight

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            pass

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    def read(steps: int, resume: Path | None = None) -> list[Any]:
        data = TextData(str(tmp_path), length=8, train_sequences=10, val_sequences=2, batch_size=2)
        saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            callbacks=[saver],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = Reader()
        trainer.fit(module, datamodule=data, ckpt_path=resume)
        return module.seen

    whole = read(12)
    for stopped in (3, 5, 8):
        assert read(12, tmp_path / f"step={stopped}.ckpt") == whole[stopped:]


def test_python_docs_splits_share_no_text() -> None:
    train, held_out = python_docs("train"), python_docs("validation")
    assert sum(map(len, train)) > 1_000_000
    assert sum(map(len, held_out)) > 100_000
    paragraphs = [{p for text in split for p in text.split("\n\n")} for split in (train, held_out)]
    shared = [p for p in islice(paragraphs[0] & paragraphs[1], 3) if len(p) > 80]
    assert not shared
    with pytest.raises(ValueError, match="'test'"):
        python_docs("test")  # type: ignore[arg-type]
