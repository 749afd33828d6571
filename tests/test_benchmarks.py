"""The benchmark runs from end to end, spends what it says and measures masks that are N:M."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from types import ModuleType

import oracle
import pytest
import torch

from maskpro_lightning import NMPattern, find_targets
from maskpro_lightning.initial.initializers import magnitude

FOLDER = Path(__file__).parent.parent / "benchmarks"
FORWARDS = 24


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The command, on a model and data so small that a run takes less than a second."""
    monkeypatch.syspath_prepend(FOLDER)
    import cases
    import methods
    import quality
    import shapes

    small = partial(shapes.VisionTransformer, width=16, depth=1, heads=2)
    monkeypatch.setattr(shapes, "VisionTransformer", small)
    monkeypatch.setattr(shapes, "TRAINING_STEPS", 10)
    monkeypatch.setattr(shapes, "BATCH", 4)
    monkeypatch.setattr(cases, "TRAINING_BATCHES", 8)
    monkeypatch.setattr(cases, "HELD_OUT_BATCHES", 2)
    monkeypatch.setattr(methods, "CALIBRATION_BATCHES", 1)
    return quality


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_a_run_fills_the_table_and_another_makes_nothing_anew(
    quality: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--model", "vision", "--forwards", str(FORWARDS), "--output", str(tmp_path)]
    quality.main([*command, "--seeds", "0", "1"])
    rows = rows_of(tmp_path / "quality.csv")
    grids = {"published": 6, "categorical": 4}
    for method in quality.METHODS:
        runs = [row for row in rows if row["method"] == method]
        again = method not in ("dense", "magnitude")  # with the second seed, at one setting
        assert len(runs) == grids.get(method, 1) + again, method
        best = min(float(run["choosing_loss"]) for run in runs if run["seed"] == "0")
        chosen = {run["setting"] for run in runs if float(run["choosing_loss"]) == best}
        assert {run["setting"] for run in runs if run["seed"] == "1"} <= chosen
    for row in rows:  # a step costs at most 3, and none may start that does not fit
        if row["bytes_per_weight"] != "0":
            assert FORWARDS - 3 < int(row["forwards"]) <= FORWARDS, row["method"]
    # The embedding, the only block and the head are three parts that are solved for in turn.
    assert {r["forwards"] for r in rows if r["method"] == "sparsegpt_updated"} == {"3"}
    page = (tmp_path / "quality.md").read_text()
    assert all(f"| {name} |" in page for name in quality.METHODS.values())
    assert "vision, 2:4" in capsys.readouterr().out
    for ending in ("png", "svg"):
        assert (tmp_path / f"quality.{ending}").exists()

    quality.main([*command, "--seeds", "0", "1"])
    assert rows_of(tmp_path / "quality.csv") == rows


def test_memory_is_what_each_learner_holds(quality: ModuleType, tmp_path: Path) -> None:
    rows = ["policy", "straight_through", "categorical"]
    command = ["--model", "vision", "--forwards", str(FORWARDS), "--output", str(tmp_path)]
    quality.main([*command, "--seeds", "0", "--rows", *rows])
    held = {
        row["method"]: float(row["bytes_per_weight"]) for row in rows_of(tmp_path / "quality.csv")
    }
    # Dense copy, logits and masks; with the weight's gradient; for 6 masks of a group of 4, logits,
    # two moments and gradients beside the dense copy and the weight's gradient.
    assert held["policy"] == 4 + 4 + 1
    assert held["straight_through"] == 9 + 4
    assert held["categorical"] == pytest.approx(4 + 4 + 16 * 6 / 4, abs=0.01)  # and step counts


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_the_categoricals_masks_are_strict_and_learned(quality: ModuleType, pattern: str) -> None:
    from categorical import CategoricalMasks

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 8))
    inputs = torch.randn(32, 16)
    parsed = NMPattern.parse(pattern)
    with torch.no_grad():
        expected = model(inputs)
    targets = find_targets(model, pattern)
    prior = {t.name: magnitude(t.parameter, parsed, t.input_dim) for t in targets}
    learned = CategoricalMasks(targets, parsed, prior, lr=0.01, steps=100, seed=0)
    dense = [target.parameter.detach().clone() for target in targets]

    def loss() -> torch.Tensor:
        return (model(inputs) - expected).square().mean()

    @torch.no_grad()
    def loss_under(masks: dict[str, torch.Tensor]) -> float:
        for target, weight in zip(targets, dense, strict=True):
            target.parameter.copy_(weight * masks[target.name])
        return float(loss())

    before = loss_under(prior)
    for _ in range(100):
        learned.step(loss)
    masks = learned.masks()
    for name, mask in masks.items():
        assert oracle.keeps_exactly(parsed.n, parsed.m, mask, -1), name
    assert loss_under(masks) < before
