"""Text that a model writes itself is the model's own distribution, and is written once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY, llama
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from maskpro_lightning.modules import written as written_text
from maskpro_lightning.modules.language import TextData
from maskpro_lightning.modules.written import written

END = 3


def sure_model() -> PreTrainedModel:
    """A model whose next tokens are not all alike in probability."""
    torch.manual_seed(0)
    model = llama()
    model.lm_head.weight.data.mul_(30)
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model and its tokenizer, whose files ask for greedy generation that ends early."""
    monkeypatch.setattr(written_text, "HF_HOME", str(tmp_path / "cache"))
    sure_model().save_pretrained(tmp_path / "model")
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"w{END}").save_pretrained(
        tmp_path / "model"
    )
    asked = {"do_sample": True, "top_k": 1, "max_new_tokens": 2, "eos_token_id": [5, 6, 7]}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(asked))
    return tmp_path / "model"


def test_tokens_are_as_frequent_as_the_model_says(folder: Path) -> None:
    count = 2000
    tokens = written(str(folder), count, length=2, seed=0)
    assert (tokens[:, 0] == END).all()
    with torch.no_grad():
        share = sure_model()(torch.tensor([[END]])).logits[0, -1].softmax(-1)
    assert share.max() > 4 * share.min()
    seen = torch.bincount(tokens[:, 1], minlength=VOCABULARY) / count
    assert ((seen - share).abs() < 5 * (share * (1 - share) / count).sqrt()).all()


def test_sequences_go_on_after_an_end_of_text(folder: Path) -> None:
    tokens = written(str(folder), 70, length=40, seed=0)  # in three batches
    assert tokens.shape == (70, 40)
    assert (tokens[:, 1:-1] == END).any()
    assert len(tokens[:, 1].unique()) > 5
    assert len(tokens.unique(dim=0)) == 70


def test_what_was_written_is_read_again_unless_the_model_or_the_seed_is_another(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = written(str(folder), 3, length=8, seed=0)
    inside = written_text._write
    monkeypatch.setattr(written_text, "_write", lambda *args: torch.tensor([[-1]]))
    torch.testing.assert_close(written(str(folder), 3, length=8, seed=0), first, rtol=0, atol=0)
    assert written(str(folder), 3, length=8, seed=1).tolist() == [[-1]]
    monkeypatch.setattr(written_text, "_write", inside)
    another = sure_model()
    another.lm_head.weight.data.neg_()
    another.save_pretrained(folder)
    assert not torch.equal(written(str(folder), 3, length=8, seed=0), first)


def test_the_random_numbers_of_a_fit_are_left_alone(folder: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    written(str(folder), 3, length=8, seed=0)
    torch.testing.assert_close(torch.get_rng_state(), before)


def test_a_data_module_trains_and_validates_on_what_the_model_writes(folder: Path) -> None:
    data = TextData(
        str(folder), "model", length=8, train_sequences=6, val_sequences=4, batch_size=2
    )
    data.prepare_data()
    data.setup("fit")
    training = torch.cat([tokens for (tokens,) in data.train_dataloader()])
    validation = torch.cat([tokens for (tokens,) in data.val_dataloader()])
    assert sorted(training.tolist()) == sorted(written(str(folder), 6, 8, seed=0).tolist())
    assert validation.tolist() == written(str(folder), 4, 8, seed=1).tolist()
    assert data.provenance()["name"] == "model"
    assert json.loads(data.provenance()["source"])["uri"] == str(folder)


def test_a_model_is_not_asked_to_write_without_end(folder: Path) -> None:
    data = TextData(str(folder), "model", train_sequences=None)
    with pytest.raises(ValueError, match="give train_sequences a number"):
        data.setup("fit")


def test_a_tokenizer_without_an_end_of_text_is_refused(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "special_tokens_map.json").write_text("{}")
    with pytest.raises(ValueError, match="no end-of-text token"):
        written(str(folder), 3, length=8, seed=0)
