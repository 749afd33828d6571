"""Writes files so that they are whole or not there, with the mode of the user's umask."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write under a temporary name; the file is renamed when the block ends, removed if it raises.

    No two writers share a temporary name. If two fits write into one folder, the last file stays.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
    try:
        with partial.open("wb") as file:
            mode = os.fstat(file.fileno()).st_mode
        yield partial
        partial.chmod(mode)  # safetensors makes files that only their owner may read
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text in UTF-8."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")
