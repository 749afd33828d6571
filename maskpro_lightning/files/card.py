"""Writes the model card of a sparse model: its results, how to load it, and how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskpro_lightning.catalog import resolve
from maskpro_lightning.files.atomic import write_text

CARD = "README.md"
_LOAD = {
    "config.json": """```python
from transformers import {architecture}

model = {architecture}.from_pretrained("{name}")
```""",
    "compressed.safetensors": """```python
from maskpro_lightning import load_compressed

state = load_compressed("{name}/compressed.safetensors", "{pattern}")
module.load_state_dict(state)
```""",
    "masks.npz": """The masks alone, in MaskLLM's format, for the weights of the dense model:

```python
from maskpro_lightning import MaskProCallback

MaskProCallback("{pattern}", init="{name}/masks.npz")
```""",
    "": """```python
from safetensors.torch import load_file

module.load_state_dict(load_file("{name}/model.safetensors"))
```""",
}


@dataclass(frozen=True)
class Card:
    """The content of a model card; empty parts are left out.

    Attributes:
        name: The model's name, such as its name on the Hub.
        pattern: The pattern, such as "2:4".
        base_model: The dense model's name or path.
        data: The data that was learned from.
        results: A table in Markdown.
        method: Parameters of the fit.
        command: The command that made the model.
        trained: Whether kept weights were trained under the mask, and differ from the dense ones.
    """

    name: str
    pattern: str
    base_model: str = ""
    data: str = ""
    results: str = ""
    method: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    trained: bool = False

    def text(self, files: Sequence[str], architecture: str = "AutoModel") -> str:
        """The card in Markdown.

        Args:
            files: The files of its folder.
            architecture: The class of transformers that the folder is loaded with.
        """
        kept, group = self.pattern.split(":")
        about = (
            f"A model of which {kept} of every {group} consecutive weights along the inputs of its "
            f"masked layers are kept and the others are zero ({self.pattern} sparsity; N counts "
            f"kept weights). "
        )
        about += (
            "The kept weights were trained under the mask."
            if self.trained
            else "The kept weights are those of the dense model, bit for bit."
        )
        parts = [self._front_matter(files), f"# {self.name}", about]
        parts += ["## Results", self.results] if self.results else []
        names = {"name": self.name, "pattern": self.pattern, "architecture": architecture}
        load = next((text for name, text in _LOAD.items() if name in files), _LOAD[""])
        parts += ["## Load it", load.format(**names)]
        parts += ["## How it was made", self._made()]
        return "\n\n".join(parts) + "\n"

    def _front_matter(self, files: Sequence[str]) -> str:
        tags = json.dumps(["sparsity", self.pattern, "maskpro"])
        lines = ["---", f"tags: {tags}"]
        lines += ["library_name: transformers"] if "config.json" in files else []
        # Others cannot load a path on this machine, or one inside the recipes.
        on_hub = self.base_model.count("/") == 1 and not Path(resolve(self.base_model)).exists()
        lines += [f"base_model: {self.base_model}"] if on_hub else []
        return "\n".join([*lines, "---"])

    def _made(self) -> str:
        lines = ["The mask was learned by [MaskPro](https://arxiv.org/abs/2506.12876)."]
        if self.trained:
            lines = ["The kept weights were trained by maskpro-lightning's SparseFinetuning."]
        lines += [f"- base model: {self.base_model}"] if self.base_model else []
        lines += [f"- data: {self.data}"] if self.data else []
        lines += [f"- {name}: {value}" for name, value in self.method.items()]
        lines += [f"\n```\n{self.command}\n```"] if self.command else []
        return "\n".join([lines[0], "", *lines[1:]]) if lines[1:] else lines[0]


def write_card(folder: Path, card: Card) -> Path:
    """Write a model card beside the files of a model; returns its path."""
    files = [path.name for path in folder.iterdir()]
    write_text(folder / CARD, card.text(files, _architecture(folder / "config.json")))
    return folder / CARD


def _architecture(config: Path) -> str:
    """The class of transformers that a model is of, head included."""
    found = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    named = found.get("architectures") or ["AutoModel"]
    return "AutoModel" if "auto_map" in found else str(named[0])


def push(folder: Path, name: str, *, private: bool = False) -> str:
    """Upload a folder to a model repository of the Hugging Face Hub, made if there is none.

    Args:
        folder: The folder.
        name: Such as "me/small-llama-2-4".
        private: Whether a new repository is private.

    Returns:
        The repository's URL.

    Raises:
        ValueError: the upload failed; the message says why and what to do.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi()
    try:
        url = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Add a sparse model")
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"{str(folder)!r} was written, but not uploaded to {name!r}: {error}. Log in with "
            f"'hf auth login', and upload it with 'hf upload {name} {folder}'."
        ) from error
    return str(url)
