"""Laws of checkpoints in parts, read on one device: all is as with the file of the same content."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from live_bytes import LiveBytes
from modules import FAST, Net, everything, fit, identical, loader, quiet_trainer, same_weights
from rules import mask_callback
from torch import nn
from torch.distributed import checkpoint as dcp

from maskpro_lightning import MaskProCallback, NMPattern, export_sparse
from maskpro_lightning.files.checkpoint import loader_of
from maskpro_lightning.initial.initializers import magnitude

# That there are no other ranks, which is what is wanted.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def folder_of(content: dict[str, Any], folder: Path, weights: str = "state_dict") -> Path:
    """A checkpoint as Lightning's strategies that shard write it."""
    rest = dict(content)
    parts = {weights: rest.pop("state_dict")}
    for number, state in enumerate(rest.pop("optimizer_states", [])):
        rest["maskpro_param_groups"] = state["param_groups"]
        parts[f"optimizer_{number}"] = {"state": state["state"]}
    dcp.save(parts, checkpoint_id=folder, no_dist=True)
    torch.save(rest, folder / "meta.pt")
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same of a fit half-way, as a file and as a folder."""
    folder = tmp_path_factory.mktemp("fit")
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
    fit(Net(), mask_callback(lr=FAST), save, folder=folder, max_steps=4)
    file = folder / "step=4.ckpt"
    content = torch.load(file, weights_only=True)
    return file, folder_of(content, folder / "step=4.parts.ckpt")


def masks() -> MaskProCallback:
    return mask_callback(lr=FAST)


@pytest.mark.parametrize("memory", ["plain", "lean"])
def test_a_fit_resumes_from_a_folder_as_from_a_file(
    checkpoints: tuple[Path, Path], tmp_path: Path, memory: Any
) -> None:
    ends = []
    for path in checkpoints:
        callback, module = mask_callback(lr=FAST, memory=memory), Net()
        trainer = fit(module, callback, folder=tmp_path, max_steps=8, ckpt_path=path)
        ends.append(everything(trainer, module, callback))
    assert ends[0]["global_step"] == 8
    assert identical(ends[0], ends[1])


def test_a_folder_validates_as_a_file(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    found = []
    for path in checkpoints:
        trainer = quiet_trainer(tmp_path, masks())
        before = sorted(vars(trainer.strategy))
        found.append(trainer.validate(Net(), loader(16), ckpt_path=path, verbose=False))
        assert sorted(vars(trainer.strategy)) == before
    dense = quiet_trainer(tmp_path).validate(Net(), loader(16), verbose=False)
    assert found[0] == found[1] != dense


@pytest.mark.parametrize("weights", ["state_dict", "model"])  # of FSDP2, of FSDP1
def test_a_folder_loads_and_exports_as_a_file(
    checkpoints: tuple[Path, Path], tmp_path: Path, weights: str
) -> None:
    file, _ = checkpoints
    parts = folder_of(torch.load(file, weights_only=True), tmp_path / "parts", weights)
    modules = [Net(), Net()]
    for path, module in zip((file, parts), modules, strict=True):
        loader_of(path)(module)
    assert same_weights(*modules)
    assert not same_weights(modules[0], Net())
    export_sparse(modules[0], tmp_path / "whole")
    export_sparse(Net().to("meta"), tmp_path / "streamed", checkpoint=parts)
    for name in ("whole", "streamed"):
        assert [path.name for path in (tmp_path / name).iterdir()] == ["model.safetensors"]
    whole, streamed = (tmp_path / n / "model.safetensors" for n in ("whole", "streamed"))
    assert whole.read_bytes() == streamed.read_bytes()
    kind: dict[str, Any] = {"file_format": "maskllm"}
    export_sparse(modules[0], tmp_path / "whole", **kind)
    export_sparse(Net().to("meta"), tmp_path / "streamed", checkpoint=parts, **kind)
    masks, found = (np.load(tmp_path / n / "masks.npz") for n in ("whole", "streamed"))
    assert masks.files == found.files
    assert all((masks[key] == found[key]).all() for key in masks.files)


def large() -> nn.Module:
    return nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)))


def test_an_export_holds_two_tensors_at_a_time(tmp_path: Path) -> None:
    model, pattern, largest = large(), NMPattern(2, 4), 4 * 256 * 256
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(magnitude(layer.weight, pattern))
    parts = folder_of({"state_dict": model.state_dict()}, tmp_path / "parts")
    model.to("meta")
    with LiveBytes() as live:
        export_sparse(model, tmp_path / "out", checkpoint=parts)
    assert largest <= live.peak <= 2 * largest  # what lies in a file, and the tensor


def test_a_folder_of_another_module_is_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = Net().state_dict()
    first, *_ = state
    wrong = {
        "lacks 1 tensors": {k: v for k, v in state.items() if k != first},
        "has 1 more": state | {"other": torch.ones(1)},
        r"is \(\d+, \d+\) here, but \(1,\) in": state | {first: torch.ones(1)},
    }
    for number, (message, content) in enumerate(wrong.items()):
        parts = folder_of({"state_dict": content}, tmp_path / str(number))
        module = Net()
        with pytest.raises(ValueError, match=message):
            loader_of(parts)(module)
        assert same_weights(module, Net())
    with pytest.raises(ValueError, match=r"but no such tensor in .*: give the recipe of that fit"):
        export_sparse(Net().to("meta"), tmp_path / "out", checkpoint=tmp_path / "0")


def test_an_export_of_a_dense_folder_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    parts = folder_of({"state_dict": Net().state_dict()}, tmp_path / "parts")
    with pytest.raises(ValueError, match=r"is not 2:4: group 0 has"):
        export_sparse(Net().to("meta"), tmp_path / "out", checkpoint=parts)
    assert not (tmp_path / "out").exists()
    given: dict[str, Any] = {"file_format": "compressed", "checkpoint": parts}
    with pytest.raises(ValueError, match=r"'compressed' needs the weights in the model"):
        export_sparse(Net().to("meta"), tmp_path / "out", **given)
    with pytest.raises(ValueError, match=r"is not 2:4: group 0 has"):
        export_sparse(Net().to("meta"), tmp_path / "out", **given | {"file_format": "maskllm"})
    assert not (tmp_path / "out").exists()


def test_a_damaged_folder_is_refused_by_name(tmp_path: Path) -> None:
    parts = folder_of({"state_dict": {"w": oracle.random(8, 8)}}, tmp_path / "parts")
    (data,) = parts.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"'w' could not be read from .*parts"):
        loader_of(parts)(nn.ParameterDict({"w": nn.Parameter(torch.ones(8, 8))}))
    (parts / ".metadata").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"is no whole checkpoint in parts"):
        loader_of(parts)


@pytest.mark.parametrize(
    ("options", "streams"),
    [
        ({}, True),
        ({"format": "safetensors"}, True),
        ({"log_model": False}, True),
        ({"log_model": True}, False),
        ({"registered_name": "name"}, False),
        ({"format": "compressed"}, False),
    ],
)
@pytest.mark.parametrize("given", ["line", "file"])
def test_an_export_of_a_folder_makes_no_weights_wherever_its_path_is_given(
    given: str,
    options: dict[str, Any],
    streams: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("transformers")
    from test_cli import main, tiny_options

    monkeypatch.setattr("sys.argv", ["maskpro"])
    words = [*tiny_options(tmp_path, monkeypatch), "--trainer.logger=false"]
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / ".metadata").touch()
    options = {"ckpt_path": str(folder)} | options
    if given == "file":
        (tmp_path / "export.yaml").write_text(json.dumps(options))
        words += ["--config", "export.yaml"]
    else:
        words += [f"--{name}={json.dumps(value).strip(chr(34))}" for name, value in options.items()]
    seen: list[Any] = []

    def export(module: Any, *_: Any, checkpoint: str | None, **__: Any) -> Path:
        seen.append(({parameter.is_meta for parameter in module.parameters()}, checkpoint))
        raise ExportedError

    building = "maskpro_lightning.commands.building"
    monkeypatch.setattr(f"{building}.loader_of", lambda path: lambda module: None)
    monkeypatch.setattr(f"{building}.export_sparse", export)
    with pytest.raises(ExportedError):
        main(["export", *words])
    assert seen == [({streams}, str(folder) if streams else None)]


class ExportedError(Exception):
    """That is enough."""


@pytest.mark.slow
def test_commands_take_a_folder_as_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    from test_cli import main, tiny_options

    monkeypatch.setattr("sys.argv", ["maskpro"])
    options = [*tiny_options(tmp_path, monkeypatch), "--trainer.logger=false"]
    main(["fit", *options])
    (file,) = tmp_path.glob("runs/**/*.ckpt")
    parts = folder_of(torch.load(file, weights_only=True), file.parent / "parts")
    for name, path in (("whole", file), ("streamed", parts)):
        main(["export", *options, f"--ckpt_path={path}", f"--output={name}"])
    names = sorted(path.name for path in Path("whole").iterdir())
    assert names == sorted(path.name for path in Path("streamed").iterdir())
    for name in names:
        if name != "README.md":  # which tells the command
            assert Path("whole", name).read_bytes() == Path("streamed", name).read_bytes(), name
    validated: list[Any] = []  # Rich prints them where the process's first console has gone to
    record = staticmethod(lambda results, stage: validated.extend(results))
    monkeypatch.setattr(_EvaluationLoop, "_print_results", record)
    for command, more in (("validate", []), ("evaluate", ["--wikitext2=null"])):
        told = []
        for path in (file, parts):
            capsys.readouterr()
            main([command, *options, *more, f"--ckpt_path={path}"])
            printed = re.findall(r"0?\.\d+%?|\d+\.\d+", capsys.readouterr().out)
            told.append([*map(str, validated), *printed])
            validated.clear()
        assert told[0] == told[1] != []
