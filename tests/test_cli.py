"""The command line, run as a user runs it, on a model of a few thousand weights."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from maskpro_lightning import NMPattern, find_targets
from maskpro_lightning.catalog import recipes, resolve
from maskpro_lightning.cli import main

SHORT = [
    "--data.train_sequences=8",
    "--data.val_sequences=4",
    "--data.length=16",
    "--data.batch_size=4",
    "--trainer.max_steps=4",
    "--trainer.val_check_interval=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """``main`` changes the process's arguments."""
    monkeypatch.setattr(sys, "argv", ["maskpro"])


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options that put a tiny model into the quickstart, and a working folder of one's own."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    return ["--config", "quickstart", f"--model.model={tmp_path / 'tiny'}", *SHORT]


def is_sparse(folder: Path) -> bool:
    model = AutoModelForCausalLM.from_pretrained(folder)
    pattern = NMPattern(2, 4)
    return all(
        bool(((pattern.group(t.parameter) != 0).sum(-1) == 2).all())
        for t in find_targets(model, pattern)
    )


def test_fit_then_export_writes_a_sparse_model_that_validates_like_the_checkpoint(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fit", *tiny])
    (checkpoint,) = tmp_path.glob("runs/**/*.ckpt")
    main(["export", *tiny, f"--ckpt_path={checkpoint}", "--output=out"])
    assert str(tmp_path / "out") in capsys.readouterr().out.replace("\n", "")
    assert is_sparse(tmp_path / "out")
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, weight in exported.items():
        assert torch.equal(weight, saved[f"model.{name}"])


def test_compare_prints_one_row_for_each_mask_and_exports(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["compare", *tiny])
    with (tmp_path / "sparse-model" / "comparison.csv").open() as file:
        rows = {row["mask"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["dense", "magnitude", "wanda", "sparsegpt", "maskpro"]
    assert [float(row["sparsity"]) for row in rows.values()] == [0, 0.5, 0.5, 0.5, 0.5]
    assert float(rows["dense"]["val_perplexity"]) == pytest.approx(
        torch.tensor(float(rows["dense"]["val_loss"])).exp().item(), rel=1e-4
    )
    printed = capsys.readouterr().out
    assert all(f" {name} " in printed for name in rows)
    assert "mlflow ui" in printed
    assert is_sparse(tmp_path / "sparse-model")


def test_export_without_a_checkpoint_says_what_is_missing(tiny: list[str]) -> None:
    with pytest.raises(SystemExit, match="maskpro export needs --ckpt_path"):
        main(["export", *tiny])


def test_a_wrong_option_is_refused_by_name(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", *tiny, "--trainer.max_stepz=3"])
    assert "trainer.max_stepz" in capsys.readouterr().err


def test_help_names_commands_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    printed = capsys.readouterr().out
    for word in ("fit", "validate", "compare", "export", *recipes()):
        assert word in printed


def test_the_command_is_installed() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "maskpro_lightning.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "usage: maskpro" in found.stdout


def test_every_recipe_is_found_and_prints_its_configuration(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert list(recipes()) == ["quickstart"]
    for name in recipes():
        with pytest.raises(SystemExit, match="0"):
            main(["fit", "--config", name, "--print_config"])
        assert "maskpro_lightning.MaskProCallback" in capsys.readouterr().out


def test_a_path_of_ones_own_goes_before_one_inside_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Path(resolve("quickstart.yaml")).is_absolute()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.yaml").touch()
    assert resolve("quickstart.yaml") == "quickstart.yaml"
    assert resolve("someone/on-the-hub") == "someone/on-the-hub"
