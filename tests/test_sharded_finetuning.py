"""Laws of training under a mask on several ranks: all as on one, whatever the strategy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from modules import identical
from process_shards import (
    CALIBRATED,
    FIT_STEPS,
    SAVED_STEP,
    STARTS,
    Model,
    fits_on,
    largest,
    weights,
)
from test_sharded_fit import FITTED, weights_in
from test_sharding import RANKS, Told, run
from torch import Tensor

# Of six steps, each along a mean over rows whose sum is rounded otherwise on other ranks.
ROUNDING = FIT_STEPS * 2**-20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def trained(folder: Path) -> Told:
    return run(folder, "train")["train"]


def masks() -> dict[str, Tensor]:
    found = {}
    for group in weights(Model()):
        ((name, weight),) = group["params"]
        found[f"model.{name}"] = largest(weight.detach(), group["input_dim"])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "ranks"), FITTED)
def test_weights_are_trained_under_their_masks_alike_on_any_ranks(
    trained: Told, strategy: str, ranks: int
) -> None:
    one = trained[1][0]["ddp"]["weights"]
    for told in trained[ranks]:
        found = told[strategy]
        assert identical(found["masks"], masks())
        for name, mask in masks().items():
            weight = found["weights"][name]
            assert identical(weight[~mask], torch.zeros_like(weight[~mask])), name
            torch.testing.assert_close(weight, one[name], rtol=0, atol=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("init", CALIBRATED)
@pytest.mark.parametrize("ranks", RANKS)
def test_masks_found_on_batches_are_trained_under_alike_on_any_ranks(
    trained: Told, init: str, ranks: int
) -> None:
    one, others = (trained[1][0][f"ddp from {each}"] for each in (init, *set(CALIBRATED) - {init}))
    assert not identical(one["masks"], others["masks"])
    for told in trained[ranks]:
        for strategy in STARTS:
            if not fits_on(strategy, ranks):
                continue
            found = told[f"{strategy} from {init}"]
            assert identical(found["masks"], one["masks"]), strategy
            for name, weight in found["weights"].items():
                assert not weight[~found["masks"][name]].any(), name
                torch.testing.assert_close(weight, one["weights"][name], rtol=0, atol=ROUNDING)


@pytest.mark.slow
def test_the_weights_of_one_rank_have_moved(trained: Told) -> None:
    model = Model()
    for name, mask in masks().items():
        before = model.get_parameter(name.removeprefix("model."))
        moved = trained[1][0]["ddp"]["weights"][name] != before
        assert moved[mask].float().mean() > 0.9, name


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "ranks"), FITTED)
def test_gradients_are_sparse_before_they_are_clipped(
    trained: Told, strategy: str, ranks: int
) -> None:
    seen = [gradient for told in trained[ranks] for gradient in told[strategy]["gradients"]]
    assert len(seen) >= 4 * FIT_STEPS
    assert set(seen) == {0.0}


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "ranks"), FITTED)
def test_a_training_resumes_under_its_masks(trained: Told, strategy: str, ranks: int) -> None:
    for told in trained[ranks]:
        resumed, whole = told[f"{strategy} resumed"], told[strategy]
        assert identical(resumed["masks"], whole["masks"])
        for name, mask in masks().items():
            weight = resumed["weights"][name]
            assert identical(weight[~mask], torch.zeros_like(weight[~mask])), name
            if strategy == "hybrid sharded":
                continue  # does not restore the moments of a training without masks either
            # DDP sums in buckets that it makes anew after the first step of a fit.
            torch.testing.assert_close(weight, whole["weights"][name], rtol=0, atol=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "ranks"), FITTED)
def test_each_rank_has_a_bit_for_each_weight_of_its_part(
    trained: Told, strategy: str, ranks: int
) -> None:
    total = sum(mask.numel() for mask in masks().values()) / 8
    copies = ranks if strategy == "ddp" else 2 if strategy.startswith("hybrid") else 1
    held = sum(told[strategy]["bytes"] for told in trained[ranks])
    if not strategy.startswith("tp"):  # which splits two of the layers
        assert total <= held / copies <= total + 4 * ranks  # a byte that is not full for each


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated", "ignore:Please use DTensor")
@pytest.mark.parametrize(("strategy", "ranks"), FITTED)
def test_every_checkpoint_is_sparse(
    trained: Told, folder: Path, strategy: str, ranks: int, tmp_path: Path
) -> None:
    for step in (SAVED_STEP, FIT_STEPS):
        state = weights_in(folder / f"{strategy}-{ranks}" / f"step={step}.ckpt", tmp_path)
        for name, mask in masks().items():
            weight = state[name.removeprefix("model.")]
            assert not weight[~mask].any(), name
            assert weight[mask].all(), name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp1 full", "fsdp2 full"])
@pytest.mark.parametrize("ranks", RANKS)
def test_zeros_that_one_rank_fills_end_the_fit_on_all(
    trained: Told, strategy: str, ranks: int
) -> None:
    *others, last = (told[f"{strategy} written"] for told in trained[ranks])
    assert "numbers that are not zero where it is pruned" in last
    assert all("see the error of another rank" in other for other in others)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", RANKS)
def test_averages_of_sharded_weights_are_refused_by_name(trained: Told, ranks: int) -> None:
    for told in trained[ranks]:
        assert "StochasticWeightAveraging averages whole weights" in told["averaged"]
