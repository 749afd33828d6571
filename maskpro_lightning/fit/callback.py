"""MaskPro in a Lightning training: when things happen, nothing about how they are done."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from os import PathLike
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from tqdm import tqdm

from maskpro_lightning.files.maskfiles import load_maskllm, load_masks
from maskpro_lightning.fit import strategies
from maskpro_lightning.fit.baseline import (
    BaselineCache,
    fingerprint,
    fresh_batches,
    notices_random_numbers,
    traceless,
)
from maskpro_lightning.fit.distillation import Distillation, Teacher
from maskpro_lightning.initial import calibration
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.optim.masked_weight import Version
from maskpro_lightning.optim.optimizer import (
    Estimator,
    Exploration,
    LogitsDtype,
    MaskPro,
    Memory,
    policy_lr,
)
from maskpro_lightning.tracking.journal import Journal
from maskpro_lightning.tracking.loggers import OnError, Tracking
from maskpro_lightning.tracking.metrics import mask_metrics
from maskpro_lightning.tracking.mlflow_run import MLflowRun
from maskpro_lightning.weights.admission import check_loss
from maskpro_lightning.weights.targets import (
    Target,
    count,
    describe,
    find_targets,
    parameter_groups,
)

_log = logging.getLogger(__name__)

# A trainer or a logger is of either of two Lightnings, whose classes of a name are not the same.
Trainer = Any
Init = str | PathLike[str] | Mapping[str, Tensor]
# A fit ends after so many updates in a row that were skipped since no loss was finite. Looked at as
# often, since reading a number waits for the device; so it can be nearly twice as many.
_PATIENCE = 100
# Of what a checkpoint holds of the callback.
_FORMAT = 1


class MaskProCallback(pl.Callback):
    """Learn N:M masks during ``Trainer.fit``, leaving the weights as they are.

    For the length of the fit the callback takes the place of the module's optimizer: each training
    step evaluates a drawn mask instead of computing gradients, and :class:`MaskPro` moves the
    logits. Validation and checkpoints see the most likely mask. Afterwards the module holds that
    mask, exactly N of every M, its kept weights bit for bit the original ones; if the fit fails it
    holds the dense weights again.

    Args:
        pattern: Weights kept of every M along the input dimension, such as "2:4".
        include: Globs of layers to mask instead of the default choice, see :func:`find_targets`.
        exclude: Globs of layers to leave out.
        init: Initial masks: "magnitude", "wanda", "sparsegpt", "reconstruction" (the best without
            learning), "random", "nonzeros" (the model is sparse already), the path of a mask file
            (ours, or MaskLLM's ``.npz``), or masks by parameter name.
        calibration_batches: Training batches that "wanda", "sparsegpt" and "reconstruction" look
            at.
        estimator: "policy" learns from the loss alone, without a backward pass;
            "straight_through" from gradients, and gets further on the same compute.
        lr: Step size of the logits, see :class:`MaskPro`. By default that of the policy depends on
            the length of the fit, see :func:`policy_lr`.
        lr_scheduler: Makes a learning rate scheduler, stepped every training step, from the
            optimizer; as in ``LightningCLI``. By default the rate falls to 0, linearly, over the
            fit; with the published rule, or where the fit has no end, it is constant.
        logit_scale: Initial logit of a kept weight, see :class:`MaskPro`.
        sharpness: How much draws sharpen while the rate falls, see :class:`MaskPro`.
        momentum: Decay of the tracker of residuals.
        normalize: Scale residuals by their running spread; False is the published rule.
        seed: Seed of all draws.
        exploration: "shared": the ranks evaluate one mask on all their data. "per_replica": each
            copy of the model evaluates a mask of its own on its own data, and all learn from all,
            see :class:`MaskPro`; with ``strategy="ddp"`` each rank is one.
        fused: Compile the step of the masks, see :class:`MaskPro`.
        memory: "lean" keeps no dense copy of the weights, see :class:`MaskPro`.
        logits_dtype: "bfloat16" halves the logits, see :class:`MaskPro`.
        baseline_cache: Batches whose baseline is remembered; 0 measures it at every step.
        distillation: Learn from the distance to the dense model's own outputs instead of the loss
            of the training step; costs one more forward pass per batch.
        log_distributions: Hand the logits to the loggers that keep files at every checkpoint
            (4 bytes per weight).
        on_logger_error: "warn" goes on without a logger that fails, "raise" ends the fit.

    Attributes:
        optimizer: The :class:`MaskPro` of the last fit, with logits and dense weights; None
            before the first.
    """

    def __init__(
        self,
        pattern: str | NMPattern = "2:4",
        *,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        init: Init = "magnitude",
        calibration_batches: int = 16,
        estimator: Estimator = "policy",
        lr: float | None = None,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        logit_scale: float | None = None,
        sharpness: float | None = None,
        momentum: float = 0.99,
        normalize: bool = True,
        seed: int = 0,
        exploration: Exploration = "shared",
        fused: bool | None = None,
        memory: Memory = "plain",
        logits_dtype: LogitsDtype = "float32",
        baseline_cache: int = 2**16,
        distillation: Distillation | None = None,
        log_distributions: bool = True,
        on_logger_error: OnError = "warn",
    ) -> None:
        self.log: Callable[..., None]  # the Trainer's gift
        self.pattern = NMPattern.parse(pattern)
        self.include = include
        self.exclude = exclude
        self.init = init if isinstance(init, Mapping) else str(init)
        if isinstance(self.init, str) and not _is_file(self.init):
            calibration.check_method(self.init)
        self.baseline_cache = baseline_cache
        self.distillation = distillation
        self.calibration_batches = calibration_batches
        self.lr_scheduler = lr_scheduler
        self.how: dict[str, Any] = {
            "fused": fused,
            "memory": memory,
            "logits_dtype": logits_dtype,
        }
        self.rule: dict[str, Any] = {
            "estimator": estimator,
            "lr": lr,
            "logit_scale": logit_scale,
            "sharpness": sharpness,
            "momentum": momentum,
            "normalize": normalize,
            "seed": seed,
            "exploration": exploration,
        }
        self.log_distributions = log_distributions
        self.on_logger_error = on_logger_error
        self.optimizer: MaskPro | None = None
        for name, value, least in (
            ("calibration_batches", calibration_batches, 1),
            ("baseline_cache", baseline_cache, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}, but {name} >= {least} must hold.")
        if on_logger_error not in get_args(OnError):
            raise ValueError(
                f"on_logger_error is one of {', '.join(get_args(OnError))}; got "
                f"{on_logger_error!r}."
            )
        self._baselines = BaselineCache(baseline_cache)
        self._journal = Journal()
        self._deployed: Version = "mode"
        self._fitting = False
        self._stepped = False
        self._window: list[Tensor] = []
        self._targets: list[Target] = []
        self._patches: list[tuple[Any, str, Any]] = []
        self._tracking: Tracking | None = None
        self._teacher: Teacher | None = None
        # Made for its checks, and for the defaults that it fills in.
        weight = nn.Parameter(torch.zeros(self.pattern.m, device="cpu"))  # never on "meta"
        given = {**self.rule, **self.how, "fused": False}  # where it runs may have a compiler
        trial = MaskPro([weight], self.pattern, **given)
        self._lr_given = lr is not None
        self.rule = {name: trial.defaults[name] for name in self.rule}

    # Entering and leaving the fit

    def setup(self, trainer: Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._refuse_unsupported(trainer, pl_module)
        self._tracking = Tracking(trainer, self.on_logger_error)
        self._mlflow_run = MLflowRun(trainer, self._tracking)
        self._baselines = BaselineCache(self.baseline_cache)
        self._journal = Journal()
        self.optimizer = None
        self._teacher = None
        self._trainer, self._module = trainer, pl_module
        self._patch(pl_module, "configure_optimizers", self._configure_optimizers)
        self._patch(pl_module, "optimizer_step", self._optimizer_step)
        self._patch(pl_module, "lr_scheduler_step", lambda scheduler, metric: scheduler.step())
        self._training_step_inside = trainer.strategy.training_step
        self._patch(trainer.strategy, "training_step", self._training_step)
        self._state_dict_inside = trainer.strategy.lightning_module_state_dict
        self._patch(trainer.strategy, "lightning_module_state_dict", self._state_dict)
        patches = strategies.MaskCheckpoints.patches(
            trainer,
            lambda: self._optimizer,
            lambda checkpoint: self.state_key in checkpoint.get("callbacks", {}),
        )
        for name, method in patches.items():
            self._patch(trainer.strategy, name, method)
        # Lightning's last call on the way out, after a fit that failed as well.
        self._teardown_inside = trainer.strategy.teardown
        self._patch(trainer.strategy, "teardown", self._leave)
        if self._forward_only:
            loop = trainer.fit_loop.epoch_loop.automatic_optimization
            self._patch(loop, "_skip_backward", True)
        self._deployed = "mode"
        self._fitting = True

    def on_train_start(self, trainer: Trainer, pl_module: pl.LightningModule) -> None:
        keeps = bool(trainer.loggers) and not trainer.fast_dev_run
        self._journal.open(self._tracking_.folder(), keeps, writes=trainer.is_global_zero)
        self._journal.parameters(self._parameters(pl_module), self._tracking_)
        if self._optimizer.begun:
            self._tracking_.resume()
        self._mlflow_run.begin(
            {"maskpro.pattern": str(self.pattern), "maskpro.estimator": self.rule["estimator"]}
        )

    def on_train_end(self, trainer: Trainer, pl_module: pl.LightningModule) -> None:
        self._optimizer.write("mode")
        self._journal.close(self._optimizer, self._tracking_)

    def on_exception(
        self, trainer: Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        # A checkpoint on exception is written after this, and holds the mode's mask as always.
        self._deployed = "dense"
        if self._fitting and self.optimizer is not None:
            self.optimizer.write(self._deployed)

    def _leave(self) -> None:
        """Stands in for the strategy's teardown: everything of the user's is theirs again."""
        self._mlflow_run.end()
        del self._mlflow_run
        if self.optimizer is not None:
            self.optimizer.write(self._deployed)
        teardown = self._teardown_inside
        for owner, name, before in reversed(self._patches):
            if before is None:
                vars(owner).pop(name, None)
            else:
                vars(owner)[name] = before
        self._patches.clear()
        self._window.clear()
        self._fitting = False
        for name in [name for name in vars(self) if name.endswith("_inside")]:
            del vars(self)[name]
        del self._trainer, self._module
        # What else leads to the trainer, so that the callback can be copied and pickled.
        self._tracking = None
        self._targets = []
        vars(self).pop("log", None)
        teardown()

    # Training under drawn masks

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._optimizer.begun:
            return
        # Only now have all hooks run in which a module may load its weights. Reading calibration
        # batches takes random numbers, too.
        with traceless(trainer, pl_module):
            self._optimizer.begin(self._initial_masks(trainer, pl_module))

    @property
    def _forward_only(self) -> bool:
        return bool(self.rule["estimator"] == "policy")

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the strategy's training step: baseline, then the drawn mask."""
        with torch.set_grad_enabled(not self._forward_only):
            self._ask_teacher(*args, **kwargs)
            baseline = self._baseline(*args, **kwargs) if self._forward_only else None
            output, loss = self._evaluate(*args, **kwargs)
        if loss is not None and not (self._forward_only or loss.requires_grad):
            raise RuntimeError(
                f"The loss of {type(self._module).__name__} has no gradient: let the masked "
                f"weights require one (requires_grad=True), or choose estimator='policy'."
            )
        if loss is not None:
            losses = [loss] if baseline is None else [loss, baseline]
            self._window.append(torch.stack([value.detach().float() for value in losses]))
        return output

    def _evaluate(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor | None]:
        """A training step with the weights as they are: its output, and the loss to learn from."""
        if self._teacher is None:
            output = self._training_step_inside(*args, **kwargs)
            return output, _loss_of(output)
        with self._teacher.asking() as losses:
            output = self._training_step_inside(*args, **kwargs)
        if _loss_of(output) is None:
            return output, None
        output = {**output, "loss": losses[0]} if isinstance(output, Mapping) else losses[0]
        return output, losses[0]

    def _ask_teacher(self, *args: Any, **kwargs: Any) -> None:
        if self.distillation is None:
            return
        if self._teacher is None:
            self._teacher = Teacher(self.distillation, self._module)
        with (
            torch.no_grad(),
            self._optimizer.applied("dense"),
            traceless(self._trainer, self._module),
            self._teacher.teaching(),
        ):
            self._training_step_inside(*args, **kwargs)

    def _baseline(self, batch: Any, *args: Any, **kwargs: Any) -> Tensor | None:
        """The initial mask's loss on a batch, remembered or measured."""
        strategy = self._trainer.strategy
        key = fingerprint(batch) if self._baselines.size else None
        known = self._baselines.get(key)
        # Ranks measure together, since a forward pass may communicate.
        if strategy.reduce_boolean_decision(known is not None, all=True):
            assert known is not None
            return known.to(strategy.root_device)
        with (
            self._optimizer.applied("initial"),
            traceless(self._trainer, self._module),
            notices_random_numbers() as random,
        ):
            _, loss = self._evaluate(batch, *args, **kwargs)
        if loss is None:
            return None
        loss = loss.detach().float()
        if not random[0]:  # with dropout, both losses need the same random numbers
            self._baselines.put(key, loss)
        return loss

    def _optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any]
    ) -> None:
        """Stands in for the module's optimizer_step: no clipping, no scaler."""
        optimizer_closure()
        if not self._window:
            return
        losses = torch.stack(self._window).mean(0)
        self._window.clear()
        if not (self._forward_only and self.rule["exploration"] == "per_replica"):
            losses = self._trainer.strategy.reduce(losses, reduce_op="mean")
        loss, *baseline = losses
        self._optimizer.step(lambda: loss, *baseline)
        self._module.zero_grad()
        self._stepped = True
        if self._optimizer.param_groups[0]["step"] % _PATIENCE == 0:
            self._end_if_nothing_is_finite(batch_idx)

    def _end_if_nothing_is_finite(self, batch_idx: int) -> None:
        skipped = int(self._optimizer.tracker["skipped_in_a_row"])
        if skipped < _PATIENCE:
            return
        losses = {name: float(value) for name, value in self._optimizer.last.items()}
        seen = f"{losses['loss']:g} under the drawn mask"
        remedy = "look at the batches, the loss and the precision"
        if self._forward_only:
            seen += f" and {losses['baseline']:g} under the initial one"
            if math.isfinite(losses["baseline"]):
                remedy = "a larger logit_scale keeps masks closer to the initial one"
        raise RuntimeError(
            f"The loss was not finite in the last {skipped} updates, so nothing is learned any "
            f"more: at step {self._trainer.global_step}, batch {batch_idx}, it was {seen}. "
            f"{remedy.capitalize()}."
        )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not self._stepped or not trainer.log_every_n_steps:
            return
        self._stepped = False
        values = dict(self._optimizer.last) | {"skipped": self._optimizer.tracker["skipped"]}
        if self._forward_only:
            values["delta"] = self._optimizer.tracker["delta"]
        self._log(values)
        if trainer._logger_connector.should_update_logs:
            found = mask_metrics(self._optimizer)[""]
            if self._forward_only:
                found["baseline_hit_rate"] = self._baselines.hit_rate
            self._log(found)
            self._journal.step(trainer.global_step, values | found)

    def _log(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self.log(f"maskpro/{name}", value, prog_bar=name in ("residual", "changed"))

    # Validation and checkpoints under the most likely mask

    def on_validation_start(self, trainer: Trainer, pl_module: pl.LightningModule) -> None:
        if self._fitting:
            self._optimizer.write("mode")

    def on_validation_end(self, trainer: Trainer, pl_module: pl.LightningModule) -> None:
        if not self._fitting:
            return
        if self._optimizer.begun:
            layers = mask_metrics(self._optimizer)
            layers.pop("")
            self._journal.layers(layers)
            logged = trainer._results.metrics(on_step=False)["callback"]
            self._journal.validation(trainer.global_step, logged)
            self._tracking_.metrics(
                {
                    # A tracker may take a slash for a folder, and leave it by "..".
                    f"maskpro/{name}/{layer.replace('/', '.')}": value
                    for layer, found in layers.items()
                    for name, value in found.items()
                }
            )
        self._optimizer.write("drawn")

    def _state_dict(self) -> dict[str, Any]:
        """Stands in for the strategy's state dict: the most likely mask's weights."""
        state: dict[str, Any]
        with self.optimizer.applied("mode") if self.optimizer is not None else nullcontext():
            state = self._state_dict_inside()
            strategies.part_from(state, [target.parameter for target in self._targets])
        return state

    def state_dict(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "baselines": self._baselines.state_dict(),
            "journal": self._journal.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        try:
            number = int(state_dict["format"])
            if number <= _FORMAT:
                self._baselines.load_state_dict(state_dict["baselines"])
                self._journal.load_state_dict(state_dict["journal"])
        except Exception as error:
            raise ValueError(
                f"What this checkpoint holds of MaskProCallback is damaged ({error!r}): resume "
                f"from another one."
            ) from error
        if number > _FORMAT:
            raise ValueError(
                f"This checkpoint holds format {number} of MaskProCallback, and this version reads "
                f"up to {_FORMAT}: pip install --upgrade maskpro-lightning."
            )

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        begun = self.optimizer is not None and self.optimizer.begun
        if self._fitting and self.log_distributions and begun:
            self._journal.distributions(self._optimizer, self._tracking_, trainer.global_step)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.state_key not in checkpoint.get("callbacks", {}):
            # Written by a training without this callback: its weights are what we start from.
            checkpoint["optimizer_states"] = []
            checkpoint["lr_schedulers"] = []

    # What the fit needs once

    @property
    def _optimizer(self) -> MaskPro:
        assert self.optimizer is not None
        return self.optimizer

    @property
    def _tracking_(self) -> Tracking:
        assert self._tracking is not None
        return self._tracking

    def _configure_optimizers(self) -> Any:
        sharded = strategies.sharded_model(self._trainer.strategy)
        module = self._module if sharded is None else sharded
        self._targets = find_targets(module, self.pattern, self.include, self.exclude)
        steps = self._trainer.estimated_stepping_batches
        falls = self.lr_scheduler is None and self.rule["normalize"] and 0 < steps < math.inf
        if falls and self._forward_only and not self._lr_given:
            self.rule["lr"] = policy_lr(self.pattern, self.rule["logit_scale"], int(steps))
        groups = parameter_groups(self._targets)
        self.optimizer = MaskPro(groups, self.pattern, model=sharded, **self.rule, **self.how)
        _log.info(describe(module, self._targets, self.pattern))
        if self.lr_scheduler is not None:
            scheduler = self.lr_scheduler(self.optimizer)
        elif falls:
            # Not LinearLR, whose state holds the length: a fit resumed for longer would stay at 0.
            scheduler = LambdaLR(self.optimizer, lambda step: max(0.0, 1 - step / steps))
        else:
            return self.optimizer
        return {
            "optimizer": self.optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _initial_masks(
        self, trainer: Trainer, pl_module: pl.LightningModule
    ) -> Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]:
        if isinstance(self.init, Mapping):
            return self.init
        if self.init.endswith(".npz"):
            shapes = {target.name: target.shape for target in self._targets}
            return load_maskllm(self.init, shapes, self.pattern)
        if _is_file(self.init):
            return load_masks(self.init, self.pattern)

        def batches() -> Iterator[Callable[[], None]]:
            for number, batch in enumerate(self._calibration_data(trainer, pl_module)):
                yield partial(run, batch, number)

        def run(batch: Any, number: int) -> None:
            with traceless(trainer, pl_module):
                self._training_step_inside(batch, number)

        return calibration.initial_masks(
            self.init,
            self._targets,
            self.pattern,
            seed=self.rule["seed"],
            batches=batches,
            reduce=lambda tensor: trainer.strategy.reduce(tensor, reduce_op="sum"),
            whole=self._optimizer.whole,
        )

    def _calibration_data(self, trainer: Trainer, pl_module: pl.LightningModule) -> Iterable[Any]:
        """The first training batches, as the training loop would hand them to the step."""
        with fresh_batches(trainer.fit_loop._combined_loader) as loader:
            batches = tqdm(
                islice(loader, self.calibration_batches),
                desc=f"Calibrating {self.init}",
                total=self.calibration_batches,
                leave=False,
                disable=not trainer.is_global_zero or trainer.progress_bar_callback is None,
            )
            for batch in batches:
                converted = trainer.precision_plugin.convert_input(batch)
                converted = pl_module._on_before_batch_transfer(converted, dataloader_idx=0)
                yield trainer.strategy.batch_to_device(converted, dataloader_idx=0)

    def _parameters(self, pl_module: nn.Module) -> dict[str, Any]:
        masked, total = count(
            strategies.sharded_model(self._trainer.strategy) or pl_module, self._targets
        )
        return {
            "pattern": str(self.pattern),
            "init": self.init if isinstance(self.init, str) else "masks",
            **self.rule,
            "layers": len(self._targets),
            "masked_weights": masked,
            "masked_share": round(masked / total, 4),
        }

    def _refuse_unsupported(self, trainer: Trainer, pl_module: pl.LightningModule) -> None:
        module = type(pl_module).__name__
        strategies.refuse_untested(trainer.strategy)
        if self.init == "reconstruction" and strategies.shards(trainer.strategy):
            raise ValueError(
                f"init='reconstruction' keeps a second copy of whole weights, which "
                f"{type(trainer.strategy).__name__} shards: choose init='sparsegpt', or find the "
                f"masks on one device and give their file."
            )
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{module} optimizes manually (automatic_optimization=False), which hides its loss "
                f"from MaskProCallback: let training_step return the loss and set "
                f"automatic_optimization=True for this fit."
            )
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise ValueError(
                f"{module}.training_step takes a dataloader_iter, which cannot be read twice, but "
                f"MaskProCallback evaluates each batch under two masks: take a batch instead."
            )

    def _patch(self, owner: Any, name: str, value: Any) -> None:
        self._patches.append((owner, name, vars(owner).get(name)))
        vars(owner)[name] = value


def _is_file(init: str) -> bool:
    return init.endswith((".safetensors", ".npz"))


def _loss_of(output: Any) -> Tensor | None:
    """The loss in what a training step returned, the same way as Lightning finds it."""
    if isinstance(output, Mapping):
        output = output.get("loss")
    if output is not None:
        check_loss(output, "training_step")
    loss: Tensor | None = output
    return loss
