"""What holds for every shape, dtype, pattern, layout and seed: MaskPro as a whole."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_cases import assert_holds, bits
from rules import mask_optimizer
from torch import Tensor, nn

from maskpro_lightning import MaskPro
from maskpro_lightning.optim.estimators import EstimatorName


@dataclass(frozen=True)
class Case:
    """A weight in a place of its own, and a rule."""

    n: int
    m: int
    shape: tuple[int, ...]
    input_dim: int
    dtype: torch.dtype
    layout: str
    rule: dict[str, Any]

    def weight(self) -> tuple[nn.Parameter, Tensor]:
        """A weight of that layout, and the memory that it lies in."""
        values = oracle.random(*self.shape, seed=3).to(self.dtype)
        if self.layout == "contiguous":
            memory = values.clone()
            return nn.Parameter(memory), memory
        if self.layout == "transposed":
            memory = values.transpose(0, -1).contiguous()
            return nn.Parameter(memory.transpose(0, -1)), memory
        wide = torch.full((*self.shape[:-1], 2 * self.shape[-1] + 1), 7.0, dtype=self.dtype)
        view = wide[..., 1::2]  # every second number belongs to somebody else
        view.copy_(values)
        return nn.Parameter(view), wide

    def optimizer(self, weight: nn.Parameter) -> MaskPro:
        group = {"params": [("w", weight)], "input_dim": self.input_dim}
        return mask_optimizer([group], f"{self.n}:{self.m}", **self.rule)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    m = draw(st.integers(2, 9))
    estimator: EstimatorName = draw(st.sampled_from(["policy", "straight_through"]))
    n = draw(st.integers(1, min(m - 1, 2 if estimator == "straight_through" else m)))
    shape = [draw(st.integers(1, 3)) for _ in range(draw(st.integers(2, 4)))]
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    shape[dim] = m * draw(st.integers(1, 3))
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    layouts = ["contiguous", "transposed", "strided"]
    rule = {
        "estimator": estimator,
        "seed": draw(st.integers(0, 2**64)),
        "published": draw(st.booleans()),
        "lr": draw(st.sampled_from([1e-3, 1.0, 1e6])),
        "momentum": draw(st.sampled_from([0.0, 0.5, 0.99])),
    }
    dtype, layout = draw(st.sampled_from(dtypes)), draw(st.sampled_from(layouts))
    return Case(n, m, tuple(shape), dim, dtype, layout, rule)


def step(optimizer: MaskPro, weight: Tensor, loss: float) -> None:
    def closure() -> Tensor:
        weight.grad = (loss * weight.detach().float()).to(weight.dtype)  # may overflow
        return torch.tensor(loss)

    optimizer.step(closure, torch.tensor(0.5))


def saved(optimizer: MaskPro) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


losses = st.lists(
    st.floats(-100, 100, width=32) | st.sampled_from([0.0, float("nan"), float("inf"), 1e30]),
    min_size=1,
    max_size=5,
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(case=cases(), losses=losses, cut=st.integers(0, 5))
def test_whatever_is_learned_masks_are_masks_and_weights_come_back(
    case: Case, losses: list[float], cut: int
) -> None:
    weight, memory = case.weight()
    dense, around = weight.detach().clone(), memory.clone()
    optimizer = case.optimizer(weight)
    twin_weight = nn.Parameter(dense.clone())  # in another place, and interrupted
    twin = case.optimizer(twin_weight)
    for number, loss in enumerate(losses):
        if number == cut:
            state, twin_weight = saved(twin), nn.Parameter(twin_weight.detach().clone())
            twin = case.optimizer(twin_weight)
            twin.load_state_dict(state)
        step(optimizer, weight, loss)
        step(twin, twin_weight, loss)

    for version in ("initial", "drawn", "mode"):
        mask = optimizer.masks(version)["w"]
        assert oracle.keeps_exactly(case.n, case.m, mask, case.input_dim)
        assert torch.equal(mask, twin.masks(version)["w"])
        optimizer.write(version)
        assert_holds(weight, dense, mask)
    assert optimizer.logits()["w"].isfinite().all()
    assert torch.equal(bits(optimizer.logits()["w"]), bits(twin.logits()["w"]))
    assert optimizer.tracker == twin.tracker
    optimizer.write("dense")
    assert torch.equal(bits(memory), bits(around))  # and nothing beside the weight is touched
