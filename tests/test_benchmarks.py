"""The benchmark runs from end to end, spends what it says and measures masks that are N:M."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

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


def vision_model() -> torch.nn.Module:
    """The model of the fixture, untrained."""
    import shapes

    model: torch.nn.Module = shapes.VisionTransformer()
    return model


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
    for row in rows:  # a step costs at most 4, and none may start that does not fit
        if row["bytes_per_weight"] != "0":
            assert FORWARDS - 4 < int(row["forwards"]) <= FORWARDS, row["method"]
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
    # Dense copy, logits and masks; with the gradient of the largest weight; for 6 masks of a group
    # of 4, logits, two moments and gradients beside the dense copy and the weights' gradients.
    assert held["policy"] == pytest.approx(4 + 4 + 1 / 4, rel=0.005)  # and counts of blocks
    sizes = [t.parameter.numel() for t in find_targets(vision_model(), "2:4")]
    largest = 4 * max(sizes) / sum(sizes)
    assert held["straight_through"] == pytest.approx(8.25 + largest, rel=0.005)
    assert held["categorical"] == pytest.approx(4 + 4 + 16 * 6 / 4, abs=0.01)  # and step counts


@pytest.mark.usefixtures("quality")
def test_a_changed_default_changes_what_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import defaults

    rows = ["straight-through", "straight-through, logits of one size", "policy", "policy, lr x 4"]
    defaults.main(["--rows", *rows, "--forwards", "130", "--output", str(tmp_path)])
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    found = {cells[1].strip(): [cell.strip() for cell in cells[2:5]] for cells in lines}
    assert list(found) == rows
    assert len({tuple(cells) for cells in found.values()}) == len(rows)


@pytest.mark.usefixtures("quality")
def test_few_sequences_are_all_that_is_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import overfitting

    monkeypatch.setattr("cases.TRAINING_BATCHES", 2)
    seen: list[tuple[int, int]] = []
    inside = overfitting.run

    def run(bench: Any, *args: int, distilling: bool) -> Any:
        seen.append((len(bench.case.training), len(bench.case.training[0])))
        few = {kind: getattr(bench.case, kind)[:1] for kind in ("reported", "elsewhere")}
        bench.case = replace(bench.case, **few)
        return inside(bench, *args, distilling=distilling)

    monkeypatch.setattr(overfitting, "run", run)
    command = ["--steps", "2", "--looks", "2", "--output", str(tmp_path)]
    overfitting.main(["--sequences", "1", "16", *command])
    overfitting.main(["--sequences", "16", "--distilled", *command])
    assert seen == [(1, 1), (2, 8), (2, 8)]
    rows = rows_of(tmp_path / "overfitting.csv")
    runs = [("labels", "1"), ("labels", "16"), ("outputs", "16")]
    assert [(row["learned_from"], row["sequences"], row["step"]) for row in rows] == [
        (*about, step) for about in runs for step in "012"
    ]
    lasts = []
    for about in runs:
        found = [row for row in rows if (row["learned_from"], row["sequences"]) == about]
        first, *_, last = found
        assert first["groups_changed"] == "0.0"
        assert float(last["groups_changed"]) > 0
        assert float(last["seen"]) < float(first["seen"])
        lasts.append((last["held_out"], last["elsewhere"]))
    assert len(set(lasts)) == len(runs)


@pytest.mark.usefixtures("quality")
def test_training_under_masks_spends_what_learning_them_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import finetuning

    command = ["--model", "vision", "--forwards", str(FORWARDS), "--output", str(tmp_path)]
    finetuning.main([*command, "--seeds", "0", "1"])
    rows = rows_of(tmp_path / "finetuning.csv")
    grids = {"magnitude_trained": 3, "sr_ste": 3, "sparsegpt_trained": 3, "learned_trained": 3}
    for method in finetuning.ROWS:
        runs = [row for row in rows if row["method"] == method]
        size = grids.get(method, 3 if method.endswith("trained") else 1)
        assert len(runs) == size + (method != "dense"), method
        if method not in ("dense", "sparsegpt"):
            assert {FORWARDS - 4 < int(row["forwards"]) <= FORWARDS for row in runs} == {True}
    losses = {(row["method"], row["setting"]): row["loss"] for row in rows if row["seed"] == "0"}
    assert len(set(losses.values())) == len(losses)  # each is a model of its own
    dense = next(row for row in rows if row["method"] == "dense")
    assert dense["loss"] != dense["elsewhere"]
    told = capsys.readouterr().out
    assert all(name.replace("**", "") in told for name in finetuning.ROWS.values())
    finetuning.main([*command, "--seeds", "0", "1"])
    assert rows_of(tmp_path / "finetuning.csv") == rows


def test_training_under_masks_is_timed_beside_plain_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    import kept

    small = ["--device", "cpu", "--width", "32", "--layers", "1", "--tokens", "4", "8"]
    monkeypatch.setattr("sys.argv", ["kept.py", *small, "--repeats", "3"])
    kept.main()
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert [cells[1].strip() for cells in rows] == ["4", "8"]
    for cells in rows:
        assert float(cells[2]) > 0
        assert float(cells[3]) > 0
        assert cells[5].strip() == "1"


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


def test_a_start_is_timed_by_the_checkout_that_is_asked_for_and_a_failure_is_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    import startup

    (tmp_path / "maskpro_lightning.py").write_text("raise SystemExit(1)")
    commands = {"help": ("-m", "maskpro_lightning", "fit", "--help")}
    monkeypatch.setattr(startup, "COMMANDS", commands)
    monkeypatch.setattr("sys.argv", ["startup.py", "--against", str(tmp_path), "--repeats", "1"])
    startup.main()
    *_, line = capsys.readouterr().out.splitlines()
    _, name, here, there, _ = (cell.strip() for cell in line.split("|"))
    assert (name, there) == ("help", "fails")
    assert 0 < float(here) < 60


@pytest.mark.usefixtures("quality")
def test_each_gap_learns_anew_from_the_same_mask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import gaps

    command = ["--model", "vision", "--steps", "3", "--output", str(tmp_path)]
    gaps.main([*command, "--gaps", "1", "1000"])
    lines = capsys.readouterr().out.splitlines()
    starts, ends = ([float(x.split()[-1]) for x in lines if key in x] for key in ("from", "other"))
    assert starts[0] == starts[1]
    assert ends[0] != ends[1]
    assert len([line for line in lines if "drawn" in line]) == 2 * 3  # one a step


@pytest.mark.usefixtures("quality")
def test_memory_is_drawn_from_runs_and_from_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import memory

    monkeypatch.setattr(memory, "SIZES", {"tiny": (64, 128, 2, 4, 2)})
    shutil.copy(FOLDER / "results" / "quality.csv", tmp_path)
    memory.main(["--output", str(tmp_path)])
    with (tmp_path / "memory.csv").open(newline="") as file:
        rows = {(r["model"], r["way"]): r for r in csv.DictReader(file)}
    size = {way: 1e9 * float(rows["tiny", way]["gb"]) for way in memory.WAYS}
    weights = int(rows["tiny", "ours"]["weights"])
    assert weights == 2 * 64 * (64 + 2 * 32 + 64 + 3 * 128)
    gradient = 2 * 64 * 128  # of one weight
    # Dense copy, logits and masks; the pruned half alone, and logits of half the size; 6 masks.
    assert size[memory.WAYS[0]] == pytest.approx(6.25 * weights + gradient)
    assert size[memory.WAYS[1]] == pytest.approx(3.25 * weights + gradient)
    assert size[memory.WAYS[2]] == pytest.approx(28 * weights)
    assert size[memory.WAYS[3]] == pytest.approx(5 * weights)
    assert float(rows["llama", "ours"]["gb"]) < float(rows["llama", memory.WAYS[2]]["gb"]) / 3
    assert (tmp_path / "memory.png").exists()
