"""Small LightningModules, their data and quiet Trainers, shared by the tests of the callback."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import lightning.pytorch as pl
import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from maskpro_lightning import MaskProCallback, find_targets
from maskpro_lightning.initial.statistics import Inputs
from maskpro_lightning.optim.estimators import EstimatorName
from maskpro_lightning.optim.masked_weight import Version
from maskpro_lightning.weights.targets import Target

ROWS, BATCH, WIDTH = 32, 8, 16
# So large that a mask whose residuals are not all zero has moved after a few steps.
FAST = 3.0
# How far, in units of lr, rounding takes logits in one update: losses near 2 and gradients have
# 22 bits after their sums; a score is at most 1, and so is, times the width, a gradient's
# direction.
ROUNDING = {"policy": 2**-20, "straight_through": WIDTH * 2**-20}
# So large that the initial masks are always the ones drawn: their odds are e^50 to 1.
CERTAIN = 50.0


every_estimator = pytest.mark.parametrize("estimator", get_args(EstimatorName))


class Net(pl.LightningModule):
    """Regresses onto random rows; every new one has the same weights.

    Args:
        inside: What lies between the two linear layers.
        width: Inputs, hidden units and outputs.
    """

    def __init__(self, *inside: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.net = nn.Sequential(linear(width, 1), *inside, nn.ReLU(), linear(width, 2))

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return mse_loss(self.net(inputs.to(self.dtype)), targets.to(self.dtype))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("held_out_loss", self.loss(batch), add_dataloader_idx=dataloader_idx > 0)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Watched(Net):
    """Remembers which versions of its weights each pass has seen."""

    def __init__(self, callback: MaskProCallback) -> None:
        super().__init__()
        self.callback = [callback]  # in a list, as a copy of the module shall leave it alone
        # Not lists of the module's own, to which an extra pass would add nothing.
        self.seen: Mapping[str, list[set[str]]] = MappingProxyType({"trained": [], "validated": []})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen["trained"].append(versions_held(self, self.callback[0]))
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen["validated"].append(versions_held(self, self.callback[0]))


def linear(width: int, seed: int) -> nn.Linear:
    layer = nn.Linear(width, width)
    with torch.no_grad():
        layer.weight.copy_(oracle.random(width, width, seed=seed) / width**0.5)
        layer.bias.copy_(oracle.random(width, seed=seed + 10))
    return layer


def dataset(rows: int = ROWS, width: int = WIDTH) -> TensorDataset:
    return TensorDataset(oracle.random(rows, width, seed=20), oracle.random(rows, width, seed=21))


def loader(rows: int = ROWS, width: int = WIDTH, **kwargs: Any) -> DataLoader[Any]:
    """Four batches of eight rows, in order, unless told otherwise."""
    return DataLoader(dataset(rows, width), **{"batch_size": BATCH} | kwargs)


def inputs_of(**layers: nn.Module) -> Inputs:
    """The inputs of the weights of layers."""
    targets = [
        Target(name, layer, layer.weight, -1, layer.weight.shape)  # type: ignore[arg-type]
        for name, layer in layers.items()
    ]
    return Inputs(targets, {})


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that a fit resumes in the middle of an epoch; Lightning saves its state."""

    taken = 0
    skip = 0

    def __iter__(self) -> Iterator[Any]:
        self.taken, self.skip = self.skip, 0
        for batch in islice(super().__iter__(), self.taken, None):
            self.taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["taken"] % len(self)


def quiet_trainer(folder: Path, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    """A Trainer on one CPU that shows nothing, logs nothing and saves nothing unless told to."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(callbacks=list(callbacks), **defaults | kwargs)


def fit(
    module: pl.LightningModule,
    *callbacks: pl.Callback,
    folder: Path,
    data: Any = None,
    validate: bool = True,
    ckpt_path: Path | None = None,
    **kwargs: Any,
) -> pl.Trainer:
    """Fit a module, with validation on the first two batches."""
    trainer = quiet_trainer(folder, *callbacks, **kwargs)
    train, val = loader() if data is None else data, loader(2 * BATCH) if validate else None
    trainer.fit(module, train, val, ckpt_path=ckpt_path)
    return trainer


def learned(callback: MaskProCallback, version: Version = "mode") -> dict[str, Tensor]:
    assert callback.optimizer is not None
    return callback.optimizer.masks(version)


def logits(callback: MaskProCallback) -> dict[str, Tensor]:
    assert callback.optimizer is not None
    return callback.optimizer.logits()


def assert_learned(callback: MaskProCallback) -> None:
    """Every weight's logits are not what they were at the start."""
    assert callback.optimizer is not None
    scale = callback.optimizer.param_groups[0]["logit_scale"]
    for name, start in learned(callback, "initial").items():
        assert not torch.equal(logits(callback)[name], scale * start), name


def everything(trainer: pl.Trainer, module: nn.Module, callback: MaskProCallback) -> dict[str, Any]:
    """All that a resumed fit has to have in common with one that was not interrupted."""
    assert callback.optimizer is not None
    state = callback.state_dict()
    del state["journal"]["validation"]  # has a law of its own in test_resume
    return {
        "logits": logits(callback),
        **{version: learned(callback, version) for version in ("initial", "drawn", "mode")},
        "weights": dict(module.state_dict()),
        "optimizer": callback.optimizer.state_dict(),
        "schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
        "callback": state,
        "global_step": trainer.global_step,
        "epoch": trainer.current_epoch,
    }


def identical(one: Any, other: Any) -> bool:
    """Equal to the bit, all the way down."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and same_bits(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(identical(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(identical, one, other))
    return bool(one == other)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit, where ``torch.equal`` takes 0 for -0."""
    bits = [t.detach().contiguous().flatten().view(torch.uint8) for t in (one, other)]
    return one.shape == other.shape and torch.equal(*bits)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    return all(a == b and same_bits(p, q) for (a, p), (b, q) in pairs)


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def versions_held(module: nn.Module, callback: MaskProCallback) -> set[str]:
    """Which versions of the masks a module's zeros agree with; "dense" if it has none."""
    weights = {name: p for name, p in module.named_parameters() if p.dim() > 1}
    if all(weight.all() for weight in weights.values()):
        return {"dense"}
    kept = {name: weight != 0 for name, weight in weights.items()}
    versions: tuple[Version, ...] = ("initial", "drawn", "mode")
    return {version for version in versions if equal(kept, learned(callback, version))}


def traces(trainer: pl.Trainer, module: nn.Module) -> list[object]:
    """Names of attributes, hooks and buffers, and the switches of everything a fit works with."""
    loops = trainer.fit_loop, trainer.fit_loop.epoch_loop
    owners = [trainer, trainer.strategy, *loops, loops[1].automatic_optimization, *module.modules()]
    owners += [trainer.strategy.precision_plugin, *trainer.loggers]
    return [
        (
            type(owner).__name__,
            sorted(vars(owner)),
            {name: v for name, v in vars(owner).items() if isinstance(v, bool)},
            {name: len(v) for name, v in vars(owner).items() if name.endswith("_hooks")},
            [name for name, _ in owner.named_buffers()] if isinstance(owner, nn.Module) else [],
        )
        for owner in owners
    ]


def assert_masked(module: nn.Module, dense: nn.Module, pattern: str = "2:4") -> None:
    """Exactly N of M of the dense weights in every default target; all else as it was."""
    n, m = map(int, pattern.split(":"))
    input_dims = {id(t.parameter): t.input_dim for t in find_targets(module, pattern)}
    before = dict(dense.named_parameters())
    for name, weight in module.named_parameters():
        expected = before[name]
        if id(weight) in input_dims:
            kept = weight != 0
            assert oracle.keeps_exactly(n, m, kept, input_dims[id(weight)]), name
            expected = expected.where(kept, 0.0)
        assert same_bits(weight, expected), name
