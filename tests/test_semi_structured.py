"""Laws of the checks before PyTorch's 2:4 kernels; the kernels themselves need a GPU."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import random
from torch import nn

from maskpro_lightning import NMPattern, find_targets
from maskpro_lightning.files import semi_structured
from maskpro_lightning.files.semi_structured import (
    check_semi_structured,
    no_kernel_for,
    no_kernel_on,
    to_semi_structured,
)

TWO_OF_FOUR = NMPattern(2, 4)
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or no_kernel_on(torch.device("cuda")) is not None,
    reason="needs a GPU with 2:4 kernels",
)


def sparse(model: nn.Module, dtype: torch.dtype = torch.float16) -> nn.Module:
    model.to(dtype)
    with torch.no_grad():
        for target in find_targets(model, "2:4"):
            groups = TWO_OF_FOUR.group(target.parameter.detach(), target.input_dim)
            groups.masked_fill_(~TWO_OF_FOUR.top(random(*groups.shape)), 0.0)
    return model


def refuse(model: nn.Module, *messages: str) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=".*".join(map(re.escape, messages))):
        to_semi_structured(model)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_weight_that_is_not_2_4_is_refused_by_name_before_any_zero_is_made() -> None:
    model = sparse(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)))
    with torch.no_grad():
        model[1].weight[0, :3] = 1.0
        model[1].weight[0, 3] = 0.0
    refuse(model, "'1.weight' is not 2:4: group 0 has 3 nonzeros (1 of 256 groups have too many).")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dtype_that_torch_reads_as_1_2_or_not_at_all_is_refused(dtype: torch.dtype) -> None:
    model = sparse(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 64)), dtype)
    problem = f"is {dtype}, not torch.float16 or torch.bfloat16"
    refuse(model, f"take 2 of 2 weights: '0.weight' {problem}; '1.weight' {problem}. Leave them")


def test_a_shape_that_no_kernel_takes_is_refused() -> None:
    model = sparse(nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 16), nn.Linear(16, 16)))
    refuse(
        model,
        "2:4 kernels do not take 2 of 3 weights: '0.weight' has shape (24, 32), not multiples of "
        "(16, 16); '1.weight' has shape (16, 24), not multiples of (16, 16).",
    )


def test_layers_that_do_not_multiply_a_matrix_are_refused() -> None:
    model = sparse(nn.Sequential(nn.Conv2d(16, 16, 1)))
    refuse(model, "'0.weight' belongs to a Conv2d, not to a linear layer")
    assert no_kernel_for(torch.zeros(2, 16, 16)) == "has 3 dimensions, not two"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_a_kernel_takes_passes_all_checks_but_the_device(dtype: torch.dtype) -> None:
    model = sparse(nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 16)), dtype)
    refuse(
        model,
        "PyTorch's 2:4 kernels run on NVIDIA GPUs (CUDA), there is none for 'cpu': move the model "
        "to such a device first.",
    )
    assert no_kernel_for(model[0].weight) is None


def test_the_multiples_are_those_of_the_library_that_torch_will_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = torch.zeros(16, 48, dtype=torch.float16)
    assert no_kernel_for(weight) is None
    monkeypatch.setattr(semi_structured.SparseSemiStructuredTensor, "_FORCE_CUTLASS", True)
    assert no_kernel_for(weight) == "has shape (16, 48), not multiples of (32, 64)"
    assert (
        no_kernel_for(torch.zeros(0, 64).half()) == "has shape (0, 64), not multiples of (32, 64)"
    )


@pytest.mark.parametrize(
    ("capability", "cusparselt", "reason"),
    [
        ((7, 5), True, "PyTorch's 2:4 kernels need compute capability 8.0, Card has 7.5"),
        ((9, 0), False, "This build of PyTorch has no cuSPARSELt, the library of its 2:4 kernels"),
        ((8, 0), True, None),
        ((12, 0), True, None),
    ],
)
def test_an_older_gpu_or_a_build_without_the_library_is_told(
    monkeypatch: pytest.MonkeyPatch, capability: Any, cusparselt: bool, reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    has = SimpleNamespace(is_available=lambda: cusparselt)
    monkeypatch.setattr(torch.backends, "cusparselt", has)
    assert no_kernel_on(torch.device("cuda")) == reason


@needs_gpu
def test_a_converted_model_computes_what_the_zeros_do() -> None:
    model = sparse(nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))).cuda()
    rows = random(32, 64).half().cuda()
    with torch.no_grad():
        expected = model(rows)
        assert to_semi_structured(model) == ["0.weight", "1.weight"]
        # Two products of at most 128 terms, summed in another order and rounded to half.
        torch.testing.assert_close(model(rows), expected, rtol=1e-2, atol=1e-2)


def test_what_passes_the_checks_is_converted_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi_structured, "no_kernel_on", lambda device: None)
    monkeypatch.setattr(semi_structured, "to_sparse_semi_structured", lambda weight: 2 * weight)
    model = sparse(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8)))
    first = model[0].weight.detach().clone()
    assert to_semi_structured(model, exclude=["1"]) == ["0.weight"]
    assert torch.equal(model[0].weight, 2 * first)
    assert not model[0].weight.requires_grad
    check_semi_structured(find_targets(model, "2:4", exclude=["1"]))
