"""Dense against sparse, and WikiText-2 as the field measures it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import log_softmax
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from maskpro_lightning import NMPattern, find_targets
from maskpro_lightning.catalog import resolve
from maskpro_lightning.cli import main
from maskpro_lightning.commands import evaluate
from maskpro_lightning.initial.initializers import magnitude
from maskpro_lightning.modules.language import CausalLM

WINDOW = 32
ROWS = ["", " = Robert Boulter = \n", "", " Robert Boulter is an English actor . \n"] * 8
README = """---
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - split: test
    path: wikitext-2-raw-v1/test-*
---
"""


@pytest.fixture(scope="module")
def wikitext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the layout of Salesforce/wikitext."""
    folder = tmp_path_factory.mktemp("wikitext")
    (folder / "README.md").write_text(README)
    rows = Dataset.from_dict({"text": ROWS})
    rows.to_parquet(folder / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=1024, **sizes, **heads)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve("quickstart/model")).save_pretrained(folder)
    return folder


def perplexity(module: CausalLM, folder: Path) -> float:
    """By hand: the text as one stream, window by window, the mean over predicted tokens."""
    text = "\n\n".join(ROWS)
    tokens = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    losses = []
    for start in range(0, len(tokens) - WINDOW + 1, WINDOW):
        window = torch.tensor(tokens[start : start + WINDOW])
        with torch.no_grad():
            scores = log_softmax(module(window[None])[0].double(), -1)
        losses += [-scores[i, window[i + 1]].item() for i in range(WINDOW - 1)]
    assert len(losses) == len(tokens) // WINDOW * (WINDOW - 1) > WINDOW
    return torch.tensor(losses).mean().exp().item()


def test_evaluate_tells_perplexity_dense_and_sparse_as_by_hand(
    wikitext: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["maskpro"])
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "text.txt").write_text("some words to be predicted\n" * 20)
    module = CausalLM(str(model)).eval()
    expected = [perplexity(module, model)]
    pattern = NMPattern(2, 4)
    with torch.no_grad():
        for target in find_targets(module, pattern):
            target.parameter.mul_(magnitude(target.parameter, pattern))
    expected.append(perplexity(module, model))
    torch.save({"state_dict": module.state_dict()}, tmp_path / "sparse.ckpt")
    files = {split: str(tmp_path / "text.txt") for split in ("train", "validation")}
    main(
        [
            "evaluate",
            "--config=quickstart",
            f"--model.model={model}",
            f"--data.tokenizer={model}",
            "--data.source=text",
            f"--data.data_files={files}".replace("'", '"'),
            "--data.length=16",
            "--data.train_sequences=2",
            "--data.val_sequences=2",
            "--trainer.logger=false",
            "--ckpt_path=sparse.ckpt",
            f"--wikitext2={wikitext}",
            f"--window={WINDOW}",
        ]
    )
    printed = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    cells = {line.split("│")[1].strip(): line.split("│")[2:4] for line in printed}
    told = [float(cell) for cell in cells["WikiText-2 (windows of 32) val_perplexity"]]
    assert told == pytest.approx(expected, rel=1e-4)  # five digits are printed
    assert told[0] != told[1]
    assert [cell.strip() for cell in cells["zeros"]] == ["0.00%", "50.00%"]
    assert cells["held-out val_loss"][0] != cells["held-out val_loss"][1]


def test_text_shorter_than_a_window_is_refused(wikitext: Path, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    with pytest.raises(ValueError, match="fewer than a window of 4096: shorten it"):
        evaluate.wikitext2(tokenizer, str(wikitext), 4096)


def test_loggers_hear_nothing_of_a_measurement(wikitext: Path, model: Path) -> None:
    class Deaf(pl.loggers.CSVLogger):
        def log_metrics(self, *_: Any, **__: Any) -> None:
            raise AssertionError("heard")

    trainer = pl.Trainer(
        accelerator="cpu",
        logger=Deaf("."),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = evaluate.wikitext2(AutoTokenizer.from_pretrained(model), str(wikitext), WINDOW)
    found = evaluate.measure(trainer, CausalLM(str(model)), {"text": data})
    assert set(found) == {"text val_loss", "text val_perplexity"}
    assert len(trainer.loggers) == 1
