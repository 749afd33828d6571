"""Laws of states and checkpoints that are damaged: an error, or a fit as sound as any; no code."""

from __future__ import annotations

import copy
import functools
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modules import FAST, Net, fit, identical, same_weights
from rules import mask_callback, mask_optimizer

from maskpro_lightning import MaskPro, find_targets

# By kind: nothing, text, numbers out of range, other containers, other tensors.
JUNK: list[Callable[[], Any]] = [
    lambda: None,
    lambda: "2:4",
    lambda: -1,
    lambda: 2**70,
    lambda: math.nan,
    lambda: math.inf,
    lambda: True,
    list,
    dict,
    lambda: [None],
    lambda: {"a": 1},
    lambda: torch.tensor(math.nan),
    lambda: torch.zeros(0),
    lambda: torch.ones(16, 16),
    lambda: torch.zeros(16, 16, dtype=torch.uint8),
    lambda: torch.full((16, 16), 255, dtype=torch.uint8),
    lambda: torch.full((16, 16), math.inf),
    lambda: torch.full((16, 16), 1e38),
    lambda: torch.zeros(16, 16).to_sparse(),
    lambda: torch.zeros(2**20, 2**20, device="meta"),
    lambda: torch.zeros(1).expand(16, 16),
]


def new(module: Net) -> MaskPro:
    return mask_optimizer(
        [(target.name, target.parameter) for target in find_targets(module, "2:4")]
    )


@functools.cache
def saved() -> bytes:
    """A checkpoint of a fit of four steps."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = fit(Net(), mask_callback(lr=FAST), folder=Path(folder), max_steps=4)
        trainer.save_checkpoint(Path(folder, "a.ckpt"))
        return Path(folder, "a.ckpt").read_bytes()


def loaded() -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".ckpt") as file:
        Path(file.name).write_bytes(saved())
        found: dict[str, Any] = torch.load(file.name, weights_only=True)
        return found


def places(thing: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """The way to everything inside."""
    keys = thing if isinstance(thing, dict) else range(len(thing)) if _is_list(thing) else ()
    for key in keys:
        yield (*path, key)
        yield from places(thing[key], *path, key)


def _is_list(thing: Any) -> bool:
    return isinstance(thing, list | tuple)


def damaged(state: dict[str, Any], data: st.DataObject) -> tuple[dict[str, Any], str]:
    """A copy with something in it taken out or replaced by junk."""
    state = copy.deepcopy(state)
    *path, key = data.draw(st.sampled_from(list(places(state))))
    junk = data.draw(st.integers(-1, len(JUNK) - 1))
    inside: Any = functools.reduce(lambda owner, name: owner[name], path, state)
    if junk < 0:
        del inside[key]
    else:
        inside[key] = JUNK[junk]()
    return state, f"{path} {key} {junk}"


def assert_sound(optimizer: MaskPro) -> None:
    """Masks are masks, whatever numbers they were made from."""
    for version in ("initial", "drawn", "mode"):
        for mask in optimizer.masks(version).values():
            assert oracle.keeps_exactly(2, 4, mask)
    optimizer.step(lambda: torch.tensor(1.0), torch.tensor(0.5))
    for values in optimizer.logits().values():
        assert values.isfinite().all()


# --- states -------------------------------------------------------------------------------------

often = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@often
@given(data=st.data())
def test_a_damaged_state_of_the_optimizer_is_refused_or_sound(data: st.DataObject) -> None:
    state, what = damaged(loaded()["optimizer_states"][0], data)
    module = Net()
    optimizer = new(module)
    try:
        optimizer.load_state_dict(state)
    except ValueError:
        assert not optimizer.begun, what
        assert same_weights(module, Net()), what
    else:
        if optimizer.begun:
            assert_sound(optimizer)


@often
@given(data=st.data())
def test_a_damaged_state_of_the_callback_is_refused_or_plain(data: st.DataObject) -> None:
    state, what = damaged(loaded()["callbacks"]["MaskProCallback"], data)
    callback = mask_callback()
    try:
        callback.load_state_dict(state)
    except ValueError:
        return
    again = mask_callback()
    again.load_state_dict(callback.state_dict())
    assert identical(again.state_dict(), callback.state_dict()) or "nan" in repr(state), what


@pytest.mark.parametrize("thing", [None, [], {}, "state", {"state": {}}, {"param_groups": [None]}])
def test_what_is_no_state_at_all_is_refused(thing: Any) -> None:
    with pytest.raises(ValueError, match="This is no whole state of MaskPro, or a damaged one"):
        new(Net()).load_state_dict(thing)
    with pytest.raises(ValueError, match="What this checkpoint holds of MaskProCallback is damage"):
        mask_callback().load_state_dict(thing)
