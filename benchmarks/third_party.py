"""Other projects' models with the callback added: ``python benchmarks/third_party.py --help``.

Each function makes data and a model as the project's own documentation does, trains it dense for a
moment, and fits it once more with the callback and nothing else. Projects that are not installed
are skipped. "Exact" says that each masked weight keeps exactly 2 of every 4 inputs, to the bit what
they were, and that nothing else has moved.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from maskpro_lightning import MaskProCallback
from maskpro_lightning.masks.pattern import NMPattern

# What a fit of a project takes: callbacks, and how many steps it makes at most.
Fit = Callable[[list[Any], int], object]
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "default_root_dir": tempfile.mkdtemp(),
}


class Watch(pl.Callback):
    """Remembers a metric of every validation, and the weights that a fit begins with."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.values: list[float] = []
        self.module: nn.Module | None = None
        self.dense: dict[str, Tensor] = {}

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        self.module = pl_module

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        self.dense = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    def on_validation_end(self, trainer: Any, pl_module: nn.Module) -> None:
        if not trainer.sanity_checking and self.metric in trainer.callback_metrics:
            self.values.append(float(trainer.callback_metrics[self.metric]))


def series(length: int) -> np.ndarray[Any, Any]:
    """Waves with noise."""
    time_ = np.arange(length)
    noise = np.random.default_rng(0).normal(0, 0.1, length)
    return (np.sin(time_ / 6) + 0.5 * np.sin(time_ / 17) + noise).astype(np.float32)


def chemprop() -> tuple[str, Fit]:
    from chemprop import data, models
    from chemprop import nn as parts

    chains = ["C" * n + end for n in range(2, 18) for end in ("O", "N", "Cl", "C(=O)O", "c1ccccc1")]
    points = [
        data.MoleculeDatapoint.from_smi(smiles, [float(len(smiles)) / 10]) for smiles in chains
    ]
    train, held_out = (
        data.build_dataloader(data.MoleculeDataset(some), batch_size=16, shuffle=shuffle)
        for some, shuffle in ((points[::2], True), (points[1::2], False))
    )
    model = models.MPNN(parts.BondMessagePassing(), parts.MeanAggregation(), parts.RegressionFFN())
    return "val_loss", lambda callbacks, steps: pl.Trainer(
        max_steps=steps, callbacks=callbacks, **QUIET
    ).fit(model, train, held_out)


def pytorch_forecasting() -> tuple[str, Fit]:
    import pandas as pd
    from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet

    frame = pd.DataFrame({"value": series(400), "time": np.arange(400), "name": "a"})
    frame["phase"] = (frame["time"] % 24).astype("float32")
    train = TimeSeriesDataSet(
        frame[frame["time"] < 300],
        time_idx="time",
        target="value",
        group_ids=["name"],
        max_encoder_length=24,
        max_prediction_length=6,
        static_categoricals=["name"],
        time_varying_known_reals=["time", "phase"],
        time_varying_unknown_reals=["value"],
    )
    held_out = TimeSeriesDataSet.from_dataset(
        train, frame[frame["time"] >= 270], stop_randomization=True
    )
    loaders = [
        train.to_dataloader(train=True, batch_size=32, num_workers=0),
        held_out.to_dataloader(train=False, batch_size=32, num_workers=0),
    ]
    model = TemporalFusionTransformer.from_dataset(
        train, learning_rate=0.01, hidden_size=16, hidden_continuous_size=8, log_interval=-1
    )
    return "val_loss", lambda callbacks, steps: pl.Trainer(
        max_steps=steps, callbacks=callbacks, gradient_clip_val=0.1, **QUIET
    ).fit(model, *loaders)


def darts() -> tuple[str, Fit]:
    import pytorch_lightning
    from darts import TimeSeries
    from darts.models import BlockRNNModel

    whole = TimeSeries.from_values(series(400))
    train, held_out = whole[:300], whole[270:]
    model = BlockRNNModel(
        input_chunk_length=24, output_chunk_length=6, model="LSTM", hidden_dim=32, n_rnn_layers=2
    )

    def fit(callbacks: list[Any], steps: int) -> None:
        trainer = pytorch_lightning.Trainer(max_steps=steps, callbacks=callbacks, **QUIET)
        model.fit(train, val_series=held_out, trainer=trainer, epochs=10**6)

    return "val_loss", fit


def neuralforecast() -> tuple[str, Fit]:
    import pandas as pd
    from neuralforecast import NeuralForecast
    from neuralforecast.models import NHITS

    frame = pd.DataFrame({"unique_id": "a", "ds": np.arange(400), "y": series(400)})
    model = NHITS(
        h=6,
        input_size=24,
        max_steps=100,
        val_check_steps=20,
        batch_size=8,
        mlp_units=3 * [[64, 64]],
        **QUIET,
    )
    forecast = NeuralForecast([model], freq=1)

    def fit(callbacks: list[Any], steps: int) -> None:
        for inner in forecast.models:
            inner.trainer_kwargs |= {"callbacks": callbacks, "max_steps": steps}
        forecast.fit(frame, val_size=60)

    return "valid_loss", fit


def scvi_tools() -> tuple[str, Fit]:
    import anndata
    from scvi.model import SCVI

    random = np.random.default_rng(0)
    rates = random.gamma(2, 1, (4, 100))
    cells = anndata.AnnData(random.poisson(rates[random.integers(0, 4, 400)]).astype(np.float32))
    SCVI.setup_anndata(cells)
    model = SCVI(cells, n_hidden=64)

    def fit(callbacks: list[Any], steps: int) -> None:
        model.train(
            max_epochs=max(1, steps // 5),
            batch_size=72,
            check_val_every_n_epoch=5,
            callbacks=callbacks,
            **{name: value for name, value in QUIET.items() if name != "enable_model_summary"},
        )

    return "validation_loss", fit


class Pixels(pl.LightningModule):
    """Any network on images, with a loss for each output."""

    def __init__(self, network: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = batch
        loss: Tensor = self.loss(self.network(images), targets)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def images(of_pixels: bool) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Coloured discs on noise; the target is the disc, or its colour."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(96, 3, 32, 32, generator=generator)
    colours = torch.randint(3, (96,), generator=generator)
    grid = torch.stack(torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij"))
    centres = torch.randint(8, 24, (96, 2, 1, 1), generator=generator)
    discs = ((grid - centres) ** 2).sum(1) < 36
    for picture, disc, colour in zip(pictures, discs, colours, strict=True):
        picture[colour][disc] += 1
    targets = discs[:, None].float() if of_pixels else colours
    training, validation = (
        DataLoader(TensorDataset(pictures[part], targets[part]), batch_size=16)
        for part in (slice(0, 64), slice(64, None))
    )
    return training, validation


def segmentation_models_pytorch() -> tuple[str, Fit]:
    import segmentation_models_pytorch as smp

    network = smp.create_model(
        "Unet", "mobilenet_v2", encoder_weights=None, encoder_depth=3, decoder_channels=(32, 16, 16)
    )
    module = Pixels(network, smp.losses.DiceLoss(smp.losses.BINARY_MODE, from_logits=True))
    return "val_loss", lambda callbacks, steps: pl.Trainer(
        max_steps=steps, callbacks=callbacks, **QUIET
    ).fit(module, *images(of_pixels=True))


def torchvision() -> tuple[str, Fit]:
    from torchvision.models import shufflenet_v2_x0_5

    module = Pixels(shufflenet_v2_x0_5(num_classes=3), nn.CrossEntropyLoss())
    return "val_loss", lambda callbacks, steps: pl.Trainer(
        max_steps=steps, callbacks=callbacks, **QUIET
    ).fit(module, *images(of_pixels=False))


PROJECTS: dict[str, Callable[[], tuple[str, Fit]]] = {
    "chemprop": chemprop,
    "pytorch-forecasting": pytorch_forecasting,
    "darts": darts,
    "neuralforecast": neuralforecast,
    "scvi-tools": scvi_tools,
    "segmentation-models-pytorch": segmentation_models_pytorch,
    "torchvision": torchvision,
}


def is_exact(module: nn.Module, masks: dict[str, Tensor], watch: Watch) -> bool:
    """Whether a module is its dense self under masks."""
    parameters = dict(module.named_parameters())
    return all(
        torch.equal(parameters[name], dense.where(masks[name], 0) if name in masks else dense)
        for name, dense in watch.dense.items()
    )


def row(name: str, steps: int) -> str:
    """One project's row of the table."""
    torch.manual_seed(0)
    metric, fit = PROJECTS[name]()
    before = Watch(metric)
    fit([before], 2 * steps)
    callback, watch = MaskProCallback("2:4", monitor=metric), Watch(metric)
    start = time.monotonic()
    fit([callback, watch], steps)
    seconds = time.monotonic() - start
    module, masks = watch.module, callback.deployed_masks()
    assert module is not None
    assert callback.result is not None
    pattern = NMPattern.parse("2:4")
    optimizer = callback.optimizer
    assert optimizer is not None
    for (weight, layout), mask_name in zip(optimizer.layouts.items(), optimizer.names, strict=True):
        pattern.check(masks[mask_name].to(weight.device), layout.input_dim, mask_name)
    total = sum(parameter.numel() for parameter in module.parameters())
    numbers = (before.values[-1:], [callback.result.initial], [callback.result.deployed])
    losses = " | ".join(
        f"{value[0]:.4g}" if value and value[0] is not None else "" for value in numbers
    )
    exact = "yes" if is_exact(module, masks, watch) else "NO"
    return (
        f"| {name} | {version(name)} | {len(masks)} | {callback.result.masked_weights / total:.0%} "
        f"| {exact} | {metric} | {losses} | {callback.result.steps} | {seconds:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--projects", nargs="*", default=list(PROJECTS), choices=list(PROJECTS))
    parser.add_argument("--steps", type=int, default=60, help="of the masks; twice as many dense")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    head = "| project | version | weights masked | of the model | exact | metric | dense "
    rows = [
        f"{head}| initial mask | deployed mask | steps | seconds |",
        "| --- | --- | ---: | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in options.projects:
        try:
            rows.append(row(name, options.steps))
        except ImportError as error:
            rows.append(f"| {name} | not installed: {error.name} |  |  |  |  |  |  |  |  |  |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
