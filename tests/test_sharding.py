"""Laws of sharded masks: nobody can tell from what was learned how many ranks learned it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import process_shards
import pytest
import torch
from modules import ROUNDING, equal, identical
from process_group import run_group
from process_shards import FAMILIES, LR, STEPS, STRATEGIES, Model, applies

from maskpro_lightning import NMPattern, find_targets
from maskpro_lightning.commands.plan import plan
from maskpro_lightning.weights.layout import Layout

RANKS = (1, 2, 4)
Told = dict[int, list[dict[str, Any]]]


def run(folder: Path, *tasks: str) -> dict[str, Told]:
    """What every rank tells of each task, on 1, 2 and 4 of them."""
    command = [sys.executable, "-W", "ignore", process_shards.__file__, str(folder), *tasks]
    status, output = run_group(command)
    assert not status, output

    def told(task: str, ranks: int, rank: int) -> Any:
        return torch.load(folder / f"{task}-{ranks}-{rank}.pt", weights_only=False)

    return {
        task: {ranks: [told(task, ranks, rank) for rank in range(ranks)] for ranks in RANKS}
        for task in tasks
    }


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return run(tmp_path_factory.mktemp("core"), "core")["core"]


POLICY = [(name, ranks) for name in STRATEGIES for ranks in RANKS if applies(name, ranks)]
GRADIENTS = [
    (family, name, ranks)
    for family, (_, _, _, names) in FAMILIES.items()
    for name in names
    for ranks in RANKS
    if applies(name, ranks)
]


def assert_alike(found: Any, expected: Any, rounding: float) -> None:
    """Equal masks; logits and losses up to the rounding of so many updates."""
    for version in ("initial", "drawn", "mode"):
        assert equal(found[version], expected[version]), version
    for name, logits in expected["logits"].items():
        torch.testing.assert_close(found["logits"][name], logits, rtol=0, atol=rounding)
    assert found["losses"] == pytest.approx(expected["losses"], rel=2**-20)


@pytest.mark.parametrize(("strategy", "ranks"), POLICY)
def test_masks_do_not_depend_on_how_the_weights_are_cut(
    core: Told, strategy: str, ranks: int
) -> None:
    one = core[1][0]["ddp"]
    for told in core[ranks]:
        assert_alike(told[strategy]["start"], one["start"], 0.0)
        assert_alike(told[strategy]["end"], one["end"], STEPS * LR * ROUNDING["policy"])
        assert not equal(told[strategy]["start"]["mode"], told[strategy]["end"]["mode"])


@pytest.mark.parametrize(("family", "strategy", "ranks"), GRADIENTS)
def test_masks_learned_from_gradients_do_not_depend_on_how_the_weights_are_cut(
    core: Told, family: str, strategy: str, ranks: int
) -> None:
    name = f"{family} {strategy}"
    one = core[1][0][f"{family} ddp"]
    for told in core[ranks]:
        assert_alike(told[name]["start"], one["start"], 0.0)
        assert_alike(told[name]["end"], one["end"], STEPS * 0.1 * ROUNDING["straight_through"])
        assert not equal(told[name]["start"]["mode"], told[name]["end"]["mode"])


@pytest.mark.parametrize(("strategy", "ranks"), POLICY)
def test_ranks_agree_to_the_bit(core: Told, strategy: str, ranks: int) -> None:
    first, *others = (told[strategy]["end"] for told in core[ranks])
    for other in others:
        for what in ("logits", "initial", "drawn", "mode", "losses"):
            assert identical(first[what], other[what]), what


@pytest.mark.parametrize("ranks", RANKS)
def test_fully_sharded_ranks_keep_together_what_one_rank_keeps(core: Told, ranks: int) -> None:
    kept = [told["fsdp2"]["end"]["bytes"] for told in core[ranks]]
    # On 4 ranks, 24 rows of inputs are cut into 6, and each keeps what belongs to 8.
    cut = 8.25 * 12 * 8 if ranks == 4 else 0
    assert sum(kept) == core[1][0]["ddp"]["end"]["bytes"] + cut
    # A rank has at most one row of each weight more than its share: 8.25 bytes a weight, up to 36.
    assert max(kept) < sum(kept) / ranks + 8.25 * 4 * 36


@pytest.mark.parametrize("ranks", RANKS)
def test_flat_shards_keep_nothing_twice_but_cut_groups(core: Told, ranks: int) -> None:
    kept = [told["fsdp1"]["end"]["bytes"] for told in core[ranks]]
    # At most 8.25 bytes a weight of the groups at two ends of four weights.
    edges = 8.25 * 2 * (36 + 48 + 4 + 4)
    assert sum(kept) <= core[1][0]["ddp"]["end"]["bytes"] + ranks * edges


@pytest.mark.parametrize("ranks", RANKS)
def test_a_plan_tells_what_the_largest_rank_keeps(core: Told, ranks: int) -> None:
    model = Model()
    for strategy in ("ddp", "fsdp2"):
        found = plan(
            model,
            find_targets(model, "2:4"),
            devices=ranks,
            strategy=strategy,
        )
        kept = max(told[strategy]["end"]["bytes"] for told in core[ranks])
        weights = max(told[strategy]["end"]["weight_bytes"] for told in core[ranks])
        assert found.state["dense"] + found.state["logits"] + found.state["masks"] == kept
        assert found.state["weights"] == weights
    found = plan(
        model,
        find_targets(model, "2:4"),
        devices=ranks,
        strategy="fsdp1",
    )
    mean = sum(told["fsdp1"]["end"]["weight_bytes"] for told in core[ranks]) / ranks
    assert mean <= found.state["weights"] <= mean + 4 * 8  # eight weights, each rounded up


@pytest.mark.slow
def test_a_plan_tells_what_a_step_takes_from_others(tmp_path: Path) -> None:
    told = run(tmp_path, "traffic")["traffic"]
    model = process_shards.Chain(16, 32, 8)
    targets = find_targets(model, "2:4")
    for ranks in (2, 4):
        for name in ("fsdp1", "fsdp2"):
            for estimator in ("policy", "straight_through"):
                found = plan(model, targets, devices=ranks, strategy=name, estimator=estimator)
                taken = [each[f"{name} {estimator}"] for each in told[ranks]]
                assert taken == [found.sent] * ranks, (ranks, name, estimator)


def test_a_step_of_the_policy_sends_nothing(core: Told) -> None:
    for ranks in RANKS:
        for told in core[ranks]:
            assert not any(told[name]["end"]["sent"] for name, n in POLICY if n == ranks)


@pytest.mark.parametrize(
    ("case", "sent"),
    [
        ("2:4 fsdp1 unsharded", []),
        ("2:4 hsdp2", [4]),  # the size of each of four gradients
        # 24 rows of inputs are cut at 6 and 18, within groups of 4 rows of 12.
        ("2:4 fsdp2", [2 * 4 * 12, 4]),
        # Of two weights, 20 columns of inputs of one are cut at 5, 10 and 15.
        ("2:4 tp", [3 * 4 * 3, 2]),
    ],
)
def test_a_step_learns_from_gradients_with_one_message_of_sizes_and_one_of_cut_groups(
    core: Told, case: str, sent: list[int]
) -> None:
    for told in core[4]:
        assert told[case]["end"]["sent"] == sent * STEPS


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2", "fsdp2 by inputs"])
def test_damaged_masks_of_a_part_are_refused(core: Told, strategy: str, ranks: int) -> None:
    for told in core[ranks]:
        found = told[f"damaged {strategy}"]
        assert re.search(
            r"the saved initial mask of '\w+.weight' is not 2:4: group 0 keeps 4", found
        )
        assert ("this rank's part" in found) == (strategy != "ddp" and ranks > 1)


def test_a_run_without_the_groups_that_its_edges_cut() -> None:
    whole = Layout.of(torch.zeros(4, 8), NMPattern(2, 4), -1)
    for start, length, first, kept in ((3, 20, 4, 16), (4, 8, 4, 8), (5, 2, 7, 0), (9, 0, 9, 0)):
        where, view = Layout.run(whole, start, length, ()).uncut(
            torch.arange(start, start + length)
        )
        assert view.tolist() == list(range(first, first + kept))
        assert (where.offset, where.size, where.cut) == ((first,), (kept,), False)
