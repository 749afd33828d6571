"""Reads the weights in a checkpoint of Lightning without running anything in it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from maskpro_lightning.files.archive import broken
from maskpro_lightning.files.distributed import Stored, is_distributed


def loader_of(path: str | os.PathLike[str]) -> Callable[[nn.Module], object]:
    """A function that loads a checkpoint's weights into a module.

    Args:
        path: What Lightning wrote: a file, or the folder of a distributed checkpoint.

    Raises:
        FileNotFoundError, ValueError: as for :func:`weights_in`. The function itself raises if the
            checkpoint is of another module.
    """
    if is_distributed(path):
        return Stored(path).load_into
    weights = weights_in(path)
    return lambda module: module.load_state_dict(weights)


def weights_in(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The ``state_dict`` of a checkpoint, on the CPU.

    Args:
        path: The file that Lightning wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder (see :func:`loader_of`) or no checkpoint, or to read it would run
            code in it.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(_of_folder(path))
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {str(path)!r}.")
    found = _loaded(path)
    state = found.get("state_dict") if isinstance(found, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"{str(path)!r} holds no state_dict of tensors, so it is no checkpoint of Lightning: "
            f"give a .ckpt that the fit wrote."
        )
    return {str(name): value for name, value in state.items()}


def _loaded(path: Path) -> Any:
    try:
        # Only a zip file, PyTorch's format since 1.6, can be mapped into memory.
        with path.open("rb") as file:
            mapped = file.read(2) == b"PK"
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UnpicklingError as error:
        # PyTorch's message advises to run it; instead, a user can allow one class by name.
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        if name is None:
            raise broken(path, "no whole checkpoint") from None
        raise ValueError(
            f"{str(path)!r} holds more than tensors and plain values, an object of {name[1]}, and "
            f"would have to be run to be read. Write it anew without that object (most are in "
            f"hyperparameters: save_hyperparameters(ignore=[...])), or allow the one class if it "
            f"is yours: torch.serialization.add_safe_globals([...])."
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError):
        raise broken(path, "no whole checkpoint") from None


def _of_folder(path: Path) -> str:
    found = sorted(path.rglob("*.ckpt"))
    inside = f", such as {str(found[0])!r}" if found else "; in it there is none that ends in .ckpt"
    return f"{str(path)!r} is a folder: give the file of a checkpoint{inside}."
