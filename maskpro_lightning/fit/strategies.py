"""Adapts Lightning's strategies to masks: gradients, and checkpoints of sharded weights.

Where weights are sharded, Lightning gathers optimizer states with PyTorch's own functions, which do
not take the state of masks. So that state is saved and restored here, in one of two forms that any
number of ranks can read: whole tensors in one file, or DTensors in a distributed checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed import all_reduce, broadcast, get_rank, get_world_size
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from maskpro_lightning.files.distributed import Stored, is_distributed
from maskpro_lightning.fit.patches import Patches
from maskpro_lightning.optim.optimizer import MaskPro
from maskpro_lightning.weights.layout import Layout, like, local

_TESTED = {
    "SingleDeviceStrategy": "devices=1",
    "DDPStrategy": 'strategy="ddp"',
    "FSDPStrategy": 'strategy="fsdp"',
    "ModelParallelStrategy": "ModelParallelStrategy (fully_shard, tensor parallelism)",
}
_SHARDED = ("FSDPStrategy", "ModelParallelStrategy")
# The key of a distributed checkpoint that holds the optimizer's parameter groups.
_GROUPS = "maskpro_param_groups"
# The file in which Lightning keeps the part of a distributed checkpoint that is no tensor.
_REST = "meta.pt"


def refuse_untested(strategy: Any) -> None:
    """Refuse strategies that masks were not tested with.

    Raises:
        ValueError: names the strategy and those that were tested.
    """
    if _kind(strategy) not in _TESTED:
        raise ValueError(
            f"Masks are tested with {', '.join(_TESTED)}, not with "
            f"{type(strategy).__name__}: choose {', '.join(_TESTED.values())}."
        )
    if _kind(strategy) == "FSDPStrategy" and not strategy.kwargs.get("use_orig_params", True):
        raise ValueError(
            "FSDPStrategy(use_orig_params=False) hides the weights in flat parameters, and masks "
            "need them: leave use_orig_params=True."
        )


def shards(strategy: Any) -> bool:
    """Whether a strategy splits weights over ranks."""
    return _kind(strategy) in _SHARDED


def wraps_steps(strategy: Any) -> bool:
    """Whether a training step is one forward pass to a strategy, with no backward pass in it."""
    return _kind(strategy) == "FSDPStrategy"


def sharded_model(strategy: Any) -> nn.Module | None:
    """The model as FSDP has wrapped it, or None where no weight is sharded."""
    model: nn.Module | None = strategy.model if shards(strategy) else None
    return model


def tell_of_processes(strategy: Any) -> None:
    """Warn of what is lost when a fit runs in processes that the strategy forks or spawns."""
    if type(getattr(strategy, "launcher", None)).__name__ == "_MultiProcessingLauncher":
        rank_zero_warn(
            "This fit runs in processes of its own, from which the weights under the deployed mask "
            "come back; the callback's optimizer, with the dense weights, and its result do not. "
            'strategy="ddp" keeps them.'
        )


def part_from(state: dict[str, Any], weights: Iterable[Tensor]) -> None:
    """Copy tensors of a state dict that share memory with weights: these change before the save."""
    memory = {local(weight).untyped_storage().data_ptr() for weight in weights}
    for name, value in state.items():
        # FSDP1's ShardedTensors are copies already.
        plain = isinstance(value, Tensor) and not isinstance(value, ShardedTensor)
        if plain and local(value).untyped_storage().data_ptr() in memory:
            state[name] = value.clone()


class Gradients:
    """Makes masked weights get gradients, averaged over ranks when masks learn from them.

    Frozen weights require gradients for the length of the fit. DDP averages gradients in buckets,
    which hold those of all weights until the backward pass is over. So masked weights are taken out
    of the buckets and averaged one at a time. They stay in if DDP would have no other parameters,
    if a rank may lack some gradients (find_unused_parameters), or if the module optimizes manually.

    Args:
        strategy: The strategy.
        patches: Undoes everything at the end of the fit.
    """

    def __init__(self, strategy: Any, patches: Patches) -> None:
        self._strategy, self._patches = strategy, patches
        self._in_buckets = False

    def expect(self, module: nn.Module, weights: Sequence[Tensor]) -> None:
        """Prepare a module that is built, and that no strategy has wrapped yet.

        Args:
            module: The module.
            weights: The parameters to mask.
        """
        for weight in weights:
            if not weight.requires_grad:
                weight.requires_grad_()
                self._patches.finally_do(partial(weight.requires_grad_, False))
        if _kind(self._strategy) == "FSDPStrategy":
            # Without synchronization, whole gradients would add up on every rank.
            self._patches.put(self._strategy, "block_backward_sync", nullcontext)
        if _kind(self._strategy) != "DDPStrategy":
            return
        masked = {id(weight) for weight in weights}
        others = (p for p in module.parameters() if id(p) not in masked)
        idle = self._strategy._ddp_kwargs.get("find_unused_parameters", False)
        # With several backward passes in a training step, only DDP knows when each ends.
        manual = not self._strategy.lightning_module.automatic_optimization
        self._in_buckets = idle or manual or not any(p.requires_grad for p in others)
        if not self._in_buckets:
            left_out = {name: p for name, p in module.named_parameters() if id(p) in masked}
            for weight in left_out.values():
                broadcast(weight.detach(), src=0)  # as DDP does with its own parameters
                self._patches.put(weight, "_ddp_ignored", True)
            self._patches.put(module, "_ddp_params_and_buffers_to_ignore", list(left_out))

    def taken_by(self, optimizer: MaskPro, backward_passes: int) -> AbstractContextManager[None]:
        """Within a ``with`` block, let an optimizer learn from gradients as they come."""
        if self._in_buckets:
            return nullcontext()
        own = _kind(self._strategy) == "DDPStrategy"
        return optimizer.taking_gradients(backward_passes, _average if own else None)


def lower_scale(precision: Any, optimizer: MaskPro) -> None:
    """Lower the scale of a GradScaler after a gradient that overflowed.

    A scaler sees overflows only in optimizer steps that it makes itself, and here it makes none.
    The scale does not matter to the logits, since gradients are divided by their own size.
    """
    scaler = getattr(precision, "scaler", None)
    if scaler is not None and scaler.is_enabled() and not optimizer.all_finite():
        scaler.update(scaler.get_scale() * scaler.get_backoff_factor())


def _average(gradient: Tensor) -> None:
    all_reduce(gradient)
    gradient /= get_world_size()


class MaskCheckpoints:
    """Saves and restores the state of masks in place of a strategy that shards weights.

    Args:
        trainer: The trainer, whose strategy shards.
        optimizer: Returns the optimizer of masks.
        is_ours: Whether a checkpoint was written by a fit with masks.
    """

    def __init__(
        self,
        trainer: Any,
        optimizer: Callable[[], MaskPro],
        is_ours: Callable[[dict[str, Any]], bool],
    ) -> None:
        self._trainer, self._optimizer, self._is_ours = trainer, optimizer, is_ours
        self._strategy = trainer.strategy
        self._load_inside = self._strategy.load_checkpoint
        self._save_inside = self._strategy.save_checkpoint

    @classmethod
    def patches(cls, trainer: Any, *args: Any) -> dict[str, Any]:
        """Methods to put on the strategy; none where no weight is sharded."""
        if not shards(trainer.strategy):
            return {}
        checkpoints = cls(trainer, *args)
        return {
            "optimizer_state": checkpoints.optimizer_state,
            "load_checkpoint": checkpoints.load_checkpoint,
            "save_checkpoint": checkpoints.save_checkpoint,
        }

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The state of the masks: distributed, or whole on rank 0."""
        masks = self._optimizer()
        keep = _distributed if self._distributed else _on_rank_zero
        packed = masks.state_dict()
        for number, layout in enumerate(masks.layouts.values()):
            tensors = packed["state"].get(number, {})
            packed["state"][number] = {name: keep(layout, v) for name, v in tensors.items()}
        return packed

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, **kwargs: Any) -> None:
        """Save as the strategy does; a distributed checkpoint's parameter groups go to the top."""
        if self._distributed:
            for packed in checkpoint.get("optimizer_states", ()):
                checkpoint[_GROUPS] = packed.pop("param_groups")
        self._save_inside(checkpoint, path, **kwargs)

    def load_checkpoint(self, path: Any, **kwargs: Any) -> dict[str, Any]:
        """Load weights with the strategy's own method, then the masks."""
        with self._without_optimizers():
            checkpoint: dict[str, Any] = self._load_inside(path, **kwargs)
        if self._trainer.state.fn == "fit" and self._is_ours(checkpoint):
            if _GROUPS in checkpoint:
                state = _read(Path(path), self._optimizer())
                packed = {"state": state, "param_groups": checkpoint.pop(_GROUPS)}
            else:
                (packed,) = checkpoint["optimizer_states"]
            self._optimizer().load_state_dict(packed)
        return checkpoint

    @property
    def _distributed(self) -> bool:
        if _kind(self._strategy) == "FSDPStrategy":
            return bool(self._strategy._state_dict_type == "sharded")
        return bool(self._strategy._save_distributed_checkpoint)

    @contextmanager
    def _without_optimizers(self) -> Iterator[None]:
        """Within a ``with`` block, the strategy neither loads nor misses an optimizer's state."""
        state, optimizers = self._trainer.state, self._strategy.optimizers
        doing, state.fn, self._strategy.optimizers = state.fn, type(state.fn)("validate"), []
        try:
            yield
        finally:
            state.fn, self._strategy.optimizers = doing, optimizers


class FolderCheckpoints:
    """Lets a strategy without shards read a distributed checkpoint, which is a folder.

    Lightning itself reads one only with a strategy of the kind that wrote it. Each tensor is read
    when it is needed, so that no rank's memory holds the checkpoint beside the model.
    """

    def __init__(self, strategy: Any) -> None:
        self._strategy = strategy
        self._load_inside = strategy.load_checkpoint
        self._load_weights_inside = strategy.load_model_state_dict

    @classmethod
    def patches(cls, strategy: Any) -> dict[str, Any]:
        """Methods to put on a strategy; none where weights are sharded."""
        if shards(strategy):
            return {}
        folders = cls(strategy)
        return {
            "load_checkpoint": folders.load_checkpoint,
            "load_model_state_dict": folders.load_model_state_dict,
        }

    def load_checkpoint(self, path: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint; the tensors of a folder are read only when they are needed."""
        if not is_distributed(path):
            whole: dict[str, Any] = self._load_inside(path, **kwargs)
            return whole
        checkpoint: dict[str, Any] = self._load_inside(Path(path) / _REST, **kwargs)
        checkpoint |= {"state_dict": Stored(path), "optimizer_states": []}
        groups = checkpoint.pop(_GROUPS, None)
        if groups is not None:
            numbers = range(sum(len(group["params"]) for group in groups))
            states = {n: Stored(path, f"optimizer_0.state.{n}.") for n in numbers}
            state = {n: tensors for n, tensors in states.items() if tensors}
            checkpoint["optimizer_states"] = [{"state": state, "param_groups": groups}]
        return checkpoint

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Load a module's weights; from a folder one after the other."""
        if isinstance(checkpoint["state_dict"], Stored):
            checkpoint["state_dict"].load_into(self._strategy.lightning_module)
        else:
            self._load_weights_inside(checkpoint, strict=strict)


def _kind(strategy: Any) -> str:
    """The name of Lightning's own class that a strategy is of, or is derived from."""
    kinds = (kind.__name__ for kind in type(strategy).__mro__ if "lightning." in kind.__module__)
    return next(kinds, type(strategy).__name__)


def _on_rank_zero(layout: Layout, value: Tensor) -> Tensor:
    whole = layout.whole(local(value))
    return whole.cpu() if get_rank() == 0 else whole.new_empty(0)


def _distributed(layout: Layout, value: Tensor) -> Tensor:
    """A DTensor as it is; a run of elements as a DTensor that is split along dimension 0."""
    if not layout.flat:
        return value
    rows = layout.whole(value).chunk(get_world_size())
    rank = get_rank()
    own = rows[rank] if rank < len(rows) else rows[0][:0]
    return _by_rows(own.clone(), layout)


def _by_rows(own: Tensor, layout: Layout) -> Tensor:
    mesh = init_device_mesh(own.device.type, (get_world_size(),))
    stride = torch.empty(layout.shape, device="meta").stride()
    rows: Tensor = DTensor.from_local(
        own, mesh, [Shard(0)], run_check=False, shape=torch.Size(layout.shape), stride=stride
    )
    return rows


def _read(path: Path, optimizer: MaskPro) -> dict[int, dict[str, Tensor]]:
    """This rank's part of the masks' state in a distributed checkpoint."""
    reader = FileSystemReader(path)
    saved: dict[str, Any] = reader.read_metadata().state_dict_metadata
    state: dict[int, dict[str, Tensor]] = {}
    for number, (parameter, layout) in enumerate(optimizer.layouts.items()):
        prefix = f"optimizer_0.state.{number}."
        for key in (key for key in saved if key.startswith(prefix)):
            dtype, device = saved[key].properties.dtype, parameter.device
            size = layout.size
            if layout.flat:
                rows = torch.empty(layout.shape[0], device="meta").chunk(get_world_size())
                own_rows = len(rows[get_rank()]) if get_rank() < len(rows) else 0
                size = (own_rows, *layout.shape[1:])
            own = torch.empty(size, dtype=dtype, device=device)
            value = _by_rows(own, layout) if layout.flat else like(own, parameter)
            state.setdefault(number, {})[key.removeprefix(prefix)] = value
    load({"optimizer_0": {"state": state}}, storage_reader=reader)
    return state
