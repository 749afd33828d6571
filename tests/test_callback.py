"""Laws of what a fit with MaskProCallback leaves in modules, checkpoints and Trainers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import (
    FAST,
    Net,
    Watched,
    assert_masked,
    equal,
    every_estimator,
    fit,
    learned,
    loader,
    logits,
    same_bits,
    same_weights,
    traces,
    versions_held,
)
from rules import mask_callback
from torch import Tensor

from maskpro_lightning import MaskProCallback
from maskpro_lightning.optim.estimators import EstimatorName


def fast(**kwargs: Any) -> MaskProCallback:
    return mask_callback(lr=FAST, **kwargs)


# --- the weights --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "estimator"),
    [
        *((pattern, "policy") for pattern in ("1:4", "2:4", "4:8", "3:5", "8:16")),
        *((pattern, "straight_through") for pattern in ("1:4", "2:4")),
    ],
)
def test_a_fit_leaves_n_of_m_of_the_dense_weights_and_all_else_as_it_was(
    estimator: EstimatorName, pattern: str, tmp_path: Path
) -> None:
    module, callback = Net(width=80), mask_callback(pattern, estimator=estimator, lr=FAST)
    fit(module, callback, folder=tmp_path, data=loader(width=80), max_epochs=2, limit_val_batches=0)
    assert_masked(module, Net(width=80), pattern)
    assert versions_held(module, callback) == {"mode"}


def test_flags_of_gradients_stay_as_the_user_set_them(tmp_path: Path) -> None:
    module = Net()
    module.net[0].requires_grad_(False)
    module.net[2].bias.requires_grad_(False)
    fit(module, fast(), folder=tmp_path, max_steps=2)
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    assert [name for name, flag in flags.items() if flag] == ["net.2.weight"]
    assert_masked(module, Net())


def test_excluded_layers_stay_dense(tmp_path: Path) -> None:
    module, callback = Net(), fast(exclude=["net.0"])
    fit(module, callback, folder=tmp_path, max_steps=6)
    assert same_bits(module.net[0].weight, Net().net[0].weight)
    assert learned(callback).keys() == {"net.2.weight"}


def test_training_sees_drawn_masks_and_validation_the_most_likely_one(tmp_path: Path) -> None:
    callback = fast()
    module = Watched(callback)
    fit(module, callback, folder=tmp_path, max_epochs=3, num_sanity_val_steps=1)
    # First it is watched what multiplies. In the first epoch each batch's baseline is measured, in
    # the second it is audited, and from then on it is remembered.
    expected = ["dense"] + ["initial", "drawn"] * 8 + ["drawn"] * 4
    for version, seen in zip(expected, module.seen["trained"], strict=True):
        assert version in seen
    assert module.seen["trained"][-1] == {"drawn"}
    assert module.seen["validated"] == [{"dense"}] + [{"mode"}] * 6


def test_with_gradients_training_sees_drawn_masks_alone(tmp_path: Path) -> None:
    callback = fast(estimator="straight_through")
    module = Watched(callback)
    fit(module, callback, folder=tmp_path, max_epochs=2)
    assert len(module.seen["trained"]) == 9
    assert module.seen["trained"].pop(0) == {"dense"}  # watched for what multiplies
    assert all("drawn" in seen for seen in module.seen["trained"])
    assert {"drawn"} in module.seen["trained"]  # late draws are sharp, and may be the mode
    assert len(module.seen["validated"]) == 8
    assert module.seen["validated"][:2] == [{"dense"}] * 2  # before the first step
    assert module.seen["validated"][2:4] == [{"initial", "mode"}] * 2
    assert all("mode" in seen for seen in module.seen["validated"][4:])
    assert {"mode"} in module.seen["validated"]


def test_validation_in_the_midst_of_an_epoch_leaves_training_alone(tmp_path: Path) -> None:
    callbacks = [fast(), fast()]
    for callback, interval in zip(callbacks, (1, 4), strict=True):
        fit(Net(), callback, folder=tmp_path, max_epochs=2, val_check_interval=interval)
    assert equal(*map(logits, callbacks))


# --- what the fit leaves elsewhere --------------------------------------------------------------


@pytest.mark.parametrize("init", ["sparsegpt", "reconstruction"])
@every_estimator
def test_nothing_is_left_on_module_strategy_and_loops(
    estimator: EstimatorName, init: str, tmp_path: Path
) -> None:
    plain, module = Net(), Net()
    callback = fast(init=init, estimator=estimator)
    expected = traces(fit(plain, folder=tmp_path, max_steps=4), plain)
    trainer = fit(module, callback, folder=tmp_path, max_steps=4)
    assert traces(trainer, module) == expected
    assert trainer.callbacks == [callback]
    assert all(weight.grad is None for weight in module.parameters())


def test_the_module_copies_and_pickles_after_a_fit(tmp_path: Path) -> None:
    module = Net()
    fit(module, fast(), folder=tmp_path, max_steps=6)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert same_weights(twin, module)


def test_validate_test_and_predict_after_the_fit_use_the_fits_last_mask(tmp_path: Path) -> None:
    module, val = Net(), loader(16)
    trainer = fit(module, fast(), folder=tmp_path, max_epochs=2)
    in_the_fit = float(trainer.callback_metrics["held_out_loss"])
    assert trainer.validate(module, val, verbose=False) == [{"held_out_loss": in_the_fit}]
    assert trainer.test(module, val, verbose=False) == [{"test_loss": in_the_fit}]
    (predicted, _) = trainer.predict(module, val)
    with torch.no_grad():
        assert torch.equal(predicted, module.net(next(iter(val))[0]))
    assert_masked(module, Net())


def test_a_plain_fit_afterwards_trains_weights_again(tmp_path: Path) -> None:
    module, callback = Net(), fast()
    trainer = fit(module, callback, folder=tmp_path, max_epochs=1)
    before = copy.deepcopy(module)
    trainer.callbacks.remove(callback)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(), loader(16))
    assert not any(map(torch.equal, module.parameters(), before.parameters()))
    assert isinstance(trainer.optimizers[0], torch.optim.SGD)


def test_another_callback_goes_on_from_the_masks_of_the_first(tmp_path: Path) -> None:
    module = Net()
    fit(module, first := fast(), folder=tmp_path, max_steps=6)
    fit(module, second := fast(init="nonzeros"), folder=tmp_path, max_steps=6)
    assert equal(learned(second, "initial"), learned(first))
    assert not equal(learned(second), learned(first))


def test_a_callback_used_again_is_as_good_as_new(tmp_path: Path) -> None:
    def negative() -> Net:
        module = Net()
        with torch.no_grad():
            module.net[2].bias.neg_()
        return module

    used, new = fast(), fast()
    fit(Net(), used, folder=tmp_path, max_epochs=1)
    for callback in (used, new):
        fit(negative(), callback, folder=tmp_path, max_epochs=1)
    assert equal(logits(used), logits(new))
    assert used.state_dict() == new.state_dict()


# --- checkpoints --------------------------------------------------------------------------------


class Masks(pl.Callback):
    """Remembers the most likely mask at every step, and at how many it is not the drawn one."""

    def __init__(self, callback: MaskProCallback) -> None:
        self.callback = callback
        self.at: dict[int, dict[str, Tensor]] = {}
        self.unlike_the_draw = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.at[trainer.global_step] = learned(self.callback)
        self.unlike_the_draw += "mode" not in versions_held(trainer.lightning_module, self.callback)


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_holds_the_most_likely_masks_of_its_step(
    weights_only: bool, tmp_path: Path
) -> None:
    save = ModelCheckpoint(
        tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_weights_only=weights_only
    )
    masks = Masks(callback := fast())
    fit(Net(), callback, masks, save, folder=tmp_path, max_steps=6)
    for step, expected in masks.at.items():
        loaded = Net.load_from_checkpoint(tmp_path / f"step={step}.ckpt")
        assert_masked(loaded, Net())
        assert equal({name: loaded.get_parameter(name) != 0 for name in expected}, expected)
    assert list(masks.at) == [1, 2, 3, 4, 5, 6]
    assert masks.unlike_the_draw == 6


def test_saving_checkpoints_leaves_training_alone(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    fit(Net(), saving := fast(), save, folder=tmp_path, max_steps=6)
    fit(Net(), silent := fast(), folder=tmp_path, max_steps=6)
    assert equal(logits(saving), logits(silent))


def test_a_checkpoint_saved_by_hand_after_the_fit_is_the_module(tmp_path: Path) -> None:
    module = Net()
    trainer = fit(module, fast(), folder=tmp_path, max_steps=6)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert same_weights(Net.load_from_checkpoint(tmp_path / "end.ckpt"), module)


def test_a_checkpoint_of_an_ordinary_training_is_where_masks_start(tmp_path: Path) -> None:
    trained = Net()
    fit(trained, folder=tmp_path, max_epochs=1).save_checkpoint(tmp_path / "plain.ckpt")
    module, callback = Net(), fast()
    trainer = fit(
        module, callback, folder=tmp_path, ckpt_path=tmp_path / "plain.ckpt", max_epochs=3
    )
    assert trainer.global_step == 12
    assert_masked(module, trained)


def test_resuming_a_finished_fit_leaves_its_masks(tmp_path: Path) -> None:
    module, again = Net(), Net()
    fit(module, fast(), folder=tmp_path, max_steps=6).save_checkpoint(tmp_path / "end.ckpt")
    fit(again, fast(), folder=tmp_path, ckpt_path=tmp_path / "end.ckpt", max_steps=6)
    assert same_weights(again, module)
