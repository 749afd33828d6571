"""``maskpro`` with a strategy for GPUs on a CPU: ``python process_recipe.py fit OPTIONS``."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from lightning.pytorch import strategies
from lightning.pytorch.strategies import fsdp
from torch import nn
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

from maskpro_lightning.cli import main


class OnCPU(strategies.FSDPStrategy):
    """Lightning wants GPUs for its own class, and PyTorch a device for flat parameters."""

    def model_sharded_context(self) -> Any:
        return nullcontext()

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


def _whole_on_cpu(module: nn.Module, world_size: int, rank0_only: bool = True) -> Any:
    # Lightning also asks to move what is gathered to the CPU, which crashes where it is.
    return FullyShardedDataParallel.state_dict_type(
        module, StateDictType.FULL_STATE_DICT, FullStateDictConfig(False, rank0_only)
    )


if __name__ == "__main__":
    with (
        mock.patch.object(strategies, "FSDPStrategy", OnCPU),
        mock.patch.object(fsdp, "_get_full_state_dict_context", _whole_on_cpu),
        mock.patch("maskpro_lightning.tracking.plots.figures", return_value={}),
    ):
        main()
