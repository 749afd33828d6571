"""What version 0.1 learned and saved: the same masks to the bit, and checkpoints that go on."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import Net, fit, learned, logits
from oracle import random
from rules import mask_callback, mask_optimizer
from torch import Tensor, nn

from maskpro_lightning.optim.masked_weight import MaskedWeight

SAVED = Path(__file__).parent / "data" / "version_0_1"
CASES: list[tuple[str, tuple[int, ...], int]] = [
    ("2:4", (6, 8), -1),
    ("2:4", (8, 6), 0),
    ("2:4", (3, 8, 2, 2), 1),
    ("2:4", (2, 8, 3), -2),
    ("1:4", (8, 6), 0),
    ("1:2", (6, 4), -1),
    ("3:5", (3, 10, 2, 2), 1),
    ("4:8", (2, 3, 16), -1),
    ("8:16", (6, 32), -1),
    ("2:4", (512, 512), -1),
]
MASKS: dict[str, str] = json.loads((SAVED / "masks.json").read_text())


@pytest.fixture
def unbounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moves as version 0.1 made them, which had no bound."""
    move = MaskedWeight.move

    def without_bound(weight: Any, draw: Any, way: Any, scale: Any, bound: Any, *args: Any) -> None:
        move(weight, draw, way, scale, 1e9, *args)

    monkeypatch.setattr(MaskedWeight, "move", without_bound)


def step(optimizer: Any, weight: Tensor, estimator: str, number: int) -> None:
    if estimator == "policy":
        loss, baseline = 1.0 - 0.4 * number, 0.1 * number * number
        optimizer.step(lambda: torch.tensor(loss), torch.tensor(baseline))
    else:
        optimizer.step(partial(with_gradient, weight, number + 1))


def with_gradient(weight: Tensor, seed: int) -> Tensor:
    weight.grad = random(*weight.shape, seed=seed).to(weight.dtype)
    return torch.tensor(1.0)


def digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


@pytest.mark.usefixtures("unbounded")
@pytest.mark.parametrize(("pattern", "shape", "dim"), CASES)
@pytest.mark.parametrize(
    ("estimator", "memory", "logits_dtype", "dtype"),
    list(
        product(
            ("policy", "straight_through"),
            ("plain", "lean"),
            ("float32", "bfloat16"),
            ("float32", "bfloat16"),
        )
    ),
)
def test_the_same_masks_are_drawn_and_learned(
    pattern: str,
    shape: tuple[int, ...],
    dim: int,
    estimator: str,
    memory: str,
    logits_dtype: str,
    dtype: str,
) -> None:
    weight = nn.Parameter(random(*shape).to(getattr(torch, dtype)))
    optimizer = mask_optimizer(
        [{"params": [("w", weight)], "input_dim": dim}],
        pattern,
        estimator=estimator,
        memory=memory,
        logits_dtype=logits_dtype,
        lr=0.5,
        logit_scale=1.0,
        momentum=0.5,
        published=estimator == "policy" and dtype == "float32",
    )
    seen = ""
    for number in range(6):
        step(optimizer, weight, estimator, number)
        for mask in (optimizer.masks("drawn")["w"], optimizer.masks("mode")["w"]):
            seen += digest(mask.contiguous().numpy().tobytes())
    key = "|".join([pattern, str(shape), str(dim), estimator, memory, logits_dtype, dtype])
    assert digest(seen.encode()) == MASKS[key]


@pytest.mark.usefixtures("unbounded")
@pytest.mark.parametrize("now", ["plain", "lean"])
@pytest.mark.parametrize("then", ["plain", "lean"])
@pytest.mark.parametrize("estimator", ["policy", "straight_through"])
def test_the_state_of_an_optimizer_goes_on(estimator: str, then: str, now: str) -> None:
    saved = torch.load(SAVED / f"{estimator}-{then}.pt")
    weight = nn.Parameter(torch.zeros(6, 8))
    optimizer = mask_optimizer([("w", weight)], estimator=estimator, memory=now)
    optimizer.load_state_dict(saved["state"])
    for number in range(3, 6):
        step(optimizer, weight, estimator, number)
    for version in ("drawn", "mode"):
        assert torch.equal(optimizer.masks(version)["w"], saved["then"][version])
    close(optimizer.logits()["w"], saved["then"]["logits"])


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_a_fit_goes_on(tmp_path: Path) -> None:
    module, callback = Net(), mask_callback(lr=3.0)
    fit(module, callback, folder=tmp_path, max_steps=8, ckpt_path=SAVED / "fit.ckpt")
    expected = torch.load(SAVED / "fit_after_8_steps.pt")
    for name, mask in learned(callback).items():
        assert torch.equal(mask, expected["mode"].pop(name))
    for name, values in logits(callback).items():
        close(values, expected["logits"].pop(name))
    assert not expected["mode"]
    assert not expected["logits"]


def close(found: torch.Tensor, saved: torch.Tensor) -> None:
    """The same numbers, but for the last bits, in which the vector units of processors differ."""
    torch.testing.assert_close(found, saved, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gone", [{"sharpness": 4.0}, {"exploration": "per_replica"}])
def test_what_this_version_does_not_have_is_refused_with_the_way_on(gone: dict[str, Any]) -> None:
    state = torch.load(SAVED / "policy-plain.pt")["state"]
    for group in state["param_groups"]:
        group.update(gone)
    optimizer = mask_optimizer([("w", nn.Parameter(torch.zeros(6, 8)))])
    ((name, value),) = gone.items()
    message = f"learned with {name}={value!r}, which this version does not have: finish that fit"
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
