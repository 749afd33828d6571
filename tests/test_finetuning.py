"""Laws of training under a mask: what is pruned stays zero, whoever trains, saves or averages."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import oracle
import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from modules import (
    BATCH,
    FAST,
    Net,
    ResumableLoader,
    dataset,
    equal,
    fit,
    identical,
    loader,
    quiet_trainer,
    same_bits,
    traces,
)
from rules import mask_callback
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from maskpro_lightning import (
    Distillation,
    MaskProCallback,
    NMPattern,
    SparseFinetuning,
    find_targets,
    keep_sparse,
    save_masks,
)
from maskpro_lightning.files.maskfiles import save_maskllm
from maskpro_lightning.weights import kept

PATTERN = NMPattern(2, 4)
Make = Callable[[Any], Optimizer]


class Trained(Net):
    """A module with an optimizer of its own."""

    def __init__(self, make: Make | None = None, *inside: nn.Module) -> None:
        super().__init__(*inside)
        self.make = make or partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def masks_of(module: nn.Module) -> dict[str, Tensor]:
    """The two smallest of every four weights are pruned."""
    return {
        t.name: PATTERN.group(t.parameter.detach().abs())
        .argsort(-1)
        .argsort(-1)
        .ge(2)
        .view(t.shape)
        for t in find_targets(module, PATTERN)
    }


def pruned(module: Any) -> Any:
    """The module with its masks applied; its own, by the same rule, if it is sparse already."""
    for name, mask in masks_of(module).items():
        weight = module.get_parameter(name)
        weight.data.copy_(weight.data.where(mask, 0))
    return module


def assert_stays_sparse(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        weight = module.get_parameter(name).detach()
        assert same_bits(weight[~mask], torch.zeros_like(weight[~mask])), name


def assert_trained_under(module: nn.Module, dense: nn.Module | None = None) -> None:
    """Pruned weights are +0, and nearly all kept ones are not what they were."""
    start = dense or Net()
    masks = masks_of(start)
    assert_stays_sparse(module, masks)
    for name, mask in masks.items():
        before = start.get_parameter(name).to(module.get_parameter(name).dtype)
        moved = module.get_parameter(name) != before
        assert moved[mask].float().mean() > 0.9, name


# --- what is told -------------------------------------------------------------------------------


class Measured(Trained):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", 1.25)


def test_a_fit_tells_where_it_starts_and_what_it_ends_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(pruned(Measured()), SparseFinetuning("2:4"), folder=tmp_path, max_epochs=1)
    assert capsys.readouterr().out.splitlines() == [
        (
            "2:4 masks on 2 weights, from their own zeros: 512 of the model's 544 numbers (94.1%), "
            "50.00% of them zero."
        ),
        "Verified after 4 steps: what the 2:4 masks prune is zero; val_loss 1.25.",
    ]


@pytest.mark.parametrize(
    ("init", "source"), [("magnitude", "magnitude"), (masks_of(Net()), "those given")]
)
def test_a_fit_tells_where_its_masks_come_from(
    init: Any, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saver = ModelCheckpoint(tmp_path, filename="last")
    fit(Trained(), SparseFinetuning(init=init), saver, folder=tmp_path, max_epochs=1)
    first, last = capsys.readouterr().out.splitlines()
    assert f"from {source}: " in first
    assert last == "Verified after 4 steps: what the 2:4 masks prune is zero."
    path = tmp_path / "last.ckpt"
    fit(Trained(), SparseFinetuning(init=init), folder=tmp_path, max_epochs=2, ckpt_path=path)
    assert "from the checkpoint: " in capsys.readouterr().out


def test_a_fit_that_fails_verifies_nothing_and_other_ranks_are_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fails(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(pruned(Trained()), SparseFinetuning(), Fails(), folder=tmp_path, max_epochs=1)
    assert "Verified" not in capsys.readouterr().out
    monkeypatch.setattr(pl.Trainer, "is_global_zero", False)
    fit(pruned(Trained()), SparseFinetuning(), folder=tmp_path, max_epochs=1)
    assert capsys.readouterr().out == ""


# --- optimizers and precisions ------------------------------------------------------------------


class Restless(torch.optim.SGD):
    """Moves weights where they have no gradient, too, as Langevin dynamics do."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data.add_(torch.randn(weight.shape), alpha=0.01)
        return loss


OPTIMIZERS: dict[str, Make] = {
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "foreach": partial(torch.optim.AdamW, lr=1e-2, foreach=True),
    "fused": partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "momentum": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adafactor": partial(torch.optim.Adafactor, lr=1e-2),
    "maximize": partial(torch.optim.RAdam, lr=1e-2, maximize=True, decoupled_weight_decay=True),
    "restless": partial(Restless, lr=1e-2),
    "lbfgs": partial(torch.optim.LBFGS, lr=1e-2, max_iter=2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_stay_zero_with_any_optimizer(name: str, tmp_path: Path) -> None:
    module = pruned(Trained(OPTIMIZERS[name]))
    fit(module, SparseFinetuning(), folder=tmp_path, max_steps=6)
    assert_trained_under(module)


class Momenta(pl.Callback):
    """Moments begin at the first step, here as those of a training that was dense."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (optimizer,) = trainer.strategy.optimizers
        for parameter in pl_module.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "momentum", "maximize"])
def test_pruned_weights_have_no_moments(name: str, tmp_path: Path) -> None:
    module = Trained(OPTIMIZERS[name])
    trainer = fit(
        module, Momenta(), SparseFinetuning(init=masks_of(Net())), folder=tmp_path, max_steps=3
    )
    (optimizer,) = trainer.optimizers
    seen = 0
    for key, mask in masks_of(Net()).items():
        for value in optimizer.state[module.get_parameter(key)].values():
            if isinstance(value, Tensor) and value.shape == mask.shape:
                assert not value[~mask].any()
                assert value[mask].all()
                seen += 1
    assert seen >= 2


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"precision": "bf16-mixed"}, id="bf16-mixed"),
        pytest.param({"precision": "bf16-true"}, id="bf16-true"),
        pytest.param({"precision": "64-true"}, id="64-true"),
        pytest.param({"accumulate_grad_batches": 2}, id="accumulation"),
        pytest.param({"gradient_clip_val": 0.1}, id="clipping"),
        pytest.param(
            {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, id="clipping values"
        ),
        pytest.param({"detect_anomaly": True}, id="anomalies"),
    ],
)
def test_pruned_weights_stay_zero_however_the_trainer_steps(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    module = pruned(Trained())
    fit(module, SparseFinetuning(), folder=tmp_path, max_steps=4, **settings)
    assert_trained_under(module)


def test_pruned_weights_stay_zero_with_a_gradient_scaler(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    module = pruned(Trained())
    fit(
        module,
        SparseFinetuning(),
        folder=tmp_path,
        max_steps=4,
        plugins=[plugin],
        gradient_clip_val=0.5,
    )
    assert_trained_under(module)


class Hand(Trained):
    """Optimizes by hand, clipping gradients itself; one optimizer for each layer."""

    def __init__(self, make: Make | None = None) -> None:
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in optimizers:
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [self.make(self.net[0].parameters()), self.make(self.net[2].parameters())]


def by_hand(module: Trained, steps: int, clip: float, apart: bool = False) -> Trained:
    """The same training in plain PyTorch: gradients times masks, clipped, then weights."""
    masks = masks_of(Net())
    pruned(module)
    layers = [module.net[0], module.net[2]] if apart else [module]
    optimizers = [module.make(layer.parameters()) for layer in layers]
    batches = [*loader()]
    for step in range(steps):
        module.zero_grad()
        module.loss(batches[step % len(batches)]).backward()
        for name, mask in masks.items():
            module.get_parameter(name).grad *= mask
        for layer, optimizer in zip(layers, optimizers, strict=True):
            clip_grad_norm_(layer.parameters(), clip)
            optimizer.step()
        for name, mask in masks.items():
            module.get_parameter(name).data *= mask
    return module


@pytest.mark.parametrize("name", ["adamw", "momentum", "adafactor"])
def test_kept_weights_move_as_if_the_pruned_ones_were_not_there(name: str, tmp_path: Path) -> None:
    module = pruned(Trained(OPTIMIZERS[name]))
    fit(module, SparseFinetuning(), folder=tmp_path, max_steps=6, gradient_clip_val=0.05)
    expected = by_hand(Trained(OPTIMIZERS[name]), 6, 0.05)
    for one, other in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_module_that_optimizes_manually_trains_under_its_mask(tmp_path: Path) -> None:
    module = pruned(Hand())
    fit(module, SparseFinetuning(), folder=tmp_path, max_steps=6)
    assert_trained_under(module)
    expected = by_hand(Trained(), 3, 0.1, apart=True)  # two steps of optimizers for each batch
    for one, other in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


class Noisy(Trained):
    """Gradients come with noise and what is not finite, after they were clipped."""

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        for name, mask in masks_of(Net()).items():
            gradient = self.get_parameter(name).grad
            assert gradient is not None
            gradient[~mask] = torch.nan


def test_what_is_written_into_gradients_reaches_no_pruned_weight(tmp_path: Path) -> None:
    module = pruned(Noisy(OPTIMIZERS["adafactor"]))  # whose moments are of whole rows
    fit(module, SparseFinetuning(), folder=tmp_path, max_steps=3)
    assert_trained_under(module)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


# --- what modules are made of --------------------------------------------------------------------


class Checkpointed(Trained):
    """Computes its first layers again in the backward pass."""

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        hidden = checkpoint(self.net[:2], inputs.requires_grad_(), use_reentrant=False)
        return nn.functional.mse_loss(self.net[2](hidden), targets)


def test_pruned_weights_stay_zero_with_activation_checkpointing(tmp_path: Path) -> None:
    module = pruned(Checkpointed())
    fit(module, SparseFinetuning(), folder=tmp_path, max_steps=4)
    assert_trained_under(module)


@pytest.mark.filterwarnings("ignore")
def test_pruned_weights_stay_zero_in_a_compiled_model(tmp_path: Path) -> None:
    module = pruned(Trained())
    module.net.compile(backend="aot_eager")
    fit(module, SparseFinetuning(), folder=tmp_path, max_steps=4)
    assert_trained_under(module)


def test_a_layer_that_is_frozen_until_later_stays_sparse(tmp_path: Path) -> None:
    class Unfreezes(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1:
                weight = module.net[0].weight.requires_grad_()
                trainer.optimizers[0].add_param_group({"params": [weight]})

    class Frozen(Trained):
        def configure_optimizers(self) -> Any:
            self.net[0].weight.requires_grad_(False)
            return self.make([p for p in self.parameters() if p.requires_grad])

    module = pruned(Frozen())
    fit(module, SparseFinetuning(), Unfreezes(), folder=tmp_path, max_epochs=3)
    assert_trained_under(module)


class UnfreezesLater(pl.Callback):
    """Lets the first layer be trained only from the second epoch on."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        module.net[0].weight.requires_grad_(False)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.current_epoch != 1:
            return
        weight = module.net[0].weight.requires_grad_()
        if self.how == "another group":
            trainer.optimizers[0].add_param_group({"params": [weight]})
        elif self.how == "another optimizer":
            trainer.strategy.optimizers = [module.make(module.parameters())]


@pytest.mark.parametrize("how", ["same group", "another group", "another optimizer"])
def test_a_layer_that_is_unfrozen_trains_as_if_the_mask_were_multiplied_in(
    how: str, tmp_path: Path
) -> None:
    class Frozen(Trained):
        def configure_optimizers(self) -> Any:
            return self.make(list(self.parameters())[how != "same group" :])

    class Reference(Frozen):
        def loss(self, batch: Any) -> Tensor:
            masks = masks_of(Net())
            weights = {n: self.get_parameter(n) * mask for n, mask in masks.items()}
            return nn.functional.mse_loss(
                torch.func.functional_call(self, weights, (batch[0],)), batch[1]
            )

        def forward(self, inputs: Tensor) -> Tensor:
            return self.net(inputs)

    trained = []
    for kind, callback in ((Frozen, SparseFinetuning()), (Reference, Rezeroes())):
        module = pruned(kind(OPTIMIZERS["momentum"]))
        unfreezes = UnfreezesLater(how)
        fit(module, callback, unfreezes, folder=tmp_path, max_epochs=3, gradient_clip_val=0.05)
        trained.append(module)
    assert equal(*(dict(module.named_parameters()) for module in trained))
    assert not torch.equal(trained[0].net[0].weight, pruned(Net()).net[0].weight)


class Rezeroes(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        for name, mask in masks_of(Net()).items():
            module.get_parameter(name).data *= mask


class HandGradients(Trained):
    """Sets its gradients itself."""

    def backward(self, loss: Tensor, *_: Any, **__: Any) -> None:
        parameters = list(self.parameters())
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            parameter.grad = gradient


def test_gradients_that_come_past_all_hooks_are_clipped_without_those_of_pruned_weights(
    tmp_path: Path,
) -> None:
    module = pruned(HandGradients())
    fit(module, SparseFinetuning(), folder=tmp_path, max_steps=6, gradient_clip_val=0.05)
    expected = by_hand(Trained(), 6, 0.05)
    for one, other in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


class InBackward(Trained):
    """Takes its steps in the backward pass, with optimizers that the trainer does not know."""

    def configure_optimizers(self) -> None:
        for parameter in self.parameters():
            optimizer = self.make([parameter])

            def step(parameter: Tensor, optimizer: Optimizer = optimizer) -> None:
                clip_grad_norm_(parameter, 0.05)
                optimizer.step()
                parameter.grad = None

            parameter.register_post_accumulate_grad_hook(step)


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_no_hook_reads_gradients_of_pruned_weights(tmp_path: Path) -> None:
    module, expected = pruned(InBackward()), pruned(Trained())
    fit(module, SparseFinetuning(), folder=tmp_path, max_epochs=2)
    masks, optimizer = masks_of(Net()), expected.make(expected.parameters())
    for batch in [*loader(), *loader()]:
        optimizer.zero_grad()
        expected.loss(batch).backward()
        for name, parameter in expected.named_parameters():
            assert parameter.grad is not None
            parameter.grad *= masks.get(name, 1)
            clip_grad_norm_(parameter, 0.05)
        optimizer.step()
    assert_stays_sparse(module, masks)
    for one, other in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


# --- averages ------------------------------------------------------------------------------------

AVERAGES: dict[str, Callable[[], pl.Callback]] = {
    "swa": partial(StochasticWeightAveraging, swa_lrs=1e-2, swa_epoch_start=1),
}
if hasattr(callbacks, "EMAWeightAveraging"):  # since Lightning 2.6
    ema = partial(callbacks.EMAWeightAveraging, decay=0.5)
    AVERAGES |= {"ema": ema, "late ema": partial(ema, update_starting_at_step=6)}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("inside", [(), (nn.BatchNorm1d(16),)], ids=["plain", "batch norm"])
@pytest.mark.parametrize("name", AVERAGES)
def test_averages_of_weights_are_sparse_in_checkpoints_and_at_the_end(
    name: str, inside: tuple[nn.Module, ...], first: bool, tmp_path: Path
) -> None:
    masks = {n.replace("net.2", f"net.{2 + len(inside)}"): m for n, m in masks_of(Net()).items()}
    ours, average = SparseFinetuning(init=masks), AVERAGES[name]()
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    both = (ours, average) if first else (average, ours)
    module, dense = Trained(None, *inside), Trained(None, *inside)
    fit(module, *both, save, folder=tmp_path, max_epochs=3)
    assert_stays_sparse(module, masks)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) >= 6
    for file in files:
        state = torch.load(file, weights_only=True)["state_dict"]
        for key, mask in masks.items():
            assert not state[key][~mask].any(), (file.name, key)
            assert state[key][mask].all(), (file.name, key)
    assert not equal(dict(module.named_parameters()), dict(dense.named_parameters()))


# --- others who write -----------------------------------------------------------------------------


class Writes(pl.Callback):
    """Writes into one pruned weight in one of its hooks."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._write)

    def _write(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        weight = module.net[2].weight.detach()
        weight[~masks_of(Net())["net.2.weight"]] += 0.5


@pytest.mark.parametrize("hook", ["on_train_end", "on_train_epoch_end", "on_validation_end"])
@pytest.mark.parametrize("first", [True, False])
def test_a_fit_in_which_others_fill_zeros_at_last_ends_with_an_error(
    hook: str, first: bool, tmp_path: Path
) -> None:
    module, both = pruned(Trained()), [SparseFinetuning(), Writes(hook)]
    said = r"The fit ended: 'net.2.weight' has 128 numbers that are not zero where it is pruned"
    with pytest.raises(RuntimeError, match=said):
        fit(module, *(both if first else reversed(both)), folder=tmp_path, max_epochs=1)


class Replaces(pl.Callback):
    """Puts dense parameters in the weights' place."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        if self.how == "assign":
            module.load_state_dict(Net().state_dict(), assign=True)
        elif self.how == "layer":
            module.net[0] = nn.Linear(16, 16)
        else:
            nn.utils.parametrizations.weight_norm(module.net[0])


@pytest.mark.parametrize("how", ["assign", "layer", "parametrization"])
def test_a_fit_in_which_weights_were_replaced_is_not_called_verified(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "The fit ended: 'net.0.weight' is another parameter than when the training began"
    with pytest.raises(RuntimeError, match=said):
        fit(pruned(Trained()), SparseFinetuning(), Replaces(how), folder=tmp_path, max_epochs=1)
    assert "Verified" not in capsys.readouterr().out


def test_a_checkpoint_of_dense_weights_is_not_written(tmp_path: Path) -> None:
    class Dense(pl.Callback):
        def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
            checkpoint["state_dict"] = Net().state_dict()

    save = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    with pytest.raises(RuntimeError, match=r"not written: 'net.0.weight' has 128 numbers"):
        fit(pruned(Trained()), SparseFinetuning(), save, Dense(), folder=tmp_path, max_steps=4)
    assert list(tmp_path.glob("*.ckpt")) == []


# --- where masks come from ------------------------------------------------------------------------


def test_a_dense_module_is_refused_by_name_with_the_remedy(tmp_path: Path) -> None:
    module = pruned(Trained())
    module.net[2].weight.data.copy_(Net().net[2].weight.data)
    said = (
        "'net.2.weight' is not 2:4: group 0 has 4 nonzero weights (64 of 64 groups have too many),"
        " and without masks its zeros are what is kept to. Learn a mask first (MaskProCallback), "
        'give masks or their file, or leave the layer out: exclude=["net.2"].'
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        fit(module, SparseFinetuning(), folder=tmp_path, max_steps=1)
    fit(module, SparseFinetuning(exclude=["net.2"]), folder=tmp_path, max_steps=4)
    assert_stays_sparse(module, {"net.0.weight": masks_of(Net())["net.0.weight"]})
    assert module.net[2].weight.all()


def test_zeros_among_kept_weights_stay_zero_too(tmp_path: Path) -> None:
    module = pruned(Trained())
    module.net[0].weight.data[0, :4] = 0
    fit(module, SparseFinetuning(), folder=tmp_path, max_steps=4)
    assert not module.net[0].weight[0, :4].any()
    assert_stays_sparse(module, masks_of(Net()))


def test_the_masks_of_a_fit_before_are_those_of_the_training(tmp_path: Path) -> None:
    module, learned = Trained(), mask_callback(lr=FAST)
    fit(module, learned, folder=tmp_path, max_steps=8)
    masks = {name: module.get_parameter(name) != 0 for name in masks_of(Net())}
    assert not equal(masks, masks_of(Net()))
    module.net[2].weight.data[0, masks["net.2.weight"][0]] = 0  # kept, and zero for once
    before = module.net[0].weight.detach().clone()
    fit(module, SparseFinetuning(init=learned), folder=tmp_path, max_steps=4)
    assert_stays_sparse(module, masks)
    assert module.net[2].weight[0, masks["net.2.weight"][0]].all()
    assert not torch.equal(before, module.net[0].weight)


@pytest.mark.parametrize("kind", ["dict", "file", "maskllm", "magnitude"])
def test_masks_that_are_given_are_applied_before_the_first_step(kind: str, tmp_path: Path) -> None:
    masks: Any = masks_of(Net())
    save_masks(masks, "2:4", tmp_path / "masks.safetensors")
    save_maskllm(masks, tmp_path / "masks.npz")
    given = {
        "dict": masks,
        "file": tmp_path / "masks.safetensors",
        "maskllm": tmp_path / "masks.npz",
        "magnitude": "magnitude",
    }
    module, expected = Trained(), pruned(Trained())
    fit(module, SparseFinetuning(init=given[kind]), folder=tmp_path, max_steps=4)
    fit(expected, SparseFinetuning(), folder=tmp_path, max_steps=4)
    assert equal(dict(module.named_parameters()), dict(expected.named_parameters()))


def test_masks_are_calibrated_by_a_training_step_that_takes_no_number(tmp_path: Path) -> None:
    class WithoutNumber(Trained):
        def training_step(self, batch: Any) -> Any:  # type: ignore[override]
            return super().training_step(batch, 0)

    module, expected = WithoutNumber(None), Trained(None)
    for each in (module, expected):
        callback = SparseFinetuning(init="wanda", calibration_batches=2)
        fit(each, callback, folder=tmp_path, max_steps=2)
    assert equal(dict(module.named_parameters()), dict(expected.named_parameters()))


def test_masks_are_calibrated_without_a_trace(tmp_path: Path) -> None:
    module, expected = (Trained(None, nn.Dropout(0.5)) for _ in range(2))
    callback = SparseFinetuning(init="wanda", calibration_batches=2)
    torch.manual_seed(0)
    fit(module, callback, folder=tmp_path, data=loader(shuffle=True), max_steps=6)
    assert callback.sparse is not None
    masks = dict(callback.sparse.masks())
    assert not torch.equal(masks["net.0.weight"], masks_of(Net())["net.0.weight"])
    assert_stays_sparse(module, masks)
    torch.manual_seed(0)
    given = SparseFinetuning(init=masks)
    fit(expected, given, folder=tmp_path, data=loader(shuffle=True), max_steps=6)
    assert equal(dict(module.named_parameters()), dict(expected.named_parameters()))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda m: m | {"net.0.weight": m["net.0.weight"] | True}, ValueError, "keeps|4 kept"),
        (lambda m: {"net.0.weight": m["net.0.weight"]}, ValueError, "no initial mask for 'net.2"),
        (lambda m: m | {"net.2.weight": m["net.2.weight"].float()}, TypeError, "bool"),
        (lambda m: m | {"net.2.weight": m["net.2.weight"][:8]}, ValueError, "shape"),
    ],
)
def test_masks_that_do_not_fit_are_refused(
    change: Any, error: type[Exception], said: str, tmp_path: Path
) -> None:
    callback = SparseFinetuning(init=change(masks_of(Net())))
    with pytest.raises(error, match=said):
        fit(Trained(), callback, folder=tmp_path, max_steps=1)


def test_what_cannot_be_trained_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fit twice"):
        fit(Trained(), SparseFinetuning(), MaskProCallback(), folder=tmp_path, max_steps=1)
    with pytest.raises(RuntimeError, match="fit with it first"):
        fit(Trained(), SparseFinetuning(init=MaskProCallback()), folder=tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=r"init='wanda' runs training steps"):
        fit(Hand(), SparseFinetuning(init="wanda"), folder=tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="calibration_batches >= 1"):
        SparseFinetuning(calibration_batches=0)


# --- resuming, and leaving ------------------------------------------------------------------------


def resumable(folder: Path, steps: int, path: Path | None = None, **given: Any) -> Trained:
    module = Trained()
    if not given and path is None:
        pruned(module)
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
    others = [save] if path is None else []
    trainer = quiet_trainer(folder, SparseFinetuning(**given), Zeroes(), *others, max_steps=steps)
    trainer.fit(
        module, ResumableLoader(dataset(), batch_size=BATCH), ckpt_path=path, weights_only=True
    )
    return module


class Zeroes(pl.Callback):
    """At the third step some kept weights are zero for once."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            module.net[2].weight.data[:4] = 0


@pytest.mark.parametrize("init", [None, "magnitude"])
def test_a_resumed_fit_is_one_that_was_not_interrupted(init: str | None, tmp_path: Path) -> None:
    given = {} if init is None else {"init": init}
    whole = resumable(tmp_path / "whole", 8, **given)
    half = resumable(tmp_path / "half", 3, **given)
    resumed = resumable(tmp_path / "resumed", 8, tmp_path / "half" / "step=3.ckpt", **given)
    assert identical(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert not identical(dict(half.state_dict()), dict(whole.state_dict()))
    assert_trained_under(resumed)


def test_a_fit_goes_on_from_a_checkpoint_of_a_dense_training(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, "dense", every_n_train_steps=3)
    fit(Trained(), save, folder=tmp_path, max_steps=3)
    module, callback = Trained(), SparseFinetuning(init=masks_of(Net()))
    fit(module, callback, folder=tmp_path, max_steps=6, ckpt_path=tmp_path / "dense.ckpt")
    assert_trained_under(module)


def test_a_checkpoint_of_another_pattern_is_refused(tmp_path: Path) -> None:
    resumable(tmp_path, 3)
    with pytest.raises(ValueError, match="holds 2:4 masks, but the pattern is 1:4"):
        resumable(tmp_path, 4, tmp_path / "step=3.ckpt", pattern="1:4")


def test_masks_take_a_bit_per_weight(tmp_path: Path) -> None:
    callback = SparseFinetuning()
    fit(pruned(Trained()), callback, folder=tmp_path, max_steps=1)
    assert callback.sparse is not None
    assert callback.sparse.bytes == 2 * 16 * 16 / 8
    assert equal(dict(callback.sparse.masks()), masks_of(Net()))


@pytest.mark.parametrize("fails", [False, True])
def test_a_fit_leaves_no_trace(fails: bool, tmp_path: Path) -> None:
    class Fails(Trained):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if fails and batch_idx == 2:
                raise KeyError("failed")
            return super().training_step(batch, batch_idx)

    left = []
    for ours in ([], [SparseFinetuning()]):
        module = pruned(Fails())
        trainer = quiet_trainer(tmp_path, *ours, max_steps=4)
        if fails:
            with pytest.raises(KeyError):
                trainer.fit(module, loader())
        else:
            trainer.fit(module, loader())
        (optimizer,) = trainer.optimizers
        hooks = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
        on_weights = [len(p._post_accumulate_grad_hooks or ()) for p in module.parameters()]
        left.append((traces(trainer, module), [len(h) for h in hooks], on_weights))
        for callback in ours:
            pickle.loads(pickle.dumps(callback))
    assert left[0] == left[1]


# --- without a trainer ----------------------------------------------------------------------------


def train(module: Trained, optimizer: Optimizer, steps: int, how: str) -> None:
    batches = [*loader()]
    for step in range(steps):

        def closure(batch: Any = batches[step % 4]) -> Tensor:
            optimizer.zero_grad()
            loss = module.loss(batch)
            loss.backward()
            return loss

        if how == "closure":
            optimizer.step(closure=closure)
        elif how == "positional":
            optimizer.step(closure)
        else:
            closure()
            clip_grad_norm_(module.parameters(), 0.05)
            optimizer.step()


@pytest.mark.parametrize("how", ["closure", "positional", "plain"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_keeps_to_masks_without_a_trainer(name: str, how: str) -> None:
    if name == "lbfgs" and how == "plain":
        pytest.skip("wants a closure")
    module = pruned(Trained())
    optimizer = OPTIMIZERS[name](module.parameters())
    sparse = keep_sparse(optimizer, module)
    train(module, optimizer, 6, how)
    assert sparse.faults() == []
    assert_trained_under(module)


def test_gradients_are_clipped_without_those_of_pruned_weights() -> None:
    module = pruned(Trained())
    optimizer = module.make(module.parameters())
    keep_sparse(optimizer, module)
    train(module, optimizer, 6, "plain")
    expected = by_hand(Trained(), 6, 0.05)
    for one, other in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_others_put_into_gradients_is_zeroed_before_the_step() -> None:
    module = pruned(Trained(OPTIMIZERS["adafactor"]))
    optimizer = module.make(module.parameters())
    keep_sparse(optimizer, module)
    module.loss(next(iter(loader()))).backward()
    for name, mask in masks_of(Net()).items():
        gradient = module.get_parameter(name).grad
        assert gradient is not None
        gradient[~mask] = torch.nan
    optimizer.step()
    assert_trained_under(module)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize(("how", "passes"), [("closure", 2), ("plain", 3)])
def test_gradients_are_zeroed_again_only_if_they_were_written_into(
    how: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pruned(Trained())
    optimizer = module.make(module.parameters())
    keep_sparse(optimizer, module)
    inside, calls = kept._Kept.apply, []
    monkeypatch.setattr(kept._Kept, "apply", lambda *args: (calls.append(args), inside(*args)))
    train(module, optimizer, 5, how)  # clips gradients, or does not
    assert len(calls) == 5 * 2 * passes


def test_an_optimizer_of_other_weights_is_refused() -> None:
    module, other = pruned(Trained()), pruned(Trained())
    with pytest.raises(ValueError, match="AdamW has none of the 2 weights under masks"):
        keep_sparse(module.make(other.parameters()), module)


class Codes(Tensor):
    """Numbers in a format of their own, as optimizers of 8 bits have them."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        raise NotImplementedError


def test_moments_in_codes_are_left_as_they_are() -> None:
    module = pruned(Trained())
    optimizer = module.make(module.parameters())
    train(module, optimizer, 1, "plain")
    weight = module.net[0].weight
    codes = torch.full(weight.shape, 127, dtype=torch.uint8)  # where code 0 is not the number 0
    wrapped = torch.Tensor._make_wrapper_subclass(Codes, weight.shape)  # type: ignore[attr-defined]
    optimizer.state[weight] |= {"codes": codes, "wrapped": wrapped}
    keep_sparse(optimizer, module, masks=masks_of(Net()))
    assert (codes == 127).all()
    assert not optimizer.state[weight]["exp_avg"][~masks_of(Net())["net.0.weight"]].any()


def test_a_step_is_given_the_numbers_that_it_takes() -> None:
    class Scaled(torch.optim.SGD):
        def step(self, scale: float, closure: Any = None) -> Any:  # type: ignore[override]
            assert scale == 0.5
            return super().step(closure)

    module = pruned(Trained(partial(Scaled, lr=0.1)))
    optimizer: Any = module.make(module.parameters())
    keep_sparse(optimizer, module)
    module.loss(next(iter(loader()))).backward()
    optimizer.step(0.5)
    assert_trained_under(module)


def test_weights_are_left_alone_once_released() -> None:
    module = pruned(Trained())
    optimizer = module.make(module.parameters())
    sparse = keep_sparse(optimizer, module, masks=masks_of(Net()))
    sparse.release()
    train(module, optimizer, 1, "plain")
    assert len(sparse.faults()) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_kept_numbers_are_left_as_they_are_to_the_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 7, dtype=dtype)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1.0, 5e-324])
    values = special.to(dtype)[torch.randint(0, 8, (7, 12))]
    layer.weight.data.copy_(values)
    mask = PATTERN.top(oracle.random(7, 3, 4, seed=1)).view(7, 12)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    keep_sparse(optimizer, layer, masks={"weight": mask})
    assert same_bits(layer.weight[mask], values[mask])
    assert same_bits(layer.weight[~mask], torch.zeros_like(values[~mask]))


def test_weights_in_any_order_of_memory_keep_to_their_masks() -> None:
    conv = nn.Conv2d(8, 6, 3).to(memory_format=torch.channels_last)
    assert not conv.weight.is_contiguous()
    mask = PATTERN.top(oracle.random(6, 3, 3, 2, 4)).flatten(-2).movedim(-1, 1)
    optimizer = torch.optim.Adam(conv.parameters(), lr=0.1)
    keep_sparse(optimizer, conv, masks={"weight": mask})
    conv(oracle.random(2, 8, 5, 5)).square().sum().backward()
    optimizer.step()
    assert torch.equal(conv.weight != 0, mask)


def test_blocks_of_a_large_weight_are_all_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskpro_lightning.weights.kept.block_size", lambda _: 8)
    layer = nn.Linear(20, 33, bias=False)
    mask = PATTERN.top(oracle.random(33, 5, 4)).view(33, 20)
    sparse = keep_sparse(torch.optim.SGD(layer.parameters()), layer, masks={"weight": mask})
    assert torch.equal(layer.weight != 0, mask)
    assert equal(dict(sparse.masks()), {"weight": mask})


# --- learning from the dense model ----------------------------------------------------------------


def distilled_by_hand(steps: int) -> Trained:
    """In plain PyTorch: the mean square error to the dense outputs, relative to their size."""
    module, teacher = pruned(Trained()), Net()
    optimizer = module.make(module.parameters())
    keep_sparse(optimizer, module)
    batches = [*loader()]
    for step in range(steps):
        inputs, _ = batches[step % len(batches)]
        with torch.no_grad():
            dense = teacher.net(inputs)
        optimizer.zero_grad()
        ((module.net(inputs) - dense).square().mean() / dense.square().mean()).backward()
        optimizer.step()
    return module


def dense_as(kind: str, folder: Path) -> Any:
    net = Net()
    if kind == "checkpoint":
        torch.save({"state_dict": net.state_dict()}, folder / "dense.ckpt")
        return folder / "dense.ckpt"
    if kind == "folder":
        for number, layer in (("0", net.net[0]), ("2", net.net[2])):
            state = {f"{number}.{name}": value for name, value in layer.state_dict().items()}
            save_file(state, folder / f"model-{number}.safetensors")
        return folder
    kinds = {"module": net.net, "whole": net.state_dict(), "part": net.net.state_dict()}
    return kinds.get(kind)


@pytest.mark.parametrize("kind", ["kept", "module", "whole", "part", "checkpoint", "folder"])
def test_sparse_weights_learn_from_dense_outputs(kind: str, tmp_path: Path) -> None:
    distillation = Distillation("net", "mse")
    dense = dense_as(kind, tmp_path)
    if kind == "kept":
        module, callback = (
            Trained(),
            SparseFinetuning(init=masks_of(Net()), distillation=distillation),
        )
    else:
        module, callback = (
            pruned(Trained()),
            SparseFinetuning(distillation=distillation, dense=dense),
        )
    fit(module, callback, folder=tmp_path, max_steps=6)
    assert_trained_under(module)
    expected = distilled_by_hand(6)
    for one, other in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_dense_module_to_learn_from_stays_as_it_is_given(tmp_path: Path) -> None:
    module, dense = pruned(Trained()), Net().net
    dense[2].bias = module.net[2].bias  # as parts that are not masked may be shared
    dense[1].eval()
    before = dense[2].bias.detach().clone()
    callback = SparseFinetuning(distillation=Distillation("net", "mse"), dense=dense)
    fit(module, callback, folder=tmp_path, max_steps=2)
    assert not torch.equal(module.net[2].bias, before)
    assert all(parameter.requires_grad for parameter in dense.parameters())
    assert [part.training for part in dense] == [True, False, True]


@pytest.mark.parametrize("shape", [(16, 16), (4, 4)])
def test_dense_weights_of_another_model_are_refused(shape: tuple[int, int], tmp_path: Path) -> None:
    state = {"net.0.weight": torch.zeros(shape), "net.0.bias": torch.zeros(16)}
    if shape == (4, 4):
        state = {**Net().state_dict(), **state}
    callback = SparseFinetuning(distillation=Distillation("net"), dense=state)
    said = "lack '2.weight', and 1 more" if shape == (16, 16) else "do not fit 'net'.*size mismatch"
    with pytest.raises(ValueError, match=re.compile(said, re.DOTALL)):
        fit(pruned(Trained()), callback, folder=tmp_path, max_steps=1)


@pytest.mark.parametrize("kind", ["module", "state"])
def test_sparse_weights_are_not_learned_from_as_dense_ones(kind: str, tmp_path: Path) -> None:
    sparse = pruned(Trained())
    dense = sparse.net if kind == "module" else sparse.state_dict()
    callback = SparseFinetuning(distillation=Distillation("net"), dense=dense)
    with pytest.raises(ValueError, match=r"'0\.weight' of the dense weights to learn from is 2:4"):
        fit(pruned(Trained()), callback, folder=tmp_path, max_steps=1)


def test_a_distillation_that_cannot_be_is_refused(tmp_path: Path) -> None:
    net = Distillation("net")
    with pytest.raises(ValueError, match="no dense one to learn from"):
        SparseFinetuning(distillation=net)
    with pytest.raises(ValueError, match="Hand optimizes manually"):
        fit(
            Hand(),
            SparseFinetuning(init="magnitude", distillation=net),
            folder=tmp_path,
            max_steps=1,
        )
    unused = SparseFinetuning(init="magnitude", distillation=Distillation("net.1"), dense=nn.Tanh())
    with pytest.raises(RuntimeError, match=r"did not call 'net\.1'"):
        fit(Unused(), unused, folder=tmp_path, max_steps=1)
    given: dict[str, Any] = {"init": "magnitude", "distillation": net}
    resumable(tmp_path, 3, **given)
    with pytest.raises(ValueError, match="the dense ones to learn from are gone"):
        resumable(tmp_path, 4, tmp_path / "step=3.ckpt", **given)


class Unused(Trained):
    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.net[2](self.net[0](batch[0])), batch[1])
