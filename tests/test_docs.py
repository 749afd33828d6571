"""The documentation's code runs, and its commands are what the command line understands."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import mlflow
import pytest
import torch
from test_readme import Regression
from torch.utils.data import DataLoader, TensorDataset

import maskpro_lightning
from maskpro_lightning.cli import main

ROOT = Path(__file__).parent.parent
PAGES = {p.name: p for p in sorted(ROOT.glob("docs/*.md"))} | {
    "recipes": ROOT / "recipes/README.md"
}
# They take no recipe; their options are looked for in their help.
PLAIN = ("plot", "send")
WITH_CODE = [name for name, page in PAGES.items() if "```python" in page.read_text()]


def commands() -> set[str]:
    """All command lines of all pages, once."""
    text = "\n".join(page.read_text() for page in PAGES.values())
    return set(re.findall(r"^ {4,}(maskpro .*)$", text, flags=re.MULTILINE))


def test_pages_are_listed_and_found() -> None:
    index = PAGES["README.md"].read_text()
    assert len(WITH_CODE) == 9
    settings = (ROOT / "mkdocs.yml").read_text()
    named = re.findall(r"^ +- (?:[\w ]+: )?([\w-]+\.md)$", settings, re.MULTILINE)
    # What the site alone has: those of other folders, and the README, which is its index.
    made = {"README.md", "start.md", "recipes.md", "benchmarks.md"}
    assert sorted(named) == sorted((PAGES.keys() - {"recipes"}) | made)
    for name in PAGES.keys() - {"README.md", "recipes"}:
        assert f"]({name})" in index, name


def test_the_api_page_has_every_public_name() -> None:
    listed = re.findall(
        r"^::: maskpro_lightning\.(\w+)$", PAGES["api.md"].read_text(), re.MULTILINE
    )
    assert sorted(listed) == sorted(maskpro_lightning.__all__)


@pytest.fixture
def _mlflow_as_before() -> Iterator[None]:
    """What a page asks of MLflow for the whole process is no other test's."""
    yield
    mlflow.pytorch.autolog(disable=True)
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]


@pytest.mark.usefixtures("_mlflow_as_before")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0", "ignore:.*already configured with model")
@pytest.mark.parametrize("name", WITH_CODE)
def test_every_python_block_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("maskpro_lightning.tracking.plots.figures", lambda run: {})
    trainer = L.Trainer

    def short_trainer(**options: Any) -> L.Trainer:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False}
        steps = min(options.pop("max_steps"), 4)
        return trainer(**{"logger": False} | options | {"max_steps": steps} | quiet)

    monkeypatch.setattr(L, "Trainer", short_trainer)
    torch.manual_seed(0)
    module = Regression()
    data = TensorDataset(torch.randn(32, 8), torch.randn(32, 4))
    names: dict[str, Any] = {"module": module, "data": DataLoader(data, 8)}
    # The pages' own names of layers.
    names["model"] = torch.nn.ModuleDict({"layers": module.model})
    # MLflow keeps a database open by its address, wherever the process goes later.
    text = PAGES[name].read_text().replace("sqlite:///mlflow.db", f"sqlite:///{tmp_path}/mlflow.db")
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        if "MaskProCallback(" in block:  # its weights are dense, whatever came before
            names["module"] = Regression()
            names["model"] = torch.nn.ModuleDict({"layers": names["module"].model})
        exec(block, names)


@pytest.mark.parametrize("line", sorted(commands()))
def test_every_command_is_understood(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["maskpro"])
    command, *options = shlex.split(line)[1:]
    if command in PLAIN:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        told = capsys.readouterr().out
        names = [option.partition("=")[0] for option in options if option.startswith("--")]
        assert all(name in told for name in names)
        return
    with pytest.raises(SystemExit, match="0"):
        main([command, *options, *([] if "--print_config" in options else ["--print_config"])])
    ours = "SparseFinetuning" if any("_finetune" in o for o in options) else "MaskProCallback"
    assert f"maskpro_lightning.{ours}" in capsys.readouterr().out
