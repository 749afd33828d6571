"""Laws of resumed fits, and of fits on several ranks: nobody can tell from what they learned."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import process_fit
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from modules import (
    BATCH,
    FAST,
    ROUNDING,
    Net,
    ResumableLoader,
    dataset,
    equal,
    every_estimator,
    everything,
    fit,
    identical,
    learned,
    logits,
)
from rules import mask_callback
from torch import nn

from maskpro_lightning import MaskProCallback
from maskpro_lightning.optim.estimators import EstimatorName

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
]

STEPS = 12


def masks(estimator: EstimatorName = "policy") -> MaskProCallback:
    return mask_callback(estimator=estimator, lr=FAST)


# --- one rank -----------------------------------------------------------------------------------


def batch_norm_net() -> Net:
    return Net(nn.BatchNorm1d(16))


@pytest.mark.parametrize("step", [4, 6], ids=["at the end of an epoch", "in the middle"])
@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        pytest.param(Net, {}, id="plain"),
        pytest.param(Net, {"estimator": "straight_through"}, id="straight_through"),
        pytest.param(Net, {"val_check_interval": 2}, id="val_check_interval"),
        pytest.param(Net, {"accumulate_grad_batches": 2}, id="accumulate_grad_batches"),
        pytest.param(Net, {"precision": "bf16-true"}, id="bf16-true"),
        pytest.param(Net, {"precision": "64-true"}, id="64-true"),
        pytest.param(batch_norm_net, {}, id="batch norm"),
    ],
)
def test_a_resumed_fit_is_the_uninterrupted_one(
    make: Any, kwargs: dict[str, Any], step: int, tmp_path: Path
) -> None:
    settings = {"max_steps": STEPS, "log_every_n_steps": 2, "num_sanity_val_steps": 2} | kwargs
    estimator = settings.pop("estimator", "policy")
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)

    def data() -> ResumableLoader:
        return ResumableLoader(dataset(), batch_size=BATCH)

    module, callback = make(), masks(estimator)
    trainer = fit(module, callback, save, folder=tmp_path, data=data(), **settings)
    whole = everything(trainer, module, callback)
    validations = callback.state_dict()["journal"]["validation"]

    path, module, callback = tmp_path / f"step={step}.ckpt", make(), masks(estimator)
    nn.init.zeros_(module.net[0].weight)  # the checkpoint knows better
    trainer = fit(module, callback, save, folder=tmp_path, data=data(), ckpt_path=path, **settings)
    assert identical(everything(trainer, module, callback), whole)
    # This checkpoint is saved before the validation of its step, which Lightning does not repeat.
    known = [row for row in validations if row["step"] != step]
    assert known
    assert callback.state_dict()["journal"]["validation"] == known

    (saved,) = torch.load(path, weights_only=False)["optimizer_states"]
    assert saved["param_groups"][0]["step"] == step
    halfway = [state["logits"] for state in saved["state"].values()]
    assert not any(map(torch.equal, halfway, whole["logits"].values()))


def test_resuming_twice_is_resuming_once(tmp_path: Path) -> None:
    def fit_on(epochs: int, path: Path | None) -> dict[str, Any]:
        module, callback = Net(), process_fit.masks()
        trainer = fit(module, callback, save, folder=tmp_path, max_epochs=epochs, ckpt_path=path)
        return everything(trainer, module, callback)

    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
    fit_on(1, None)
    fit_on(2, tmp_path / "step=4.ckpt")
    once, twice = (fit_on(3, tmp_path / f"step={step}.ckpt") for step in (4, 8))
    assert identical(once, twice)


def test_a_fit_resumed_for_longer_goes_on_learning(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
    ends = []
    for epochs, path in ((1, None), (3, tmp_path / "step=4.ckpt")):
        callback = masks()
        fit(Net(), callback, save, folder=tmp_path, max_epochs=epochs, ckpt_path=path)
        ends.append(logits(callback))
    assert not any(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_resumed_fit_logs_all_its_numbers_at_the_same_steps(tmp_path: Path) -> None:
    # Where max_steps ended a fit, Lightning's count of steps to log is one ahead in the next.
    save = ModelCheckpoint(tmp_path, save_last=True)
    settings = {"folder": tmp_path, "log_every_n_steps": 3}
    fit(Net(), masks(), save, max_steps=4, **settings)
    logger, path = CSVLogger(tmp_path, name="resumed", version=""), tmp_path / "last.ckpt"
    fit(Net(), masks(), save, max_steps=16, logger=logger, ckpt_path=path, **settings)
    with (tmp_path / "resumed" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["maskpro/residual"]]
    assert len(rows) == 4
    assert all(row["maskpro/entropy"] for row in rows)
    assert len({row["maskpro/entropy"] for row in rows}) == 4


# --- a process that is killed -------------------------------------------------------------------


@contextmanager
def process(task: str, folder: Path, ranks: int = 1) -> Iterator[subprocess.Popen[str]]:
    """A fit in a process of its own, which does not outlive the block."""
    command = [sys.executable, process_fit.__file__, task, str(folder), str(ranks)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=folder, **pipes) as started:
        try:
            yield started
        finally:
            started.kill()


@pytest.mark.slow
def test_fits_that_are_killed_twenty_times_end_as_if_they_had_not_been(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    with process("kills", tmp_path, 20) as fits:
        output, _ = fits.communicate(timeout=300)
        assert fits.returncode == 0, output
    told = torch.load(tmp_path / "0.pt", weights_only=False)
    assert len(told["reached"]) == 20
    assert max(told["reached"]) > 0  # some had a checkpoint to go on from
    assert told["ends"]
    for end in told["ends"]:
        for what in ("logits", "initial", "drawn", "mode", "weights", "optimizer", "schedulers"):
            assert identical(end[what], told["whole"][what]), what
    record_property("tried", 20)


# --- two ranks ----------------------------------------------------------------------------------


Ranks = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What two ranks have learned in a whole, a half and a resumed fit, by estimator."""
    folder = tmp_path_factory.mktemp("ranks")
    with process("resume", folder, ranks=2) as fits:
        output, _ = fits.communicate(timeout=120)
        assert fits.returncode == 0, output
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.slow
@every_estimator
def test_all_ranks_learn_the_same_masks(ranks: Ranks, estimator: EstimatorName) -> None:
    one, other = (rank[estimator] for rank in ranks[1])
    for name in ("whole", "half", "resumed"):
        for what in ("logits", "initial", "drawn", "mode", "weights", "optimizer"):
            assert identical(one[name][what], other[name][what]), (name, what)


@pytest.mark.slow
@every_estimator
def test_a_resumed_fit_on_two_ranks_is_the_uninterrupted_one(
    ranks: Ranks, estimator: EstimatorName
) -> None:
    for rank in ranks[1]:
        fits = rank[estimator]
        assert identical(fits["resumed"], fits["whole"])
        assert not equal(fits["half"]["logits"], fits["whole"]["logits"])


@pytest.mark.slow
@every_estimator
def test_two_ranks_learn_from_half_batches_what_one_learns_from_whole_ones(
    ranks: Ranks, estimator: EstimatorName, tmp_path: Path
) -> None:
    module, callback = Net(), process_fit.masks(estimator)
    fit(module, callback, folder=tmp_path, max_epochs=4)
    expected = ranks[1][0][estimator]["whole"]
    assert_close(logits(callback), expected["logits"], estimator)
    assert equal(learned(callback), expected["mode"])
    assert identical(dict(module.state_dict()), expected["weights"])


@pytest.mark.slow
@every_estimator
def test_two_ranks_learn_by_hand_what_they_learn_otherwise(
    ranks: Ranks, estimator: EstimatorName
) -> None:
    one, other = (rank[estimator]["by hand"] for rank in ranks[1])
    assert identical(one["optimizer"], other["optimizer"])
    expected = ranks[1][0][estimator]["whole"]
    assert_close(one["logits"], expected["logits"], estimator)
    assert equal(one["mode"], expected["mode"])


@pytest.mark.slow
@every_estimator
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_all(
    ranks: Ranks, estimator: EstimatorName
) -> None:
    one, other = (rank[estimator]["bad"] for rank in ranks[1])
    assert identical(one["optimizer"], other["optimizer"])
    assert one["optimizer"]["param_groups"][0]["skipped"] == 4  # two batches in each of two epochs
    for values in one["logits"].values():
        assert values.isfinite().all()
    assert not equal(one["logits"], {k: 3.0 * v for k, v in one["initial"].items()})
    assert not equal(one["logits"], ranks[1][0][estimator]["half"]["logits"])


@pytest.mark.slow
@every_estimator
def test_a_checkpoint_of_two_ranks_resumes_on_one(
    ranks: Ranks, estimator: EstimatorName, tmp_path: Path
) -> None:
    folder, (rank, _) = ranks
    path = folder / estimator / "half" / "checkpoints" / "epoch=1.ckpt"
    resumed = process_fit.fit_ranks(tmp_path, 1, estimator, epochs=4, ckpt_path=path)
    expected = rank[estimator]["whole"]
    assert_close(resumed["logits"], expected["logits"], estimator)
    assert equal(resumed["mode"], expected["mode"])
    assert resumed["global_step"] == 16


def assert_close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], estimator: EstimatorName
) -> None:
    """Equal up to rounding in each of 16 updates."""
    for name, values in expected.items():
        tolerance = 16 * process_fit.LR[estimator] * ROUNDING[estimator]
        torch.testing.assert_close(found[name], values, rtol=0, atol=tolerance)
