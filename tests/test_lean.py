"""Lean memory changes where weights are kept, and nothing that can be seen from outside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from optimizer_cases import Shape, assert_holds, bits, every_case, one_weight, step
from oracle import random
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskpro_lightning import MaskPro
from maskpro_lightning.optim.masked_weight import Version
from maskpro_lightning.tracking.metrics import mask_metrics
from maskpro_lightning.weights import layout

VERSIONS: list[Version] = ["dense", "initial", "drawn", "mode", "best"]
RESIDUALS = [1.0, -0.5, 2.0, 0.25]
RULE: dict[str, Any] = {"lr": 0.5, "logit_scale": 0.5, "momentum": 0.5}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_BLOCK", 5)


def special(shape: Shape, dtype: torch.dtype) -> Tensor:
    dense = random(*shape).to(dtype)
    dense.view(-1)[:4] = torch.tensor([-0.0, torch.inf, -torch.inf, 0.0])
    return dense


def seen(optimizer: MaskPro) -> dict[str, Tensor]:
    """All that can be seen of a MaskPro of one weight, whose drawn mask is written then."""
    (weight,) = optimizer.param_groups[0]["params"]
    found = {"logits": optimizer.logits()["w"].clone(), **optimizer.tracker}
    for version in VERSIONS:
        found[f"{version} mask"] = optimizer.masks(version)["w"]
    for version in (*VERSIONS, *reversed(VERSIONS), "drawn"):
        optimizer.write(version)
        held = bits(weight)
        assert torch.equal(found.setdefault(version, held), held)
    found["redrawn"] = optimizer.redrawn()["w"]
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@every_case
@pytest.mark.parametrize(
    ("dtype", "logits_dtype"),
    [(torch.float32, "bfloat16"), (torch.bfloat16, "float32"), (torch.float64, "float32")],
)
def test_lean_and_plain_look_alike_at_every_step(
    pattern: str, shape: Shape, input_dim: int, dtype: torch.dtype, logits_dtype: Any
) -> None:
    dense = special(shape, dtype)
    weights = [nn.Parameter(dense.clone()) for _ in range(2)]
    plain, lean = (
        one_weight(weight, pattern, input_dim, memory=memory, logits_dtype=logits_dtype, **RULE)
        for weight, memory in zip(weights, ("plain", "lean"), strict=True)
    )
    for residual in RESIDUALS:
        for optimizer in (plain, lean):
            step(optimizer, residual)
        assert_holds(weights[1], dense, plain.masks("drawn")["w"])
        assert_same(seen(lean), seen(plain))
    assert not torch.equal(plain.masks("mode")["w"], plain.masks("initial")["w"])


def test_gradients_move_both_alike() -> None:
    found = []
    for memory in ("plain", "lean"):
        weight = nn.Parameter(random(6, 8).bfloat16())
        optimizer = one_weight(weight, estimator="straight_through", memory=memory)
        for seed in range(4):
            optimizer.step(partial(with_gradient, weight, random(6, 8, seed=seed)))
        found.append(seen(optimizer))
    assert_same(*found)


def with_gradient(weight: Tensor, gradient: Tensor) -> Tensor:
    weight.grad = gradient.to(weight.dtype)
    return torch.tensor(1.0)


@pytest.mark.parametrize("then", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("memory", ["plain", "lean"])
@pytest.mark.parametrize("action", ["step", "mode", "dense"])
def test_an_exception_between_any_two_blocks_loses_no_weight(
    monkeypatch: pytest.MonkeyPatch, action: Any, memory: Any, then: bool
) -> None:
    dense = special((3, 12), torch.bfloat16)
    interruptions = 0
    for number in range(5):
        weight = nn.Parameter(dense.clone())
        optimizer = one_weight(weight, memory=memory, **RULE)
        for residual in RESIDUALS:
            step(optimizer, residual)
        twin = one_weight(nn.Parameter(dense.clone()), memory=memory, **RULE)
        for residual in (*RESIDUALS, 1.0):
            step(twin, residual)
        acts = {"step": partial(step, optimizer, 1.0)}
        with monkeypatch.context() as patched:
            patched.setattr(torch, "_foreach_copy_", interrupted(number, then))
            try:
                acts.get(action, partial(optimizer.write, action))()
            except KeyboardInterrupt:
                interruptions += 1
        for version in ("dense", "mode", "initial", "dense"):
            optimizer.write(version)
            assert_holds(weight, dense, optimizer.masks(version)["w"])
        if action == "step":  # it has been finished, and once
            assert_same(seen(optimizer), seen(twin))
    assert interruptions == 3  # blocks, of 3 groups each


def interrupted(number: int, then: bool) -> Callable[..., None]:
    """What copies, but for its call of a number, which is interrupted before it or then."""
    calls, copy = count(), torch._foreach_copy_

    def copy_or_stop(*arguments: Any) -> None:
        stop = next(calls) == number
        if then or not stop:
            copy(*arguments)
        if stop:
            raise KeyboardInterrupt

    return copy_or_stop


@pytest.mark.parametrize("after", ["plain", "lean"])
@pytest.mark.parametrize("before", ["plain", "lean"])
@pytest.mark.parametrize("version", VERSIONS)
def test_each_form_resumes_the_other_to_the_bit(before: Any, after: Any, version: Version) -> None:
    def new(dense: Tensor, memory: Any) -> MaskPro:
        return one_weight(nn.Parameter(dense.bfloat16()), "1:4", memory=memory, **RULE)

    uninterrupted, interrupted = new(random(9, 12), before), new(random(9, 12), before)
    for residual in RESIDUALS:
        step(uninterrupted, residual)
    for residual in RESIDUALS[:2]:
        step(interrupted, residual)
    interrupted.write(version)
    state = interrupted.state_dict()
    resumed = new(torch.zeros(9, 12), after)
    resumed.load_state_dict(state)
    for residual in RESIDUALS[2:]:
        step(resumed, residual)
    assert_same(seen(resumed), seen(uninterrupted))
    interrupted.write("drawn")
    for residual in RESIDUALS[2:]:
        step(interrupted, residual)
    assert_same(seen(interrupted), seen(uninterrupted))


@pytest.mark.parametrize("memory", ["plain", "lean"])
@pytest.mark.parametrize("input_dim", [-1, 0])
def test_where_a_weight_lies_in_memory_changes_nothing(memory: Any, input_dim: int) -> None:
    found = []
    for start in (0, 1):  # an odd start leaves no two values in one word
        memory_of_both = torch.empty(8 * 8 + 1, dtype=torch.bfloat16)
        values = memory_of_both[start : start + 64].view(8, 8).copy_(random(8, 8))
        optimizer = one_weight(nn.Parameter(values), input_dim=input_dim, memory=memory, **RULE)
        for residual in RESIDUALS:
            step(optimizer, residual)
        found.append(seen(optimizer))
    assert_same(*found)


@pytest.mark.parametrize("memory", ["plain", "lean"])
def test_draws_are_from_the_logits_that_are_stored_whatever_the_gradients_dtype(
    memory: Any,
) -> None:
    found = []
    for dtype in (torch.float64, torch.float32):
        weight = nn.Parameter(random(6, 8).to(dtype))
        optimizer = one_weight(
            weight, estimator="straight_through", memory=memory, logits_dtype="bfloat16"
        )
        for seed in range(3):
            optimizer.step(partial(with_gradient, weight, random(6, 8, seed=seed)))
        assert_holds(weight, random(6, 8).to(dtype), optimizer.masks("drawn")["w"])
        found.append(optimizer.logits()["w"].float())
    torch.testing.assert_close(*found, rtol=2**-6, atol=2**-6)


# --- memory -------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notices the bytes of the largest memory that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {
            t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if is_tensor(t)
        }
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return found


def is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


@pytest.mark.parametrize("estimator", ["policy", "straight_through"])
@pytest.mark.parametrize(
    ("memory", "logits_dtype", "each"),
    [("plain", "float32", 8.25), ("lean", "float32", 7.25), ("lean", "bfloat16", 5.25)],
)
def test_nothing_as_large_as_a_layer_is_made_on_the_way(
    monkeypatch: pytest.MonkeyPatch, estimator: Any, memory: Any, logits_dtype: Any, each: float
) -> None:
    monkeypatch.setattr(layout, "_BLOCK", 256)
    weight = nn.Parameter(random(256, 128).bfloat16())
    rule = {"memory": memory, "logits_dtype": logits_dtype}
    optimizer = one_weight(weight, estimator=estimator, **rule)
    optimizer.begin()
    loss = partial(with_gradient, weight, random(256, 128).bfloat16())
    with Largest() as largest:
        optimizer.step(loss, torch.tensor(0.0))
        for version in VERSIONS:
            optimizer.write(version)
        mask_metrics(optimizer)
    # The largest of a block: M x M numbers of 4 bytes for each group.
    assert 0 < largest.bytes <= 256 * 16 * 4 < weight.numel()
    state = optimizer.state[weight].values()
    held = weight.nbytes + sum(tensor.nbytes for tensor in state)
    counts = 8 * sum(tensor.dtype == torch.int64 for tensor in state) * 256 * 128 // 4 // 256
    assert held - counts == each * weight.numel()
