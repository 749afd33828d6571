"""Laws of a fit that is broken off at any moment, by an error or by a signal."""

from __future__ import annotations

import copy
import os
import pickle
import random
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from modules import (
    BATCH,
    FAST,
    Net,
    ResumableLoader,
    assert_masked,
    dataset,
    equal,
    every_estimator,
    fit,
    identical,
    loader,
    logits,
    quiet_trainer,
    same_weights,
)
from optimizer_cases import assert_holds, one_weight, step
from oracle import random as randoms
from rules import mask_callback
from torch.utils._python_dispatch import TorchDispatchMode

from maskpro_lightning import MaskProCallback
from maskpro_lightning.optim.estimators import EstimatorName
from maskpro_lightning.optim.states import Memory

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]

STEPS, MOMENTS = 6, 16


class Broken(BaseException):
    """Comes at any moment, like Ctrl-C or a full memory."""


class Breaks(TorchDispatchMode):
    """Raises instead of the n-th operation on tensors."""

    def __init__(self, moment: int = -1) -> None:
        super().__init__()
        self.moment, self.done = moment, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.done += 1
        if self.done == self.moment:
            raise Broken
        return func(*args, **kwargs or {})


def fit_to_the_end(
    folder: Path, module: Net, callback: MaskProCallback, path: Path | None = None, **kwargs: Any
) -> pl.Trainer:
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    settings = {"max_steps": STEPS, "val_check_interval": 2, "num_sanity_val_steps": 1} | kwargs
    data = ResumableLoader(dataset(), batch_size=BATCH)
    return fit(module, callback, save, folder=folder, data=data, ckpt_path=path, **settings)


def last(folder: Path) -> Path | None:
    found = sorted(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem[5:]))
    return found[-1] if found else None


def names(owner: Any) -> set[str]:
    return {name for name in vars(owner) if not name.startswith("_")}


# --- any moment ---------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["plain", "lean"])
@every_estimator
def test_a_fit_that_breaks_at_any_operation_leaves_the_module_as_it_was_and_resumes(
    estimator: EstimatorName,
    memory: Memory,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    def masks() -> MaskProCallback:
        return mask_callback(lr=FAST, estimator=estimator, memory=memory)

    untouched = Net()
    untouched.net[2].bias.requires_grad_(False)
    whole, counter = masks(), Breaks()
    with counter:
        fit_to_the_end(tmp_path / "whole", copy.deepcopy(untouched), whole)
    moments = random.Random(0).sample(range(1, counter.done + 1), MOMENTS)
    for moment in moments:
        folder = tmp_path / str(moment)
        module, callback = copy.deepcopy(untouched), masks()
        with pytest.raises(Broken), Breaks(moment):
            fit_to_the_end(folder, module, callback)
        assert same_weights(module, untouched)
        assert names(module) <= names(untouched) | {"trainer"}
        assert not any(vars(m)[k] for m in module.modules() for k in vars(m) if "_hooks" in k)
        assert [p.requires_grad for p in module.parameters()] == [True, True, True, False]
        resumed = masks()
        fit_to_the_end(folder, module, resumed, last(folder))
        assert equal(logits(resumed), logits(whole))
        assert_masked(module, untouched)
    record_property("tried", len(moments))


@pytest.mark.parametrize("action", ["step", "mode"])
def test_lean_memory_that_breaks_at_each_operation_in_turn_loses_no_weight(action: str) -> None:
    dense = randoms(3, 8).bfloat16()
    dense[0, :2] = torch.tensor([0.0, -0.0])
    weight = torch.nn.Parameter(dense.clone())
    optimizer = one_weight(weight, memory="lean", lr=0.5, logit_scale=0.5)
    acts = {"step": partial(step, optimizer, 1.0), "mode": partial(optimizer.write, "mode")}
    step(optimizer, 1.0)
    broken, moment = True, 0
    while broken:
        moment += 1
        optimizer.write("drawn")
        try:
            with Breaks(moment):
                acts[action]()
            broken = False
        except Broken:
            pass
        for version in ("drawn", "dense"):
            optimizer.write(version)
            assert_holds(weight, dense, optimizer.masks(version)["w"])
    assert moment > 20  # or nothing was broken


# --- signals ------------------------------------------------------------------------------------


class Signalled(Net):
    """Gets a signal in the midst of a step, or after one."""

    def __init__(self, within: signal.Signals | None = None, after: Any = None) -> None:
        super().__init__()
        self.within, self.after = within, after

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.within is not None and self.global_step == 3:
            os.kill(os.getpid(), self.within)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.after is not None and self.global_step == 3:
            os.kill(os.getpid(), self.after)


@every_estimator
def test_a_fit_that_is_terminated_leaves_dense_weights_and_a_checkpoint_that_resumes(
    estimator: EstimatorName, tmp_path: Path
) -> None:
    def masks() -> MaskProCallback:
        return mask_callback(lr=FAST, estimator=estimator)

    whole, before = masks(), signal.getsignal(signal.SIGTERM)
    fit_to_the_end(tmp_path / "whole", Net(), whole)
    module = Signalled(signal.SIGTERM)
    with pytest.raises(SIGTERMException):
        fit_to_the_end(tmp_path / "ended", module, masks())
    assert signal.getsignal(signal.SIGTERM) == before
    assert same_weights(module, Net())
    path = last(tmp_path / "ended")
    assert path is not None
    assert path.stem == "step=4"  # the step is finished and saved
    resumed = masks()
    fit_to_the_end(tmp_path / "ended", Net(), resumed, path)
    assert equal(logits(resumed), logits(whole))


def test_a_job_that_slurm_takes_back_resumes_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = mask_callback(lr=FAST)
    fit_to_the_end(tmp_path / "whole", Net(), whole)
    for name, value in {"JOB_ID": "1", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_NODELIST", "localhost")
    monkeypatch.setenv("PATH", str(tmp_path))  # where there is no scontrol to requeue the job
    shared = tmp_path / "job"
    for number in (signal.SIGUSR1, None):
        callback, data = mask_callback(lr=FAST), ResumableLoader(dataset(), batch_size=BATCH)
        trainer = quiet_trainer(shared, callback, plugins=[SLURMEnvironment()], max_steps=STEPS)
        trainer.fit(Signalled(after=number), data, loader(16))
        assert (shared / "hpc_ckpt_1.ckpt").exists()
        assert equal(logits(callback), logits(whole))


# --- afterwards ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
@every_estimator
def test_module_and_callback_copy_pickle_and_fit_again(
    estimator: EstimatorName, fails: bool, tmp_path: Path
) -> None:
    module, callback = Net(), mask_callback(lr=FAST, estimator=estimator)
    if fails:
        with pytest.raises(Broken), Breaks(800):
            fit(module, callback, folder=tmp_path, max_steps=STEPS)
    else:
        fit(module, callback, folder=tmp_path, max_steps=STEPS)
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert not any("trainer" in name for name in vars(twin))
        assert equal(logits(twin), logits(callback))
        assert twin.optimizer.holds == ("dense" if fails else "mode")
    callback.restore_dense()
    pickled = pickle.loads(pickle.dumps(module))
    fit(module, copy.deepcopy(callback), folder=tmp_path, max_steps=STEPS)
    fit(pickled, pickle.loads(pickle.dumps(callback)), folder=tmp_path, max_steps=STEPS)
    assert same_weights(module, pickled)
    assert identical(dict(module.state_dict()), dict(pickled.state_dict()))
    fit(module, folder=tmp_path, max_steps=1)
    assert not same_weights(module, pickled)  # the weights are trained again
