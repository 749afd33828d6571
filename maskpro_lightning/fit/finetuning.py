"""Training under masks in Lightning: weights move, what is pruned stays zero."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from maskpro_lightning.catalog import resolve
from maskpro_lightning.fit import start, strategies
from maskpro_lightning.fit.callback import MaskProCallback
from maskpro_lightning.fit.distillation import Dense, DenseTeacher, Distillation, dense_part
from maskpro_lightning.fit.patches import Patches
from maskpro_lightning.fit.quiet import be_heard, quiet
from maskpro_lightning.fit.traceless import traceless
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.weights.adapters import adapted_layers
from maskpro_lightning.weights.admission import is_sparse
from maskpro_lightning.weights.kept import Masks, SparseWeights, pack_bits, unpack_bits
from maskpro_lightning.weights.sharding import layouts
from maskpro_lightning.weights.targets import Target, count, find_targets

_log = logging.getLogger(__name__)

# A trainer is of either of two Lightnings, whose classes of a name are not the same.
Trainer = Any
# Of what a checkpoint holds of the callback.
_FORMAT = 1
_CALIBRATED = ("wanda", "sparsegpt", "reconstruction")


class SparseFinetuning(pl.Callback):
    """Train a sparse module as it is trained dense; its pruned weights stay exactly zero.

    The module's own optimizers train it. Gradients of pruned weights are zeroed before anything
    reads them, and pruned weights after every step. The weights of every checkpoint, and those that
    the fit ends with, are looked at: a fit in which something else has written into pruned weights
    ends with an error that names them.

    Args:
        pattern: Weights kept of every M along the input dimension, such as "2:4".
        init: The masks. "nonzeros": the module is sparse, as a :class:`MaskProCallback` leaves it,
            and keeps its zeros. Else they are applied before the first step: the path of a mask
            file (ours, or MaskLLM's ``.npz``), masks by parameter name, the
            :class:`MaskProCallback` of an earlier fit, or "magnitude", "wanda", "sparsegpt",
            "reconstruction", "random".
        include: Globs of layers that are masked, see :func:`find_targets`.
        exclude: Globs of layers that are not.
        calibration_batches: Training batches that "wanda", "sparsegpt" and "reconstruction" look
            at.
        distillation: Learn from the distance to the dense model's outputs instead of the loss of
            the training step; keeps the part's dense weights, and costs one more forward pass of
            it.
        dense: Where these are: the dense part as a module, or its weights, or those of the whole
            module, by name or as a file or folder. By default what the module holds before
            ``init`` is applied, which may not be "nonzeros" then.

    Attributes:
        sparse: The weights under their masks of the last fit; None before its first step.
    """

    def __init__(
        self,
        pattern: str | NMPattern = "2:4",
        *,
        init: start.Init | MaskProCallback = "nonzeros",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        calibration_batches: int = 16,
        distillation: Distillation | None = None,
        dense: Dense | None = None,
    ) -> None:
        self.pattern = NMPattern.parse(pattern)
        self.include, self.exclude = include, exclude
        self.init = init if isinstance(init, MaskProCallback) else start.check_init(init)
        if calibration_batches < 1:
            raise ValueError(
                f"calibration_batches is {calibration_batches}, but calibration_batches >= 1 must "
                f"hold."
            )
        self.calibration_batches = calibration_batches
        self.distillation = distillation
        self.dense = resolve(dense) if isinstance(dense, str) else dense
        if distillation is not None and dense is None and self.init == "nonzeros":
            raise ValueError(
                "The module is sparse (init='nonzeros'), so there is no dense one to learn from: "
                "give it, or its weights (dense=...)."
            )
        self.sparse: SparseWeights | None = None
        self._resumed: dict[str, Tensor] | None = None
        self._failed = False
        self._patches = Patches()
        self._quiet = ExitStack()

    # Entering and leaving the fit

    def setup(self, trainer: Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        be_heard()
        self._refuse_unsupported(trainer, pl_module)
        self._trainer = trainer
        self.sparse, self._resumed, self._failed = None, None, False
        self._teacher: DenseTeacher | None = None
        put, strategy = self._patches.put, trainer.strategy
        if self.distillation is not None:
            self._step_inside = put(strategy, "training_step", self._training_step)
        self._save_inside = put(strategy, "save_checkpoint", self._save_checkpoint)
        # Lightning's last call on the way out, after a fit that failed as well.
        self._teardown_inside = put(strategy, "teardown", self._leave)
        self._quiet.enter_context(quiet(trainer))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.sparse is not None:
            return
        # Only now have all hooks run in which a module may load its weights.
        sharded = strategies.sharded_model(trainer.strategy)
        model = pl_module if sharded is None else sharded
        targets = find_targets(model, self.pattern, self.include, self.exclude)
        teacher = None
        if self.distillation is not None:
            if self._resumed is not None and self.dense is None:
                raise ValueError(
                    "This checkpoint holds the sparse weights, and the dense ones to learn from "
                    "are gone: give them (dense=...) to go on."
                )
            dense = dense_part(self.distillation, pl_module, self.dense)
            self._refuse_sparse(dense, self.distillation.part_of(pl_module), targets)
            teacher = DenseTeacher(
                self.distillation, pl_module, dense.to(trainer.strategy.root_device)
            )
        with ExitStack() as calibrating:  # each mask is found when it is asked for
            masks = self._masks(trainer, pl_module, batch, targets, sharded, calibrating)
            self.sparse = SparseWeights(targets, self.pattern, masks, model=sharded)
        self._chosen = model, targets
        self._teacher = teacher
        for optimizer in trainer.strategy.optimizers:
            self.sparse.follow(optimizer)
        for average in _averages(trainer):
            self.sparse.zero_copy(average, prefix="module.")
        if trainer.is_global_zero:
            numbers, total = count(model, targets)
            print(
                f"{self.pattern} masks on {len(targets)} weights, from {self._source()}: "
                f"{numbers:,} of the model's {total:,} numbers ({numbers / total:.1%}), "
                f"{self.pattern.sparsity:.2%} of them zero."
            )
        _tell_of_adapters(model, targets)

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the strategy's method: the distance to the dense outputs as loss."""
        if self._teacher is None:  # while masks are calibrated
            return self._step_inside(*args, **kwargs)
        with self._teacher.asking() as losses:
            output = self._step_inside(*args, **kwargs)
        if output is None:
            return None
        return {**output, "loss": losses[0]} if isinstance(output, Mapping) else losses[0]

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Before Lightning clips gradients, of which not all come through hooks on weights.

        Those of FSDP1 come in flat parameters, and others' hooks write into gradients or set them.
        """
        if self.sparse is not None:
            self.sparse.follow(optimizer)  # which may have taken the place of another one
            self.sparse.zero_gradients(optimizer)

    def on_exception(
        self, trainer: Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._failed = True

    def _leave(self) -> None:
        """Stands in for the strategy's teardown: everything of the user's is theirs again."""
        teardown = self._teardown_inside
        try:
            if self.sparse is not None and not self._failed:
                self._verify(self.sparse, "The fit ended")
                self._tell_end(self._trainer)
        finally:
            self._patches.undo()
            self._quiet.close()
            if self.sparse is not None:
                self.sparse.release()
            # All that leads to the trainer, so that the callback can be copied and pickled.
            for name in ("_trainer", "_save_inside", "_teardown_inside", "_step_inside"):
                vars(self).pop(name, None)
            for name in ("_teacher", "_chosen", "log", "log_dict"):
                vars(self).pop(name, None)
        teardown()

    def _tell_end(self, trainer: Trainer) -> None:
        """Say on one rank what was verified, and what the last validation logged."""
        if not trainer.is_global_zero:
            return
        metric = getattr(trainer.checkpoint_callback, "monitor", None) or "val_loss"
        value = trainer.callback_metrics.get(metric)
        reached = "" if value is None else f"; {metric} {float(value):.4g}"
        print(
            f"Verified after {trainer.global_step} steps: what the {self.pattern} masks prune is "
            f"zero{reached}."
        )

    # The weights that leave

    def _save_checkpoint(self, checkpoint: dict[str, Any], path: Any, **kwargs: Any) -> None:
        """Stands in for the strategy's method: no checkpoint without looking at its weights."""
        if self.sparse is not None:
            self._verify(self.sparse, f"The checkpoint {str(path)!r} was not written", checkpoint)
        self._save_inside(checkpoint, path, **kwargs)

    def _verify(
        self, sparse: SparseWeights, what: str, checkpoint: Mapping[str, Any] | None = None
    ) -> None:
        """End the fit on all ranks if pruned weights of one of them are not zero."""
        found = sparse.faults()
        found += [
            f"{name!r} is another parameter than when the training began, and no mask reaches that"
            for name in start.replaced(*self._chosen)
        ]
        if checkpoint is not None:
            found += sparse.faults(checkpoint.get("state_dict", {}))
        if not self._trainer.strategy.reduce_boolean_decision(not found, all=True):
            told = found[0] if found else "see the error of another rank"
            raise RuntimeError(
                f"{what}: {told}. Something beside the optimizers writes into weights or replaces "
                f"them (a callback, a hook, or a copy that was made of them dense): let it keep "
                f"zeros, or leave the layer out with exclude."
            )

    def state_dict(self) -> dict[str, Any]:
        if self.sparse is None:
            return {}
        bits = {name: pack_bits(mask).cpu() for name, mask in self.sparse.masks()}
        return {"format": _FORMAT, "pattern": str(self.pattern), "masks": bits}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        if state_dict["format"] > _FORMAT:
            raise ValueError(
                f"This checkpoint holds format {state_dict['format']} of SparseFinetuning, and "
                f"this version reads up to {_FORMAT}: pip install --upgrade maskpro-lightning."
            )
        if state_dict["pattern"] != str(self.pattern):
            raise ValueError(
                f"This checkpoint holds {state_dict['pattern']} masks, but the pattern is "
                f"{self.pattern}: resume with the pattern of the fit."
            )
        self._resumed = state_dict["masks"]

    # What the fit needs once

    def _source(self) -> str:
        """Where the masks come from."""
        if self._resumed is not None:
            return "the checkpoint"
        if isinstance(self.init, MaskProCallback):
            return "the fit before"
        if isinstance(self.init, Mapping):
            return "those given"
        return "their own zeros" if self.init == "nonzeros" else self.init

    def _masks(
        self,
        trainer: Trainer,
        pl_module: pl.LightningModule,
        first: Any,
        targets: Sequence[Target],
        sharded: nn.Module | None,
        calibrating: ExitStack,
    ) -> Masks | None:
        """The masks to keep to, whole; None for the zeros that the weights have."""
        if self._resumed is not None:
            shapes = {target.name: target.shape for target in targets}
            return _unpacked(self._resumed, shapes)
        if isinstance(self.init, MaskProCallback):
            return self.init.deployed_masks()
        if self.init == "nonzeros":
            return None

        def run(*args: Any) -> None:
            with traceless(trainer, pl_module):
                trainer.strategy.training_step(*args)

        calibrating.enter_context(traceless(trainer, pl_module))
        calibrating.enter_context(torch.no_grad())
        return start.initial_masks(
            self.init,
            targets,
            self.pattern,
            seed=0,
            trainer=trainer,
            first=first,
            batches=self.calibration_batches,
            run=run,
            model=sharded,
        )

    def _refuse_sparse(self, dense: nn.Module, part: nn.Module, targets: Sequence[Target]) -> None:
        """Refuse to learn from a sparse copy of the part, which would be to learn from itself."""
        masked = {target.parameter: target for target in targets}
        weights = dict(dense.named_parameters())
        for name, parameter in part.named_parameters():
            target, weight = masked.get(parameter), weights.get(name)
            if target is None or weight is None or weight.shape != parameter.shape:
                continue
            (layout,) = layouts(None, [(weight, self.pattern, target.input_dim)])
            if is_sparse(layout, weight):
                raise ValueError(
                    f"{name!r} of the dense weights to learn from is {self.pattern} already: give "
                    f"a copy from before the mask was learned, or the file of the dense model."
                )

    def _refuse_unsupported(self, trainer: Trainer, pl_module: pl.LightningModule) -> None:
        strategies.refuse_untested(trainer.strategy)
        if isinstance(self.init, MaskProCallback) and self.init.optimizer is None:
            raise RuntimeError(
                "The MaskProCallback given as init has learned no masks: fit with it first."
            )
        if any(isinstance(callback, MaskProCallback) for callback in trainer.callbacks):
            raise ValueError(
                "MaskProCallback leaves the weights as they are, and SparseFinetuning trains them: "
                "fit twice, each with a Trainer of its own."
            )
        if self.distillation is not None and not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} optimizes manually (automatic_optimization=False), so "
                f"its loss cannot be another one: leave distillation out."
            )
        if self.distillation is not None and strategies.shards(trainer.strategy):
            raise ValueError(
                f"distillation keeps a second copy of whole weights, which "
                f'{type(trainer.strategy).__name__} shards: choose strategy="ddp", or leave it out.'
            )
        if strategies.shards(trainer.strategy):
            for callback in trainer.callbacks:
                if hasattr(callback, "_average_model"):
                    raise ValueError(
                        f"{type(callback).__name__} averages whole weights, which "
                        f'{type(trainer.strategy).__name__} shards: choose strategy="ddp", or '
                        f"leave it out."
                    )
        if self.init in _CALIBRATED and not pl_module.automatic_optimization:
            raise ValueError(
                f"init={self.init!r} runs training steps to look at their inputs, and those of "
                f"{type(pl_module).__name__} train (automatic_optimization=False): choose "
                f"init='magnitude', or give masks."
            )


def _averages(trainer: Trainer) -> Iterator[nn.Module]:
    """The copies of the module that other callbacks average its weights in."""
    for callback in trainer.callbacks:
        average = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            yield average


def _unpacked(
    bits: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, Tensor]]:
    """The masks of a checkpoint, one after the other."""
    for name, packed in bits.items():
        size = torch.Size(shapes.get(name, ())).numel()
        if name in shapes and packed.numel() != -(-size // 8):
            raise ValueError(
                f"The checkpoint's mask of {name!r} has {packed.numel()} bytes, but the weight of "
                f"shape {tuple(shapes[name])} needs {-(-size // 8)}: resume with the same module."
            )
        yield name, unpack_bits(packed, shapes.get(name, ()))


def _tell_of_adapters(model: nn.Module, targets: Iterable[Target]) -> None:
    """Say before the training what would undo it."""
    masked = {id(target.module) for target in targets}
    adapted = [name for name, layer in adapted_layers(model) if id(layer) in masked]
    if adapted:
        _log.warning(
            f"{len(adapted)} sparse layers have adapters, such as {adapted[0]!r}. "
            f"merge_and_unload() would fill their zeros: merge with maskpro_lightning."
            f"merge_adapters(model), which keeps the masks, or deploy the adapters beside them."
        )
