"""What the site takes from beside this folder: README, recipes and benchmarks, as pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

_ROOT = Path(__file__).parent.parent
# Pages and files by their place in the site.
_OUTSIDE = {
    "start.md": "README.md",
    "recipes.md": "recipes/README.md",
    "existing_training.py": "recipes/existing_training.py",
    "quickstart.ipynb": "recipes/quickstart.ipynb",
    "benchmarks.md": "benchmarks/README.md",
    **{
        f"results/{path.name}": f"benchmarks/results/{path.name}"
        for path in sorted((_ROOT / "benchmarks" / "results").iterdir())
        if path.suffix in (".csv", ".png")
    },
}
_LINKS = {
    "](../recipes/README.md": "](recipes.md",
    "](../recipes/existing_training.py": "](existing_training.py",
    "](../recipes/quickstart.ipynb": "](quickstart.ipynb",
    "](recipes/quickstart.ipynb": "](quickstart.ipynb",
    "](../benchmarks/README.md": "](benchmarks.md",
    "](../benchmarks/results/": "](results/",
    "](../docs/": "](",
    "](../README.md": "](start.md",
    "](docs/": "](",
    "](benchmarks/README.md": "](benchmarks.md",
    "](recipes/README.md": "](recipes.md",
}


def on_files(files: Any, config: Any) -> Any:
    """Add what lies outside."""
    for place, path in _OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(_ROOT / path)))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Leave out the roles that docstrings give to names, which this site does not know."""
    return re.sub(r":(?:attr|class|func|meth):(?=<code)", "", html)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links lead to pages of the site, that lead to files of the repository."""
    for link, page in _LINKS.items():
        markdown = markdown.replace(link, page)
    return markdown.replace("`[`benchmarks/`]", "[`benchmarks/`]")
