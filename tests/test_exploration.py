"""Laws of a mask for each replica: all learn from all, and nobody's logits drift."""

from __future__ import annotations

from functools import reduce
from typing import Any

import oracle
import pytest
import torch
from modules import ROUNDING, equal, identical
from process_shards import STEPS, Model, weights
from test_sharding import RANKS, Told, assert_alike, run
from torch import Tensor, nn

from maskpro_lightning import MaskPro

DRAWN = 2  # the bit of a drawn mask


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return run(tmp_path_factory.mktemp("explore"), "explore")["explore"]


def single_update(before: dict[str, Any], losses: list[Tensor]) -> tuple[dict[str, Tensor], Any]:
    """Logits and tracker after one rank has evaluated one mask."""
    groups = weights(Model())
    optimizer = MaskPro(groups, lr=1.0, momentum=0.9)
    state = before["state"]
    for number, mask in enumerate(before["told"]["drawn"].values()):
        masks = state["state"][number]["masks"]
        state["state"][number]["masks"] = masks & ~DRAWN | mask.to(torch.uint8) * DRAWN
    for group in state["param_groups"]:
        group["exploration"] = "shared"  # which does not draw its mask again
    optimizer.load_state_dict(state)
    baseline, loss = losses
    optimizer.step(lambda: loss, baseline)
    return optimizer.logits(), optimizer.tracker


@pytest.mark.parametrize("ranks", RANKS)
def test_an_update_is_the_mean_of_the_updates_for_each_mask(told: Told, ranks: int) -> None:
    for number in range(3):
        steps = [rank["steps"][number] for rank in told[ranks]]
        singles = [single_update(step, step["losses"]) for step in steps]
        for name, logits in steps[0]["after"]["logits"].items():
            mean = torch.stack([found[name] for found, _ in singles]).mean(0)
            torch.testing.assert_close(logits, mean, rtol=0, atol=4 * ROUNDING["policy"])
        trackers = [tracker for _, tracker in singles]
        after = told[ranks][0]["steps"][number + 1]["state"] if number < 2 else None
        for name in trackers[0] if after else ():
            mean = torch.stack([tracker[name] for tracker in trackers]).mean()
            torch.testing.assert_close(after["param_groups"][0][name], mean)


@pytest.mark.parametrize("ranks", [2, 4])
def test_replicas_draw_masks_of_their_own_and_share_all_else(told: Told, ranks: int) -> None:
    first, *others = (rank["ddp"] for rank in told[ranks])
    for other in others:
        for what in ("logits", "initial", "mode"):
            assert identical(first[what], other[what]), what
        assert not equal(first["drawn"], other["drawn"])
    drawn = [rank["steps"][0]["told"]["drawn"]["conv.weight"] for rank in told[ranks]]
    assert not any(torch.equal(drawn[0], mask) for mask in drawn[1:])
    # The first replica's is the one that all would share.
    shared = told[1][0]["steps"][0]["told"]["drawn"]
    assert equal(told[ranks][0]["steps"][0]["told"]["drawn"], shared)


def test_one_replica_explores_as_all_do_together(told: Told) -> None:
    (rank,) = told[1]
    assert identical(rank["ddp"], rank["shared"])
    for ranks in RANKS:
        for rank in told[ranks]:
            found = rank["fsdp2"] | {"losses": []}  # each rank knows that of its data alone
            expected = told[1][0]["shared"] | {"losses": []}
            assert_alike(found, expected, STEPS * 8 * ROUNDING["policy"])


def test_two_ranks_with_half_a_replica_each_explore_as_one_with_a_whole(told: Told) -> None:
    for rank, sharded in enumerate(told[4]):
        expected = told[2][rank // 2]["ddp"]
        found = sharded["hsdp2"] | {"losses": []}
        assert_alike(found, expected | {"losses": []}, STEPS * 8 * ROUNDING["policy"])


@pytest.mark.parametrize("ranks", RANKS)
def test_a_resumed_exploration_is_the_uninterrupted_one(told: Told, ranks: int) -> None:
    logits = [rank["whole"]["logits"] for rank in told[ranks]]
    assert all(identical(logits[0], other) for other in logits)
    for rank in told[ranks]:
        for what in ("logits", "initial", "drawn", "mode", "weights"):
            assert identical(rank["resumed"][what], rank["whole"][what]), what
    drawn = [rank["whole"]["drawn"] for rank in told[ranks]]
    assert reduce(lambda alike, mask: alike or equal(drawn[0], mask), drawn[1:], False) is False


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_drift_are_stopped(told: Told, ranks: int) -> None:
    for rank in told[ranks]:
        fine, drifted = rank["drift"]
        assert not fine
        assert drifted.startswith("The logits of the ranks have drifted apart")


@pytest.mark.parametrize("logits_dtype", ["float32", "bfloat16"])
def test_a_replica_alone_learns_what_all_would_share(logits_dtype: Any) -> None:
    found = []
    for exploration in ("shared", "per_replica"):
        weight = nn.Parameter(oracle.random(8, 16))
        optimizer = MaskPro(
            [("w", weight)], lr=0.5, exploration=exploration, logits_dtype=logits_dtype
        )
        for residual in (1.0, -0.5, 2.0, 0.25):
            optimizer.step(lambda r=residual: torch.tensor(r), torch.tensor(0.0))
        found.append((optimizer.logits()["w"], optimizer.masks("drawn")["w"]))
    assert all(map(torch.equal, *found))
    assert found[0][0].unique().numel() > 2  # something is learned
