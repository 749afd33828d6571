"""Laws of the model card and of the Hub, without a network."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny_models
import torch
import yaml
from test_export import masked, two_layers

from maskpro_lightning import NMPattern, export_sparse, find_targets
from maskpro_lightning.files.card import Card, push, write_card
from maskpro_lightning.files.maskfiles import load_maskllm

FULL = Card(
    name="me/small-2-4",
    pattern="2:4",
    base_model="org/small",
    data="python-docs",
    results="| val_loss | 3.1 |",
    method={"steps": 200, "init": "sparsegpt"},
    command="maskpro compare --config quickstart",
)


def front_matter(text: str) -> Any:
    _, yaml_text, _ = text.split("---\n", 2)
    return yaml.safe_load(yaml_text)


def test_a_card_tells_all_that_is_known_and_nothing_else(tmp_path: Path) -> None:
    export_sparse(masked(tiny_models.llama()), tmp_path)
    text = write_card(tmp_path, FULL).read_text()
    assert front_matter(text) == {
        "tags": ["sparsity", "2:4", "maskpro"],
        "library_name": "transformers",
        "base_model": "org/small",
    }
    for told in (
        "# me/small-2-4",
        "2 of every 4",
        "| val_loss | 3.1 |",
        "python-docs",
        "steps: 200",
    ):
        assert told in text
    assert "maskpro compare --config quickstart" in text
    bare = Card("small", "1:4").text(["model.safetensors"])
    assert front_matter(bare) == {"tags": ["sparsity", "1:4", "maskpro"]}
    assert "## Results" not in bare
    assert "base model:" not in bare
    assert "those of the dense model, bit for bit" in bare


def test_the_card_of_trained_weights_does_not_call_them_the_dense_models() -> None:
    text = Card("small", "2:4", trained=True).text(["model.safetensors"])
    assert "The kept weights were trained under the mask." in text
    assert "those of the dense model" not in text
    assert "learned by" not in text


def test_a_model_of_ones_own_disk_is_no_base_model_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "small").mkdir(parents=True)
    assert "base_model" not in front_matter(FULL.text(["config.json"]))
    of_a_recipe = dataclasses.replace(FULL, base_model="quickstart/model")
    assert "base_model" not in front_matter(of_a_recipe.text(["config.json"]))


def test_masks_alone_are_loaded_from_where_the_card_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = masked(two_layers())
    export_sparse(module, "out", file_format="maskllm")
    text = write_card(Path("out"), Card("out", "2:4")).read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (path,) = re.findall(r'init="(.*?)"', code)
    shapes = {target.name: target.shape for target in find_targets(module, "2:4")}
    found = dict(load_maskllm(path, shapes, NMPattern(2, 4)))
    assert torch.equal(found["0.weight"], module.get_parameter("0.weight") != 0)
    exec(code, {})


@pytest.mark.parametrize("file_format", ["huggingface", "safetensors", "compressed"])
def test_what_the_card_says_loads_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    held = tiny_models.llama() if file_format == "huggingface" else two_layers()
    module = masked(held)
    export_sparse(module, "out", file_format=file_format)
    text = write_card(Path("out"), Card("out", "2:4")).read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    fresh = two_layers()
    space: dict[str, Any] = {"module": fresh}
    exec(code, space)
    if file_format == "huggingface":
        assert type(space["model"]) is type(held)
        found, expected = space["model"].state_dict(), held.state_dict()
    else:
        found, expected = fresh.state_dict(), module.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("config", ["{}", '{"auto_map": {}, "architectures": ["Theirs"]}'])
def test_a_class_that_transformers_does_not_have_is_not_imported_from_it(
    config: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(config)
    assert "import AutoModel\n" in write_card(tmp_path, FULL).read_text()


class Hub:
    """Remembers what it is asked for."""

    asked: list[tuple[str, dict[str, Any]]]

    def create_repo(self, name: str, **how: Any) -> str:
        Hub.asked.append((name, how))
        return f"https://hub/{name}"

    def upload_folder(self, **how: Any) -> None:
        Hub.asked.append(("upload", {k: v for k, v in how.items() if k != "commit_message"}))


def test_a_folder_is_uploaded_whole_to_a_repository_that_may_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hub.asked = []
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert push(tmp_path, "me/small", private=True) == "https://hub/me/small"
    assert Hub.asked == [
        ("me/small", {"private": True, "exist_ok": True}),
        ("upload", {"repo_id": "me/small", "folder_path": tmp_path}),
    ]


def test_a_hub_that_refuses_is_told_with_the_way_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    message = r"was written, but not uploaded to 'me/small': no route\. Log in with 'hf auth login'"
    with pytest.raises(ValueError, match=message):
        push(tmp_path, "me/small")
