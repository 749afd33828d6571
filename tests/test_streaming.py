"""Laws of models written tensor by tensor: the same files as at once, in the memory of one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import tiny_models
import torch
from live_bytes import LiveBytes
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_export import files, masked, two_layers
from torch import Tensor, nn

from maskpro_lightning import export_sparse
from maskpro_lightning.files import pretrained, streaming

INDEX = "model.safetensors.index.json"
MODELS = {
    "llama": tiny_models.llama,
    "tied": lambda: tiny_models.llama(tied=True),
    "gpt2": tiny_models.gpt2,
    "mixtral": tiny_models.mixtral,
    "gpt_oss": tiny_models.gpt_oss,
}


def stream(folder: Path, tensors: dict[str, Tensor], limit: int | str) -> list[str]:
    folder.mkdir(exist_ok=True)
    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    backwards = reversed(tensors.items())  # in any order
    streaming.write(folder, shapes, iter(list(backwards)), limit)
    return files(folder)


def loaded(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, and the index tells where each lies."""
    found = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        where = {name: path for path, tensors in found.items() for name in tensors}
        assert index["weight_map"] == where
        total = sum(tensor.nbytes for tensors in found.values() for tensor in tensors.values())
        assert index["metadata"]["total_size"] == total
    assert sum(map(len, found.values())) == len({name for each in found.values() for name in each})
    return {name: tensor for tensors in found.values() for name, tensor in tensors.items()}


def test_a_streamed_file_is_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    source = oracle.random(3, 8, seed=1)
    names = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
    tensors = {f"of {name}": source.to(getattr(torch, name)) for name in names}
    for name in ("int64", "int32", "int16", "int8", "uint8", "bool"):
        tensors[f"as {name}"] = (source * 100).to(getattr(torch, name))
    tensors |= {
        'quoted "ü\n\\': source[:, :3].T,
        "none": torch.zeros(0, 4),
        "one": torch.tensor(2.0),
        "odd": torch.tensor([True]),
        "B": source[1:],
        "a": source[:1],
    }
    apart = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    save_file(apart, tmp_path / "whole", {"format": "pt"})
    assert stream(tmp_path / "out", tensors, "5GB") == ["model.safetensors"]
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert written == (tmp_path / "whole").read_bytes()


def test_files_are_as_large_as_they_may_be_but_for_a_larger_tensor(tmp_path: Path) -> None:
    sizes = (2, 2, 1, 9, 1, 5)
    tensors = {f"{i}": torch.full((size,), i, dtype=torch.uint8) for i, size in enumerate(sizes)}
    written = stream(tmp_path, tensors, 5)
    parts = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert written == [*parts, INDEX]
    held = []
    for part in parts:
        with safe_open(tmp_path / part, "pt") as file:
            held.append(sorted(file.keys()))
            assert file.metadata() == {"format": "pt"}
    assert held == [["0", "1", "2"], ["3"], ["4"], ["5"]]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded(tmp_path).items())


@pytest.mark.parametrize(("size", "number"), [(7, 7), ("3KB", 3000), ("5GB", 5 * 10**9)])
def test_a_size_is_a_number_of_bytes(size: int | str, number: int) -> None:
    assert streaming.bytes_of(size) == number


@pytest.mark.parametrize("size", [0, -1, "5", "GB", "-2GB", "1.5GB", "5 apples"])
def test_what_is_no_size_is_refused(tmp_path: Path, size: int | str) -> None:
    message = (
        f"max_shard_size is {size!r}: give a positive number of bytes, or one with a unit of KB, "
        "MB, GB, TB, such as '5GB'."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        export_sparse(masked(two_layers()), tmp_path / "out", max_shard_size=size)
    assert files(tmp_path) == []


def test_a_dtype_without_a_name_is_refused(tmp_path: Path) -> None:
    model = masked(two_layers())
    model.register_buffer("phases", torch.zeros(2, dtype=torch.complex128))
    message = (
        "'phases' is of torch.complex128, which safetensors does not have: convert it, or use "
        "torch.save."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        export_sparse(model, tmp_path / "out")
    assert files(tmp_path) == []


def test_a_module_in_several_files_is_its_state_dict(tmp_path: Path) -> None:
    model = masked(two_layers())
    export_sparse(model, tmp_path, max_shard_size=200)
    found = loaded(tmp_path)
    assert len(files(tmp_path)) == 4  # 256 bytes, 224 of which 32 do not fit in, and the index
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*RoPE scaling")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("limit", ["3KB", "5GB"])
def test_from_pretrained_finds_what_save_pretrained_would_have_written(
    kind: str, limit: str, tmp_path: Path
) -> None:
    model = masked(MODELS[kind]()).eval()
    export_sparse(model, tmp_path / "ours", max_shard_size=limit)
    model.save_pretrained(tmp_path / "theirs")
    found, expected = loaded(tmp_path / "ours"), loaded(tmp_path / "theirs")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert ((tmp_path / "ours" / INDEX).exists()) == (limit == "3KB")
    for beside in ("config.json", "generation_config.json"):
        one, other = (tmp_path / name / beside for name in ("ours", "theirs"))
        assert one.read_bytes() == other.read_bytes()
    if limit == "5GB":
        one, other = (tmp_path / name / "model.safetensors" for name in ("ours", "theirs"))
        assert one.read_bytes() == other.read_bytes()
    again = type(model).from_pretrained(tmp_path / "ours").eval()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


class Fused:
    """A stand-in for a model whose files hold the query, key and value of a block as one."""

    @staticmethod
    def convert(_: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {name: value for name, value in state.items() if "attention" not in name}
        for block in sorted({name.split(".")[1] for name in state if "attention" in name}):
            parts = [state[f"layers.{block}.attention.{part}"] for part in "qkv"]
            found[f"layers.{block}.attention"] = torch.cat(parts)
        return found


def test_what_files_hold_as_one_is_converted_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", Fused.convert)
    names = [f"layers.{i}.attention.{part}" for i in range(2) for part in "qkv"]
    state = {name: oracle.random(4, 4, seed=i) for i, name in enumerate(["head", *names])}
    shapes = {name: value.to("meta") for name, value in state.items()}
    conversion = pretrained.Conversion(None, shapes)
    assert [len(part) for part in conversion.parts] == [1, 3, 3]
    found, expected = dict(conversion.convert(state.__getitem__)), Fused.convert(None, state)
    assert conversion.shapes.keys() == found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def large() -> nn.Module:
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(6)), nn.Linear(256, 1024))


def large_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("model", [large, large_llama])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exporting_needs_the_memory_of_two_layers_at_most(
    model: Callable[[], nn.Module], dtype: torch.dtype, tmp_path: Path
) -> None:
    module = masked(model().to(dtype))
    largest = max(parameter.nbytes for parameter in module.parameters())
    with LiveBytes() as live:
        export_sparse(module, tmp_path)
    assert 0 < live.peak < 2 * largest
    # The count counts: a copy of the state, which an earlier version made, is far more.
    with LiveBytes() as live:
        copies = [value.clone() for value in module.state_dict().values()]
    assert live.peak == sum(value.nbytes for value in copies) > 2 * largest
