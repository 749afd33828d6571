"""Finds what ``recipes/`` holds, in a checkout and in an installed wheel alike."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent
# A wheel carries the recipes inside the package; a checkout and an editable install, beside it.
_FOLDER = next(
    (folder for folder in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes") if folder.is_dir()),
    _PACKAGE / "recipes",
)


def recipes() -> dict[str, Path]:
    """The recipes by name, such as "quickstart"."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


def resolve(name: str) -> str:
    """The path of something in ``recipes/``; any other name or path passes through.

    Args:
        name: A path of your own, which goes first; a path inside ``recipes/``, such as
            "quickstart/model"; or a name for the Hugging Face Hub.
    """
    if not Path(name).exists() and (_FOLDER / name).exists():
        return str(_FOLDER / name)
    return name
