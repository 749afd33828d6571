"""Laws of weights that are loaded once they are sharded: as if all had been there at once."""

from __future__ import annotations

import copy
import functools
import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import process_fit
import pytest
import torch
from modules import identical
from process_group import run_group
from safetensors.torch import load_file, save_file
from tiny_models import llama
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from maskpro_lightning.cli import main
from maskpro_lightning.modules.language import CausalLM
from maskpro_lightning.modules.loading import loading_late, mapped, pretrained

KIND = AutoModelForCausalLM


def saved(folder: Path, dtype: torch.dtype, **kwargs: Any) -> str:
    torch.manual_seed(0)
    llama(tied=kwargs.pop("tied", True)).to(dtype).save_pretrained(folder, **kwargs)
    return str(folder)


def late(path: str, dtype: str) -> tuple[PreTrainedModel, Any]:
    with torch.device("meta"):
        shapes = pretrained(KIND, path, dtype)
    return mapped(KIND, path, dtype, shapes)


def content(model: PreTrainedModel) -> Any:
    training = [part.training for part in model.modules()]
    tensors = (dict(model.named_parameters()), dict(model.named_buffers()))
    return [training, model.config.to_dict(), model.generation_config.to_dict(), *tensors]


@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("shard", ["5GB", "3KB"])
def test_what_is_mapped_and_converted_is_what_is_loaded_at_once(
    stored: torch.dtype, asked: str, shard: str, tmp_path: Path
) -> None:
    path = saved(tmp_path, stored, max_shard_size=shard)
    found, convert = late(path, asked)
    assert {parameter.dtype for parameter in found.parameters()} == {stored}
    for part in found.model.layers:
        convert(part)
    convert(found)
    assert identical(content(found), content(pretrained(KIND, path, asked)))


def test_files_of_several_dtypes_are_not_rounded_twice(tmp_path: Path) -> None:
    path = saved(tmp_path, torch.float32, tied=False)
    tensors = load_file(tmp_path / "model.safetensors")
    half = {name: value.bfloat16() for name, value in list(tensors.items())[::2]}
    save_file(tensors | half, tmp_path / "model.safetensors", {"format": "pt"})
    found, convert = late(path, "float16")
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}
    convert(found)
    assert identical(content(found), content(pretrained(KIND, path, "float16")))


def test_a_config_without_a_dtype_takes_that_of_the_files(tmp_path: Path) -> None:
    path = saved(tmp_path, torch.float16)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": None}))
    found, convert = late(path, "auto")
    convert(found)
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float16}
    assert identical(content(found), content(pretrained(KIND, path, "auto")))


@pytest.mark.parametrize("why", ["rule", "buffer", "dtype"])
def test_what_mapping_would_change_is_loaded_at_once(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: Any = type(llama())
    if why == "rule":
        monkeypatch.setattr(kind, "_keep_in_fp32_modules", ["norm"])
    elif why == "buffer":
        init = kind.__init__

        def with_buffer(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            self.register_buffer("third", torch.ones(1) / 3)

        monkeypatch.setattr(kind, "__init__", with_buffer)
    path, asked = saved(tmp_path, torch.float32), "float16"
    if why == "dtype":
        tensors = load_file(tmp_path / "model.safetensors")
        name = "model.norm.weight"
        odd = {name: tensors[name].to(torch.float8_e4m3fn)}
        save_file(tensors | odd, tmp_path / "model.safetensors", {"format": "pt"})
    found, convert = late(path, asked)
    expected = content(pretrained(KIND, path, asked))
    assert identical(content(found), expected)
    convert(found)
    assert identical(content(found), expected)


def test_a_module_on_meta_is_loaded_by_any_trainer(tmp_path: Path) -> None:
    path = saved(tmp_path, torch.float16)
    with loading_late():
        module = CausalLM(path, dtype="bfloat16")
    assert all(parameter.is_meta for parameter in module.parameters())
    module.configure_model()
    weights = copy.deepcopy(content(module.model))
    assert identical(weights, content(CausalLM(path, dtype="bfloat16").model))
    module.configure_model()
    assert identical(content(module.model), weights)


def test_a_module_that_shards_itself_otherwise_has_its_weights(tmp_path: Path) -> None:
    class Own(CausalLM):
        def configure_model(self) -> None:
            pass

    with loading_late():
        module = Own(saved(tmp_path, torch.float16))
    assert not any(parameter.is_meta for parameter in module.parameters())


@pytest.mark.parametrize("shards", [False, True])
def test_the_command_line_loads_late_what_is_sharded(
    shards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    @functools.wraps(pl.Trainer.fit)
    def fit(self: pl.Trainer, model: CausalLM, **_: Any) -> None:
        seen.append([parameter.is_meta for parameter in model.parameters()])

    monkeypatch.setattr(pl.Trainer, "fit", fit)
    monkeypatch.chdir(tmp_path)
    own = '{"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}'
    strategy = own if shards else "ddp"
    main(["fit", "--config", "quickstart", f"--trainer.strategy={strategy}"])
    ((first, *others),) = seen
    assert first == shards
    assert set(others) == {shards}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_shards_and_masks_are_those_of_weights_that_came_at_once(
    tied: bool, tmp_path: Path
) -> None:
    saved(tmp_path / "model", torch.float16, tied=tied)
    command = [sys.executable, process_fit.__file__, "loads", str(tmp_path), "2"]
    status, output = run_group(command)
    assert status == 0, output
    for rank in (0, 1):
        told = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for dtype in ("auto", "bfloat16"):
            found, expected = told[f"{dtype} late"], told[f"{dtype} at once"]
            assert identical(found, expected)
            assert expected["tied"] == tied
        assert not identical(told["auto late"]["shards"], told["bfloat16 late"]["shards"])
