"""How FSDP splits a model over ranks, and how to reach the weights underneath.

Only this module uses FSDP's internals: where its flat parameters keep a weight, and that it may
hold a second, whole copy of weights, which does not show a mask that is written into the shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, all_reduce, get_world_size
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import _is_fsdp_flattened
from torch.distributed.fsdp._runtime_utils import _reshard

from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.weights.layout import Layout


def over_ranks(parts: Sequence[Layout], numbers: Tensor, device: torch.device) -> Tensor:
    """Add up numbers that ranks have counted in their parts; a collective if a weight is split.

    Copies of a part count once.

    Args:
        parts: This rank's part of each weight.
        numbers: (weights, ...) on the CPU, one row for each part.
        device: Where collectives happen.
    """
    if not any(part.across for part in parts):
        return numbers
    shares = torch.tensor([part.ranks / get_world_size() for part in parts])
    numbers = (numbers * shares[:, None]).to(device)
    all_reduce(numbers)
    return numbers.cpu()


def reshard(model: nn.Module) -> None:
    """Drop the whole weights that FSDP keeps after a forward pass without a backward pass.

    Afterwards the parameters are the shards, and the next forward pass gathers their values. Also
    clears the lists that FSDP fills in a forward pass and empties only in a backward pass.
    """
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            handle = module._handle
            if handle is not None and module._is_root is not None:
                if handle.uses_sharded_strategy and not handle.needs_unshard():
                    _reshard(module, handle, True)
                if module._is_root:
                    module._exec_order_data.next_iter()
        elif isinstance(module, FSDPModule):
            module.reshard()
            state: Any = module._get_fsdp_state()
            getattr(state._comm_ctx, "post_forward_order", []).clear()
            for group in _fsdp_groups(state):
                group._post_forward_indices.clear()


def shows_gradients_late(weight: Tensor) -> bool:
    """Whether a weight has its gradient only when the backward pass is over, as with FSDP1.

    FSDP1 computes with views of a flat parameter, so a hook on the weight would never run.
    """
    return isinstance(weight, nn.Parameter) and _is_fsdp_flattened(weight)


def free_gradients(model: nn.Module) -> None:
    """Let FSDP1 free each flat gradient whose views no weight holds as ``grad`` any more."""
    for module in FullyShardedDataParallel.fsdp_modules(model):
        if module._handle is not None:
            module._handle._reset_flat_param_grad_info_if_needed()


def own_state(model: nn.Module) -> dict[str, Any]:
    """A model's state on this rank: its own parameters and buffers, nothing gathered.

    Raises:
        ValueError: the model is a part of one whose flat parameters hold its weights.
    """
    reshard(model)
    with _without_gathering(model):
        state: dict[str, Any] = model.state_dict(keep_vars=True)
    inside = {
        id(weight)
        for module in FullyShardedDataParallel.fsdp_modules(model)
        if module._handle is not None
        for weight in module._handle.flat_param._params or ()
    }
    for name, value in state.items():
        flattened = isinstance(value, nn.Parameter) and _is_fsdp_flattened(value)
        if flattened and id(value) not in inside:
            raise ValueError(
                f"FSDP keeps {name!r} in a flat parameter of a module around "
                f"{type(model).__name__}: give the outermost one, which is trainer.strategy.model "
                f"in a Trainer."
            )
    return state


@contextmanager
def _without_gathering(model: nn.Module) -> Iterator[None]:
    """Within a ``with`` block, remove FSDP1's hooks that gather weights for a state dict."""
    modules = FullyShardedDataParallel.fsdp_modules(model)
    kinds = ("_state_dict_hooks", "_state_dict_pre_hooks")
    hooks = [(module, kind, vars(module)[kind]) for module in modules for kind in kinds]
    for module, kind, found in hooks:
        vars(module)[kind] = type(found)()
    try:
        yield
    finally:
        for module, kind, found in hooks:
            vars(module)[kind] = found


def flat_shapes(model: nn.Module) -> dict[int, torch.Size]:
    """Shapes of the whole weights that FSDP1 shows as 1-D pieces, by the parameter's id."""
    return {key: shape for key, (shape, _, _, _) in _flat_parameters(model).items()}


def layouts(
    model: nn.Module | None, weights: Sequence[tuple[Tensor, NMPattern, int]]
) -> list[Layout]:
    """The layout of this rank's part of each weight.

    Args:
        model: The model that FSDP1 has wrapped, if it has.
        weights: Its parameters with pattern and input dimension.
    """
    flat = {} if model is None else _flat_parameters(model)
    found = []
    for weight, pattern, input_dim in weights:
        if id(weight) in flat:
            shape, start, length, group = flat[id(weight)]
            whole = Layout.of(torch.empty(shape, device="meta"), pattern, input_dim)
            found.append(Layout.run(whole, start, length, (group,)))
        else:
            found.append(Layout.of(weight, pattern, input_dim))
    return found


def _flat_parameters(model: nn.Module) -> dict[int, tuple[torch.Size, int, int, ProcessGroup]]:
    """By id: shape of the whole weight, start and length of this rank's run, and its group."""
    found = {}
    for module in FullyShardedDataParallel.fsdp_modules(model):
        handle = module._handle
        if handle is None or not handle.uses_sharded_strategy:
            continue
        flat: Any = handle.flat_param
        if flat._params is None:
            raise ValueError(
                "FSDP hides the weights in flat parameters (use_orig_params=False), and masks "
                "need them: wrap with use_orig_params=True."
            )
        for weight, shape, info, name, contiguous in zip(
            flat._params,
            flat._shapes,
            flat._shard_param_infos,
            flat._fqns,
            flat._contiguities,
            strict=True,
        ):
            if not contiguous:
                raise ValueError(
                    f"{name!r} is not contiguous, and FSDP cuts it in its order in memory: make "
                    f"it contiguous before wrapping, or use fully_shard (FSDP2)."
                )
            start, length = (info.intra_param_start_idx, info.numel_in_shard)
            found[id(weight)] = (shape, start or 0, length or 0, handle.process_group)
    return found


def _fsdp_groups(state: Any) -> Sequence[Any]:
    if hasattr(state, "_fsdp_param_groups"):
        groups: Sequence[Any] = state._fsdp_param_groups
        return groups
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []
