"""Finds the initial masks of a fit, in a file or by calibration on the fit's training batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from os import PathLike
from typing import Any

import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from maskpro_lightning.files.maskfiles import load_maskllm, load_masks
from maskpro_lightning.fit.traceless import fresh_batches
from maskpro_lightning.initial import calibration
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.progress import progress
from maskpro_lightning.weights.admission import is_sparse
from maskpro_lightning.weights.layout import Layout, local
from maskpro_lightning.weights.targets import Target

Init = str | PathLike[str] | Mapping[str, Tensor]


def check_init(init: Init) -> str | Mapping[str, Tensor]:
    """Check ``init``: returns a path or a method's name as a string, and masks as they are.

    Raises:
        ValueError: neither a file of masks nor the name of a method.
    """
    if isinstance(init, Mapping):
        return init
    if not _is_file(str(init)):
        calibration.check_method(str(init))
    return str(init)


def refuse_sparse(
    init: str | Mapping[str, Tensor], targets: Sequence[Target], layouts: Mapping[Tensor, Layout]
) -> None:
    """Refuse weights that are N:M already, whose zeros would be taken for dense values.

    Args:
        init: What :func:`check_init` returned; with "nonzeros" such weights are expected.
        targets: The weights to mask.
        layouts: The part of each weight that is this rank's.

    Raises:
        ValueError: names the first such weight, and what to do.
    """
    if init == "nonzeros":
        return
    for target in targets:
        layout = layouts[target.parameter]
        if is_sparse(layout, local(target.parameter)):
            raise ValueError(
                f"{target.name!r} is {layout.pattern} already, as a fit leaves it: masks would "
                f"choose among its zeros. Load the dense weights again (after a fit in this "
                f"process, callback.restore_dense() gives them back), leave it out with "
                f"exclude, or start from its zeros with init='nonzeros'."
            )


def replaced(module: nn.Module, targets: Sequence[Target]) -> list[str]:
    """The names of weights that are no parameters of the module any more."""
    there = {id(parameter) for parameter in module.parameters()}
    return [target.name for target in targets if id(target.parameter) not in there]


def refuse_replaced(module: nn.Module, targets: Sequence[Target]) -> None:
    """Refuse weights that the module has replaced by other parameters since they were chosen.

    Raises:
        ValueError: names the first such weight.
    """
    if gone := replaced(module, targets):
        raise ValueError(
            f"{gone[0]!r} is no longer the parameter that was chosen when the fit began ("
            f"{len(gone)} of the masked weights): {type(module).__name__} has put another one in "
            f"its place, as load_state_dict(assign=True), parametrizations and exchanged layers "
            f"do, and no mask reaches that. Do so in setup or before the fit, or leave the weight "
            f'dense with exclude=["{gone[0].rpartition(".")[0] or gone[0]}"].'
        )


@contextmanager
def unchanged(module: str, targets: Sequence[Target]) -> Iterator[None]:
    """Refuse weights that a training step, which runs in the ``with`` block, changes itself.

    Args:
        module: The name of the module's class, for the message.
        targets: The weights to mask; changed ones are put back.

    Raises:
        ValueError: names the first such weight.
    """
    before = [(target, target.parameter.detach().clone()) for target in targets]
    changed = []
    try:
        yield
    finally:
        for target, value in before:
            if not torch.equal(target.parameter, value):
                changed.append(target)
                target.parameter.data.copy_(value)
    if not changed:
        return
    names = [target.name for target in changed]
    others = {target.name for target in targets} - set(names)
    raise ValueError(
        f"{module}.training_step changes {names[0]!r} itself ({len(names)} of the weights to "
        f"mask), as it does with momentum encoders, the moving averages of another part. A mask "
        f"needs weights that stay: leave them dense with exclude={_parts_of(names, others)}."
    )


def _parts_of(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """The largest parts of a module that hold some of these weights and none of the others."""
    others = {f"{name}." for name in others}
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        found[next(p for p in prefixes if not any(o.startswith(f"{p}.") for o in others))] = None
    return list(found)


def initial_masks(
    init: str | Mapping[str, Tensor],
    targets: Sequence[Target],
    pattern: NMPattern,
    *,
    seed: int,
    trainer: Any,
    first: Any,
    batches: int,
    run: Callable[..., None],
    model: nn.Module | None,
) -> Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]:
    """Find the masks that a fit starts from.

    Args:
        init: What :func:`check_init` returned.
        targets: The weights to mask, which must be dense.
        pattern: The pattern.
        seed: Seed of random masks.
        trainer: The trainer, within its fit.
        first: The batch that training is about to begin with.
        batches: The number of training batches to calibrate on.
        run: Runs a training step with given arguments, and leaves no trace.
        model: What FSDP has wrapped, if it has.

    Returns:
        Bool masks by parameter name, or pairs of name and mask, one at a time.
    """
    if isinstance(init, Mapping):
        return init
    if init.endswith(".npz"):
        return load_maskllm(init, {target.name: target.shape for target in targets}, pattern)
    if _is_file(init):
        return load_masks(init, pattern)

    def calls() -> Iterator[Callable[[], None]]:
        title = f"Calibrating {init}"
        for number, batch in enumerate(_batches(trainer, first, batches, title)):
            yield partial(run, *arguments(trainer.lightning_module, batch, number))

    masks = calibration.initial_masks(
        init,
        targets,
        pattern,
        seed=seed,
        batches=calls,
        reduce=lambda tensor: trainer.strategy.reduce(tensor, reduce_op="sum"),
        model=model,
        ranks=calibration.Ranks(trainer.global_rank, trainer.world_size)
        if trainer.world_size > 1
        else None,
    )
    return progress(masks, f"Choosing masks by {init}", len(targets), visible=_shows(trainer))


def _shows(trainer: Any) -> bool:
    """Whether this rank shows progress."""
    return trainer.is_global_zero and trainer.progress_bar_callback is not None


def arguments(module: Any, batch: Any, number: int) -> tuple[Any, ...]:
    """The arguments that Lightning's loop would give the module's training step."""
    numbered = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    return (batch, number) if numbered else (batch,)


def _batches(trainer: Any, first: Any, count: int, title: str) -> Iterator[Any]:
    """The first training batches, as the training loop would hand them to the step."""
    with fresh_batches(trainer.fit_loop._combined_loader, count) as (loader, begun):
        taken = [first] if begun else []
        yield from taken
        rest = islice(loader, count - len(taken))
        for batch in progress(rest, title, count, visible=_shows(trainer)):
            converted = trainer.precision_plugin.convert_input(batch)
            module = trainer.lightning_module
            converted = module._on_before_batch_transfer(converted, dataloader_idx=0)
            yield trainer.strategy.batch_to_device(converted, dataloader_idx=0)


def _is_file(init: str) -> bool:
    return init.endswith((".safetensors", ".npz"))
