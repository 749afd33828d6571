"""The compiled mask step does what the same does uncompiled, and steps back where it cannot be."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from optimizer_cases import assert_holds, drawn_of, logits_of, one_weight, step
from oracle import random
from rules import mask_optimizer
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from maskpro_lightning import MaskPro
from maskpro_lightning.optim import fusion

RESIDUALS = [1.0, -0.5, 2.0, 0.25]
RULE: dict[str, Any] = {"lr": 0.3, "logit_scale": 1.0}


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")


@pytest.fixture
def failing_compiler(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    runs = []

    def compiled(*_: Any) -> Any:
        runs.append("failed")
        raise TorchDynamoException("no space\nleft")

    monkeypatch.setattr(fusion, "_compiled", lambda _: compiled)
    return runs


@pytest.fixture(scope="module", autouse=True)
def forgotten() -> Iterator[None]:
    yield
    torch.compiler.reset()


def trained(dense: Tensor, pattern: str = "2:4", input_dim: int = -1, **rule: Any) -> MaskPro:
    weight = nn.Parameter(dense.clone())
    optimizer = one_weight(weight, pattern, input_dim, **RULE, **rule)
    gradient = random(*dense.shape, seed=3).to(dense.dtype)

    def loss(residual: float) -> Tensor:
        weight.grad = residual * gradient
        return torch.tensor(residual)

    for residual in RESIDUALS:
        optimizer.step(partial(loss, residual), torch.tensor(0.0))
    return optimizer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "shape", "input_dim", "dtype", "rule", "loops"),
    [
        pytest.param("2:4", (129, 128), -1, torch.bfloat16, {}, 1, id="Linear"),
        pytest.param("1:4", (128, 129), 0, torch.bfloat16, {"memory": "lean"}, 1, id="Conv1D lean"),
        pytest.param("2:4", (16, 32, 3, 3), 1, torch.float16, {}, 1, id="Conv2d"),
        pytest.param(
            "2:4",
            (129, 128),
            -1,
            torch.float32,
            {"estimator": "straight_through", "memory": "lean"},
            3,  # a direction, a move along it, and a draw
            id="gradients lean",
        ),
    ],
)
def test_fused_draws_what_eager_draws(
    pattern: str,
    shape: tuple[int, ...],
    input_dim: int,
    dtype: torch.dtype,
    rule: dict[str, Any],
    loops: int,
) -> None:
    dense = random(*shape).to(dtype)
    dense.view(-1)[:3] = torch.tensor([-0.0, torch.inf, -torch.inf])
    graphs = counters["stats"]["unique_graphs"]
    eager, fused = (
        trained(dense, pattern, input_dim, fused=choice, **rule) for choice in (False, True)
    )
    assert counters["stats"]["unique_graphs"] == graphs + loops
    assert torch.equal(drawn_of(fused), drawn_of(eager))
    assert_holds(fused.param_groups[0]["params"][0], dense, drawn_of(eager))
    # Each of four steps adds a number below 2 that some 30 roundings have gone into.
    bound = len(RESIDUALS) * 2 * 30 * torch.finfo(torch.float32).eps
    assert (logits_of(fused) - logits_of(eager)).abs().max() < bound


@pytest.mark.slow
def test_layers_of_all_sizes_are_compiled_once_for_each_layout() -> None:
    shapes = {"a": (8, 16), "b": (24, 8), "c": (1, 12), "d": (40, 32, 1, 1), "e": (6, 8, 3, 3)}
    groups = [
        {"params": [(name, nn.Parameter(random(*shape)))], "input_dim": min(1, len(shape) - 1)}
        for name, shape in shapes.items()
    ]
    graphs = counters["stats"]["unique_graphs"]
    optimizer = mask_optimizer(groups, fused=True)
    for residual in RESIDUALS:
        step(optimizer, residual)
    assert counters["stats"]["unique_graphs"] <= graphs + 2


def test_fused_where_it_cannot_be_is_refused_by_name(no_compiler: None) -> None:
    weight = nn.Parameter(random(4, 16))
    message = "A fused mask step needs a C++ compiler such as g++: install it or leave fused=None."
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        one_weight(weight, fused=True)
    message = "The mask step for 4:8 cannot be fused, only those with N <= 2 and M <= 8"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}: leave fused=None.$"):
        one_weight(weight, "4:8", fused=True)


@pytest.mark.parametrize("large", [False, True])
def test_left_to_itself_it_compiles_for_many_weights_only(
    large: bool, failing_compiler: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion, "_PAYS_FROM", 128 if large else 129)
    trained(random(8, 16))
    assert failing_compiler == ["failed"] * large


def test_without_a_compiler_it_goes_on_without_a_word(
    no_compiler: None,
    failing_compiler: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(fusion, "_PAYS_FROM", 0)
    trained(random(8, 16))
    assert failing_compiler == caplog.messages == []


def test_a_compiler_that_fails_is_named_once_and_done_without(
    failing_compiler: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    eager = trained(random(8, 16), fused=False)
    monkeypatch.setattr(fusion, "_PAYS_FROM", 0)
    with caplog.at_level(logging.WARNING):
        found = trained(random(8, 16))
    assert failing_compiler == ["failed"]
    (message,) = caplog.messages
    assert message.startswith("The mask step goes on without being fused, which failed: ")
    assert "no space" in message
    assert "\n" not in message
    assert torch.equal(logits_of(found), logits_of(eager))
    assert torch.equal(drawn_of(found), drawn_of(eager))


def test_a_compiler_that_fails_where_it_must_not_is_an_error(failing_compiler: list[str]) -> None:
    message = "^The fused mask step cannot be compiled here.$"
    with pytest.raises(RuntimeError, match=message) as caught:
        trained(random(8, 16), fused=True)
    assert isinstance(caught.value.__cause__, TorchDynamoException)
