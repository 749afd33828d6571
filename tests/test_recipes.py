"""Every recipe runs: as it is written, but for its model, its data, its device and its length."""

from __future__ import annotations

import csv
import gzip
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from maskpro_lightning import NMPattern, find_targets, load_masks
from maskpro_lightning.catalog import recipes, resolve
from maskpro_lightning.cli import main
from maskpro_lightning.weights.targets import Target

RECIPES = Path(__file__).parent.parent / "recipes"
STEPS = 2
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
WORDS = {**SIZES, "vocab_size": 1024, "num_key_value_heads": 1}
#: The layers that a recipe masks in one block of its model.
LAYERS = {"llama": 7, "olmo2": 7, "qwen3": 7, "bert": 6, "vit": 6}
MODELS = {
    "quickstart": "llama",
    "llama2_7b_c4": "llama",
    "smollm2_135m": "llama",
    "olmo2_1b": "olmo2",
    "qwen3_8b": "qwen3",
    "qwen3_8b_fsdp": "qwen3",
    "qwen3_8b_fsdp2": "qwen3",
    "llama3_70b_fsdp2": "llama",
    "minilm": "bert",
    "vit_cifar10": "vit",
}
#: Those that train on a sparse model, which another recipe's export is.
TRAINED = {
    "quickstart_finetune": "llama",
    "olmo2_1b_finetune": "olmo2",
    "vit_cifar10_finetune": "vit",
}
C4 = {
    "train": "en/c4-train.00000-of-01024.json.gz",
    "validation": "en/c4-validation.00000-of-00008.json.gz",
}
SHARDED = ("qwen3_8b_fsdp", "qwen3_8b_fsdp2", "llama3_70b_fsdp2")


def model(kind: str) -> PreTrainedModel:
    """A model of the recipe's own architecture, with random weights."""
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**WORDS))
    if kind == "olmo2":
        return Olmo2ForCausalLM(Olmo2Config(**WORDS, eos_token_id=0, pad_token_id=0))
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**WORDS, head_dim=8))
    if kind == "bert":
        return BertModel(BertConfig(**SIZES, vocab_size=8, max_position_embeddings=64))
    return ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=3))


def targets(built: PreTrainedModel) -> list[Target]:
    """The weights that its recipes mask."""
    exclude = ["*.patch_embeddings", "classifier"] if hasattr(built, "vit") else []
    return find_targets(built, "2:4", exclude=exclude)


def pruned(dense: PreTrainedModel) -> PreTrainedModel:
    """Two of four weights are zero in all layers that are masked."""
    for target in targets(dense):
        NMPattern(2, 4).group(target.parameter.detach(), target.input_dim)[..., 2:] = 0
    return dense


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the Hub would give: a model of each kind, text and images."""
    folder = tmp_path_factory.mktemp("hub")
    for kind in LAYERS:
        model(kind).save_pretrained(folder / kind)
        if kind in TRAINED.values():
            pruned(model(kind)).save_pretrained(folder / "sparse" / kind)
        AutoTokenizer.from_pretrained(resolve("quickstart/model")).save_pretrained(folder / kind)
    words = {"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3, "c": 4}
    words_of_bert = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    words_of_bert.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words_of_bert, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder / "bert")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / "vit")
    write_c4(folder / "c4")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 6, 6, 3), np.uint8)
    rows = {"img": [Image.fromarray(image) for image in pixels], "label": [0, 1, 2] * 8}
    images = Dataset.from_dict(rows).cast_column("label", ClassLabel(names=["a", "b", "c"]))
    for split in ("train", "test"):
        images.to_parquet(folder / "cifar10" / f"{split}-00000-of-00001.parquet")
    return folder


def write_c4(folder: Path) -> None:
    """Texts of letters in the layout of allenai/c4."""
    (folder / "en").mkdir(parents=True)
    letters = np.random.default_rng(0).choice(list("abc"), (400, 60))
    text = "\n".join(json.dumps({"text": " ".join(row), "url": ""}) for row in letters)
    for name in C4.values():
        (folder / name).write_bytes(gzip.compress(text.encode(), 1))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder for all, since making MLflow's database takes longest."""
    return tmp_path_factory.mktemp("runs")


def options(name: str, hub: Path) -> list[str]:
    """What is overridden: the model, the data, the device and the length."""
    kind = (MODELS | TRAINED)[name]
    given = hub / "sparse" / kind if name in TRAINED else hub / kind
    chosen = [f"--config={name}", f"--model.model={given}"]
    if kind == "vit":
        chosen += [f"--data.processor={hub / kind}", f"--data.source={hub / 'cifar10'}"]
        chosen += ["--data.train_images=16", "--data.val_images=8", "--data.batch_size=8"]
        chosen += ["--data.num_workers=0"]
    else:
        chosen += [f"--data.tokenizer={hub / kind}", f"--data.source={hub / 'c4'}"]
        chosen += ["--data.train_sequences=32", "--data.val_sequences=4"]
        if name == "quickstart_finetune":
            chosen.append(f"--trainer.callbacks.dense={hub / kind}")
        if name.startswith("quickstart"):  # the others name C4's files themselves
            chosen += [f"--data.data_files={json.dumps(C4)}"]
    return [
        *chosen,
        "--trainer.accelerator=cpu",
        f"--trainer.max_steps={STEPS}",
        "--trainer.val_check_interval=1",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        f"--trainer.default_root_dir=runs/{name}",
    ]


def assert_learned(name: str, runs: Path) -> None:
    (history,) = (runs / "runs" / name).rglob("history.csv")
    with history.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [str(step + 1) for step in range(STEPS)]
    (learned_from,) = {"loss", "distillation_loss"} & rows[0].keys()
    assert all(float(row[learned_from]) >= 0 for row in rows)
    masks = load_masks(history.with_name("masks.safetensors"), NMPattern(2, 4))
    assert len(masks) == LAYERS[MODELS[name]]
    with history.with_name("validation.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)][-1] == str(STEPS)


def test_all_recipes_are_known_and_described() -> None:
    found = [path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.yaml")]
    assert len(found) == 13
    assert (
        sorted(found)
        == sorted(f"{name}.yaml" for name in recipes())
        == sorted(f"{name}.yaml" for name in MODELS | TRAINED)
    )
    described = (RECIPES / "README.md").read_text()
    scripts = [path.name for path in RECIPES.glob("*.py")]
    assert scripts == ["existing_training.py"]
    notebooks = [path.name for path in RECIPES.glob("*.ipynb")]
    for name in [*recipes(), *scripts, *notebooks]:
        assert f"| `{name}` |" in described, name


@pytest.mark.parametrize("name", [name for name in MODELS if name not in SHARDED])
def test_a_recipe_runs(name: str, hub: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["maskpro"])
    monkeypatch.chdir(runs)
    # Drawing them takes longer than all else here.
    monkeypatch.setattr("maskpro_lightning.tracking.plots.figures", lambda run: {})
    main(["fit", *options(name, hub)])
    assert_learned(name, runs)


@pytest.mark.parametrize("name", TRAINED)
def test_a_recipe_trains_on_under_the_mask_and_exports(
    name: str, hub: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["maskpro"])
    monkeypatch.chdir(runs)
    main(["fit", *options(name, hub)])
    checkpoints = sorted(runs.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    output = runs / f"{name}-sparse"
    main(["export", *options(name, hub), f"--ckpt_path={checkpoints[-1]}", f"--output={output}"])
    kind = type(model(TRAINED[name]))
    assert "The kept weights were trained under the mask." in (output / "README.md").read_text()
    found = [kind.from_pretrained(path) for path in (hub / "sparse" / TRAINED[name], output)]
    for before, after in zip(*map(targets, found), strict=True):
        kept = before.parameter != 0
        assert kept.float().mean() == 0.5, before.name
        assert not after.parameter[~kept].any(), before.name
        assert (after.parameter != before.parameter)[kept].any(), before.name


@pytest.mark.parametrize("name", ["quickstart", "minilm", "vit_cifar10"])
def test_a_recipe_is_planned_without_its_weights(
    name: str,
    hub: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["maskpro"])
    main(["plan", *options(name, hub)])
    told = capsys.readouterr().out
    built = model(MODELS[name])
    weights = sum(tensor.nbytes for tensor in [*built.parameters(), *built.buffers()])
    assert f" {weights / 1e9:.3g} " in told
    assert "One device" in told


@pytest.mark.parametrize(
    ("devices", "more", "gigabytes"), [(8, [], 83.3), (8, ["bfloat16"], 66.2), (64, [], 28)]
)
def test_70_billion_weights_are_planned_from_their_published_sizes(
    devices: int,
    more: list[str],
    gigabytes: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8}
    LlamaConfig(**sizes, **heads, vocab_size=128256, dtype="bfloat16").save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["maskpro"])
    chosen = ["--config=llama3_70b_fsdp2", f"--model.model={tmp_path}", f"--devices={devices}"]
    chosen += [f"--trainer.callbacks.logits_dtype={dtype}" for dtype in more]
    main(["plan", *chosen, "--data.tokenizer=quickstart/model"])
    told = capsys.readouterr().out
    assert f" {gigabytes} " in told
    assert f"a rank sends {490 if devices == 8 else 551} GB of weights and gradients" in told


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_recipe_runs_on_two_ranks(name: str, hub: Path, runs: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("process_recipe.py")), "fit"]
    ranks = ["--trainer.devices=2"]
    if name.endswith("fsdp2"):
        ranks += ["--trainer.strategy.data_parallel_size=2", "--trainer.num_nodes=1"]
    done = subprocess.run(
        [*command, *options(name, hub), *ranks],
        cwd=runs,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_learned(name, runs)


@pytest.mark.parametrize("name", MODELS | TRAINED)
def test_a_recipe_prints_its_configuration(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["maskpro"])
    with pytest.raises(SystemExit, match="0"):
        main(["fit", f"--config={name}", "--trainer.max_steps=7", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["max_steps"] == 7
    assert printed["trainer"]["logger"]["init_args"]["run_name"] == name
    last = printed["trainer"]["callbacks"][-1]
    ours = "SparseFinetuning" if name in TRAINED else "MaskProCallback"
    assert last["class_path"] == f"maskpro_lightning.{ours}"


def test_the_papers_recipe_is_the_papers() -> None:
    recipe = yaml.safe_load((RECIPES / "llama2_7b_c4.yaml").read_text())
    rule = recipe["trainer"]["callbacks"][-1]["init_args"]["estimator"]
    published = {"published": True, "lr": 50, "logit_scale": 10, "momentum": 0.99}
    assert rule == {"class_path": "maskpro_lightning.Policy", "init_args": published}
    data = recipe["data"]["init_args"]
    assert (data["train_sequences"], data["length"], data["batch_size"]) == (512, 128, 32)
    assert recipe["trainer"]["max_steps"] == 10_000


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0")
def test_ones_own_training_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(RECIPES / "existing_training.py"), run_name="__main__")
    module, found = names["module"], names["masks"].result
    assert ((NMPattern(2, 4).group(module.net[2].weight) != 0).sum(-1) == 2).all()
    assert None not in (found.dense, found.initial, found.deployed)
    # Always saying the more frequent class gives 0.61.
    assert found.deployed >= found.initial > 0.9
    assert (tmp_path / "sparse-model" / "model.safetensors").exists()
