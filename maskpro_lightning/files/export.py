"""Exports a sparse model in formats that others load."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor, nn

from maskpro_lightning.files import archive, pretrained, streaming
from maskpro_lightning.files.atomic import atomic
from maskpro_lightning.files.compressed import save_compressed
from maskpro_lightning.files.distributed import Stored
from maskpro_lightning.files.gathering import Named, WholeState, state_of
from maskpro_lightning.files.maskfiles import save_maskllm
from maskpro_lightning.initial import initializers
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.optim.optimizer import MaskPro
from maskpro_lightning.weights.targets import Target, find_targets

_DISTRIBUTIONS = "maskpro distributions 1"

Format = Literal["auto", "huggingface", "safetensors", "compressed", "maskllm"]


def export_sparse(
    model: nn.Module,
    folder: str | os.PathLike[str],
    pattern: str | NMPattern = "2:4",
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    file_format: Format = "auto",
    max_shard_size: int | str = "5GB",
    checkpoint: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a model whose masks are applied, for others to load; no tokenizer and no model card.

    The formats:

    - "huggingface": the one Hugging Face model that this is or holds, zeros included, as
      ``save_pretrained`` writes it; ``from_pretrained`` loads it without this package.
    - "safetensors": ``model.safetensors``, the ``state_dict``, zeros included.
    - "compressed": ``compressed.safetensors``, the ``state_dict`` without the zeros; loads with
      :func:`load_compressed`.
    - "maskllm": ``masks.npz``, the masks alone, as MaskLLM writes them.
    - "auto": "huggingface" where there is one such model, else "safetensors".

    The first two write tensor by tensor, into several files and an index if one would be too large.
    They also take a model that FSDP or tensor parallelism splits over ranks. Then all ranks have to
    call this; each tensor is gathered, and rank 0 writes it.

    Args:
        model: The model after the fit; under FSDP1 the outermost wrapper.
        folder: Where to write; made if it does not exist.
        pattern: The pattern that every masked weight must have.
        include: Which layers are masked, as in :func:`find_targets`.
        exclude: Which layers are not.
        file_format: One of the formats.
        max_shard_size: The largest size of a file, in bytes or such as "5GB".
        checkpoint: The folder of a distributed checkpoint of the fit. All formats but "compressed"
            read each tensor from it when they write it; the model may then be on the meta device.

    Returns:
        The folder.

    Raises:
        ValueError: a weight has a group with more than N nonzeros; the format would lose a part of
            the model, or does not take a sharded one; an argument is out of range.
        TypeError: the state holds something other than tensors.
        RuntimeError: another rank could not write. After any of these errors nothing is written.
    """
    pattern = NMPattern.parse(pattern)
    limit = streaming.bytes_of(max_shard_size)
    values = state_of(model)
    stored = None if checkpoint is None else Stored(checkpoint)
    targets = find_targets(model, pattern, include, exclude, on_meta=stored is not None)
    if file_format not in get_args(Format):
        raise ValueError(f"file_format is one of {get_args(Format)}, got {file_format!r}.")
    if file_format == "auto":
        file_format = "huggingface" if len(pretrained.find(model)) == 1 else "safetensors"
    folder = Path(folder)
    state = WholeState.of(model, values, pattern, targets, stored)
    if file_format in ("huggingface", "safetensors"):
        _write(model, state, folder, file_format, limit)
        return folder
    if file_format == "maskllm":
        _write_masks(model, state, folder, targets, pattern)
        return folder
    if stored is not None:
        raise ValueError(
            f"file_format={file_format!r} needs the weights in the model: load the checkpoint into "
            f"it, and leave out checkpoint."
        )
    _refuse_sharded(state, file_format)
    folder.mkdir(parents=True, exist_ok=True)
    save_compressed(
        model, folder / "compressed.safetensors", pattern, include=include, exclude=exclude
    )
    return folder


def save_distributions(optimizer: MaskPro, path: str | os.PathLike[str]) -> None:
    """Write the logits of every masked weight, float32, in the weights' shapes and names."""
    groups = optimizer.param_groups
    notes = {
        "pattern": groups[0]["pattern"],
        "seed": str(groups[0]["seed"]),
        "step": str(groups[0]["step"]),
    }
    archive.write(optimizer.logits(), path, _DISTRIBUTIONS, notes)


def _write(
    model: nn.Module, state: WholeState, folder: Path, file_format: Format, limit: int
) -> None:
    """Write a model's tensors one after the other, as they are gathered."""
    if file_format == "safetensors":
        shapes = {name: state.shape(name) for name in state.values}
        tensors = ((name, state.whole(name)) for name in shapes)
        state.hand_over(tensors, lambda tensors: _write_files(folder, shapes, tensors, limit))
        return
    name, inner = pretrained.only(model, state.values)
    if not pretrained.is_of_transformers(inner):
        _refuse_sharded(state, file_format)
        with _files_of(folder) as inside:
            inner.save_pretrained(inside)
        return
    names = pretrained.names_in(inner, name, state.values)
    conversion = pretrained.Conversion(inner, {n: state.shape(key) for n, key in names.items()})

    def write(tensors: Named) -> None:
        beside = partial(pretrained.save_beside, inner)
        _write_files(folder, conversion.shapes, tensors, limit, beside)

    state.hand_over(conversion.convert(lambda name: state.whole(names[name])), write)


def _write_files(
    folder: Path,
    shapes: Mapping[str, Tensor],
    tensors: Named,
    limit: int,
    beside: Callable[[Path], None] = lambda _: None,
) -> None:
    with _files_of(folder) as inside:
        beside(inside)
        streaming.write(inside, shapes, tensors, limit)


@contextmanager
def _files_of(folder: Path) -> Iterator[Path]:
    """A temporary folder to write a model into; its files move into ``folder`` when the block ends.

    Files of an older model are then deleted, all others stay. If the block raises, nothing changes.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as inside:
            yield Path(inside)
            # The index last, as it leads to the others.
            written = sorted(Path(inside).iterdir(), key=lambda path: path.name == streaming.INDEX)
            for path in written:
                with atomic(folder / path.name) as place:
                    path.replace(place)
    except BaseException:
        if new:
            with suppress(OSError):  # unless something has moved in
                folder.rmdir()
        raise
    if any(path.name.startswith("model") for path in written):
        ours = {path.name for path in written}
        for kind in ("model.safetensors", "model-?????-of-?????.safetensors", streaming.INDEX):
            for stale in folder.glob(kind):  # it would be loaded instead of a new one
                if stale.name not in ours:
                    stale.unlink(missing_ok=True)


def _refuse_sharded(state: WholeState, file_format: str) -> None:
    if state.sharded:
        raise ValueError(
            f"The model is split over ranks, which file_format={file_format!r} cannot write: "
            f'choose "safetensors", load that on one device, and export again from there.'
        )


def _write_masks(
    model: nn.Module,
    state: WholeState,
    folder: Path,
    targets: Sequence[Target],
    pattern: NMPattern,
) -> None:
    """Write the masks of the nonzeros, named as in the one Hugging Face model, if there is one."""
    found = pretrained.find(model)
    prefix = f"{next(iter(found))}." if len(found) == 1 and "" not in found else ""
    dims = {target.name: target.input_dim for target in targets}

    def write(tensors: Named) -> None:
        masks = (
            (name.removeprefix(prefix), initializers.nonzeros(w, pattern, dims[name], name=name))
            for name, w in tensors
        )
        save_maskllm(masks, folder / "masks.npz")

    state.hand_over(((name, state.whole(name)) for name in dims), write)
