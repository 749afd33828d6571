"""Laws of states and checkpoints that are damaged: an error, or a fit as sound as any; no code."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import pickle
import random
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modules import FAST, Net, assert_masked, fit, identical, loader, quiet_trainer, same_weights
from torch import Tensor

from maskpro_lightning import MaskPro, MaskProCallback, find_targets

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
    return MaskPro([(target.name, target.parameter) for target in find_targets(module, "2:4")])


@functools.cache
def saved() -> bytes:
    """A checkpoint of a fit of four steps."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = fit(Net(), MaskProCallback(lr=FAST), folder=Path(folder), max_steps=4)
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
    callback = MaskProCallback()
    try:
        callback.load_state_dict(state)
    except ValueError:
        return
    again = MaskProCallback()
    again.load_state_dict(callback.state_dict())
    assert identical(again.state_dict(), callback.state_dict()) or "nan" in repr(state), what


@pytest.mark.parametrize("thing", [None, [], {}, "state", {"state": {}}, {"param_groups": [None]}])
def test_what_is_no_state_at_all_is_refused(thing: Any) -> None:
    with pytest.raises(ValueError, match="This is no whole state of MaskPro, or a damaged one"):
        new(Net()).load_state_dict(thing)
    with pytest.raises(ValueError, match="What this checkpoint holds of MaskProCallback is damage"):
        MaskProCallback().load_state_dict(thing)


# A weight of 16 x 16 has 64 groups.
COUNTS = {
    "none": (torch.tensor(0), True),
    "all": (torch.tensor(64), True),
    "more than all": (torch.tensor(65), False),
    "negative": (torch.tensor(-1), False),
    "a fraction": (torch.tensor(0.5), False),
    "several": (torch.tensor([1, 2]), False),
    "no tensor": (3, False),
    "sparse": (torch.ones(1, dtype=torch.int64).to_sparse(), False),
    "nowhere": (torch.tensor(0, device="meta"), False),
}


@pytest.mark.parametrize(("redrawn", "sound"), COUNTS.values(), ids=COUNTS.keys())
def test_from_no_group_to_all_may_have_been_redrawn(redrawn: Any, sound: bool) -> None:
    state = loaded()["optimizer_states"][0]
    state["state"][0]["redrawn"] = redrawn
    optimizer = new(Net())
    if sound:
        optimizer.load_state_dict(state)
        assert_sound(optimizer)
        return
    with pytest.raises(ValueError, match=r"redrawn of 'net\.0\.weight' is no (number|tensor)"):
        optimizer.load_state_dict(state)
    assert not optimizer.begun


@pytest.mark.parametrize("value", [0.99e20, -0.99e20, 1e20, -1e20, math.inf, math.nan])
def test_logits_below_1e20_are_sound(value: float) -> None:
    state = loaded()["optimizer_states"][0]
    state["state"][0]["logits"][0, 0] = value
    optimizer = new(Net())
    if abs(value) < 1e20:
        optimizer.load_state_dict(state)
        assert_sound(optimizer)
        return
    with pytest.raises(ValueError, match=r"logits of 'net\.0\.weight' are not all below 1e\+20"):
        optimizer.load_state_dict(state)


# --- files --------------------------------------------------------------------------------------


def resume(content: bytes, folder: Path) -> tuple[Net, MaskProCallback]:
    (folder / "damaged.ckpt").write_bytes(content)
    module, callback = Net(), MaskProCallback(lr=FAST)
    fit(module, callback, folder=folder, ckpt_path=folder / "damaged.ckpt", max_steps=5)
    return module, callback


@pytest.mark.filterwarnings("ignore:.*")
def test_a_truncated_or_flipped_checkpoint_is_refused_or_resumes_with_sound_masks(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    whole, chance = saved(), random.Random(0)
    tries = [whole[: chance.randrange(len(whole))] for _ in range(20)]
    for _ in range(100):
        flipped = bytearray(whole)
        flipped[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        tries.append(bytes(flipped))
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for content in tries:
        try:
            module, _ = resume(content, tmp_path)
        except Exception:  # noqa: BLE001, of PyTorch or Lightning or ours, but an error
            refused += 1
        else:
            for layer in module.net[::2]:
                assert ((layer.weight != 0).view(-1, 4).sum(-1) <= 2).all()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 200 * 1024
    assert refused >= 20  # whatever is cut off
    record_property("tried", len(tries))


def test_an_undamaged_checkpoint_resumes(tmp_path: Path) -> None:
    module, callback = resume(saved(), tmp_path)
    assert callback.optimizer is not None
    assert callback.optimizer.param_groups[0]["step"] == 5
    assert_masked(module, Net())


class Payload:
    """Touches a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.skipif(
    "weights_only" not in inspect.signature(pl.Trainer.fit).parameters,
    reason="this Lightning cannot load weights only",
)
def test_no_code_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    evil, mark = loaded(), tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(mark)))  # so that the test can fail
    mark.unlink()
    evil["callbacks"]["MaskProCallback"]["journal"]["rows"] = Payload(mark)
    torch.save(evil, tmp_path / "evil.ckpt")
    module = Net()
    trainer = quiet_trainer(tmp_path, MaskProCallback(), max_steps=5)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        trainer.fit(module, loader(), ckpt_path=tmp_path / "evil.ckpt", weights_only=True)
    assert not mark.exists()
    assert same_weights(module, Net())


def test_what_we_save_is_plain() -> None:
    def plain(thing: Any) -> bool:
        if isinstance(thing, dict):
            return all(plain(k) and plain(v) for k, v in thing.items())
        if _is_list(thing):
            return all(map(plain, thing))
        return thing is None or type(thing) in (str, int, float, bool, Tensor)

    found = loaded()
    assert plain(found["optimizer_states"])
    assert plain(found["lr_schedulers"])
    assert plain(found["callbacks"]["MaskProCallback"])
