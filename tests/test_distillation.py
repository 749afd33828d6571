"""Laws of distillation: the dense outputs are the target, and nothing of it stays behind."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from modules import Net, assert_masked, every_estimator, fit
from oracle import random
from rules import mask_callback
from torch import Tensor, nn

from maskpro_lightning import Distillation
from maskpro_lightning.fit.distillation import DenseTeacher, Teacher
from maskpro_lightning.optim.estimators import EstimatorName


class Misled(Net):
    """Its labels have nothing to do with what it computes."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * 0 + 1e6 * self.net[0].weight.sum()


# --- divergences --------------------------------------------------------------------------------


def test_divergences_are_the_ones_by_hand() -> None:
    masked, dense = random(3, 5, 7), random(3, 5, 7, seed=1)
    p, q = dense.double().softmax(-1), masked.double().softmax(-1)
    dot = (masked * dense).double().sum(-1) / (
        masked.double().norm(dim=-1) * dense.double().norm(dim=-1)
    )
    by_hand = {
        "kl": (p * (p / q).log()).sum(-1).mean(),
        "mse": (masked - dense).double().square().sum() / dense.double().square().sum(),
        "cosine": 1 - dot.mean(),
    }
    for name, expected in by_hand.items():
        actual = Distillation("", name).between(masked, dense)  # type: ignore[arg-type]
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
        assert Distillation("", name).between(dense, dense).abs() < 1e-6  # type: ignore[arg-type]
    own = Distillation("", lambda masked, dense: (masked - dense).abs().max())
    assert own.between(masked, dense) == (masked - dense).abs().max()


def test_an_unknown_divergence_is_refused() -> None:
    message = "divergence is one of kl, mse, cosine or a function of two outputs; got 'js'."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Distillation("net", "js")  # type: ignore[arg-type]


def test_a_part_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"^Net has no part 'model' to distill; its parts are 'net'"
    ):
        Distillation("model").part_of(Net())


# --- the teacher --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: (t, None),
        lambda t: SimpleNamespace(logits=t),
        lambda t: SimpleNamespace(last_hidden_state=t),
    ],
)
def test_outputs_of_the_usual_kinds_are_compared_call_by_call(wrap: Any) -> None:
    class Part(nn.Module):
        def forward(self, inputs: Tensor) -> Any:
            return wrap(inputs)

    module = nn.Sequential(Part())
    teacher = Teacher(Distillation("0", "mse"), module)
    dense, masked = random(2, 4, 8), random(2, 4, 8, seed=1).requires_grad_()
    with teacher.teaching():
        for inputs in dense:
            module[0](inputs)
    with teacher.asking() as found:
        for inputs in masked:
            module[0](inputs)
    expected = (
        sum((m - d).square().mean() / d.square().mean() for m, d in zip(masked, dense, strict=True))
        / 2
    )
    torch.testing.assert_close(found[0], expected)
    assert found[0].requires_grad
    assert not module[0]._forward_hooks


def test_a_part_that_is_not_called_is_refused_by_name() -> None:
    module = nn.Sequential(nn.Linear(4, 4))
    teacher = Teacher(Distillation("0"), module)
    with teacher.teaching():
        module(random(2, 4))
    message = "'0', which is to be distilled, 0 times under a mask and 1 times dense"
    with pytest.raises(RuntimeError, match=message), teacher.asking():
        pass


def test_a_part_that_is_called_less_often_under_a_mask_is_refused() -> None:
    module = nn.Sequential(nn.Linear(4, 4))
    teacher = Teacher(Distillation("0"), module)
    with teacher.teaching():
        module(random(2, 4))
        module(random(2, 4))
    message = "1 times under a mask and 2 times dense"
    with pytest.raises(RuntimeError, match=message), teacher.asking():
        module(random(2, 4))


def test_a_dense_teacher_neither_learns_nor_drops_out() -> None:
    def part() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))

    module, dense, inputs = nn.ModuleDict({"part": part()}).eval(), part().train(), random(4, 8)
    with torch.no_grad():
        module["part"][0].weight.mul_(0.5)
    target = dense[0](inputs).detach()
    inputs.requires_grad_()  # as where other layers come before
    expected = (module["part"](inputs) - target).square().mean() / target.square().mean()
    (slope,) = torch.autograd.grad(expected, inputs)
    teacher = DenseTeacher(Distillation("part", "mse"), module, dense)
    for _ in range(2):
        with teacher.asking() as found:
            module["part"](inputs)
        assert found[0] == expected
        torch.testing.assert_close(torch.autograd.grad(found[0], inputs)[0], slope)
    assert all(p.grad is None and p.requires_grad for p in dense.parameters())
    assert all(part.training for part in dense.modules())


@pytest.mark.parametrize("kind", [Teacher, DenseTeacher])
def test_a_step_that_fails_leaves_no_hook(kind: Any) -> None:
    module = nn.Sequential(nn.Linear(4, 4))
    own = (copy.deepcopy(module[0]),) if kind is DenseTeacher else ()
    teacher = kind(Distillation("0"), module, *own)

    def ask() -> None:
        with teacher.asking():
            assert module[0]._forward_hooks
            raise OSError("lost")

    with pytest.raises(OSError, match="lost"):
        ask()
    assert not module[0]._forward_hooks


def test_an_output_of_another_kind_is_refused() -> None:
    class Part(nn.Module):
        def forward(self, inputs: Tensor) -> str:
            return "text"

    module = nn.Sequential(Part())
    teacher = Teacher(Distillation("0"), module)
    with pytest.raises(TypeError, match="puts out a str: name one"), teacher.teaching():
        module(random(2, 4))


# --- the fit ------------------------------------------------------------------------------------


@every_estimator
def test_the_mask_imitates_the_dense_model_whatever_the_labels_say(
    estimator: EstimatorName, tmp_path: Path
) -> None:
    inputs, errors = random(256, 16), {}

    @torch.no_grad()
    def error(module: Net) -> float:
        return float((module.net(inputs) - Net().net(inputs)).square().mean())

    for name, distillation in (("labels", None), ("dense outputs", Distillation("net", "mse"))):
        module = Misled()
        callback = mask_callback(
            init="random",
            estimator=estimator,
            lr=0.1,
            logit_scale=1.0,
            distillation=distillation,
        )
        fit(module, callback, folder=tmp_path, max_epochs=50)
        assert_masked(module, Net())
        assert not module.net._forward_hooks
        errors[name] = error(module)
    assert callback.optimizer is not None
    with callback.optimizer.applied("initial"):
        assert errors["dense outputs"] < 0.8 * error(module)
    assert errors["dense outputs"] < errors["labels"]
