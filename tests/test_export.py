"""Laws of the files: what others load is what was masked, whole or not there at all."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from oracle import random
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from maskpro_lightning import (
    MaskPro,
    NMPattern,
    export,
    export_sparse,
    find_targets,
    load_masks,
    parameter_groups,
    save_masks,
)
from maskpro_lightning.export import check_sparse, save_distributions

TWO_OF_FOUR = NMPattern(2, 4)


def masked(model: nn.Module, pattern: str = "2:4", **globs: Any) -> nn.Module:
    """A model as a fit leaves it, under the most likely masks."""
    optimizer = MaskPro(parameter_groups(find_targets(model, pattern, **globs)), pattern)
    optimizer.begin()
    optimizer.write("mode")
    return model


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


class Tied(nn.Module):
    """Two layers with one weight, and a buffer that is a view of another."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.register_buffer("whole", torch.arange(8.0))
        self.register_buffer("part", self.whole[:4])


class Wrapper(nn.Module):
    """A module that holds a Hugging Face model, as a LightningModule does."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_models.llama()


class Ensemble(nn.Module):
    """A module that holds two Hugging Face models."""

    def __init__(self) -> None:
        super().__init__()
        self.models = nn.ModuleList([tiny_models.llama(), tiny_models.llama(tied=True)])


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


# --- models -------------------------------------------------------------------------------------

ELSEWHERE = """
import pathlib, sys, torch, transformers
sys.modules["maskpro_lightning"] = None  # importing it raises, wherever it may be installed
for folder in map(pathlib.Path, sys.argv[1:]):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.save(model(torch.arange(8)[None]).logits, folder / "logits.pt")
"""


def test_an_exported_model_computes_the_same_where_this_package_is_not(tmp_path: Path) -> None:
    wrapper = Wrapper()
    cases: dict[str, tuple[nn.Module, Any]] = {
        "llama": (llama := tiny_models.llama(), llama),
        "tied": (tied := tiny_models.llama(tied=True), tied),
        "held": (wrapper, wrapper.model),
    }
    folders = [
        export_sparse(masked(module), tmp_path / "out" / name)
        for name, (module, _) in cases.items()
    ]
    # -I: neither PYTHONPATH nor the working directory leads to the package.
    subprocess.run([sys.executable, "-I", "-c", ELSEWHERE, *folders], check=True, cwd=tmp_path)
    for folder, (_, model) in zip(folders, cases.values(), strict=True):
        with torch.no_grad():
            expected = model.eval()(torch.arange(8)[None]).logits
        assert torch.equal(torch.load(folder / "logits.pt"), expected)


def test_the_config_promises_nothing_that_a_server_would_refuse(tmp_path: Path) -> None:
    config = json.loads(
        (export_sparse(masked(tiny_models.llama()), tmp_path) / "config.json").read_text()
    )
    assert config["model_type"] == "llama"
    assert not {"sparsity_config", "quantization_config", "compression_config"} & config.keys()


@pytest.mark.parametrize("model", [two_layers, Tied, Ensemble])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_module_becomes_its_state_dict(
    tmp_path: Path, model: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    module = masked(model().to(dtype))
    export_sparse(module, tmp_path)
    assert files(tmp_path) == ["model.safetensors"]
    found, expected = load_file(tmp_path / "model.safetensors"), module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert model().to(dtype).load_state_dict(found).missing_keys == []


def test_a_dense_model_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    message = (
        "'0.weight' is not 2:4: group 0 has 4 nonzeros (16 of 16 groups have too many). Export "
        "after the fit, with the pattern, include and exclude of the fit."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        export_sparse(two_layers(), tmp_path / "out")
    assert files(tmp_path) == []


def test_a_single_group_too_dense_is_refused_by_name(tmp_path: Path) -> None:
    model = masked(two_layers())
    with torch.no_grad():
        model[2].weight[1, 4:7] = 1.0
        model[2].weight[1, 7] = 0.0
    message = "'2.weight' is not 2:4: group 3 has 3 nonzeros (1 of 8 groups have too many)."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        export_sparse(model, tmp_path / "out")
    assert files(tmp_path) == []
    export_sparse(model, tmp_path, exclude=["2"])
    assert files(tmp_path) == ["model.safetensors"]


def test_the_pattern_and_the_layers_are_those_of_the_fit(tmp_path: Path) -> None:
    model = masked(two_layers(), "1:4", include=["0"])
    export_sparse(model, tmp_path, "1:4", include=["0"])
    with pytest.raises(ValueError, match=r"^'2.weight' is not 1:4"):
        export_sparse(model, tmp_path, "1:4")
    with pytest.raises(ValueError, match=r"^'0.weight' is not 1:8"):
        export_sparse(model, tmp_path, NMPattern(1, 8), include=["0"])


def test_a_kept_weight_may_be_zero_and_nan_counts_as_a_weight() -> None:
    nan = float("nan")
    check_sparse(torch.tensor([[0.0, 1.0, -0.0, 0.0], [nan, 0.0, nan, 0.0]]), TWO_OF_FOUR, -1, "w")
    with pytest.raises(ValueError, match=r"^'w' is not 2:4: group 0 has 3 nonzeros \(1 of 1 "):
        check_sparse(torch.tensor([nan, 0.0, nan, nan]), TWO_OF_FOUR, -1, "w")


# --- masks and distributions --------------------------------------------------------------------


@pytest.mark.parametrize(
    "shapes",
    [
        {"fc.weight": (4, 8)},
        {"a": (1, 5), "b": (7, 5), "c": (3, 5, 3, 1)},  # no multiple of eight bits
        {"scalar": (), "one": (1,), "none": (0, 4)},
    ],
    ids=str,
)
def test_masks_are_read_as_they_were_written(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]]
) -> None:
    masks = {name: random(*shape) > 0 for name, shape in shapes.items()}
    save_masks(masks, TWO_OF_FOUR, tmp_path / "masks")
    found = load_masks(tmp_path / "masks", TWO_OF_FOUR)
    assert found.keys() == masks.keys()
    for name, mask in masks.items():
        assert found[name].dtype == torch.bool
        assert torch.equal(found[name], mask)
    assert files(tmp_path) == ["masks"]


def test_a_mask_takes_a_bit_per_weight_highest_first(tmp_path: Path) -> None:
    mask = torch.tensor([[True, True, False, False], [False, True, False, True], [True] * 4])
    save_masks({"w": mask.T.contiguous().T}, TWO_OF_FOUR, tmp_path / "masks")
    assert load_file(tmp_path / "masks")["w"].tolist() == [0b11000101, 0b11110000]


def test_distributions_are_the_logits_in_the_weights_names_and_shapes(tmp_path: Path) -> None:
    model = two_layers()
    groups = parameter_groups(find_targets(model, "2:4"))
    optimizer = MaskPro(groups, "2:4", seed=3)
    optimizer.begin()
    optimizer.step(lambda: torch.tensor(1.0), torch.tensor(0.0))
    save_distributions(optimizer, tmp_path / "logits")
    found = load_file(tmp_path / "logits")
    assert found.keys() == optimizer.logits().keys() == {"0.weight", "2.weight"}
    assert all(torch.equal(found[name], pi) for name, pi in optimizer.logits().items())
    with safe_open(tmp_path / "logits", "pt") as file:
        assert file.metadata() == {
            "format": "maskpro distributions 1",
            "pattern": "2:4",
            "seed": "3",
            "step": "1",
        }


# --- what is no mask file -----------------------------------------------------------------------


def write_masks(path: Path) -> None:
    save_masks({"w": torch.tensor([[True, True, False, False]] * 4)}, TWO_OF_FOUR, path)


def write_masks_with(shape: list[int], bits: Tensor) -> Callable[[Path], None]:
    metadata = {"format": "maskpro masks 1", "pattern": "2:4", "shapes": json.dumps({"w": shape})}
    return lambda path: save_file({"w": bits}, path, metadata)


def write_without_the_end(path: Path) -> None:
    write_masks(path)
    path.write_bytes(path.read_bytes()[:-1])


BYTES = torch.zeros(2, dtype=torch.uint8)
NO_MASKS = "not 'maskpro masks 1': give a file that save_masks wrote."


@pytest.mark.parametrize(
    ("write", "pattern", "message"),
    [
        pytest.param(
            write_masks,
            "1:4",
            "'masks' holds 2:4 masks, but the pattern is 1:4.",
            id="another pattern",
        ),
        pytest.param(
            lambda path: save_file({"w": BYTES}, path),
            "2:4",
            f"'masks' holds 'unnamed tensors', {NO_MASKS}",
            id="other tensors",
        ),
        pytest.param(
            lambda path: save_file({"w": BYTES}, path, {"format": "pt"}),
            "2:4",
            f"'masks' holds 'pt', {NO_MASKS}",
            id="another format",
        ),
        *(
            pytest.param(write, "2:4", "'masks' is not a whole safetensors file: ", id=name)
            for name, write in {
                "cut off": write_without_the_end,
                "other bytes": lambda path: path.write_bytes(b"nothing of the kind"),
                "empty": lambda path: path.write_bytes(b""),
            }.items()
        ),
        *(
            pytest.param(
                write_masks_with(shape, bits),
                "2:4",
                f"The mask of 'w' does not have the size of its shape {shape}.",
                id=name,
            )
            for name, shape, bits in [
                ("fewer weights", [2, 4], BYTES),
                ("more weights", [5, 4], BYTES),
                ("not bytes", [4, 4], BYTES.float()),
                ("not flat", [4, 4], BYTES[None]),
            ]
        ),
    ],
)
def test_what_is_no_mask_file_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path], None],
    pattern: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("masks"))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        load_masks("masks", NMPattern.parse(pattern))


# --- whole or not there -------------------------------------------------------------------------


def fails_half_way(tensors: Any, path: Path, metadata: Any) -> None:
    path.write_bytes(b"half a file")
    raise OSError("disk full")


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda path: export_sparse(masked(two_layers()), path.parent), id="a model"),
        pytest.param(write_masks, id="masks"),
    ],
)
def test_a_file_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    path = tmp_path / "model.safetensors"
    monkeypatch.setattr(export, "save_file", fails_half_way)
    with pytest.raises(OSError, match="disk full"):
        write(path)
    assert not path.exists()
    monkeypatch.undo()
    write(path)
    whole = path.read_bytes()
    monkeypatch.setattr(export, "save_file", fails_half_way)
    with pytest.raises(OSError, match="disk full"):
        write(path)
    assert path.read_bytes() == whole
