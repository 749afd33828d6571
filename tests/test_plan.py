"""Laws of plans; that they tell what ranks really keep is tested where ranks are."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import oracle
import pytest
import torch
from live_bytes import LiveBytes
from rules import mask_optimizer
from torch import Tensor, nn

from maskpro_lightning import Distillation, find_targets, parameter_groups
from maskpro_lightning.cli import main
from maskpro_lightning.commands import plan as commands_plan
from maskpro_lightning.commands.plan import Plan, Strategy, hours, plan, plan_training
from maskpro_lightning.fit.distillation import Teacher
from maskpro_lightning.optim.estimators import EstimatorName


def planned(devices: int, strategy: Strategy = "fsdp2", **kwargs: object) -> Plan:
    with torch.device("meta"):
        blocks = nn.ModuleList([nn.Linear(64, 48) for _ in range(3)])
    targets = find_targets(blocks, "2:4", on_meta=True)
    kwargs = {"estimator": "policy"} | kwargs
    return plan(blocks, targets, devices=devices, strategy=strategy, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("devices", [1, 2, 4, 16])
def test_what_is_sharded_falls_as_the_inverse_of_the_ranks(devices: int) -> None:
    one, weights = planned(1), 3 * 64 * 48
    assert one.state["weights"] == 4 * (weights + 3 * 48)
    assert [one.state[name] for name in ("dense", "logits")] == [4 * weights] * 2
    for strategy in ("fsdp1", "fsdp2"):
        many = planned(devices, strategy)  # type: ignore[arg-type]
        assert many.state == {name: size / devices for name, size in one.state.items()}
    assert planned(devices, "ddp").state == one.state


def test_a_forward_pass_gathers_one_block() -> None:
    assert planned(4).gathered == 4 * 65 * 48
    assert planned(1).gathered == planned(4, "ddp").gathered == 0


def test_gradients_cost_gradients_and_activations() -> None:
    policy = planned(4, rows=10)
    gradients = planned(4, rows=10, estimator="straight_through")
    assert (policy.forwards, gradients.forwards) == (2, 3)
    assert "gradients" not in policy.state
    # A rank has a quarter of all, which are few enough to wait for each other.
    assert gradients.state["gradients"] == (3 * 48 + 3 * 64 * 48) * 4 // 4
    assert planned(4, "fsdp1", estimator="straight_through").state == gradients.state
    with mock.patch.object(commands_plan, "WAITING", 64):
        few = planned(4, estimator="straight_through").state["gradients"]
    assert few == (3 * 48 + 64 * 48) * 4 // 4 + 64 * 4  # those of a block, and what waits
    ddp = planned(4, "ddp", estimator="straight_through")
    assert ddp.state["gradients"] == (3 * 48 + 64 * 48) * 4
    assert policy.activations == 10 * (64 + 48) * 4
    softmax = 10 * 48 * 4
    assert gradients.activations == 3 * policy.activations + softmax
    passes = policy.gathered + policy.activations
    assert policy.workspace == 48 * 3 * 64 * 48 // 4 > passes
    assert policy.total == sum(policy.state.values()) + policy.workspace
    many = planned(4, rows=1000)
    assert many.total == sum(many.state.values()) + many.gathered + (many.activations or 0)
    assert planned(4, "fsdp1").workspace == policy.workspace + 4 * 64 * 48 // 4


def test_lean_memory_and_small_logits_are_planned_as_they_are_kept() -> None:
    weights = 3 * 64 * 48
    lean = planned(2, "ddp", memory="lean", logits_dtype="bfloat16", pattern="1:4").state
    assert lean == {
        "weights": 4 * (weights + 3 * 48),
        "pruned": 4 * weights * 3 // 4,
        "logits": 2 * weights,
        "masks": weights // 4,
    }


def test_strategies_without_a_plan_are_refused() -> None:
    message = (
        "There is no plan for 'deepspeed' on 2 devices: strategy is one of ddp, fsdp1, fsdp2, "
        "and devices at least 1."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        planned(2, "deepspeed")  # type: ignore[arg-type]


def perceptron() -> tuple[nn.Module, Tensor, int]:
    blocks = (
        nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128), nn.LayerNorm(128))
        for _ in range(3)
    )
    return nn.Sequential(*blocks), oracle.random(2048, 128), 2048


def convolutions() -> tuple[nn.Module, Tensor, int]:
    layers = nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()
    return nn.Sequential(*layers, nn.Conv2d(64, 16, 1)), oracle.random(16, 16, 16, 16), 16 * 256


def llama(vocabulary: int, dtype: torch.dtype) -> tuple[nn.Module, Tensor, int]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype), torch.arange(2048).view(16, 128) % vocabulary, 2048


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor, int]]] = {
    "perceptron": perceptron,
    "convolutions": convolutions,
    "llama": lambda: llama(64, torch.float32),
    "llama of many words": lambda: llama(2048, torch.float32),
    "llama in bfloat16": lambda: llama(2048, torch.bfloat16),
}


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    if batch.is_floating_point():
        return model(batch).square().mean()
    return model(input_ids=batch, labels=batch).loss


@pytest.mark.slow
@pytest.mark.parametrize("estimator", get_args(EstimatorName))
@pytest.mark.parametrize("case", CASES)
def test_a_plan_is_near_what_is_measured(case: str, estimator: EstimatorName) -> None:
    pytest.importorskip("transformers")
    model, batch, rows = CASES[case]()
    targets = find_targets(model, "2:4")
    planned = plan(model, targets, devices=1, estimator=estimator, rows=rows, device="cpu")
    with torch.set_grad_enabled(estimator == "straight_through"), LiveBytes() as live:
        loss = loss_of(model, batch)
        if loss.requires_grad:
            loss.backward()
    gradients = sum(p.nbytes for p in model.parameters()) if loss.requires_grad else 0
    assert planned.activations is not None
    assert 2 / 3 < (planned.activations + gradients) / live.peak < 3 / 2
    model.zero_grad()
    optimizer = mask_optimizer(parameter_groups(targets), estimator=estimator, fused=False)

    def closure() -> Tensor:
        loss = loss_of(model, batch)
        if loss.requires_grad:
            loss.backward()
        return loss

    with LiveBytes() as live, torch.no_grad():
        optimizer.begin()
        for _ in range(2):
            optimizer.step(closure)
            model.zero_grad()
    assert 2 / 3 < planned.total / (live.peak + planned.state["weights"]) < 3 / 2


@pytest.mark.slow
@pytest.mark.parametrize("estimator", get_args(EstimatorName))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_of_a_distillation_is_near_what_is_measured(
    dtype: torch.dtype, estimator: EstimatorName
) -> None:
    pytest.importorskip("transformers")
    from maskpro_lightning.modules.language import CausalLM

    words, learns = 4096, estimator == "straight_through"
    module = nn.Module()
    module.model, batch, rows = llama(words, dtype)
    targets = find_targets(module, "2:4")
    planned = [
        plan(module, targets, devices=1, estimator=estimator, rows=rows, teacher=taught)
        for taught in (False, True)
    ]

    def loss_of(batch: Tensor) -> Tensor:
        return CausalLM._loss(module.model(input_ids=batch).logits, batch)

    def peak(taught: bool) -> int:
        teacher = Teacher(Distillation("model"), module)
        with torch.set_grad_enabled(learns), LiveBytes() as live:
            if taught:
                with torch.no_grad(), teacher.teaching():
                    loss_of(batch)
                with teacher.asking() as losses:
                    loss = loss_of(batch)
                loss = losses[0]
            else:
                loss = loss_of(batch)
            if learns:
                loss.backward()
        module.zero_grad()
        return live.peak

    without, with_teacher = (found.activations for found in planned)
    assert without is not None
    assert with_teacher is not None
    assert 0.9 < (with_teacher - without) / (peak(True) - peak(False)) < 1.1


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_training_under_masks_keeps_moments_a_bit_per_weight_and_a_dense_copy(kind: Any) -> None:
    with torch.device("meta"):
        blocks = nn.ModuleList([nn.Linear(64, 48) for _ in range(3)])
        frozen = nn.Linear(64, 48).requires_grad_(False)
    model = nn.ModuleDict({"blocks": blocks, "frozen": frozen})
    targets = find_targets(blocks, "2:4", on_meta=True)
    weights, biases = 3 * 64 * 48, 3 * 48
    optimizer = kind(blocks.parameters(), lr=0.1)

    def state(**kwargs: Any) -> dict[str, int]:
        found = plan_training(model, targets, [optimizer], **({"devices": 1} | kwargs))
        assert found.forwards == (4 if "teacher" in kwargs else 3)
        return found.state

    one, moments = state(), 2 if kind is torch.optim.AdamW else 0
    assert one["weights"] == 4 * (weights + biases) * 4 // 3
    assert one["gradients"] == 4 * (weights + biases)
    steps = 4 * 6 if moments else 0  # AdamW counts them for each parameter
    assert one["optimizer"] == 4 * moments * (weights + biases) + steps
    assert one["masks"] == weights // 8
    assert state(teacher=blocks) == one | {"dense copy": 4 * (weights + biases)}
    assert state(devices=4)["optimizer"] == 4 * moments * (weights + biases) // 4 + steps
    assert state(devices=4, strategy="ddp") == one


def test_the_teacher_of_a_training_passes_forward() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64))
    targets = find_targets(model, "2:4", on_meta=True)
    alone, taught = (
        plan_training(model, targets, [], devices=1, rows=10, teacher=teacher)
        for teacher in (None, model)
    )
    forward = plan(model, targets, devices=1, estimator="policy", rows=10)
    assert alone.activations is not None
    assert forward.activations is not None
    assert taught.activations == alone.activations + forward.activations


def test_time_is_that_of_the_weights_that_multiply() -> None:
    model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 16), nn.LayerNorm(16))
    found = hours(model, rows=10, forwards=3, steps=7, tflops=1e-9)
    assert found * 3600 == pytest.approx(2 * 8 * 16 * 10 * 3 * 7 / 1e3)
    head = nn.Linear(8, 100)
    head.weight = model[0].weight
    tied = nn.Sequential(*model, head)
    assert hours(tied, 10, 3, 7, 1e-9) / found == pytest.approx(1 + 100 / 16)


def test_a_model_with_memory_is_not_planned_by_a_step_of_its_optimizer() -> None:
    model = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="make it under torch"):
        plan_training(model, find_targets(model, "2:4"), [], devices=1)


@pytest.mark.parametrize(
    ("trainer", "planned"),
    [
        (["devices=auto"], "One device"),
        (["devices=4", "num_nodes=2", "strategy=fsdp"], "One of 8 ranks, fsdp1"),
        (["devices=[0,1]", "strategy=ddp_find_unused_parameters_true"], "One of 2 ranks, ddp"),
        (["devices='0,2,3'", "strategy=ddp"], "One of 3 ranks, ddp"),
        (
            ["devices=2", "strategy=lightning.pytorch.strategies.ModelParallelStrategy"],
            "One of 2 ranks, fsdp2",
        ),
    ],
    ids=["auto", "fsdp1", "ddp", "indices", "fsdp2"],
)
def test_the_command_plans_for_the_recipes_own_devices(
    trainer: list[str],
    planned: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("sys.argv", ["maskpro"])
    main(["plan", "--config", "quickstart", *(f"--trainer.{option}" for option in trainer)])
    assert planned in capsys.readouterr().out
    main(["plan", "--config", "quickstart", "--devices=3", "--strategy=fsdp2"])
    assert "One of 3 ranks, fsdp2" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_plans_a_recipe_without_its_weights(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["maskpro"])
    main(["plan", "--config", "quickstart", "--devices=8", "--strategy=fsdp2", "--tflops=0.01"])
    told = capsys.readouterr().out
    assert "One of 8 ranks, fsdp2" in told
    assert re.search(r"dense\s+│\s+0\.000492", told)
    assert "A step costs 3 forward passes of a batch" in told
    assert "Distillation costs one more." in told
    # 2 operations of the 1,114,112 weights that multiply, 16 x 128 tokens, 4 passes, 200 steps.
    minutes, rest = divmod(round(2 * 1_114_112 * 16 * 128 * 4 * 200 / 0.01e12), 60)
    assert f"The 200 steps take about {minutes} min {rest:02} s at 0.01 TFLOP/s" in told
    assert not list(tmp_path.iterdir())
    once = re.search(r"rank sends (\S+) GB", told)
    twofold = ["--devices=8", "--strategy=fsdp2", "--trainer.accumulate_grad_batches=2"]
    main(["plan", "--config", "quickstart", "--tflops=0.01", *twofold])
    told = capsys.readouterr().out
    assert "accumulates 2 batches" in told
    minutes, rest = divmod(round(2 * 1_114_112 * 16 * 128 * 4 * 2 * 200 / 0.01e12), 60)
    assert f"The 200 steps take about {minutes} min {rest:02} s at 0.01 TFLOP/s" in told
    twice = re.search(r"rank sends (\S+) GB", told)
    assert once is not None
    assert twice is not None
    assert float(twice[1]) == pytest.approx(2 * float(once[1]), rel=0.01)
    own = ["--model.model", "quickstart/model", "--trainer.precision=bf16-mixed"]
    main(["plan", "--config", "quickstart_finetune", "--trainer.accelerator=gpu", *own])
    assert "at 400 TFLOP/s" in capsys.readouterr().out
    main(["plan", "--config", "quickstart_finetune", *own[:2]])
    told = capsys.readouterr().out
    assert "at 0.1 TFLOP/s" in told  # on a CPU, as the recipe says
    assert re.search(r"optimizer\s+│\s+0\.00892", told)
    assert re.search(r"masks\s+│\s+0\.000123", told)
    assert re.search(r"dense copy\s+│\s+0\.00446", told)
    assert "a forward and a backward pass of a batch and one of the dense part" in told
    assert not list(tmp_path.iterdir())
