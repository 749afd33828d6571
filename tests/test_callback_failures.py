"""Laws of a fit that fails, and of the fits that MaskProCallback refuses."""

from __future__ import annotations

import inspect
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from modules import (
    FAST,
    Net,
    assert_masked,
    fit,
    loader,
    quiet_trainer,
    same_weights,
    traces,
    versions_held,
)
from rules import mask_callback
from torch import Tensor

from maskpro_lightning import MaskProCallback
from maskpro_lightning.optim.masked_weight import MaskedWeight, Version

# Those before the first step, and the others.
EARLY_HOOKS = ["setup", "on_fit_start", "on_train_start"]
CALLBACK_HOOKS = [
    *EARLY_HOOKS,
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_end",
    "on_save_checkpoint",
    "on_train_epoch_end",
    "on_train_end",
]
# Lightning calls them when the fit is over and the module is the user's again.
LATE_HOOKS = ["on_fit_end", "teardown"]


saves_on_exception = pytest.mark.skipif(
    "save_on_exception" not in inspect.signature(ModelCheckpoint).parameters,
    reason="this Lightning does not save on exceptions",
)


class Fails(Net):
    """Raises in a step of its own, from the third update on."""

    def __init__(self, step: str = "", error: BaseException | None = None) -> None:
        super().__init__()
        self.step, self.error = step, error

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self._fail("training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._fail("validation_step")
        super().validation_step(batch, batch_idx, dataloader_idx)

    def _fail(self, step: str) -> None:
        if self.error is not None and step == self.step and self.global_step >= 3:
            raise self.error


def failing_callback(hook: str, error: BaseException) -> pl.Callback:
    """Raises in a hook; the fit ends after six updates."""
    callback = pl.Callback()

    def fail(trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step >= 3 or hook in EARLY_HOOKS:
            raise error

    setattr(callback, hook, fail)
    return callback


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Lightning ignores Ctrl-C for good once it has seen one; this puts the handler back."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def failed_fit(
    folder: Path, module: Net, *callbacks: pl.Callback, raises: type[BaseException]
) -> pl.Trainer:
    save = ModelCheckpoint(folder, every_n_train_steps=4)
    trainer = quiet_trainer(folder, *callbacks, save, max_steps=6, val_check_interval=2)
    with pytest.raises(raises) as info:
        trainer.fit(module, loader(), loader(16))
    assert info.match("boom" if raises is RuntimeError else "1")
    return trainer


# --- failures -----------------------------------------------------------------------------------


def test_a_write_that_fails_on_the_way_out_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, failed = MaskedWeight.write, []
    module = Fails("training_step", RuntimeError("boom"))

    def without_memory(weight: MaskedWeight, version: Version) -> None:
        if version == "dense" and not failed and module.global_step >= 3:
            failed.append(weight.name)
            raise MemoryError
        write(weight, version)

    monkeypatch.setattr(MaskedWeight, "write", without_memory)
    failed_fit(tmp_path, module, mask_callback(lr=FAST), raises=RuntimeError)
    assert failed
    assert same_weights(module, Net())


@pytest.mark.parametrize("step", ["training_step", "validation_step"])
def test_a_step_that_raises_leaves_the_dense_weights_and_no_trace(
    step: str, tmp_path: Path
) -> None:
    plain, module = (Fails(step, RuntimeError("boom")) for _ in range(2))
    expected = traces(failed_fit(tmp_path / "plain", plain, raises=RuntimeError), plain)
    callback = mask_callback(lr=FAST)
    trainer = failed_fit(tmp_path / "masked", module, callback, raises=RuntimeError)
    assert callback.optimizer is not None
    assert callback.optimizer.begun
    assert same_weights(module, Net())
    assert traces(trainer, module) == expected


@pytest.mark.parametrize("hook", CALLBACK_HOOKS)
@pytest.mark.parametrize("first", [True, False])
def test_a_callback_that_raises_leaves_the_dense_weights_and_no_trace(
    hook: str, first: bool, tmp_path: Path
) -> None:
    plain, module = Net(), Net()
    bad = failing_callback(hook, RuntimeError("boom"))
    expected = traces(failed_fit(tmp_path / "plain", plain, bad, raises=RuntimeError), plain)
    ours = mask_callback(lr=FAST)
    callbacks = (bad, ours) if first else (ours, bad)
    trainer = failed_fit(tmp_path / "masked", module, *callbacks, raises=RuntimeError)
    assert same_weights(module, Net())
    assert traces(trainer, module) == expected


@pytest.mark.parametrize("hook", LATE_HOOKS)
@pytest.mark.parametrize("first", [True, False])
def test_a_callback_that_raises_when_all_is_done_leaves_the_masks_and_no_trace(
    hook: str, first: bool, tmp_path: Path
) -> None:
    plain, module = Net(), Net()
    bad = failing_callback(hook, RuntimeError("boom"))
    expected = traces(failed_fit(tmp_path / "plain", plain, bad, raises=RuntimeError), plain)
    ours = mask_callback(lr=FAST)
    callbacks = (bad, ours) if first else (ours, bad)
    trainer = failed_fit(tmp_path / "masked", module, *callbacks, raises=RuntimeError)
    assert_masked(module, Net())
    assert versions_held(module, ours) == {"mode"}
    assert traces(trainer, module) == expected


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("step", ["training_step", "validation_step"])
def test_ctrl_c_leaves_the_dense_weights_and_no_trace(step: str, tmp_path: Path) -> None:
    plain, module = (Fails(step, KeyboardInterrupt()) for _ in range(2))
    expected = traces(failed_fit(tmp_path / "plain", plain, raises=SystemExit), plain)
    callback = mask_callback(lr=FAST)
    trainer = failed_fit(tmp_path / "masked", module, callback, raises=SystemExit)
    assert same_weights(module, Net())
    assert traces(trainer, module) == expected


def test_a_sanity_check_that_raises_leaves_no_trace(tmp_path: Path) -> None:
    class Insane(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("boom")

    found = []
    for callbacks in ([], [MaskProCallback()]):
        module = Insane()
        trainer = quiet_trainer(tmp_path, *callbacks, max_steps=6, num_sanity_val_steps=1)
        with pytest.raises(RuntimeError, match="boom"):
            trainer.fit(module, loader(), loader(16))
        assert same_weights(module, Net())
        found.append(traces(trainer, module))
    assert found[0] == found[1]


def test_a_trainer_fits_after_a_failure(tmp_path: Path) -> None:
    module, callback = Fails("training_step", RuntimeError("boom")), mask_callback(lr=FAST)
    trainer = failed_fit(tmp_path, module, callback, raises=RuntimeError)
    module.error = None
    trainer.fit(module, loader(), loader(16))
    assert_masked(module, Net())
    assert versions_held(module, callback) == {"mode"}


@saves_on_exception
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=repr)
def test_a_checkpoint_on_exception_holds_masks_and_resumes(
    error: BaseException, tmp_path: Path
) -> None:
    module, callback = Fails("training_step", error), mask_callback(lr=FAST)
    save = ModelCheckpoint(tmp_path / "saved", save_on_exception=True)
    with pytest.raises((RuntimeError, SystemExit)):
        fit(module, callback, save, folder=tmp_path, max_steps=6)
    (path,) = (tmp_path / "saved").iterdir()
    assert_masked(Net.load_from_checkpoint(path), Net())
    resumed, again = Net(), mask_callback(lr=FAST)
    trainer = fit(resumed, again, save, folder=tmp_path, ckpt_path=path, max_steps=6)
    assert trainer.global_step == 6
    assert again.optimizer is not None
    assert again.optimizer.param_groups[0]["step"] == 6
    assert_masked(resumed, Net())


# --- refusals -----------------------------------------------------------------------------------


class Iterating(Net):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        return self.loss(next(dataloader_iter)[0])


class Odd(SingleDeviceStrategy):
    """A strategy of Lightning's that nobody has tested."""

    __module__ = "lightning.pytorch.strategies.odd"


@pytest.mark.parametrize(
    ("module", "kwargs", "message"),
    [
        pytest.param(
            Iterating,
            {},
            r"Iterating\.training_step takes a dataloader_iter.*take a batch instead",
            id="dataloader_iter",
            marks=pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step"),
        ),
        pytest.param(
            Net,
            {"strategy": Odd(torch.device("cpu"))},
            r"tested with .*, FSDPStrategy, ModelParallelStrategy, not with Odd: choose ",
            id="strategy",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    module: type[Net], kwargs: dict[str, Any], message: str, tmp_path: Path
) -> None:
    refused = module()
    trainer = quiet_trainer(tmp_path, mask_callback(), max_epochs=1, **kwargs)
    with pytest.raises(ValueError, match=message):
        trainer.fit(refused, loader(), loader(16))
    assert same_weights(refused, Net())
    assert "configure_optimizers" not in vars(refused)


def test_two_callbacks_of_a_kind_are_refused_by_lightning(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `MaskProC"):
        quiet_trainer(tmp_path, mask_callback(), mask_callback())


def test_layers_that_the_pattern_does_not_fit_are_named(tmp_path: Path) -> None:
    module = Net()
    with pytest.raises(ValueError, match=r"'net\.0\.weight' has 16 inputs, not a multiple"):
        fit(module, mask_callback("2:32"), folder=tmp_path, max_steps=1)
    assert "configure_optimizers" not in vars(module)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@saves_on_exception
def test_a_checkpoint_on_exception_does_not_hide_the_error(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, save_on_exception=True)
    fit(Net(), save, folder=tmp_path, max_steps=1)  # so that there is something new to save
    with pytest.raises(ValueError, match=r"'net\.0\.weight' has 16 inputs"):
        fit(Net(), mask_callback("2:32"), save, folder=tmp_path, max_steps=1)


def test_resuming_with_another_pattern_is_refused(tmp_path: Path) -> None:
    fit(Net(), mask_callback(), folder=tmp_path, max_steps=1).save_checkpoint(tmp_path / "a.ckpt")
    module = Net()
    with pytest.raises(ValueError, match=r"pattern is '2:4' there and '1:4' here"):
        fit(
            module,
            mask_callback("1:4"),
            folder=tmp_path,
            ckpt_path=tmp_path / "a.ckpt",
            max_steps=2,
        )
