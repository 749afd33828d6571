"""Laws of what sharded fits learn from gradients, from a teacher and with a compiler."""

from __future__ import annotations

import pytest
from modules import ROUNDING, equal
from process_shards import (
    BY_HAND,
    FIT_STEPS,
    LESSONS,
    LR,
    PUPILS,
    PUPILS_BY_HAND,
    STEPS,
    fits_on,
)
from test_sharding import Told, assert_alike, run


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return run(tmp_path_factory.mktemp("learn"), "learn")["learn"]


TAUGHT = [
    (lesson, name, ranks)
    for lessons, pupils in ((LESSONS, PUPILS), (BY_HAND, PUPILS_BY_HAND))
    for lesson in lessons
    for name in pupils
    for ranks in (2, 4)
    if fits_on(name, ranks)
]


@pytest.mark.slow
@pytest.mark.parametrize(("lesson", "strategy", "ranks"), TAUGHT)
def test_a_fit_learns_what_one_device_does(
    learned: Told, lesson: str, strategy: str, ranks: int
) -> None:
    one, rule = learned[1][0][f"{lesson} ddp"], (LESSONS | BY_HAND)[lesson]
    estimator = rule.get("estimator", "policy")
    rounding = FIT_STEPS * rule.get("lr", LR) * ROUNDING[estimator]
    for told in learned[ranks]:
        found = told[f"{lesson} {strategy}"]
        # A divergence is a small difference of terms near 1, which are what is rounded.
        assert found["losses"] == pytest.approx(one["losses"], rel=0, abs=2**-20)
        assert_alike(found | {"losses": one["losses"]}, one, rounding)
        assert not equal(found["mode"], found["initial"])


@pytest.mark.slow
def test_a_lesson_is_not_that_of_another(learned: Told) -> None:
    one = learned[1][0]
    modes = [one[f"{lesson} ddp"]["mode"] for lesson in LESSONS]
    assert not any(equal(a, b) for n, a in enumerate(modes) for b in modes[:n])


@pytest.mark.slow
def test_one_device_learns_by_hand_what_it_learns_automatically(learned: Told) -> None:
    one = learned[1][0]
    assert_alike(one["gradients by hand ddp"], one["gradients ddp"], 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("estimator", "lr"), [("policy", LR), ("straight_through", 0.1)])
def test_compiled_steps_of_sharded_weights_learn_the_same(
    learned: Told, estimator: str, lr: float
) -> None:
    for told in learned[2]:
        eager, fused = (told[f"{estimator} fused={fused}"] for fused in (False, True))
        assert_alike(fused, eager, STEPS * lr * ROUNDING[estimator])
        assert not equal(fused["mode"], fused["initial"])
