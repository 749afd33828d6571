"""Text that a language model writes itself, to learn masks from without other data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from maskpro_lightning.catalog import resolve
from maskpro_lightning.files.atomic import atomic
from maskpro_lightning.progress import progress

# Sequences that are generated at once.
_BATCH = 32


def written(
    model: str, count: int, length: int, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Sequences sampled from a model's own distribution, each from an end-of-text token on.

    They are stored below ``HF_HOME``, and read from there the next time.

    Args:
        model: Path or Hub name of a causal language model and its tokenizer, or a path inside
            ``recipes/``.
        count: The number of sequences.
        length: The number of tokens of a sequence.
        seed: Seed of the sampling.
        device: Where the model runs.

    Returns:
        int64 (count, length).

    Raises:
        ValueError: the tokenizer has no end-of-text token.
    """
    about = [model, _version(Path(resolve(model))), count, length, seed]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    path = Path(HF_HOME, "maskpro_lightning", f"written-{digest}.safetensors")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        tokens = _write(model, count, length, seed, device)
        with atomic(path) as partial:
            save_file({"tokens": tokens}, partial)
    return load_file(path)["tokens"]


def _write(name: str, count: int, length: int, seed: int, device: torch.device | str) -> Tensor:
    end = AutoTokenizer.from_pretrained(resolve(name)).eos_token_id
    if end is None:
        raise ValueError(
            f"The tokenizer of {name!r} has no end-of-text token, which a text would begin after: "
            f"give texts as source."
        )
    model: Any = AutoModelForCausalLM.from_pretrained(resolve(name), dtype="auto")
    return generate(model.to(device), end, count, length, seed)


@torch.no_grad()
def generate(model: Any, end: int, count: int, length: int, seed: int) -> Tensor:
    """Sample sequences as :func:`written` does, each from the token ``end`` on."""
    config: Any = GenerationConfig  # which is untyped
    # The model's own generation config may not sample from its distribution.
    asked, model.generation_config = model.generation_config, config()
    plain = config(
        do_sample=True,
        top_k=0,
        min_new_tokens=length - 1,
        max_new_tokens=length - 1,
        eos_token_id=None,  # goes on after an end-of-text, as packed text does
        pad_token_id=end,
    )
    found, device = [], model.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        sizes = [min(_BATCH, count - first) for first in range(0, count, _BATCH)]
        for size in progress(sizes, "Writing text"):
            first = torch.full((size, 1), end, device=device)
            about = {"attention_mask": torch.ones_like(first), "generation_config": plain}
            found.append(model.eval().generate(first, **about).cpu())
    model.generation_config = asked
    return torch.cat(found)


def _version(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a folder's files, to notice other files; empty for a Hub name."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
