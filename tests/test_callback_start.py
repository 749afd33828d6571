"""Laws of the masks that a fit starts from, and of the batches that they are calibrated on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import initializer_oracle
import oracle
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from modules import (
    BATCH,
    FAST,
    Net,
    assert_masked,
    equal,
    fit,
    learned,
    loader,
    same_bits,
)
from rules import mask_callback
from torch import Tensor
from torch.utils.data import DataLoader

from maskpro_lightning import NMPattern, load_masks, save_masks

Masks = dict[str, Tensor]


def started(folder: Path, module: Net | None = None, **kwargs: Any) -> Masks:
    """The initial masks of a fit of one step."""
    callback = mask_callback(**kwargs)
    fit(module or Net(), callback, folder=folder, max_steps=1)
    return learned(callback, "initial")


def inputs(batches: int) -> Masks:
    """What flows into the layers of the dense Net in the first batches, (T, K)."""
    net, rows = Net().net, next(iter(loader(batch_size=batches * BATCH)))[0]
    with torch.no_grad():
        return {"net.0.weight": rows, "net.2.weight": net[1](net[0](rows))}


def magnitude() -> Masks:
    return {
        name: torch.tensor(initializer_oracle.keep_highest(weight.abs(), 2, 4))
        for name, weight in Net().named_parameters()
        if weight.dim() > 1
    }


def wanda(batches: int) -> Masks:
    net = Net()
    return {
        name: torch.tensor(
            initializer_oracle.wanda(net.get_parameter(name).detach(), x.norm(dim=0), 2, 4)
        )
        for name, x in inputs(batches).items()
    }


def sparsegpt(batches: int) -> Masks:
    net = Net()
    return {
        name: initializer_oracle.sparsegpt(
            net.get_parameter(name).detach(), 2 * x.T @ x / len(x), 2, 4, 0.01
        )[0]
        for name, x in inputs(batches).items()
    }


# --- which masks --------------------------------------------------------------------------------


def test_magnitude_keeps_the_largest_weights(tmp_path: Path) -> None:
    assert equal(started(tmp_path), magnitude())


@pytest.mark.parametrize("batches", [1, 4])
def test_wanda_looks_at_the_first_batches(batches: int, tmp_path: Path) -> None:
    assert equal(started(tmp_path, init="wanda", calibration_batches=batches), wanda(batches))
    assert not equal(wanda(batches), magnitude())
    assert not equal(wanda(1), wanda(4))


@pytest.mark.parametrize("batches", [2, 4])
def test_sparsegpt_looks_at_the_first_batches(batches: int, tmp_path: Path) -> None:
    found = started(tmp_path, init="sparsegpt", calibration_batches=batches)
    assert equal(found, sparsegpt(batches))
    assert not equal(sparsegpt(2), sparsegpt(4))
    assert not equal(sparsegpt(batches), wanda(batches))


class Order(Net):
    """Remembers which batches it was trained on, by their first number."""

    def __init__(self) -> None:
        super().__init__()
        self.order: tuple[float, ...] = ()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.order = (*self.order, float(batch[0][0, 0]))


@pytest.mark.parametrize("init", ["wanda", "reconstruction"])
def test_what_can_be_read_once_is_calibrated_on_and_then_trained_on(
    init: str, tmp_path: Path
) -> None:
    module, callback = Order(), mask_callback(init=init, calibration_batches=4)
    fit(module, callback, folder=tmp_path, data=(batch for batch in loader()), max_epochs=1)
    assert module.order == tuple(float(batch[0][0, 0]) for batch in loader())
    # Lightning has taken two of the four: the one that training begins with, and one ahead.
    rows = [0, 2, 3]
    kept = [list(loader())[row] for row in rows]
    again = mask_callback(init=init, calibration_batches=3)
    fit(Net(), again, folder=tmp_path, data=kept_loader(kept), max_steps=1)
    assert equal(learned(callback, "initial"), learned(again, "initial"))
    assert not equal(learned(callback, "initial"), magnitude())


class Unnumbered(Net):
    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return self.loss(batch)


@pytest.mark.parametrize("init", ["wanda", "reconstruction"])
def test_a_step_that_takes_no_number_is_calibrated_on(init: str, tmp_path: Path) -> None:
    found = started(tmp_path, Unnumbered(), init=init)
    assert equal(found, started(tmp_path, init=init))


def kept_loader(batches: list[Any]) -> Any:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def test_random_masks_depend_on_the_seed_alone(tmp_path: Path) -> None:
    one, same, other = (started(tmp_path, init="random", seed=seed) for seed in (1, 1, 2))
    assert equal(one, same)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert all(oracle.keeps_exactly(2, 4, mask) for mask in one.values())


def test_nonzeros_keeps_the_masks_of_a_sparse_module(tmp_path: Path) -> None:
    masks, module = wanda(4), Net()
    for name, mask in masks.items():
        module.get_parameter(name).data[~mask] = 0
    assert equal(started(tmp_path, module, init="nonzeros"), masks)


def test_given_masks_are_where_the_fit_starts(tmp_path: Path) -> None:
    masks = wanda(4)
    save_masks(masks, NMPattern(2, 4), tmp_path / "masks.safetensors")
    for init in (masks, tmp_path / "masks.safetensors", str(tmp_path / "masks.safetensors")):
        assert equal(started(tmp_path, init=init), masks)


def test_the_masks_of_one_fit_start_the_next(tmp_path: Path) -> None:
    callback, logger = mask_callback(lr=FAST), CSVLogger(tmp_path, name="", version="")
    fit(Net(), callback, folder=tmp_path, max_steps=6, logger=logger, log_every_n_steps=4)
    path = tmp_path / "maskpro" / "masks.safetensors"
    assert equal(load_masks(path, NMPattern(2, 4)), learned(callback))
    assert equal(started(tmp_path / "next", init=path), learned(callback))


def test_weights_loaded_in_a_hook_are_the_ones_masked(tmp_path: Path) -> None:
    class Late(Net):
        def on_train_start(self) -> None:
            self.load_state_dict(Other().state_dict())

    class Other(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net[0].weight.data = oracle.random(16, 16, seed=9)

    module = Late()
    fit(module, mask_callback(lr=FAST), folder=tmp_path, max_steps=6)
    assert_masked(module, Other())


# --- calibration leaves no trace ----------------------------------------------------------------


class Seen(Net):
    """Remembers the batches that the training loop hands it, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Tensor] = []
        self.noise: list[Tensor] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch[0])
        self.noise.append(torch.rand(()))


LOADERS = {
    "shuffled": lambda: loader(shuffle=True),
    "shuffled by a generator of its own": lambda: loader(
        shuffle=True, generator=torch.Generator().manual_seed(0)
    ),
    "a worker that stays": lambda: loader(shuffle=True, num_workers=1, persistent_workers=True),
    "a worker": lambda: loader(shuffle=True, num_workers=1),
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_calibration_changes_neither_batches_nor_random_numbers(make: Any, tmp_path: Path) -> None:
    seen = {}
    for init in ("magnitude", "wanda"):
        torch.manual_seed(5)
        module, callback = Seen(), mask_callback(init=init, calibration_batches=3)
        fit(module, callback, folder=tmp_path, data=make(), max_epochs=2)
        seen[init] = module
    for one, other in zip(*(module.batches for module in seen.values()), strict=True):
        assert torch.equal(one, other)
    assert seen["magnitude"].noise == seen["wanda"].noise
    assert len(seen["wanda"].batches) == 8


def test_calibration_takes_the_batches_of_several_loaders(tmp_path: Path) -> None:
    class Pair(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch["one"]) + 0 * self.loss(batch["other"])

    callback = mask_callback(init="wanda")
    data = {"one": loader(), "other": loader()}
    fit(Pair(), callback, folder=tmp_path, data=data, max_steps=1)
    assert equal(learned(callback, "initial"), wanda(4))


def test_calibration_passes_batches_through_the_modules_hooks(tmp_path: Path) -> None:
    class Scaled(Net):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] * torch.arange(1, 17), batch[1]]

    found = started(tmp_path, Scaled(), init="wanda")["net.0.weight"]
    norm = (inputs(4)["net.0.weight"] * torch.arange(1, 17)).norm(dim=0)
    expected = initializer_oracle.wanda(Net().net[0].weight.detach(), norm, 2, 4)
    assert found.tolist() == expected
    assert wanda(4)["net.0.weight"].tolist() != expected


def test_an_unknown_method_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"init is one of magnitude, wanda, .*; got 'largest'\."):
        mask_callback(init="largest")


def test_masks_of_other_weights_are_refused_and_the_module_stays_dense(tmp_path: Path) -> None:
    module = Net()
    with pytest.raises(ValueError, match=r"There is no initial mask for 'net\.2\.weight'"):
        started(tmp_path, module, init={"net.0.weight": magnitude()["net.0.weight"]})
    assert same_bits(module.net[0].weight, Net().net[0].weight)
