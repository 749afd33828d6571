"""The forward passes of a training step: the dense teacher's, the baseline's, the drawn mask's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from maskpro_lightning.fit.baseline import BaselineCache, fingerprint
from maskpro_lightning.fit.distillation import Distillation, Teacher
from maskpro_lightning.fit.patches import Patches
from maskpro_lightning.fit.traceless import copied, notices_random_numbers, traceless
from maskpro_lightning.optim.masked_weight import Version
from maskpro_lightning.optim.optimizer import MaskPro
from maskpro_lightning.weights.admission import check_loss

_log = logging.getLogger(__name__)


class Passes:
    """Runs a module's training step under one version of the weights after the other.

    Args:
        trainer: The trainer.
        module: The module.
        training_step: The strategy's own training step.
        baselines: Remembers the initial mask's losses.
        distillation: The divergence to learn from instead of the step's loss, if any.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        training_step: Callable[..., Any],
        baselines: BaselineCache,
        distillation: Distillation | None,
    ) -> None:
        self._trainer, self._module = trainer, module
        self._training_step, self._baselines = training_step, baselines
        self._distillation = distillation
        self._teacher: Teacher | None = None
        # The parameters that the training step itself changes, such as a moving average's; None
        # until the first extra pass has shown them.
        self._moving: list[Tensor] | None = None

    def plain(self, optimizer: MaskPro, *args: Any) -> None:
        """Run the training step on a copy of a batch, with the weights as they are; traceless."""
        with traceless(self._trainer, self._module, self._unmasked(optimizer)):
            self._training_step(*copied(args))

    @contextmanager
    def _extra(self, optimizer: MaskPro, version: Version) -> Iterator[None]:
        """Within a ``with`` block, an extra pass under a version of the weights leaves no trace."""
        unmasked = self._unmasked(optimizer)
        moving = unmasked if self._moving is None else self._moving
        before = [(parameter, parameter._version) for parameter in unmasked]
        if self._moving is None:
            before_first = [parameter.detach().clone() for parameter in unmasked]
        with optimizer.applied(version), traceless(self._trainer, self._module, moving):
            yield
            changed = [p for p, number in before if p._version != number]
            if self._moving is None:
                # By the version counter if the value is the same, by the value if it was written
                # through ``data``, which does not count.
                written = {id(parameter) for parameter in changed}
                pairs = zip(unmasked, before_first, strict=True)
                self._moving = [p for p, value in pairs if id(p) in written or not _same(p, value)]
        known = {id(parameter) for parameter in self._moving}
        if any(id(parameter) not in known for parameter in changed):
            raise RuntimeError(
                f"{type(self._module).__name__}.training_step has begun to change parameters of "
                f"the module, and would do so twice, since each batch is evaluated more than once: "
                f"change them in on_train_batch_end."
            )

    def _unmasked(self, optimizer: MaskPro) -> list[Tensor]:
        """The parameters without a mask; none of a sharded model."""
        if optimizer.sharded:
            return []  # FSDP exchanges them in each pass
        masked = {id(weight) for weight in optimizer.layouts}
        return [p for p in self._module.parameters() if id(p) not in masked]

    def ask_teacher(self, optimizer: MaskPro, *args: Any, **kwargs: Any) -> None:
        """For distillation, run the step under the dense weights and remember their outputs."""
        if self._distillation is None:
            return
        if self._teacher is None:
            self._teacher = Teacher(self._distillation, self._module)
        with torch.no_grad(), self._extra(optimizer, "dense"), self._teacher.teaching():
            self._training_step(*copied(args), **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor | None]:
        """Run the training step with the weights as they are; returns its output and its loss."""
        with nullcontext() if self._teacher is None else self._distilling(self._teacher):
            output = self._training_step(*args, **kwargs)
        return output, _loss_of(output)

    @contextmanager
    def _distilling(self, teacher: Teacher) -> Iterator[None]:
        """Within a ``with`` block, the module's training step returns the divergence as its loss.

        The innermost step is replaced, since wrappers around it (FSDP, DDP) look for the tensors
        that it returns to find the gradients.
        """

        def step(*args: Any, **kwargs: Any) -> Any:
            with teacher.asking() as losses:
                output = inside(*args, **kwargs)
            if _loss_of(output) is None:
                return output
            return {**output, "loss": losses[0]} if isinstance(output, Mapping) else losses[0]

        patches = Patches()
        inside = patches.put(self._module, "training_step", step)
        try:
            yield
        finally:
            patches.undo()

    def baseline(self, optimizer: MaskPro, batch: Any, *args: Any, **kwargs: Any) -> Tensor | None:
        """The initial mask's loss on a batch, remembered or measured; None if there is no loss."""
        strategy, baselines = self._trainer.strategy, self._baselines
        key = fingerprint(batch) if baselines.size else None
        known = baselines.get(key)
        # Ranks measure together, since a forward pass may communicate.
        if not strategy.reduce_boolean_decision(known is not None, all=True):
            known = None
        elif not strategy.reduce_boolean_decision(baselines.audits, all=False):
            assert known is not None
            return known.to(strategy.root_device)
        with self._extra(optimizer, "initial"), notices_random_numbers() as random:
            _, loss = self.evaluate(copied(batch), *args, **kwargs)
        if loss is None:
            return None
        dtype, loss = loss.dtype, loss.detach().float()
        if known is not None:
            baselines.audit(known, loss, dtype)
            if baselines.given_up:
                _log.warning(
                    f"Baselines are measured at every step from now on, as they depend on more "
                    f"than the batch: {baselines.given_up}."
                )
        elif not random[0]:  # with dropout, both losses need the same random numbers
            baselines.put(key, loss)
        return loss


def _loss_of(output: Any) -> Tensor | None:
    """The loss in what a training step returned, found as Lightning finds it; None if none."""
    if isinstance(output, Mapping):
        output = output.get("loss")
    if output is not None:
        check_loss(output, "training_step returned")
    loss: Tensor | None = output
    return loss


def _same(parameter: Tensor, value: Tensor) -> bool:
    """Whether a strided parameter has a value; others, whose writes are always counted, do."""
    return parameter.layout != torch.strided or torch.equal(parameter, value)
