"""One law for many networks: a fit moves every mask and keeps N of M, however weights lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import tiny_models
import torch
from modules import FAST, assert_learned, assert_masked, every_estimator, fit, learned
from rules import mask_callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from maskpro_lightning.optim.estimators import EstimatorName


class Classifier(pl.LightningModule):
    """Any network on tokens or images, its loss the cross entropy of random classes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self.network(batch[0])
        scores = getattr(output, "logits", output)
        return nn.functional.cross_entropy(scores.flatten(0, -2), batch[1].flatten())

    def configure_optimizers(self) -> None:
        return None


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 8)
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.ReLU(), nn.Linear(16, 8))


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(32, 4, 6, 6), torch.randint(8, (32,))


def tokens() -> tuple[Tensor, Tensor]:
    return torch.randint(tiny_models.VOCABULARY, (2, 32, 8)).unbind()


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]], int]] = {
    "convolutions": (conv_net, images, 3),
    "GPT-2": (tiny_models.gpt2, tokens, 4),
    "Llama": (tiny_models.llama, tokens, 7),
    "compiled": (lambda: torch.compile(mlp(), backend="eager"), images, 2),
}


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@every_estimator
@pytest.mark.parametrize(("make", "data", "layers"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_every_architecture_learns_masks(
    make: Callable[[], nn.Module],
    data: Callable[[], tuple[Tensor, ...]],
    layers: int,
    estimator: EstimatorName,
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    module = Classifier(make())
    dense = Classifier(make())
    dense.load_state_dict(module.state_dict())
    rows = list(zip(*data(), strict=True))
    batches = DataLoader(rows, batch_size=8)
    callback = mask_callback(estimator=estimator, lr=FAST, logit_scale=2)
    trainer = fit(module, callback, folder=tmp_path, data=batches, validate=False, max_epochs=4)
    assert trainer.global_step == 16
    assert len(learned(callback)) == layers
    assert_learned(callback)
    assert_masked(module, dense)
