"""The quickstart's notebook runs from above to below, and shows what it promises."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
NOTEBOOK = Path(__file__).parent.parent / "recipes" / "quickstart.ipynb"
SHORT = {
    "max_steps=200": "max_steps=4",
    "val_check_interval=50": "val_check_interval=2",
    "log_every_n_steps=5": "log_every_n_steps=1",
    "train_sequences=4096": "train_sequences=64",
    "val_sequences=256": "val_sequences=16",
}


def shown(cell: Any, kind: str) -> list[Any]:
    """What a cell displays of a kind, such as "image/png"."""
    outputs = [output for output in cell.outputs if "data" in output]
    return [output["data"][kind] for output in outputs if kind in output["data"]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs_and_shows_curves_and_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ipywidgets, and with nothing on the stream that notebooks show in red."""
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "ipywidgets.py").write_text("raise ImportError")
    paths = [str(tmp_path / "absent"), str(NOTEBOOK.parent.parent)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        assert not cell.get("outputs"), "a notebook without outputs is one that can be compared"
        for long, short in SHORT.items():
            cell.source = cell.source.replace(long, short)
    assert sum("max_steps=4" in cell.source for cell in notebook.cells) == 1
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=900, resources=resources).execute()
    cells = {cell.source.splitlines()[-1]: cell for cell in notebook.cells}
    figures = next(c for c in notebook.cells if c.source.startswith("for name in"))
    assert len(shown(figures, "image/png")) == 3
    (listed,) = shown(
        cells['sorted(path.name for path in Path("sparse-model").iterdir())'], "text/plain"
    )
    assert "'model.safetensors'" in listed
    assert "'tokenizer.json'" in listed
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert [each["text"] for each in outputs if each.get("name") == "stderr"] == []
    assert "ipywidgets" not in str(outputs)
