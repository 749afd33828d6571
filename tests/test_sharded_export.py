"""Laws of exports of sharded models: what all ranks write together is what one would have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import process_shards
import pytest
import torch
from process_shards import EXPORTS, applies
from test_sharding import RANKS, Told, run

EXPORTED = [(name, ranks) for name in EXPORTS for ranks in RANKS if applies(name, ranks)]
LARGEST = 4 * 256 * 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def exports(folder: Path) -> Told:
    return run(folder, "export")["export"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("name", "ranks"), EXPORTED)
def test_the_files_of_a_sharded_model_are_those_of_one_device(
    exports: Told, folder: Path, name: str, ranks: int
) -> None:
    kind = next((kind for kind in ("llama ", "large ") if kind in name), "")
    one = contents(folder / f"{kind}ddp-1")
    assert "model.safetensors.index.json" in one or kind == "large "
    assert contents(folder / f"{name}-{ranks}") == one


@pytest.mark.parametrize(("name", "ranks"), EXPORTED)
def test_the_masks_of_a_sharded_model_are_those_of_one_device(
    exports: Told, folder: Path, name: str, ranks: int
) -> None:
    kind = next((kind for kind in ("llama ", "large ") if kind in name), "")
    one = np.load(folder / f"masks {kind}ddp-1" / "masks.npz")
    found = np.load(folder / f"masks {name}-{ranks}" / "masks.npz")
    assert found.files == one.files
    assert all((found[key] == one[key]).all() for key in one.files)


def test_what_sharded_ranks_wrote_together_loads_anywhere(exports: Told, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = process_shards._llama(1)
    process_shards._mask(model)
    found = AutoModelForCausalLM.from_pretrained(folder / "llama fsdp1-4")
    expected = model.state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_a_rank_gathers_one_layer_at_a_time(exports: Told, strategy: str, ranks: int) -> None:
    for told in exports[ranks]:
        assert LARGEST <= told[f"large {strategy}"] < 2 * LARGEST


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_what_cannot_be_written_is_refused_on_all_ranks(
    exports: Told, strategy: str, ranks: int
) -> None:
    for rank, told in enumerate(exports[ranks]):
        assert told["inside"].startswith(
            "FSDP keeps 'conv.weight' in a flat parameter of a module "
        )
        refused: list[tuple[str, Any]] = told[f"refused {strategy}"]
        assert [left for _, left in refused] == [[]] * 4
        dense, compressed, masks, full = (message for message, _ in refused)
        for message in (dense, masks):
            assert message.startswith("ValueError: 'conv.weight' is not 2:4: group 0 has 4 nonz")
        assert compressed == (
            "ValueError: The model is split over ranks, which file_format='compressed' cannot "
            'write: choose "safetensors", load that on one device, and export again from there.'
        )
        assert full == (
            "RuntimeError: The model was not written: see the error of another rank."
            if rank
            else "OSError: disk full"
        )
