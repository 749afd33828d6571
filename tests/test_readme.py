"""The README's code runs, and its commands are those of the continuous integration."""

import re
import tomllib
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from maskpro_lightning import MaskProCallback, NMPattern

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


class Regression(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, outputs = batch
        return nn.functional.mse_loss(self.model(inputs), outputs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_every_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = L.Trainer

    def short_trainer(**options: Any) -> L.Trainer:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        return trainer(**options | {"max_steps": 3, "accelerator": "cpu"} | quiet)

    monkeypatch.setattr(L, "Trainer", short_trainer)
    torch.manual_seed(0)
    module, model = Regression(), Regression().model
    inputs = torch.randn(32, 8)
    batches = list(zip(inputs.split(8), torch.randn(32, 4).split(8), strict=True))
    names: dict[str, Any] = {
        "module": module,
        "data": DataLoader(TensorDataset(inputs, torch.randn(32, 4)), 8),
        "model": model,
        "batches": batches,
        "loss_of": lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]),
    }
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert (tmp_path / "sparse-model" / "model.safetensors").exists()
    for network in (module.model, model):
        for layer in (network[0], network[2]):
            assert ((NMPattern(2, 4).group(layer.weight) != 0).sum(-1) == 2).all()


def test_options_that_the_readme_names_exist() -> None:
    for call in re.findall(r"`(MaskProCallback\([^`]*\))`", README):
        assert isinstance(eval(call), MaskProCallback)


def test_the_test_command_is_what_ci_runs() -> None:
    assert "    python -m tox run\n" in README
    assert "-m tox run\n" in (ROOT / ".ci" / "run").read_text()


def test_the_install_line_states_the_packages_own_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {name for name in project["dependencies"] if name.startswith(("torch>", "lightning"))}
    bounds.add(f"Python{project['requires-python']}")
    (line,) = re.findall(r"pip install -c constraints.txt '\.\[all\]' +# (.*)", README)
    assert {bound.replace(" ", "") for bound in line.split(",")} == bounds
