"""English texts found in every CPython installation: language topics and library docstrings."""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

SPLITS = ("train", "validation")
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "turtledemo", "lib2to3", "pydoc_data"}
    | {"site-packages", "dist-packages"}
)
SHORTEST_TEXT = 200
SHORTEST_UNIQUE_PARAGRAPH = 60


def python_docs(split: Literal["train", "validation"]) -> list[str]:
    """Returns the texts of one split: pydoc topics first, then one text per library module.

    A text goes to validation when the MD5 of its name is divisible by ten, so the split is the
    same in every Python version. Of a paragraph that occurs more than once, only the first
    occurrence is kept, so that nothing held out can be learned from the training texts.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    return [text for name, text in _unique_texts() if _is_held_out(name) == (split == "validation")]


def _is_held_out(name: str) -> bool:
    """Returns whether the text of this name is in the validation split."""
    return int(hashlib.md5(name.encode(), usedforsecurity=False).hexdigest(), 16) % 10 == 0


@cache
def _unique_texts() -> tuple[tuple[str, str], ...]:
    """Returns (name, text) of all texts, without repeated paragraphs and without tiny texts."""
    seen: set[str] = set()
    texts: list[tuple[str, str]] = []
    for name, text in [*_topic_texts(), *_module_texts()]:
        kept = []
        for paragraph in text.split("\n\n"):
            words = " ".join(paragraph.split())
            if words not in seen:
                kept.append(paragraph)
            if len(words) >= SHORTEST_UNIQUE_PARAGRAPH:
                seen.add(words)
        unique_text = "\n\n".join(kept).strip()
        if len(unique_text) >= SHORTEST_TEXT:
            texts.append((name, unique_text))
    return tuple(texts)


def _topic_texts() -> Iterator[tuple[str, str]]:
    """Yields (name, text) of the language topics that `help()` shows."""
    for name, text in sorted(topics.items()):
        yield f"topics/{name}", text


def _module_texts() -> Iterator[tuple[str, str]]:
    """Yields (path, docstrings joined in source order) of the standard library's modules."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name in sorted(paths):
        if SKIPPED_FOLDERS.isdisjoint(name.split("/")):
            yield name, "\n\n".join(_docstrings(ast.parse(paths[name].read_bytes())))


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Yields the docstrings of a module and of its classes and functions, in source order."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    if isinstance(node, documented) and (docstring := ast.get_docstring(node)):
        yield docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler):
            yield from _docstrings(child)
