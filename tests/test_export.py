"""Laws of the files: what others load is what was masked, whole or not there at all."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from rules import mask_optimizer
from safetensors.torch import load_file
from torch import nn
from torchmetrics import MeanMetric
from transformers import LlamaForCausalLM

from maskpro_lightning import (
    NMPattern,
    export_sparse,
    find_targets,
    load_compressed,
    parameter_groups,
)
from maskpro_lightning.files import archive, streaming
from maskpro_lightning.files.export import Format, save_distributions
from maskpro_lightning.files.grouping import check_sparse
from maskpro_lightning.files.maskfiles import load_maskllm

TWO_OF_FOUR = NMPattern(2, 4)


def masked(model: nn.Module, pattern: str = "2:4", **globs: Any) -> nn.Module:
    """A model as a fit leaves it, under the most likely masks."""
    optimizer = mask_optimizer(parameter_groups(find_targets(model, pattern, **globs)), pattern)
    optimizer.begin()
    optimizer.write("mode")
    return model


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


class Tied(nn.Module):
    """Two layers with one weight, and a buffer that is a view of another."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.register_buffer("whole", torch.arange(8.0))
        self.register_buffer("part", self.whole[:4])


class Wrapper(nn.Module):
    """A module that holds a Hugging Face model, as a LightningModule does."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_models.llama()


class Ensemble(nn.Module):
    """A module that holds two Hugging Face models."""

    def __init__(self) -> None:
        super().__init__()
        self.models = nn.ModuleList([tiny_models.llama(), tiny_models.llama(tied=True)])


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


# --- models -------------------------------------------------------------------------------------

ELSEWHERE = """
import pathlib, sys, torch, transformers
sys.modules["maskpro_lightning"] = None  # importing it raises, wherever it may be installed
for folder in map(pathlib.Path, sys.argv[1:]):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.save(model(torch.arange(8)[None]).logits, folder / "logits.pt")
"""


def test_an_exported_model_computes_the_same_where_this_package_is_not(tmp_path: Path) -> None:
    wrapper = Wrapper()
    cases: dict[str, tuple[nn.Module, Any]] = {
        "llama": (llama := tiny_models.llama(), llama),
        "tied": (tied := tiny_models.llama(tied=True), tied),
        "held": (wrapper, wrapper.model),
    }
    folders = [
        export_sparse(masked(module), tmp_path / "out" / name)
        for name, (module, _) in cases.items()
    ]
    # -I: neither PYTHONPATH nor the working directory leads to the package.
    subprocess.run([sys.executable, "-I", "-c", ELSEWHERE, *folders], check=True, cwd=tmp_path)
    for folder, (_, model) in zip(folders, cases.values(), strict=True):
        with torch.no_grad():
            expected = model.eval()(torch.arange(8)[None]).logits
        assert torch.equal(torch.load(folder / "logits.pt"), expected)


def test_the_config_promises_nothing_that_a_server_would_refuse(tmp_path: Path) -> None:
    config = json.loads(
        (export_sparse(masked(tiny_models.llama()), tmp_path) / "config.json").read_text()
    )
    assert config["model_type"] == "llama"
    assert not {"sparsity_config", "quantization_config", "compression_config"} & config.keys()


@pytest.mark.parametrize("model", [two_layers, Tied, Ensemble])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_module_becomes_its_state_dict(
    tmp_path: Path, model: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    module = masked(model().to(dtype))
    export_sparse(module, tmp_path)
    assert files(tmp_path) == ["model.safetensors"]
    found, expected = load_file(tmp_path / "model.safetensors"), module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert model().to(dtype).load_state_dict(found).missing_keys == []


def test_a_dense_model_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    message = (
        "'0.weight' is not 2:4: group 0 has 4 nonzeros (16 of 16 groups have too many). Export "
        "after the fit, with the pattern, include and exclude of the fit."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        export_sparse(two_layers(), tmp_path / "out")
    assert files(tmp_path) == []


def test_a_single_group_too_dense_is_refused_by_name(tmp_path: Path) -> None:
    model = masked(two_layers())
    with torch.no_grad():
        model[2].weight[1, 4:7] = 1.0
        model[2].weight[1, 7] = 0.0
    message = "'2.weight' is not 2:4: group 3 has 3 nonzeros (1 of 8 groups have too many)."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        export_sparse(model, tmp_path / "out")
    assert files(tmp_path) == []
    export_sparse(model, tmp_path, exclude=["2"])
    assert files(tmp_path) == ["model.safetensors"]


def test_the_pattern_and_the_layers_are_those_of_the_fit(tmp_path: Path) -> None:
    model = masked(two_layers(), "1:4", include=["0"])
    export_sparse(model, tmp_path, "1:4", include=["0"])
    with pytest.raises(ValueError, match=r"^'2.weight' is not 1:4"):
        export_sparse(model, tmp_path, "1:4")
    with pytest.raises(ValueError, match=r"^'0.weight' is not 1:8"):
        export_sparse(model, tmp_path, NMPattern(1, 8), include=["0"])


def test_a_kept_weight_may_be_zero_and_nan_counts_as_a_weight() -> None:
    nan = float("nan")
    check_sparse(torch.tensor([[0.0, 1.0, -0.0, 0.0], [nan, 0.0, nan, 0.0]]), TWO_OF_FOUR, -1, "w")
    with pytest.raises(ValueError, match=r"^'w' is not 2:4: group 0 has 3 nonzeros \(1 of 1 "):
        check_sparse(torch.tensor([nan, 0.0, nan, nan]), TWO_OF_FOUR, -1, "w")


# --- distributions --------------------------------------------------------------------------------


def test_distributions_are_the_logits_in_the_weights_names_and_shapes(tmp_path: Path) -> None:
    model = two_layers()
    groups = parameter_groups(find_targets(model, "2:4"))
    optimizer = mask_optimizer(groups, "2:4", seed=3)
    optimizer.begin()
    optimizer.step(lambda: torch.tensor(1.0), torch.tensor(0.0))
    save_distributions(optimizer, tmp_path / "logits")
    found = load_file(tmp_path / "logits")
    assert found.keys() == optimizer.logits().keys() == {"0.weight", "2.weight"}
    assert all(torch.equal(found[name], pi) for name, pi in optimizer.logits().items())
    read, notes = archive.read(tmp_path / "logits", "maskpro distributions 1")
    assert read.keys() == found.keys()
    expected = {"format": "maskpro distributions 1", "pattern": "2:4", "seed": "3", "step": "1"}
    assert notes == expected


# --- formats ------------------------------------------------------------------------------------


class Headed(Wrapper):
    """A Hugging Face model and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 4)


def test_a_head_beside_a_hugging_face_model_is_never_lost(tmp_path: Path) -> None:
    module = masked(Headed())
    message = (
        "Headed holds a Hugging Face model ('model') and 2 tensors more, such as 'head.weight', "
        'which its folder would lose: choose file_format="safetensors" to write everything, or '
        "export that model alone."
    )
    for file_format in ("auto", "huggingface"):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            export_sparse(module, tmp_path / "out", file_format=file_format)
        assert files(tmp_path) == []
    export_sparse(module, tmp_path / "whole", file_format="safetensors")
    found = load_file(tmp_path / "whole" / "model.safetensors")
    assert found.keys() == module.state_dict().keys()
    assert torch.equal(found["head.weight"], module.head.weight)
    export_sparse(module.model, tmp_path / "alone")
    assert "config.json" in files(tmp_path / "alone")


def test_a_tied_weight_or_a_metric_without_state_is_nothing_that_is_lost(tmp_path: Path) -> None:
    wrapper = Wrapper()
    wrapper.metric = MeanMetric()
    wrapper.same = nn.Linear(16, tiny_models.VOCABULARY, bias=False)
    wrapper.same.weight = wrapper.model.get_input_embeddings().weight
    export_sparse(masked(wrapper, exclude=["same"]), tmp_path, exclude=["same"])
    assert "config.json" in files(tmp_path)


def test_hugging_face_is_refused_where_there_is_no_such_model(tmp_path: Path) -> None:
    for module, count in ((two_layers(), 0), (Ensemble(), 2)):
        message = f"holds {count} Hugging Face models, but this format is for one"
        with pytest.raises(ValueError, match=message):
            export_sparse(masked(module), tmp_path / "out", file_format="huggingface")
    assert files(tmp_path) == []


def test_adapters_and_foreign_configs_are_refused(tmp_path: Path) -> None:
    model = masked(tiny_models.llama())
    model.peft_config = {"default": "lora"}
    with pytest.raises(ValueError, match=r"holds adapters.*: take them off \(unload"):
        export_sparse(model, tmp_path / "out")
    del model.peft_config
    for name in ("quantization_config", "sparsity_config", "compression_config"):
        setattr(model.config, name, {"format": "2:4"})
        with pytest.raises(ValueError, match=f"has a {name}, by which others would look"):
            export_sparse(model, tmp_path / "out")
        delattr(model.config, name)
    assert files(tmp_path) == []


def test_a_new_model_takes_the_place_of_a_larger_one_and_leaves_other_files(tmp_path: Path) -> None:
    shards = ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
    for name in (*shards, "comparison.csv"):
        (tmp_path / name).write_text("an older one")
    export_sparse(masked(tiny_models.llama()), tmp_path)
    found = {"comparison.csv", "config.json", "generation_config.json", "model.safetensors"}
    assert set(files(tmp_path)) == found


def test_a_state_that_is_not_all_tensors_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"version": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    module = masked(nn.Sequential(Extra(8, 4)))
    message = (
        "The state of Sequential holds '0._extra_state', of type dict, which a file of tensors "
        "would lose: use torch.save."
    )
    for file_format in ("safetensors", "compressed"):
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            export_sparse(module, tmp_path / "out", file_format=file_format)
        assert files(tmp_path) == []


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"file_format is one of \('auto', .*, got 'gguf'\."):
        export_sparse(masked(two_layers()), tmp_path, file_format="gguf")


def test_masks_for_maskllm_have_the_names_of_the_model_that_is_held(tmp_path: Path) -> None:
    wrapper = masked(Wrapper())
    export_sparse(wrapper, tmp_path, file_format="maskllm")
    assert files(tmp_path) == ["masks.npz"]
    weights = {t.name: t.parameter for t in find_targets(wrapper.model, "2:4")}
    found = load_maskllm(tmp_path / "masks.npz", {k: w.shape for k, w in weights.items()})
    assert all(torch.equal(found[name], weight != 0) for name, weight in weights.items())
    with np.load(tmp_path / "masks.npz", allow_pickle=False) as npz:
        assert set(npz.files) == {f"{name}.mask" for name in weights}


def test_a_generation_config_is_written_as_it_is_however_odd(tmp_path: Path) -> None:
    model = masked(tiny_models.llama())
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.9
    kind = type(model.generation_config)
    export_sparse(model, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.9
    assert type(model.generation_config) is kind
    assert LlamaForCausalLM.from_pretrained(tmp_path).generation_config.temperature == 0.9


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_sparse_model_leaves_from_beneath_its_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = masked(tiny_models.llama())
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.fill_(1.0)
    with pytest.raises(ValueError, match=r"Merged now they would fill the zeros of the masks"):
        export_sparse(adapted, tmp_path / "out")
    export_sparse(adapted.unload(), tmp_path / "out")
    found = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("file_format", ["safetensors", "compressed"])
def test_names_are_those_of_the_module_that_is_not_compiled(
    tmp_path: Path, file_format: Format
) -> None:
    plain = masked(two_layers())
    compiled = nn.ModuleDict({"net": torch.compile(plain, backend="eager")})
    export_sparse(compiled, tmp_path, file_format=file_format)
    load = load_compressed if file_format == "compressed" else load_file
    found = load(tmp_path / files(tmp_path)[0])
    expected = {f"net.{name}": value for name, value in plain.state_dict().items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# --- whole or not there -------------------------------------------------------------------------


def fails_half_way(tensors: Any, path: Path, metadata: Any) -> None:
    path.write_bytes(b"half a file")
    raise OSError("disk full")


def no_space_after(tensors: int) -> Any:
    """Stands in for what writes tensors, and fails at the one after so many."""
    written = []

    def fails(tensor: torch.Tensor, _: torch.Tensor) -> bytes:
        written.append(tensor)
        if len(written) > tensors:
            raise OSError("disk full")
        return b"a tensor"

    return fails


@pytest.mark.parametrize("file_format", ["safetensors", "compressed", "maskllm"])
def test_a_file_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: Format
) -> None:
    def write() -> None:
        export_sparse(masked(two_layers()), tmp_path, file_format=file_format)

    def break_the_disk() -> None:
        monkeypatch.setattr(archive, "save_file", fails_half_way)
        monkeypatch.setattr(streaming, "_bytes_in", no_space_after(1))
        monkeypatch.setattr(
            np, "savez_compressed", lambda file, **_: fails_half_way(None, Path(file.name), None)
        )

    break_the_disk()
    with pytest.raises(OSError, match="disk full"):
        write()
    assert files(tmp_path) == []
    monkeypatch.undo()
    write()
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    break_the_disk()
    with pytest.raises(OSError, match="disk full"):
        write()
    assert path.read_bytes() == whole
    assert files(tmp_path) == [path.name]


def test_a_hugging_face_model_that_cannot_be_written_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = masked(tiny_models.llama())
    export_sparse(model, tmp_path)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(streaming, "_bytes_in", no_space_after(5))
    with pytest.raises(OSError, match="disk full"):
        export_sparse(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole


def test_files_of_a_compiled_part_load_into_the_bare_module(tmp_path: Path) -> None:
    bare = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for weight in (bare[0].weight, bare[1].weight):
        weight.data[:, ::2] = 0
    compiled = nn.Sequential(torch.compile(bare[0], backend="eager"), bare[1])
    export_sparse(compiled, tmp_path, file_format="safetensors")
    assert load_file(tmp_path / "model.safetensors").keys() == bare.state_dict().keys()
