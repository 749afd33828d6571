"""The same tensors and notes make the same file: safetensors writes its notes in any order."""

from __future__ import annotations

import json
from pathlib import Path


def sort_notes(path: Path) -> None:
    """Put the metadata of a safetensors file into alphabetical order, in place.

    Its header is eight bytes that hold its length, then JSON padded with spaces; in another order
    it is as long as before.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))
