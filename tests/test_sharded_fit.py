"""Laws of fits and checkpoints of sharded models: all as on one rank, whatever the strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from modules import ROUNDING, equal, identical
from process_shards import (
    FIT_STEPS,
    FITS,
    FOLDERS,
    INITS,
    LAYERS,
    LOGGED,
    LR,
    MOVES,
    SAVED_STEP,
    STARTS,
    WIDTH,
    Fitted,
    Model,
    fits_on,
    weights,
)
from test_sharding import RANKS, Told, assert_alike, run
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from maskpro_lightning import NMPattern, export_sparse, load_masks
from maskpro_lightning.files.checkpoint import loader_of

FITTED = [(name, ranks) for name in FITS for ranks in RANKS if fits_on(name, ranks)]
RESUMED = [(n, saved, r) for n, r in FITTED for saved in RANKS if fits_on(n, saved)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fits")


@pytest.fixture(scope="module")
def fits(folder: Path) -> dict[str, Told]:
    return run(folder, "fit", "resume")


def assert_fitted_alike(found: Any, expected: Any) -> None:
    assert_alike(found, expected, FIT_STEPS * LR * ROUNDING["policy"])
    assert identical(found["weights"], expected["weights"])
    assert found["validated"] == pytest.approx(expected["validated"], rel=2**-20)
    for layer, statistics in expected["metrics"].items():
        assert found["metrics"][layer] == pytest.approx(statistics, abs=2**-18), layer


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "ranks"), FITTED)
def test_a_fit_does_not_depend_on_the_strategy(
    fits: dict[str, Told], strategy: str, ranks: int
) -> None:
    one = fits["fit"][1][0]["ddp"]
    for told in fits["fit"][ranks]:
        assert_fitted_alike(told[strategy], one)
        assert not equal(told[strategy]["mode"], told[strategy]["initial"])


@pytest.mark.slow
def test_hybrid_shards_are_halves_on_two_pairs_of_ranks(fits: dict[str, Told]) -> None:
    for told in fits["fit"][4]:
        for kind in ("full", "sharded"):
            assert told[f"hybrid {kind}"]["parts"] == [2] * 4
            assert told[f"fsdp1 {kind}"]["parts"] == [4] * 4


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "saved", "ranks"), RESUMED)
def test_a_fit_resumes_on_any_number_of_ranks(
    fits: dict[str, Told], strategy: str, saved: int, ranks: int
) -> None:
    for told in fits["resume"][ranks]:
        assert_fitted_alike(told[f"{strategy} of {saved}"], later_half(fits))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), MOVES)
def test_a_whole_file_moves_between_strategies(
    fits: dict[str, Told], before: str, after: str
) -> None:
    for told in fits["resume"][2]:
        assert_fitted_alike(told[f"{before} to {after}"], later_half(fits))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("before", FOLDERS)
def test_a_folder_of_shards_moves_to_ranks_that_hold_everything(
    fits: dict[str, Told], before: str, ranks: int
) -> None:
    for told in fits["resume"][ranks]:
        assert_fitted_alike(told[f"{before} to ddp"], later_half(fits))


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_folder_of_shards_exports_byte_for_byte_as_one_device(
    fits: dict[str, Told], folder: Path, name: str, ranks: int, tmp_path: Path
) -> None:
    for checkpoint in (folder / "ddp-1", folder / f"{name}-{ranks}"):
        module, path = Fitted(), checkpoint / f"step={FIT_STEPS}.ckpt"
        module.configure_model()
        if path.is_file():
            loader_of(path)(module)
            export_sparse(module, tmp_path / "one")
        else:
            export_sparse(module.to("meta"), tmp_path / "parts", checkpoint=path)
    files = [tmp_path / each / "model.safetensors" for each in ("one", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


def later_half(fits: dict[str, Told]) -> dict[str, Any]:
    """What a fit on one rank has learned, and told since its checkpoint."""
    one = fits["fit"][1][0]["ddp"]
    since = one["losses"][-(FIT_STEPS - SAVED_STEP) :]
    return one | {"losses": since, "validated": one["validated"][-1:]}


@pytest.mark.slow
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("ranks", RANKS)
def test_initial_masks_do_not_depend_on_the_strategy(
    fits: dict[str, Told], init: str, ranks: int
) -> None:
    one = fits["fit"][1][0]
    expected = one[f"ddp from {init}"]
    other = "sparsegpt" if init == "reconstruction" else "magnitude"
    before = one["ddp"] if other == "magnitude" else one[f"ddp from {other}"]
    assert not equal(expected["initial"], before["initial"])
    for told in fits["fit"][ranks]:
        for name in STARTS:
            if fits_on(name, ranks):
                found = told[f"{name} from {init}"]
                assert equal(found["initial"], expected["initial"]), name
                # The drawn mask's, the first step being made from the initial one.
                assert found["losses"] == pytest.approx(expected["losses"], rel=2**-20)
                # Each of four weights on one rank, improved in three rounds.
                share = 4 // ranks if init in ("sparsegpt", "reconstruction") else 0
                improved = 3 * share if init == "reconstruction" else 0
                assert told[f"found for {name} from {init}"] == (share, improved)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "ranks"), LOGGED)
def test_a_sharded_fit_leaves_its_files(
    fits: dict[str, Told], folder: Path, strategy: str, ranks: int
) -> None:
    left = folder / f"{strategy}-{ranks}" / "maskpro"
    masks = load_masks(left / "masks.safetensors", NMPattern(2, 4))
    assert equal(masks, fits["fit"][ranks][0][strategy]["mode"])
    assert (left / "history.csv").exists()
    assert not (left / "distributions.safetensors").exists()


@pytest.mark.slow
def test_all_ranks_end_where_one_finds_no_mask(tmp_path: Path) -> None:
    first, second = run(tmp_path, "lost")["lost"][2]
    for name in ("ddp", "fsdp1 sharded"):
        assert second[name] == "ValueError: no mask"
        assert first[name].startswith("RuntimeError: Another rank found no mask for 'model.")


def weights_in(checkpoint: Path, folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint by name, read by those who do not know of masks."""
    file = checkpoint
    if checkpoint.is_dir():
        file = folder / "whole.ckpt"
        dcp_to_torch_save(checkpoint, file)
    state = torch.load(file, weights_only=False)
    found = state["state_dict"] if "state_dict" in state else state["model"]
    return {name.removeprefix("model."): value for name, value in found.items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated", "ignore:Please use DTensor")
@pytest.mark.parametrize(("strategy", "ranks"), FITTED)
def test_a_checkpoint_holds_the_most_likely_masks_for_those_without_the_callback(
    fits: dict[str, Told], folder: Path, strategy: str, ranks: int, tmp_path: Path
) -> None:
    checkpoint = folder / f"{strategy}-{ranks}" / f"step={FIT_STEPS}.ckpt"
    model, masks = Model(), fits["fit"][ranks][0][strategy]["mode"]
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(weights_in(checkpoint, tmp_path))
    for group in weights(model):
        ((name, weight),) = group["params"]
        assert torch.equal(weight, dense[name] * masks[f"model.{name}"]), name
        assert oracle.keeps_exactly(2, 4, weight != 0, group["input_dim"]), name
    assert torch.equal(model.first.bias, dense["first.bias"])


@pytest.mark.slow
def test_a_rank_that_improves_masks_holds_no_more_of_the_model_than_its_share(
    tmp_path: Path,
) -> None:
    told = run(tmp_path, "calibrate")["calibrate"]
    few, many = LAYERS
    # Of each weight its part of the dense values and of the mask. At either peak, gloo's own thread
    # may still hold a message of one whole weight.
    growth, message = (many - few) * WIDTH**2 * (4 + 1), 4 * WIDTH**2
    for ranks in RANKS:
        for name in ("fsdp1", "fsdp2"):
            for peaks in told[ranks]:
                found = peaks[f"{name} {many}"] - peaks[f"{name} {few}"]
                assert abs(found - growth / ranks) <= 2 * message
