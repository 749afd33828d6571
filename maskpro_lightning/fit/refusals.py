"""What a fit with masks refuses, each by name and with a way out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from maskpro_lightning.fit import strategies
from maskpro_lightning.fit.distillation import Distillation


def refuse_untested(trainer: Any, module: Any, distillation: Distillation | None) -> None:
    """Refuse strategies, modules and arguments that masks are not tested with together.

    Raises:
        ValueError: says which of them, and what to change.
    """
    name = type(module).__name__
    strategies.refuse_untested(trainer.strategy)
    if not module.automatic_optimization:
        by_hand = f"{name} optimizes manually (automatic_optimization=False)"
        if strategies.wraps_steps(trainer.strategy):
            raise ValueError(
                f"{by_hand}, and FSDP1 takes no backward pass within a training step, masks or "
                f'not: choose ModelParallelStrategy with fully_shard, or strategy="ddp".'
            )
        if distillation is not None:
            raise ValueError(
                f"{by_hand}, so that its own losses are learned from, and distillation has no "
                f"place: leave distillation=None."
            )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(
            f"{name}.training_step takes a dataloader_iter, which cannot be read twice, but "
            f"MaskProCallback evaluates each batch under two masks: take a batch instead."
        )


def refuse_newer(number: Any, known: int) -> None:
    """Refuse a checkpoint of a format that this version does not know.

    Raises:
        ValueError: the number is above ``known``.
    """
    if isinstance(number, int) and number > known:
        raise ValueError(
            f"This checkpoint holds format {number} of MaskProCallback, and this version reads "
            f"up to {known}: pip install --upgrade maskpro-lightning."
        )


def refuse_without_step(trainer: Any, module: Any) -> NoReturn:
    """Refuse to leave a dense module behind as if it were done.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        f"This fit made no step, so no mask was found and {type(module).__name__} is as it was: "
        f"let max_steps, max_epochs and limit_train_batches allow for one (a Trainer that has "
        f"fitted before counts on from step {trainer.global_step}: make a new one), and "
        f"training_step return a loss."
    )


def refuse_overwritten(names: Sequence[str], module: Any, callbacks: Sequence[Any]) -> NoReturn:
    """Refuse masked weights that somebody else has written into.

    Args:
        names: The weights.
        module: The module, whose hooks may have done it.
        callbacks: The other callbacks, which may have.

    Raises:
        RuntimeError: always.
    """
    hooks = [f"hooks of {type(module).__name__}", *(type(each).__name__ for each in callbacks)]
    layer = names[0].rpartition(".")[0] or names[0]
    raise RuntimeError(
        f"Somebody else has written into {names[0]!r} ({len(names)} of the masked weights) since "
        f"its mask was: the values are not those of the mask. Look at training_step, "
        f"{', '.join(hooks)}: leave out what changes weights for this fit, or leave the weights "
        f'dense with exclude=["{layer}"].'
    )
