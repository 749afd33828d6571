"""Files of tensors: safetensors with the kind of their content, and a digest.

Reading executes nothing, and never takes a tensor's name for a path.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from maskpro_lightning.files.atomic import atomic

_DIGEST = "sha256"


def write(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    kind: str,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write tensors with a digest of all that :func:`read` returns.

    Args:
        tensors: The tensors by name.
        path: The file.
        kind: The kind of content, such as "maskpro masks 2".
        notes: Further metadata.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {**(notes or {}), "format": kind}
    metadata[_DIGEST] = _digest(plain, metadata)
    with atomic(path) as partial:
        save_file(plain, partial, metadata)
        _sort_notes(partial)


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what :func:`write` wrote; takes no more memory than the file's size.

    Args:
        path: The file.
        kind: The kind of content that it must hold.

    Returns:
        The tensors and the notes, with the kind as "format".

    Raises:
        ValueError: the file is cut off, changed, or of another kind; the message names it.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, AttributeError, RuntimeError, TypeError) as error:
        # Also for dtypes that only safetensors has, and for impossible sizes in its header.
        raise broken(path, f"not a whole safetensors file ({error})") from None
    found = metadata.get("format", "unnamed tensors")
    if found != kind:
        raise broken(path, f"not {kind!r}, it holds {found!r}")
    digest = metadata.pop(_DIGEST, None)
    if digest != _digest(tensors, metadata):
        raise broken(path, f"not as it was written, its {_DIGEST} is another one")
    return tensors, metadata


def broken(path: str | os.PathLike[str], problem: str) -> ValueError:
    """The error about a file that cannot be read."""
    return ValueError(f"{os.fspath(path)!r} is {problem}: write or download it again.")


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sort_notes(path: Path) -> None:
    """Put the metadata of a safetensors file into alphabetical order, in place.

    safetensors writes them in any order, but equal tensors and notes are to make equal files. A
    file begins with the header's length in eight bytes. The header is JSON padded with spaces, as
    long in any order.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))
