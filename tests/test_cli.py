"""The command line, run as a user runs it, on a model of a few thousand weights."""

import csv
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from mlflow.tracking import MlflowClient
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import maskpro_lightning
from maskpro_lightning import NMPattern, find_targets, load_compressed
from maskpro_lightning.__main__ import main as command
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
    return tiny_options(tmp_path, monkeypatch)


def tiny_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
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


@pytest.mark.parametrize("command", ["fit", "plan", "compare"])
def test_what_the_hub_would_have_is_named_where_it_cannot_be_reached(
    command: str, tiny: list[str]
) -> None:
    with pytest.raises(SystemExit, match="files of 'nobody/nothing': fetch it once"):
        main([command, *tiny, "--data.tokenizer=nobody/nothing", "--trainer.logger=false"])


@pytest.mark.parametrize("said", ["couldn't connect to", "sparse-model is not a local folder"])
def test_a_sparse_model_that_was_not_written_yet_is_asked_for(
    said: str, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, **kwargs: object) -> None:
        raise OSError(f"{said} and is not a valid model identifier")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    with pytest.raises(
        SystemExit, match=r"of 'sparse-model': .* is written first, by maskpro comp"
    ):
        main(["plan", "--config", "quickstart_finetune"])


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
def test_weights_that_the_hub_would_have_are_named_whenever_they_are_loaded(
    late: bool, tiny: list[str], tmp_path: Path
) -> None:
    kept = tmp_path / "models--nobody--nothing"
    for folder in ("refs", "snapshots/0"):
        (kept / folder).mkdir(parents=True)
    (kept / "refs" / "main").write_text("0")
    (tmp_path / "tiny" / "config.json").rename(kept / "snapshots" / "0" / "config.json")
    given = [*tiny, "--model.model=nobody/nothing", "--trainer.logger=false"]
    shards = '{"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}'
    given += [f"--trainer.strategy={shards}"] if late else []
    # In a process of its own, which a strategy may leave with a process group.
    done = subprocess.run(
        [sys.executable, "-m", "maskpro_lightning", "fit", *given],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "files of 'nobody/nothing': fetch it once" in done.stderr
    assert "Traceback" not in done.stderr


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
    printed = capsys.readouterr().out
    (told,) = (line for line in printed.splitlines() if line.startswith("To export it: "))
    assert "export_sparse(" not in printed
    maskpro, *typed = shlex.split(told.removeprefix("To export it: "))
    assert maskpro == "maskpro"
    assert typed[:3] == ["export", "--config", "quickstart"]
    assert typed[-2:] == ["--output", "sparse-model"]
    assert "/runs?workflowType=machine_learning" in printed  # the page in MLflow
    main([*typed, "--output=out"])
    told = capsys.readouterr().out
    assert str(tmp_path / "out") in told.replace("\n", "")
    assert "Written over: " not in told
    main([*typed, "--output=out"])
    assert "Written over: what was in out" in capsys.readouterr().out
    assert is_sparse(tmp_path / "out")
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, weight in exported.items():
        assert torch.equal(weight, saved[f"model.{name}"])


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--trainer.val_check_interval=50"], 4),
        (["--trainer.val_check_interval=3"], 4),
        (["--trainer.val_check_interval=2"], 4),
        (["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=50"], 4),
        (["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=3"], 4),
    ],
    ids=["short", "between validations", "even", "fewer than every n", "between every n"],
)
def test_a_fit_ends_with_one_checkpoint_of_its_last_step(
    options: list[str], steps: int, tiny: list[str], tmp_path: Path
) -> None:
    main(["fit", *tiny, *options, "--trainer.logger=false"])
    (checkpoint,) = tmp_path.glob("runs/**/*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["global_step"] == steps
    main(["validate", *tiny, f"--ckpt_path={checkpoint}", "--trainer.logger=false"])
    longer = [f"--ckpt_path={checkpoint}", "--trainer.max_steps=5", "--trainer.logger=false"]
    main(["fit", *tiny, *options, *longer])
    found = {int(torch.load(p, weights_only=True)["global_step"]) for p in tmp_path.rglob("*.ckpt")}
    assert max(found) == 5


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
    assert "share of the gap closed" in printed
    assert "To export it" not in printed
    assert "mlflow ui" in printed
    page = urlsplit(next(x for x in printed.splitlines() if x.startswith("http")))
    asked = {k: v for k, (v,) in parse_qs(urlsplit(page.fragment).query).items()}
    assert asked.pop("workflowType") == "machine_learning"
    asked["order_by"] = f"{asked.pop('orderByKey')} ASC"
    assert asked.pop("orderByAsc") == "true"
    client = MlflowClient("sqlite:///mlflow.db")
    listed = client.search_runs(["1"], asked["searchFilter"], order_by=[asked["order_by"]])
    assert {run.data.tags["maskpro.mask"] for run in listed} == set(rows)
    assert listed[0].data.metrics["compare/val_loss"] == min(
        float(row["val_loss"]) for row in rows.values()
    )
    assert is_sparse(tmp_path / "sparse-model")
    card = (tmp_path / "sparse-model" / "README.md").read_text()
    assert "\nmaskpro compare --config quickstart --model.model=" in card
    assert "- init: sparsegpt\n" in card
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert (checkpoint.parents[1] / "maskpro" / "result.json").exists(), "not in the run's folder"


def test_compare_of_a_finetuning_has_the_learned_mask_and_the_trained_weights(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["compare", *tiny])
    capsys.readouterr()
    own = ["--config=quickstart_finetune", f"--trainer.callbacks.dense={tmp_path / 'tiny'}"]
    options = [*own, "--model.model=sparse-model", "--model.lr=0.01", *SHORT]
    with pytest.raises(SystemExit, match="'sparse-model' is the model that this recipe starts"):
        main(["compare", *options])
    main(["compare", *options, "--output=trained-model"])
    first, second = (
        {row["mask"]: row for row in csv.DictReader(text.splitlines())}
        for folder in ("sparse-model", "trained-model")
        for text in (Path(folder, "comparison.csv").read_text(),)
    )
    assert list(second) == ["dense", "magnitude", "wanda", "sparsegpt", "sparse", "finetuned"]
    assert [float(row["sparsity"]) for row in second.values()] == [0, *[0.5] * 5]
    losses = {mask: float(row["val_loss"]) for mask, row in second.items()}
    for mask, other in {"dense": "dense", "sparsegpt": "sparsegpt", "sparse": "maskpro"}.items():
        assert losses[mask] == pytest.approx(float(first[other]["val_loss"]), rel=1e-6), mask
    assert losses["finetuned"] != losses["sparse"]
    assert is_sparse(tmp_path / "trained-model")
    trained = AutoModelForCausalLM.from_pretrained("trained-model").state_dict()
    before = AutoModelForCausalLM.from_pretrained("sparse-model").state_dict()
    assert any(not torch.equal(trained[name], value) for name, value in before.items())
    client = MlflowClient("sqlite:///mlflow.db")
    (number,) = [
        each.experiment_id for each in client.search_experiments() if each.name != "Default"
    ]
    runs = {run.info.run_name: run for run in client.search_runs([number])}
    child = runs["quickstart_finetune finetuned"]
    above = runs["quickstart_finetune compare"]
    assert child.data.tags["mlflow.parentRunId"] == above.info.run_id
    assert child.data.metrics["compare/val_loss"] == losses["finetuned"]


def test_a_card_has_the_results_of_the_run_that_is_given(tiny: list[str], tmp_path: Path) -> None:
    main(["fit", *tiny])
    (checkpoint,) = Path("runs").rglob("*.ckpt")
    run_id, moved = checkpoint.parents[1].name, tmp_path / "last.ckpt"
    checkpoint.rename(moved)
    shutil.rmtree("runs")
    options = [f"--ckpt_path={moved}", "--output=out"]
    main(["export", *tiny, *options, f"--trainer.logger.run_id={run_id}"])
    card = Path("out", "README.md").read_text()
    assert "| val_loss, deployed mask |" in card
    assert "- init: sparsegpt\n" in card
    with pytest.raises(SystemExit, match="MLflow run nope could not be read from sqlite:"):
        main(["export", *tiny, *options, "--trainer.logger.run_id=nope"])


def test_export_does_not_write_over_the_model_that_it_read(tiny: list[str]) -> None:
    main(["fit", *tiny])
    (checkpoint,) = Path("runs").rglob("*.ckpt")
    with pytest.raises(SystemExit, match=r"'tiny' is the model that this recipe starts from"):
        main(["export", *tiny, f"--ckpt_path={checkpoint}", "--output=tiny"])


def test_export_writes_the_format_that_is_asked_for(tiny: list[str], tmp_path: Path) -> None:
    main(["fit", *tiny])
    (checkpoint,) = tmp_path.glob("runs/**/*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    for file_format in ("compressed", "maskllm"):
        arguments = [f"--ckpt_path={checkpoint}", "--output=out", f"--format={file_format}"]
        main(["export", *tiny, *arguments])
    assert {path.name for path in Path("out").iterdir()} == {
        "README.md",
        "compressed.safetensors",
        "masks.npz",
    }
    found = load_compressed("out/compressed.safetensors")
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], value) for name, value in saved.items())
    # The masks start the next fit.
    main(["fit", *tiny, "--trainer.callbacks.init=out/masks.npz", "--trainer.max_steps=1"])


def test_measure_times_the_dense_layers_and_says_that_a_cpu_has_no_kernel(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["measure", *tiny, "--batch_sizes=[1,3]", "--dtype=float32"])
    printed = capsys.readouterr().out
    assert "7 layers on cpu, torch.float32" in printed
    assert printed.count("no kernel") == 2
    assert "there is none for 'cpu'" in printed
    assert "No 2:4 kernel runs these layers here" in printed


def test_plot_draws_a_run_from_its_folder_or_from_mlflow(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["compare", *tiny])
    (history,) = tmp_path.glob("runs/**/history.csv")
    capsys.readouterr()
    drawn = {"loss", "exploration", "validation", "layers", "groups", "confidence"}
    drawn = {f"{name}.{ending}" for name in drawn for ending in ("png", "svg")}
    main(["plot", str(history.parents[1])])
    printed = capsys.readouterr().out.split()
    assert {Path(path).name for path in printed} == drawn
    assert all(Path(path).parent == history.parent for path in printed)
    run_id = history.parents[1].name
    main(["plot", run_id, "--tracking_uri=sqlite:///mlflow.db", "--output=figures"])
    assert {path.name for path in Path("figures").iterdir()} == drawn
    for name in drawn:
        if name.endswith(".svg"):
            assert (history.parent / name).read_bytes() == Path("figures", name).read_bytes()
    assert "dense val_loss" in Path("figures/validation.svg").read_text()


def test_plot_of_what_is_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"holds no history\.csv: give the folder of a run"):
        main(["plot", str(tmp_path)])


def test_plot_names_the_mlflow_run_that_it_cannot_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    number = client.create_experiment("empty", artifact_location=str(tmp_path / "files"))
    run_id = client.create_run(number).info.run_id
    with pytest.raises(SystemExit, match=rf"'MLflow run {run_id}' holds no history\.csv: give"):
        main(["plot", run_id, f"--tracking_uri={uri}"])
    (tmp_path / "history.csv").write_text("step,loss\n1,much\n")
    client.log_artifact(run_id, str(tmp_path / "history.csv"), "maskpro")
    named = f"'MLflow run {run_id}/history.csv' is no table of numbers at line 2"
    with pytest.raises(SystemExit, match=named):
        main(["plot", run_id, f"--tracking_uri={uri}"])
    with pytest.raises(SystemExit, match="MLflow run nope could not be read from sqlite:"):
        main(["plot", "nope", f"--tracking_uri={uri}"])


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
    for word in ("fit", "validate", "compare", "export", "measure", "plot", *recipes()):
        assert word in printed


def test_the_command_is_installed() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "maskpro_lightning", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "usage: maskpro" in found.stdout


@pytest.mark.parametrize("command", ["--help", "plot", "send"])
def test_what_needs_no_model_does_not_wait_for_pytorch(command: str, tmp_path: Path) -> None:
    """An import that is refused is an import that was tried."""
    refused = ("torch", "transformers", "lightning", "pytorch_lightning", "torchmetrics")
    if command == "plot":
        (tmp_path / "history.csv").write_text("step,loss,entropy\n1,2.0,0.5\n2,1.5,0.25\n")
    refuse = f"import sys; sys.modules.update(dict.fromkeys({refused}))"
    run = "from maskpro_lightning.__main__ import main; main()"
    options = {"--help": [], "plot": [str(tmp_path)], "send": ["--help"]}[command]
    found = subprocess.run(
        [sys.executable, "-c", f"{refuse}; {run}", command, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    words = {"--help": "usage: maskpro", "plot": "loss.svg", "send": "--tracking_uri"}
    assert words[command] in found.stdout


@pytest.mark.parametrize(
    ("package", "extra"), [("matplotlib", "plots"), ("jsonargparse", "recipes")]
)
def test_a_plain_command_says_what_to_install(
    package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"matplotlib": "plot", "jsonargparse": "send"}[package]
    monkeypatch.setattr(sys, "argv", ["maskpro", name, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "maskpro_lightning.tracking.plots", raising=False)
    monkeypatch.delattr("maskpro_lightning.tracking.plots", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as caught:
        command()
    assert str(caught.value) == f"maskpro needs {package}: pip install 'maskpro-lightning[{extra}]'"


def test_the_package_offers_what_it_lists() -> None:
    listed = maskpro_lightning.__all__
    assert set(listed) == maskpro_lightning._HOMES.keys()
    assert set(listed) <= set(dir(maskpro_lightning))
    assert all(getattr(maskpro_lightning, name).__name__ == name for name in listed)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = maskpro_lightning.nothing


@pytest.mark.parametrize("module", ["rich.console", "jsonargparse.typing"])
def test_without_the_packages_of_recipes_it_says_what_to_install(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["maskpro", "fit"])
    for name in ("maskpro_lightning.cli", "maskpro_lightning.commands.building"):
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(name)
    monkeypatch.setitem(sys.modules, module, None)
    package = module.partition(".")[0]
    with pytest.raises(SystemExit) as caught:
        command()
    assert str(caught.value) == (
        f"maskpro needs {package}: pip install 'maskpro-lightning[recipes]'"
    )


def test_a_path_of_ones_own_goes_before_one_inside_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Path(resolve("quickstart.yaml")).is_absolute()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.yaml").touch()
    assert resolve("quickstart.yaml") == "quickstart.yaml"
    assert resolve("someone/on-the-hub") == "someone/on-the-hub"
