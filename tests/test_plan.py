"""Laws of plans; that they tell what ranks really keep is tested where ranks are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from maskpro_lightning import find_targets
from maskpro_lightning.cli import main
from maskpro_lightning.commands.plan import Plan, Strategy, plan


def planned(devices: int, strategy: Strategy = "fsdp2", **kwargs: object) -> Plan:
    with torch.device("meta"):
        blocks = nn.ModuleList([nn.Linear(64, 48) for _ in range(3)])
    targets = find_targets(blocks, "2:4", on_meta=True)
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
    assert gradients.state["gradients"] == gradients.state["weights"]
    assert policy.activations == 10 * (64 + 48) * 4
    assert gradients.activations == 3 * policy.activations
    assert policy.total == sum(policy.state.values()) + policy.gathered + policy.activations


def test_lean_memory_and_small_logits_are_planned_as_they_are_kept() -> None:
    weights = 3 * 64 * 48
    lean = planned(2, "ddp", memory="lean", logits_dtype="bfloat16", pattern="1:4").state
    counts = lean.pop("redrawn")
    assert counts == 3 * 8  # a block of groups for each of three weights
    assert lean == {
        "weights": 4 * (weights + 3 * 48),
        "pruned": 4 * weights * 3 // 4,
        "logits": 2 * weights,
        "masks": weights // 4,
    }
    message = (
        "memory='lean' exchanges whole weights, but fsdp2 shards them over 2 ranks: plan with "
        "memory='plain', or with strategy='ddp'."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        planned(2, memory="lean")


def test_strategies_without_a_plan_are_refused() -> None:
    message = (
        "There is no plan for 'deepspeed' on 2 devices: strategy is one of ddp, fsdp1, fsdp2, "
        "and devices at least 1."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        planned(2, "deepspeed")  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_command_plans_a_recipe_without_its_weights(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["maskpro"])
    main(["plan", "--config", "quickstart", "--devices", "8", "--strategy", "fsdp2"])
    told = capsys.readouterr().out
    assert "One of 8 ranks, fsdp2" in told
    assert re.search(r"dense\s+│\s+491,520", told)
    assert "Forward passes per step: 3" in told
    assert not list(tmp_path.iterdir())
