"""Laws of compressed checkpoints: smaller, and the same bits back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import random
from torch import Tensor, nn

from maskpro_lightning import NMPattern, export_sparse, find_targets, load_compressed
from maskpro_lightning.files.compressed import save_compressed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [0.0, -0.0, 1e-45, float("inf"), float("-inf"), float("nan")]
INTEGERS = {2: torch.int16, 4: torch.int32}


def bits(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().contiguous().view(INTEGERS[tensor.element_size()])


def same_bits(found: dict[str, Tensor], model: nn.Module) -> bool:
    expected = model.state_dict()
    return found.keys() == expected.keys() and all(
        found[name].dtype == value.dtype
        and found[name].shape == value.shape
        and torch.equal(bits(found[name]), bits(value))
        for name, value in expected.items()
    )


@torch.no_grad()
def sparse(model: nn.Module, pattern: str = "2:4", **globs: Any) -> nn.Module:
    """A model under masks, with zeros of both signs among what is kept."""
    nm = NMPattern.parse(pattern)
    for seed, target in enumerate(find_targets(model, pattern, **globs)):
        groups = nm.group(target.parameter.detach(), target.input_dim)
        kept = nm.top(random(*groups.shape, seed=seed))
        special = torch.tensor(SPECIAL, dtype=groups.dtype)
        some = special[torch.arange(groups.numel()).view(groups.shape) % len(special)]
        groups.copy_(groups.where(random(*groups.shape, seed=seed + 100) > -1, some))
        groups.masked_fill_(~kept, 0.0)
    return model


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 4))


class Tied(nn.Module):
    """A masked weight and a free one, each under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.free = (nn.Linear(8, 8) for _ in range(3))
        self.two.weight = self.one.weight
        self.two.bias = self.free.bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [convolutions, Tied, tiny_models.gpt2, tiny_models.gpt_oss])
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, make: Any, dtype: torch.dtype) -> None:
    model = sparse(make().to(dtype))
    values = torch.cat([t.parameter.detach().flatten() for t in find_targets(model, "2:4")])
    assert (bits(values) == bits(torch.tensor([-0.0], dtype=dtype))).any()
    export_sparse(model, tmp_path, file_format="compressed")
    found = load_compressed(tmp_path / "compressed.safetensors")
    assert same_bits(found, model)
    assert model.load_state_dict(found).missing_keys == []


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "3:4", "4:8", "16:32"])
def test_any_pattern_comes_back(tmp_path: Path, pattern: str) -> None:
    model = sparse(nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 2)), pattern, include=["0"])
    save_compressed(model, tmp_path / "file", pattern, include=["0"])
    assert same_bits(load_compressed(tmp_path / "file", pattern), model)


def test_what_was_shared_is_shared_and_stored_once(tmp_path: Path) -> None:
    model = sparse(Tied())
    save_compressed(model, tmp_path / "file")
    found = load_compressed(tmp_path / "file")
    assert same_bits(found, model)
    assert found["one.weight"] is found["two.weight"]
    assert found["free.bias"] is found["two.bias"]
    weights = 2 * 8 * 8  # one.weight and free.weight
    expected = 4 * (weights / 2 + 8 + 8) + weights / 12  # kept, both biases, masks
    tensors = (tmp_path / "file").stat().st_size
    header = int.from_bytes((tmp_path / "file").read_bytes()[:8], "little") + 8
    assert tensors - header == pytest.approx(expected, abs=2)  # masks end in a whole byte each


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.521), (torch.bfloat16, 0.542)])
def test_a_2_4_model_takes_half_and_its_mask(
    tmp_path: Path, dtype: torch.dtype, share: float
) -> None:
    model = sparse(nn.Sequential(nn.Linear(512, 512, bias=False)).to(dtype))
    save_compressed(model, tmp_path / "file")
    dense = model[0].weight.numel() * model[0].weight.element_size()
    # 1/2 + (2/3 bit) / (32 or 16 bits), and a header below 1 KiB
    assert (tmp_path / "file").stat().st_size / dense == pytest.approx(share, abs=0.003)


@given(data=st.data(), dtype=st.sampled_from(DTYPES))
@settings(deadline=None, derandomize=True, database=None, max_examples=100)
def test_any_numbers_come_back(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, dtype: torch.dtype
) -> None:
    integer = INTEGERS[dtype.itemsize]
    most = torch.iinfo(integer).max
    kept = st.lists(st.integers(-most - 1, most), min_size=2, max_size=2)
    rows = data.draw(st.lists(kept, min_size=1, max_size=4))
    places = data.draw(st.lists(st.permutations(range(4)), min_size=len(rows), max_size=len(rows)))
    weight = torch.zeros(len(rows), 4, dtype=integer)
    for row, values, order in zip(weight, rows, places, strict=True):
        row[torch.tensor(order[:2])] = torch.tensor(values, dtype=integer)
    model = nn.Linear(4, len(rows), bias=False, dtype=dtype)
    model.weight = nn.Parameter(weight.view(dtype))
    path = tmp_path_factory.mktemp("compressed") / "file"
    save_compressed(model, path)
    assert same_bits(load_compressed(path), model)


def test_a_negative_zero_too_many_is_refused_rather_than_lost(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0, 0.0, 0.0], [1.0, -0.0, -0.0, 0.0]]))
    message = (
        "'0.weight' has a group with more than 2 numbers other than +0, which a 2:4 mask cannot "
        "keep (a pruned weight may hold -0): set pruned weights to 0.0."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        save_compressed(model, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
    with torch.no_grad():
        model[0].weight[1, 2] = 0.0
    save_compressed(model, tmp_path / "file")
    assert same_bits(load_compressed(tmp_path / "file"), model)
