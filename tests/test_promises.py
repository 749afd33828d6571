"""What leaves a fit is what was promised, whoever else is at work on the module."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from modules import (
    BATCH,
    FAST,
    Net,
    assert_masked,
    equal,
    every_estimator,
    fit,
    identical,
    learned,
    loader,
    logits,
    quiet_trainer,
    same_weights,
)
from oracle import random
from rules import mask_callback, mask_optimizer
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from maskpro_lightning import MaskProCallback
from maskpro_lightning.optim.estimators import EstimatorName

every_memory = pytest.mark.parametrize("memory", ["plain", "lean"])


def masks(estimator: EstimatorName = "straight_through", **kwargs: Any) -> MaskProCallback:
    return mask_callback(estimator=estimator, lr=FAST, **kwargs)


# --- others who write ---------------------------------------------------------------------------


class Backbone(Net):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.net[0]

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return mse_loss(self.net[2](self.net[1](self.backbone(inputs))), targets)


RIVALS = {
    "EMA": partial(EMAWeightAveraging, decay=0.9),
    "SWA": partial(StochasticWeightAveraging, 1e-2, swa_epoch_start=1),
    "pruning": partial(ModelPruning, "l1_unstructured", amount=0.3),
    "backbone": partial(BackboneFinetuning, unfreeze_backbone_at_epoch=1),
    "learning rate": partial(LearningRateFinder, num_training_steps=6),
}


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
@pytest.mark.parametrize("make", RIVALS.values(), ids=RIVALS.keys())
@every_estimator
def test_callbacks_that_train_weights_are_left_out_of_a_fit_and_given_back(
    estimator: EstimatorName,
    make: Any,
    first: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    callback, rival, module = masks(estimator), make(), Backbone()
    order = [rival, callback] if first else [callback, rival]
    save = ModelCheckpoint(tmp_path, save_last=True)
    trainer = fit(module, *order, save, folder=tmp_path, max_epochs=3)
    assert_masked(module, Backbone())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert equal(saved, dict(module.state_dict()))
    assert rival in trainer.callbacks
    assert f"{type(rival).__name__} is left out of this fit" in caplog.text
    assert callback.optimizer is not None
    assert callback.optimizer.param_groups[0]["step"] == 12


class Scribbler(Net):
    """Writes into a masked weight in a hook."""

    def __init__(self, hook: str, epoch: int, value: float) -> None:
        super().__init__()
        self.epoch, self.value = epoch, value
        setattr(self, hook, self.scribble)

    def scribble(self, *_: Any) -> None:
        if self.current_epoch >= self.epoch:
            with torch.no_grad():
                self.net[2].weight.data[0, :4] += self.value


@pytest.mark.parametrize(
    ("hook", "epoch"),
    [("on_train_epoch_end", 1), ("on_train_end", 0), ("on_fit_end", 0), ("on_train_batch_end", 1)],
)
@every_memory
def test_where_somebody_else_writes_the_fit_leaves_the_mask_or_the_weights_name(
    memory: str, hook: str, epoch: int, tmp_path: Path
) -> None:
    module = Scribbler(hook, epoch, 1.0)
    heals = memory == "plain" and hook == "on_train_epoch_end"  # the next draw is written over it
    message = r"Somebody else has written into 'net\.2\.weight' \(1 of the masked weights\)"
    with nullcontext() if heals else pytest.raises(RuntimeError, match=message):
        fit(module, masks(memory=memory), folder=tmp_path, max_epochs=3)
    if heals:
        assert_masked(module, Net())


@every_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_known_again_to_the_bit(memory: str, dtype: torch.dtype) -> None:
    weight = nn.Parameter(random(16, 32).to(dtype))
    optimizer = mask_optimizer([("w", weight)], memory=memory)
    for loss in (0.0, 1.0, 3.0):
        optimizer.step(lambda loss=loss: torch.tensor(loss), torch.tensor(0.0))
    for version in ("drawn", "mode", "initial", "best", "dense", "mode"):
        optimizer.write(version)
        assert optimizer.overwritten() == []
    kept, pruned = (weight.data[0] != 0).nonzero()[0], (weight.data[0] == 0).nonzero()[0]
    for place, value in ((kept, 0.0), (pruned, 1e-3)):
        before = weight.data[0, place].clone()
        weight.data[0, place] = value
        assert optimizer.overwritten() == ["w"]
        weight.data[0, place] = before
        assert optimizer.overwritten() == []


class Sized(Net):
    batch_size = BATCH

    def train_dataloader(self) -> Any:
        return loader(batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return loader(2 * BATCH)


@every_estimator
def test_a_search_for_the_batch_size_learns_nothing(
    estimator: EstimatorName, tmp_path: Path
) -> None:
    module, callback = Sized(), masks(estimator)
    finder = BatchSizeFinder(max_trials=2, steps_per_trial=2)
    quiet_trainer(tmp_path, finder, callback, max_epochs=2).fit(module)
    assert_masked(module, Sized())


def test_two_wrappers_of_an_optimizer_agree_on_what_the_weights_hold() -> None:
    weight = nn.Parameter(random(8, 16))
    optimizer = mask_optimizer([("w", weight)], logit_scale=0.5)
    wrapper = copy.copy(optimizer)  # as Fabric makes one
    optimizer.begin()
    for loss in (1.0, 3.0):
        wrapper.step(lambda loss=loss: torch.tensor(loss), torch.tensor(0.0))
        wrapper.write("mode")
        assert torch.equal(weight != 0, optimizer.masks("mode")["w"])


# --- the mask and what was measured with it -----------------------------------------------------


@pytest.mark.parametrize("resumed", [False, True], ids=["at once", "resumed"])
def test_buffers_are_those_of_the_mask_that_is_deployed(resumed: bool, tmp_path: Path) -> None:
    class Drifting(Net):
        """Its best validation is an early one, and its statistics go on moving."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            inputs, targets = batch
            return self.loss((inputs + self.global_step, targets))

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", self.loss(batch))

        def on_validation_start(self) -> None:
            self.eval()

    module, callback = Drifting(nn.BatchNorm1d(16)), masks()
    save = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    fit(module, callback, save, folder=tmp_path, max_epochs=3)
    if resumed:
        module, callback = Drifting(nn.BatchNorm1d(16)), masks()
        fit(module, callback, folder=tmp_path, max_epochs=3, ckpt_path=tmp_path / "step=8.ckpt")
    assert callback._best.version == "best"
    (found,) = quiet_trainer(tmp_path).validate(module, loader(2 * BATCH), verbose=False)
    assert found["val_loss"] == pytest.approx(callback._best.value, rel=1e-5)


# --- the dense weights --------------------------------------------------------------------------


@every_estimator
def test_a_cell_that_is_run_twice_is_refused_and_the_module_is_left_as_it_was(
    estimator: EstimatorName, tmp_path: Path
) -> None:
    module, first = Net(), masks(estimator)
    fit(module, first, folder=tmp_path, max_steps=3)
    before = copy.deepcopy(module)
    with pytest.raises(ValueError, match=r"'net\.0\.weight' is 2:4 already.*init='nonzeros'"):
        fit(module, masks(estimator), folder=tmp_path, max_steps=3)
    assert same_weights(module, before)
    first.restore_dense()
    assert same_weights(module, Net())
    fit(module, masks(estimator), folder=tmp_path, max_steps=3)
    assert_masked(module, Net())


def test_weights_of_zeros_alone_are_not_taken_for_pruned_ones(tmp_path: Path) -> None:
    module = Net()
    nn.init.zeros_(module.net[2].weight)
    fit(module, masks("policy"), folder=tmp_path, max_steps=3)
    assert ((module.net[0].weight != 0).view(-1, 4).sum(1) == 2).all()


def test_a_refused_checkpoint_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    trainer = fit(Net(), masks("policy"), folder=tmp_path, max_steps=4)
    trainer.save_checkpoint(tmp_path / "policy.ckpt")
    module = Net()
    with pytest.raises(ValueError, match="estimator is 'policy' there and 'straight_through' here"):
        fit(module, masks(), folder=tmp_path, max_steps=8, ckpt_path=tmp_path / "policy.ckpt")
    assert same_weights(module, Net())


def test_without_a_fit_there_is_nothing_to_restore() -> None:
    with pytest.raises(RuntimeError, match="has masked no weights"):
        masks().restore_dense()
    with pytest.raises(RuntimeError, match="has masked no weights"):
        masks().deployed_masks()


@pytest.mark.parametrize(
    "limits", [{"max_steps": 0}, {"max_epochs": 0}, {"limit_train_batches": 0, "max_epochs": 1}]
)
def test_a_fit_without_a_step_ends_with_an_error(limits: dict[str, Any], tmp_path: Path) -> None:
    module = Net()
    with pytest.raises(RuntimeError, match="This fit made no step, so no mask was found and Net"):
        fit(module, masks(), folder=tmp_path, **limits)
    assert same_weights(module, Net())


def test_a_trainer_that_is_through_is_told_so_and_the_masks_stay(tmp_path: Path) -> None:
    module, callback = Net(), masks()
    trainer = fit(module, callback, folder=tmp_path, max_steps=2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"is as it was: .* counts on from step 2: make a new"):
        trainer.fit(module, loader())
    assert equal(module.state_dict(), before)


# --- gradients ----------------------------------------------------------------------------------


def test_a_scale_that_overflows_is_lowered(tmp_path: Path) -> None:
    class Large(Net):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) * 1000

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    callback, plugin = masks(), MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fit(Large(), callback, folder=tmp_path, max_steps=40, validate=False, plugins=[plugin])
    assert callback.optimizer is not None
    assert scaler.get_scale() < 2.0**16
    assert callback.optimizer.tracker["skipped"] < 20


class Twice(Net):
    """Calls its first layer twice, each call in a checkpoint of its own."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        layer = partial(checkpoint, self.net[0], use_reentrant=self.reentrant)
        return mse_loss(self.net[2](layer(layer(inputs.requires_grad_()).relu())), targets)


def test_a_layer_in_several_reentrant_checkpoints_learns_from_its_whole_gradient(
    tmp_path: Path,
) -> None:
    found = []
    for reentrant in (True, False):
        callback = masks()
        fit(Twice(reentrant=reentrant), callback, folder=tmp_path, max_steps=1, validate=False)
        found.append(logits(callback))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name])


def test_weights_that_get_no_gradient_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Cut(Net):
        def loss(self, batch: Any) -> Tensor:
            inputs, targets = batch
            with torch.no_grad():
                hidden = self.net[0](inputs)
            return mse_loss(self.net[2](hidden), targets)

    fit(Cut(), masks(), folder=tmp_path, max_steps=3)
    text = "1 of 2 masked weights got no gradient in the first step, such as 'net.0.weight'"
    assert caplog.text.count(text) == 1


# --- passes that leave no trace -----------------------------------------------------------------


class Popping(Net):
    def loss(self, batch: Any) -> Tensor:
        batch = {"inputs": batch[0], "targets": batch[1]} if isinstance(batch, list) else batch
        return super().loss((batch["inputs"], batch.pop("targets")))


@every_estimator
def test_a_step_may_take_its_batch_apart(estimator: EstimatorName, tmp_path: Path) -> None:
    batches = [{"inputs": x, "targets": y} for x, y in loader()]
    found = []
    for data in (loader(), DataLoader(batches, batch_size=None)):
        callback = masks(estimator)
        fit(Popping(), callback, folder=tmp_path, data=data, validate=False, max_steps=4)
        found.append(logits(callback))
    assert identical(*found)


def test_what_a_step_changes_is_changed_once(tmp_path: Path) -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Parameter(torch.zeros(1), requires_grad=False)
            self.outputs: list[float] = []
            self.sums = {"steps": 0, "losses": [0.0]}
            self.sums["itself"] = self.sums

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.teacher.data += 1
            self.outputs.append(1.0)
            self.sums["steps"] += 1
            self.sums["losses"].append(1.0)  # type: ignore[attr-defined]
            return self.loss(batch)

    module = Counting()
    fit(module, masks("policy"), folder=tmp_path, validate=False, max_steps=6)
    assert float(module.teacher) == len(module.outputs) == module.sums["steps"] == 6
    assert len(module.sums["losses"]) == 7  # type: ignore[arg-type]


def test_a_loss_that_follows_a_schedule_is_measured_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Warming(Net):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) * (1 + self.current_epoch)

    found = []
    for cache in (2**16, 0):
        callback = masks("policy", baseline_cache=cache)
        fit(Warming(), callback, folder=tmp_path, validate=False, max_epochs=4)
        found.append(logits(callback))
    assert identical(*found)
    assert caplog.text.count("Baselines are measured at every step from now on") == 1


def test_batches_with_numpy_arrays_are_remembered(tmp_path: Path) -> None:
    class Labelled(Net):
        def loss(self, batch: Any) -> Tensor:
            return super().loss((batch["inputs"], batch["targets"]))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch)  # and logs nothing, for which Lightning asks a batch's size

    batches = [
        {"inputs": x, "targets": y, "rows": np.arange(3) + i} for i, (x, y) in enumerate(loader())
    ]
    callback, whole = masks("policy"), DataLoader(batches, batch_size=None)
    fit(Labelled(), callback, folder=tmp_path, data=whole, validate=False, max_epochs=4)
    assert callback._baselines.hit_rate == 0.75


def test_a_remembered_loss_does_not_keep_what_it_is_a_view_of(tmp_path: Path) -> None:
    class Large(Net):
        def loss(self, batch: Any) -> Tensor:
            return (torch.zeros(10_000) + super().loss(batch))[0]

    callback = masks("policy")
    fit(Large(), callback, folder=tmp_path, validate=False, max_epochs=1)
    known = callback._baselines._losses.values()
    assert [loss.untyped_storage().nbytes() for loss in known] == [4] * 4


# --- copies, schedulers and numbers that others ask for -----------------------------------------


@every_estimator
def test_a_copy_made_in_a_fit_trains_plainly(estimator: EstimatorName, tmp_path: Path) -> None:
    class Copying(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1 and "kept" not in vars(self):
                self.__dict__["kept"] = copy.deepcopy(self)

    module = Copying()
    fit(module, masks(estimator), folder=tmp_path, validate=False, max_epochs=1)
    kept = vars(module).pop("kept")
    assert set(vars(kept)) - set(vars(Copying())) <= {"_hparams"}
    vars(kept)["kept"] = None
    before = kept.net[0].weight.detach().clone()
    fit(kept, folder=tmp_path, validate=False, max_epochs=1)
    assert not torch.equal(kept.net[0].weight, before)


def test_a_scheduler_that_cycles_momentum_leaves_the_tracker_alone(tmp_path: Path) -> None:
    scheduler = partial(OneCycleLR, max_lr=1.0, total_steps=8, cycle_momentum=False)
    callback = masks("policy", lr_scheduler=scheduler)
    fit(Net(), callback, folder=tmp_path, max_steps=6)
    assert callback.optimizer is not None
    assert callback.optimizer.param_groups[0]["tracker_momentum"] == 0.99
    with pytest.raises(ValueError, match="must support momentum"):
        OneCycleLR(callback.optimizer, max_lr=1.0, total_steps=8)


@every_estimator
def test_a_scheduler_may_wait_for_a_plateau(estimator: EstimatorName, tmp_path: Path) -> None:
    scheduler = partial(ReduceLROnPlateau, patience=0, threshold=1e9, threshold_mode="abs")
    callback = masks(estimator, lr_scheduler=scheduler)
    fit(Net(), callback, folder=tmp_path, max_steps=4)
    assert callback.optimizer is not None
    assert callback.optimizer.param_groups[0]["lr"] < FAST


@every_estimator
def test_others_may_stop_by_numbers_that_are_logged_now_and_then(
    estimator: EstimatorName, tmp_path: Path
) -> None:
    stop = EarlyStopping("maskpro/entropy", patience=1, check_on_train_epoch_end=True)
    fit(Net(), masks(estimator), stop, folder=tmp_path, max_epochs=3)
    assert stop.best_score < 1


def test_a_metric_that_no_validation_logs_is_named_with_those_that_there_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(Net(), masks(monitor="val_loss"), folder=tmp_path, max_steps=4)
    assert "validation logs no 'val_loss'" in caplog.text
    assert "set monitor to one of 'held_out_loss'" in caplog.text


def test_a_callback_shows_what_it_will_do_and_what_it_did(tmp_path: Path) -> None:
    callback = masks("policy")
    assert repr(callback).startswith("MaskProCallback(2:4 masks from magnitude by Policy(lr=3.0")
    fit(Net(), callback, folder=tmp_path, max_steps=3)
    assert repr(callback).endswith("512 weights after 3 steps)")
    assert learned(callback)
