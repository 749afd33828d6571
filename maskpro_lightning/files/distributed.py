"""Reads distributed checkpoints, which ranks wrote together, on one device, a tensor at a time."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from maskpro_lightning.files.archive import broken
from maskpro_lightning.weights.names import clean_name

# Where Lightning keeps a module's weights: ModelParallelStrategy (FSDP2), FSDPStrategy (FSDP1).
_WEIGHTS = ("state_dict.", "model.")


def is_distributed(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the folder of a distributed checkpoint."""
    return (Path(path) / ".metadata").is_file()


class Stored(Mapping[str, Tensor]):
    """The tensors of a distributed checkpoint by name; each is read, whole, when it is looked up.

    Args:
        path: The folder.
        prefix: The prefix of the keys to read; names are keys without it. By default the prefix of
            a module's weights.

    Raises:
        ValueError: the folder is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], prefix: str | None = None) -> None:
        self._reader = _Reader(Path(path))
        try:
            stored = self._reader.read_metadata().state_dict_metadata
        except Exception:  # noqa: BLE001, as above
            raise broken(Path(path), "no whole checkpoint in parts") from None
        if prefix is None:
            prefix = next((p for p in _WEIGHTS if any(k.startswith(p) for k in stored)), "")
        self._stored = {
            clean_name(key.removeprefix(prefix)): (key, about)
            for key, about in stored.items()
            if key.startswith(prefix) and isinstance(about, TensorStorageMetadata)
        }

    def __getitem__(self, name: str) -> Tensor:
        key, about = self._stored[name]
        value = torch.empty(about.size, dtype=about.properties.dtype, device="cpu")
        alone = {"no_dist": True} if "no_dist" in inspect.signature(load).parameters else {}
        try:
            with warnings.catch_warnings():  # of there being no other ranks
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                load({key: value}, storage_reader=self._reader, **alone)
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            raise ValueError(
                f"{name!r} could not be read from {str(self._reader.path)!r}: a part of the "
                f"checkpoint is missing or damaged. Copy it anew, or take another."
            ) from error
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def load_into(self, module: nn.Module) -> None:
        """Copy all tensors into a module's, one after the other.

        Raises:
            ValueError: a name is missing on either side, or a shape differs; nothing is copied.
        """
        state = {
            clean_name(name): value for name, value in module.state_dict(keep_vars=True).items()
        }
        missing, more = sorted(state.keys() - self.keys()), sorted(self.keys() - state.keys())
        if missing or more:
            raise ValueError(
                f"{str(self._reader.path)!r} is of another module than "
                f"{type(module).__name__}: it lacks {len(missing)} tensors {missing[:1]} and has "
                f"{len(more)} more {more[:1]}."
            )
        for name, value in state.items():
            self.check_shape(name, value)
        with torch.no_grad():
            for name, value in state.items():
                value.copy_(self[name])

    def check_shape(self, name: str, value: Tensor) -> None:
        """Refuse a tensor that is not stored, or whose stored shape is another.

        Raises:
            ValueError: names the tensor and both shapes.
        """
        size = self._stored[name][1].size if name in self._stored else None
        if size != value.shape:
            what = "no such tensor" if size is None else str(tuple(size))
            raise ValueError(
                f"{name!r} is {tuple(value.shape)} here, but {what} in {str(self._reader.path)!r}: "
                f"give the recipe of that fit."
            )


class _Reader(FileSystemReader):
    """Reads the checkpoint's metadata only once."""

    _known: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._known is None:
            self._known = super().read_metadata(*args, **kwargs)
        return self._known
