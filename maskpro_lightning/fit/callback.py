"""MaskPro in a Lightning training: when things happen, nothing about how they are done."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from maskpro_lightning.fit import neighbours, refusals, start, strategies, validation
from maskpro_lightning.fit.baseline import BaselineCache
from maskpro_lightning.fit.best import BestMask, MonitorMode
from maskpro_lightning.fit.distillation import Distillation
from maskpro_lightning.fit.learning import Learning
from maskpro_lightning.fit.passes import Passes
from maskpro_lightning.fit.patches import Patches
from maskpro_lightning.fit.quiet import be_heard, quiet
from maskpro_lightning.fit.start import Init
from maskpro_lightning.fit.traceless import traceless
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.optim.estimators import Estimator, EstimatorName, Policy, estimator_of
from maskpro_lightning.optim.optimizer import MaskPro
from maskpro_lightning.optim.states import LogitsDtype, Memory
from maskpro_lightning.tracking.journal import Journal
from maskpro_lightning.tracking.loggers import OnError, Tracking
from maskpro_lightning.tracking.metrics import mask_metrics
from maskpro_lightning.tracking.mlflow_run import MLflowRun
from maskpro_lightning.tracking.result import Result, report
from maskpro_lightning.tracking.runs import DISTILLED, TAGGED
from maskpro_lightning.tracking.standin import watch_loggers
from maskpro_lightning.weights import summary
from maskpro_lightning.weights.targets import Selection, Target, count, parameter_groups, select

_log = logging.getLogger(__name__)

# A trainer or a logger is of either of two Lightnings, whose classes of a name are not the same.
Trainer = Any
# Of what a checkpoint holds of the callback.
_FORMAT = 2


class MaskProCallback(pl.Callback):
    """Learn N:M masks during ``Trainer.fit``, leaving the weights as they are.

    For the length of the fit the callback takes the place of the module's optimizer: each training
    step evaluates a drawn mask, and :class:`MaskPro` moves the logits. Validation sees the most
    likely mask. Afterwards the module holds that mask, or an earlier one that did better in
    validation: exactly N of every M, the kept weights bit for bit the original ones. What a
    checkpoint would deploy is what it holds as weights. If the fit fails, the module holds the
    dense weights again.

    Args:
        pattern: Weights kept of every M along the input dimension, such as "2:4".
        include: Globs of layers to mask instead of the default choice, see :func:`find_targets`.
        exclude: Globs of layers to leave out.
        init: Initial masks: "magnitude", "wanda", "sparsegpt", "reconstruction" (the best without
            learning), "random", "nonzeros" (the model is sparse already), the path of a mask file
            (ours, or MaskLLM's ``.npz``), or masks by parameter name.
        calibration_batches: Training batches that "wanda", "sparsegpt" and "reconstruction" look
            at.
        estimator: "straight_through" learns from gradients. "policy", the paper's, learns from the
            loss alone, without a backward pass, and gets much less far. Or a
            :class:`StraightThrough` or :class:`Policy` with numbers of your own.
        lr_scheduler: Makes a learning rate scheduler from the optimizer, as in ``LightningCLI``, or
            the dict around one that Lightning takes; stepped every training step. By default the
            rate falls to 0, linearly, over the fit; with the published rule, or where the fit has
            no end, it is constant.
        seed: Seed of all draws.
        memory: "lean" keeps no dense copy of the weights, see :class:`MaskPro`.
        logits_dtype: "bfloat16" halves the logits, see :class:`MaskPro`.
        distillation: Learn from the distance to the dense model's own outputs instead of the loss
            of the training step; costs one more forward pass per batch.
        monitor: The metric of validations by which an earlier mask is deployed instead of the last
            one. Before the first step the dense weights are validated, as a sanity check of the
            whole validation set, and the initial mask; at the end the last mask, if no validation
            was of it. Where the module does not log the metric, or this is None, the last mask is
            deployed.
        monitor_mode: Whether a lower ("min") or a higher ("max") value is better.
        log_distributions: Hand the logits to the loggers that keep files at every checkpoint
            (4 bytes per weight).
        on_logger_error: "warn" goes on without a logger that fails, "raise" ends the fit.

    Attributes:
        optimizer: The :class:`MaskPro` of the last fit, with logits and dense weights; None
            before the first.
        result: What the last fit found, see :class:`Result`; None before.
        to_do: What a fit says at its end to export the model with; None says what to write in
            Python, "" nothing.

    Raises:
        TypeError, ValueError: an argument that is none of its choices, or out of range.
    """

    def __init__(
        self,
        pattern: str | int | NMPattern = "2:4",  # an int from YAML, see NMPattern.parse
        *,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        init: Init = "sparsegpt",
        calibration_batches: int = 16,
        estimator: Estimator | EstimatorName = "straight_through",
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        seed: int = 0,
        memory: Memory = "plain",
        logits_dtype: LogitsDtype = "float32",
        distillation: Distillation | None = None,
        monitor: str | None = "val_loss",
        monitor_mode: MonitorMode = "min",
        log_distributions: bool = True,
        on_logger_error: OnError = "warn",
    ) -> None:
        self.pattern = NMPattern.parse(pattern)
        self.include = include
        self.exclude = exclude
        self.init = start.check_init(init)
        self.calibration_batches = calibration_batches
        self.estimator = estimator_of(estimator)
        self.lr_scheduler = lr_scheduler
        self.seed = seed
        self.memory, self.logits_dtype = memory, logits_dtype
        self.distillation = distillation
        self.monitor, self.monitor_mode = monitor, monitor_mode
        self.log_distributions = log_distributions
        self.on_logger_error = on_logger_error
        self.optimizer: MaskPro | None = None
        self.result: Result | None = None
        self.to_do: str | None = None
        if calibration_batches < 1:
            raise ValueError(
                f"calibration_batches is {calibration_batches}, but calibration_batches >= 1 must "
                f"hold."
            )
        for name, given, choices in (
            ("on_logger_error", on_logger_error, get_args(OnError)),
            ("monitor_mode", monitor_mode, get_args(MonitorMode)),
        ):
            if given not in choices:
                raise ValueError(f"{name} is one of {', '.join(choices)}; got {given!r}.")
        # Made for its checks.
        weight = nn.Parameter(torch.zeros(self.pattern.m, device="cpu"))  # never on "meta"
        self._new_optimizer([weight], self.estimator, fused=False)
        self._forget()

    def _new_optimizer(self, params: Any, estimator: Estimator, **kwargs: Any) -> MaskPro:
        return MaskPro(
            params,
            self.pattern,
            estimator=estimator,
            seed=self.seed,
            memory=self.memory,
            logits_dtype=self.logits_dtype,
            **kwargs,
        )

    def _forget(self) -> None:
        """Begin anew what belongs to one fit."""
        policy = self.estimator if isinstance(self.estimator, Policy) else None
        self._baselines = BaselineCache(policy.baseline_cache if policy else 0)
        self._best = BestMask(self.monitor, self.monitor_mode)
        self._journal = Journal()
        self._failed = False
        self._fitting = False
        self._logged_before: dict[str, Any] = {}
        self._targets: list[Target] = []
        self._patches = Patches()
        self._quiet = ExitStack()
        self._tracking: Tracking | None = None

    def __repr__(self) -> str:
        init = self.init if isinstance(self.init, str) else "masks"
        does = f"{self.pattern} masks from {init} by {self.estimator}"
        if self.optimizer is None:
            return f"MaskProCallback({does})"
        group = self.optimizer.param_groups[0]
        masked = sum(math.prod(layout.shape) for layout in self.optimizer.layouts.values())
        return f"MaskProCallback({does}; {masked:,} weights after {group['step']} steps)"

    def restore_dense(self) -> None:
        """Give the module of the last fit its dense weights back.

        Raises:
            RuntimeError: there was no fit that has masked weights.
        """
        self._of_last_fit().write("dense")

    def _of_last_fit(self) -> MaskPro:
        if self.optimizer is None or not self.optimizer.begun:
            raise RuntimeError(
                "This callback has masked no weights in this process. (Of a fit whose strategy "
                "forks or spawns processes, only the module's weights come back.)"
            )
        return self.optimizer

    # Entering and leaving the fit

    @property
    def log(self) -> Callable[..., None]:
        """The module's own ``log``, which the Trainer gives its callbacks."""
        return self._module_log

    @log.setter
    def log(self, log: Callable[..., None]) -> None:
        # Trainers set it before they open their loggers; all hooks come after that.
        self._module_log = log
        module = getattr(log, "__self__", None)  # not where a module's log is a function of its own
        if self.on_logger_error == "warn" and module and module.trainer.state.fn == "fit":
            watch_loggers(module.trainer)

    def setup(self, trainer: Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            self._read_folders(trainer.strategy)
            return
        be_heard()
        refusals.refuse_untested(trainer, pl_module, self.distillation)
        self._forget()
        self.optimizer = None
        self._tracking = Tracking(trainer, self.on_logger_error)
        self._tracking.folder()  # what loggers miss from now on is kept there
        self._mlflow_run = MLflowRun(trainer, self._tracking)
        self._trainer, self._module = trainer, pl_module
        self._stand_in(trainer, pl_module)
        self._fitting = True
        self._quiet.enter_context(quiet(trainer))

    def _read_folders(self, strategy: Any) -> None:
        for name, method in strategies.FolderCheckpoints.patches(strategy).items():
            self._patches.put(strategy, name, method)

    def _stand_in(self, trainer: Trainer, pl_module: pl.LightningModule) -> None:
        """Put methods of ours in the place of the module's and the strategy's."""
        put, strategy = self._patches.put, trainer.strategy
        neighbours.leave_out_rivals(trainer, self._patches)
        self._read_folders(strategy)
        configure = self._configure_optimizers
        self._configure_inside = put(pl_module, "configure_optimizers", configure)
        self._learning = Learning(
            trainer,
            pl_module,
            self.estimator,
            lambda: self._optimizer,
            lambda: self._make_sure(trainer, pl_module),
        )
        self._learning.stand_in(
            self._patches,
            lambda step: Passes(trainer, pl_module, step, self._baselines, self.distillation),
        )
        self._state_dict_inside = put(strategy, "lightning_module_state_dict", self._state_dict)
        patches = strategies.MaskCheckpoints.patches(
            trainer,
            lambda: self._optimizer,
            lambda checkpoint: self.state_key in checkpoint.get("callbacks", {}),
        )
        for name, method in patches.items():
            put(strategy, name, method)
        self._load_inside = put(pl_module, "on_load_checkpoint", self._before_loading)
        self._configure_model_inside = put(pl_module, "configure_model", self._configure_model)
        # Lightning's last call on the way out, after a fit that failed as well.
        self._teardown_inside = put(strategy, "teardown", self._leave)

    def _configure_model(self) -> None:
        """Stands in for the module's: then choose the weights, before a strategy wraps them."""
        self._configure_model_inside()
        if self.estimator.needs_gradients:
            weights = [target.parameter for target in self._select().targets]
            self._learning.gradients.expect(self._module, weights)

    def on_train_start(self, trainer: Trainer, pl_module: pl.LightningModule) -> None:
        keeps = bool(trainer.loggers) and not trainer.fast_dev_run
        self._journal.open(self._tracker.folder(), keeps, writes=trainer.is_global_zero)
        self._best.put_last_buffers(pl_module)
        self._began = time.monotonic()
        parameters = self._parameters(pl_module)
        self._journal.parameters(parameters, self._tracker)
        if self._optimizer.begun:
            self._tracker.resume()
            model = strategies.sharded_model(trainer.strategy) or pl_module
            summary.show(model, self._selection, self.pattern)
        self._mlflow_run.begin({f"maskpro.{name}": parameters[name] for name in TAGGED})

    def on_train_end(self, trainer: Trainer, pl_module: pl.LightningModule) -> None:
        if self._optimizer.last and not self._journal.knows(trainer.global_step):
            # The fit was too short for a row, or ends between two.
            numbers = self._cheap_numbers() | self._costly_numbers()
            self._journal.training(trainer.global_step, numbers)
        if self._best.is_behind(trainer.global_step) and trainer.enable_validation:
            validation.validate(trainer)  # of the last mask, which may be the one to deploy
        self._best.tell()
        self._deploy()
        self._journal.close(self._optimizer, self._best.version, self._tracker)
        if self._optimizer.begun:
            self.result = self._found(trainer)
            if trainer.is_global_zero and self._journal.keeps:
                report(self.result, self._tracker)
            elif trainer.is_global_zero:
                self.result.show()
            strategies.tell_of_processes(trainer.strategy)

    def _found(self, trainer: Trainer) -> Result:
        optimizer, version = self._optimizer, self._best.version
        masked = sum(math.prod(layout.shape) for layout in optimizer.layouts.values())
        return Result(
            pattern=str(self.pattern),
            metric=self.monitor or "loss",
            mode=self.monitor_mode,
            dense=self._best.dense,
            initial=self._best.initial,
            deployed=self._best.value,
            sparsity=self.pattern.sparsity,
            masked_weights=masked,
            changed=optimizer.changed(version),
            steps=trainer.global_step,
            best_step=self._best.step if version == "best" else trainer.global_step,
            seconds=time.monotonic() - self._began,
            folder=str(self._tracker.folder()) if self._journal.keeps else None,
            to_do=self._export_line() if self.to_do is None else self.to_do,
        )

    def _export_line(self) -> str:
        given = ["module", '"sparse-model"']
        given += [f'"{self.pattern}"'] if str(self.pattern) != "2:4" else []
        given += [f"include={list(self.include)}"] if self.include is not None else []
        given += [f"exclude={list(self.exclude)}"] if self.exclude else []
        return f"export_sparse({', '.join(given)})"

    def on_exception(
        self, trainer: Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        # A checkpoint on exception is written after this, and holds a mask as always.
        self._failed = True
        if "_mlflow_run" in vars(self):
            self._mlflow_run.fail()
        if self._fitting and self.optimizer is not None:
            with suppress(Exception):  # else Lightning would leave it at that; we leave twice
                self.optimizer.write("dense")

    def _deploy(self) -> None:
        """Leave the module with the mask to deploy, and the buffers that belong to it."""
        optimizer = self._optimizer
        optimizer.write(self._best.version)
        self._best.put_buffers(self._module)

    def _leave(self) -> None:
        """Stands in for the strategy's teardown: everything of the user's is theirs again."""
        self._mlflow_run.end()
        try:
            if self.optimizer is not None:
                if not self.optimizer.begun and not self._failed:
                    refusals.refuse_without_step(self._trainer, self._module)
                self._make_sure(self._trainer, self._module)
                self.optimizer.write("dense" if self._failed else self._best.version)
        except BaseException:
            if self.optimizer is not None:
                self.optimizer.write("dense")
            raise
        finally:
            teardown = self._teardown_inside
            self._patches.undo()
            if "_learning" in vars(self):
                self._learning.end()
            self._logged_before.clear()
            self._quiet.close()
            self._fitting = False
            # All that leads to the trainer, so that the callback can be copied and pickled.
            self._tracking = None
            self._targets = []
            gone = ("_trainer", "_module", "_selection", "_learning", "_mlflow_run")
            for name in (*gone, "_module_log"):
                vars(self).pop(name, None)
            for name in [name for name in vars(self) if name.endswith("_inside")]:
                del vars(self)[name]
            teardown()

    def teardown(self, trainer: Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # After all hooks of the fit but those of callbacks behind this one.
        if stage != "fit":
            self._patches.undo()
            return
        if self.optimizer is not None and not self.optimizer.sharded:
            self._make_sure(trainer, pl_module)

    # Training under drawn masks

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._optimizer.begun:
            if self._learning.steps == 1:  # hooks may write, too
                self._make_sure(trainer, pl_module)
            elif not self._optimizer.sharded:
                self._refuse_replaced(pl_module)
            return
        # Only now have all hooks run in which a module may load its weights. Reading calibration
        # batches takes random numbers, too.
        if not self._optimizer.sharded:
            start.refuse_replaced(pl_module, self._targets)
        self._optimizer.refuse_not_finite()
        start.refuse_sparse(self.init, self._targets, self._optimizer.layouts)
        run = partial(self._learning.passes.plain, self._optimizer)
        whole = [] if self._optimizer.sharded else self._targets
        with (
            torch.set_grad_enabled(self.estimator.needs_gradients),
            start.unchanged(type(pl_module).__name__, whole),
        ):
            summary.announce(
                strategies.sharded_model(trainer.strategy) or pl_module,
                self._selection,
                self.pattern,
                lambda: run(*start.arguments(pl_module, batch, batch_idx)),
            )
        with traceless(trainer, pl_module):
            masks = start.initial_masks(
                self.init,
                self._targets,
                self.pattern,
                seed=self.seed,
                trainer=trainer,
                first=batch,
                batches=self.calibration_batches,
                run=run,
                model=strategies.sharded_model(trainer.strategy),
            )
            self._optimizer.begin(masks)
        if self._best.expected and trainer.enable_validation:
            validation.check_sanity(trainer)  # of the dense weights
            validation.validate(trainer)  # of the initial mask

    def on_before_backward(
        self, trainer: Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        self._learning.before_backward()

    def on_after_backward(self, trainer: Trainer, pl_module: pl.LightningModule) -> None:
        self._learning.after_backward()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not self._learning.has_stepped() or not trainer.log_every_n_steps:
            return
        values = self._cheap_numbers()
        self._log(values)
        wanted = trainer._logger_connector.should_update_logs
        # At the end of an epoch as well, when others may ask for them.
        if wanted or trainer.is_last_batch:
            found = self._costly_numbers()
            self._log(found)
            if wanted:
                self._journal.training(trainer.global_step, values | found)

    def _cheap_numbers(self) -> dict[str, Any]:
        values = {self._name_of(name): value for name, value in self._optimizer.last.items()}
        if not self.estimator.needs_gradients:
            values["delta"] = self._optimizer.tracker["delta"]
        return values

    def _costly_numbers(self) -> dict[str, Any]:
        found: dict[str, Any] = mask_metrics(self._optimizer)[""]
        if not self.estimator.needs_gradients:
            found["baseline_hit_rate"] = self._baselines.hit_rate
        # A chart of nothing else than zeros tells nothing.
        if skipped := float(self._optimizer.tracker["skipped"]):
            found["skipped"] = skipped
        return found

    def _name_of(self, number: str) -> str:
        """The loss by what it is of, since the module may log the other one."""
        return DISTILLED if number == "loss" and self.distillation is not None else number

    def _log(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            # Not in the progress bar: in 80 columns it has room for one short name, the user's.
            self.log(f"maskpro/{name}", value)

    # Validation and checkpoints under the most likely mask

    def _make_sure(self, trainer: Trainer, pl_module: nn.Module) -> None:
        """Refuse to go on with weights that somebody else has written."""
        if self._failed or self.optimizer is None:
            return
        if not self.optimizer.sharded:
            self._refuse_replaced(pl_module)
        try:
            names = self.optimizer.overwritten()
        except BaseException:
            self.optimizer.write("dense")
            raise
        if names:
            self._failed = True
            self.optimizer.write("dense")
            others = [each for each in trainer.callbacks if each is not self]
            refusals.refuse_overwritten(names, pl_module, others)

    def _refuse_replaced(self, pl_module: nn.Module) -> None:
        """Refuse to go on where the module has other parameters than those that are masked."""
        try:
            start.refuse_replaced(pl_module, self._targets)
        except ValueError:
            self._failed = True
            self._optimizer.write("dense")
            raise

    def on_validation_start(self, trainer: Trainer, pl_module: pl.LightningModule) -> None:
        if self._fitting:
            self._make_sure(trainer, pl_module)
            # Before there are masks a sanity check sees the dense weights, and afterwards as well.
            self._optimizer.write("dense" if trainer.sanity_checking else "mode")
            self._logged_before = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: pl.LightningModule) -> None:
        if not self._fitting:
            return
        before = self._logged_before
        found = trainer.callback_metrics.items()
        # What training has logged is in there, too, but as the same objects.
        logged = {name: value for name, value in found if before.get(name) is not value}
        if trainer.sanity_checking and not self._optimizer.begun:
            self._best.expect(logged, trainer)
        elif trainer.sanity_checking:
            self._best.compare_with(logged, trainer)
            self._journal.compare("dense", logged)
        elif self._optimizer.begun:
            if not self._optimizer.param_groups[0]["step"]:
                self._journal.compare("initial", logged)
            layers = mask_metrics(self._optimizer)
            layers.pop("")
            self._journal.layers(layers)
            self._journal.validation(trainer.global_step, logged)
            self._best.judge(logged, trainer, pl_module, self._optimizer)
        self._optimizer.write("drawn")

    def _state_dict(self) -> dict[str, Any]:
        """Stands in for the strategy's state dict: the weights under the mask to deploy."""
        state: dict[str, Any]
        self._make_sure(self._trainer, self._module)
        optimizer, version = self.optimizer, self._best.version
        with nullcontext() if optimizer is None else optimizer.applied(version):
            state = self._state_dict_inside()
            strategies.part_from(state, [target.parameter for target in self._targets])
        return self._best.with_buffers(state)

    def state_dict(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "baselines": self._baselines.state_dict(),
            "journal": self._journal.state_dict(),
            "best": self._best.state_dict(vars(self).get("_module")),
        }

    def _before_loading(self, checkpoint: dict[str, Any]) -> None:
        """Stands in for the module's hook: refuse a checkpoint before its weights are loaded."""
        ours = checkpoint.get("callbacks", {}).get(self.state_key)
        if ours is not None:
            refusals.refuse_newer(ours.get("format"), _FORMAT)
            if not strategies.shards(self._trainer.strategy):
                groups = parameter_groups(self._select().targets)
                trial = self._new_optimizer(groups, self.estimator, fused=False)
                trial.check_state(*checkpoint["optimizer_states"])
        self._load_inside(checkpoint)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        try:
            number = int(state_dict["format"])
            if number <= _FORMAT:
                self._baselines.load_state_dict(state_dict["baselines"])
                self._journal.load_state_dict(state_dict["journal"])
                if "best" in state_dict:  # not in the first checkpoints of format 1
                    self._best.load_state_dict(state_dict["best"])
        except Exception as error:
            raise ValueError(
                f"What this checkpoint holds of MaskProCallback is damaged ({error!r}): resume "
                f"from another one."
            ) from error
        refusals.refuse_newer(number, _FORMAT)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        begun = self.optimizer is not None and self.optimizer.begun
        if self._fitting and self.log_distributions and begun:
            self._journal.distributions(self._optimizer, self._tracker, trainer.global_step)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.state_key not in checkpoint.get("callbacks", {}):
            # Written by a training without this callback: its weights are what we start from.
            checkpoint["optimizer_states"] = []
            checkpoint["lr_schedulers"] = []

    def deployed_masks(self) -> dict[str, Tensor]:
        """The masks that the last fit left in the module, bool and whole, by parameter name.

        Raises:
            RuntimeError: there was no fit that has masked weights.
        """
        return dict(self._of_last_fit().whole_masks(self._best.version))

    # What the fit needs once

    @property
    def _optimizer(self) -> MaskPro:
        assert self.optimizer is not None
        return self.optimizer

    @property
    def _tracker(self) -> Tracking:
        assert self._tracking is not None
        return self._tracking

    def _select(self, module: nn.Module | None = None) -> Selection:
        return select(module or self._module, self.pattern, self.include, self.exclude)

    def _configure_optimizers(self) -> Any:
        sharded = strategies.sharded_model(self._trainer.strategy)
        module = self._module if sharded is None else sharded
        if self._learning.manual is not None:
            self._learning.manual.configure(self._configure_inside())
        self._selection = self._select(module)
        self._targets = self._selection.targets
        steps = self._trainer.estimated_stepping_batches
        ends = 0 < steps < math.inf
        falls = ends and self.lr_scheduler is None and self.estimator.rate_falls
        estimator = self.estimator.for_fit(
            self.pattern, len(self._targets), int(steps) if falls else None
        )
        groups = parameter_groups(self._targets)
        self.optimizer = self._new_optimizer(groups, estimator, model=sharded)
        if self.lr_scheduler is not None:
            scheduler: Any = self.lr_scheduler(self.optimizer)
        elif falls:
            # Not LinearLR, whose state holds the length: a fit resumed for longer would stay at 0.
            scheduler = LambdaLR(self.optimizer, lambda step: max(0.0, 1 - step / steps))
        else:
            return self.optimizer
        given = scheduler if isinstance(scheduler, Mapping) else {"scheduler": scheduler}
        about: dict[str, Any] = {"interval": "step", **given}
        if isinstance(about.get("scheduler"), ReduceLROnPlateau):
            # It goes by the loss under the drawn mask.
            about |= {"monitor": f"maskpro/{self._name_of('loss')}", "strict": False}
        return {"optimizer": self.optimizer, "lr_scheduler": about}

    def _parameters(self, pl_module: nn.Module) -> dict[str, Any]:
        masked, total = count(
            strategies.sharded_model(self._trainer.strategy) or pl_module, self._targets
        )
        return {
            "pattern": str(self.pattern),
            "init": self.init if isinstance(self.init, str) else "masks",
            "estimator": self.estimator.name,
            **asdict(self._optimizer.estimator),
            "lr": self._optimizer.estimator.rule()["lr"],
            "seed": self.seed,
            "include": list(self.include or ()),
            "exclude": list(self.exclude),
            "memory": self.memory,
            "logits_dtype": self.logits_dtype,
            "distillation": repr(self.distillation) if self.distillation else None,
            "monitor": self.monitor,
            "layers": len(self._targets),
            "masked_weights": masked,
            "masked_share": round(masked / total, 4),
        }
