"""The private names of Lightning, PyTorch, MLflow and others that the package uses.

Any upgrade may remove one without notice. So each stands in a table with an object that has it, and
a test names the one that is gone. (An import of a private module fails by name without a test.)
Checked with the versions in ``constraints.txt`` and in ``constraints-lowest.txt``.
"""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from transformers import PreTrainedModel

PACKAGE = Path(__file__).parent.parent / "maskpro_lightning"
#: Names that are only compared with, such as those of operations or in parameters' names.
SPELLED = {
    "_MultiProcessingLauncher",
    "_T",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
    "_inside",
    "_instantiator",
    "_orig_mod",
    "_sequences",
}
#: What PyTorch looks for on others' objects, and where.
LOOKED_FOR = {
    "_ddp_ignored": nn.parallel.distributed,
    "_ddp_params_and_buffers_to_ignore": nn.parallel.distributed,
    "_wrapped_by_lr_sched": torch.optim.lr_scheduler,
}


@pytest.fixture(scope="module")
def owners() -> Iterator[dict[str, Any]]:
    """The objects that private names are asked of."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, barebones=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one rank shards nothing
        fsdp1: Any = FullyShardedDataParallel(
            nn.Linear(4, 4), use_orig_params=True, device_id=torch.device("cpu")
        )
    fsdp1(torch.ones(1, 4)).sum().backward()
    fsdp2: Any = fully_shard(nn.Linear(4, 4))
    fsdp2(torch.ones(1, 4)).sum().backward()
    state = fsdp2._get_fsdp_state()
    conv = nn.Conv1d(1, 1, 3, padding=1)
    yield {
        "torch": torch,
        "torch's core": torch._C,
        "a tensor": torch.ones(1),
        "a module": conv,
        "an operation": torch.ops.aten.mm.default,
        "DataLoader": torch.utils.data.DataLoader([1]),
        "FSDP1": fsdp1,
        "its handle": fsdp1._handle,
        "its handle's flat parameter": fsdp1._handle.flat_param,
        "FSDP2": fsdp2,
        "its state": state,
        "its communication": state._comm_ctx,
        "its group": (getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group])[0],
        "semi-structured": SparseSemiStructuredTensorCUTLASS,
        "trainer": trainer,
        "its loop": trainer.fit_loop,
        "its connector": trainer._logger_connector,
        "LightningCLI": LightningCLI,
        "LightningModule": pl.LightningModule(),
        "bar": RichProgressBar(),
        "ModelCheckpoint": ModelCheckpoint(),
        "WeightAveraging": WeightAveraging(),
        "LightningOptimizer": LightningOptimizer(torch.optim.SGD(conv.parameters())),
        "DDPStrategy": DDPStrategy(),
        "FSDPStrategy": FSDPStrategy(),
        "ModelParallelStrategy": ModelParallelStrategy(),
        "MLFlowLogger": MLFlowLogger(tracking_uri="http://127.0.0.1:1"),
        "mlflow": import_module("mlflow.tracking.fluent"),
        "launcher": import_module(
            "lightning.fabric.strategies.launchers.subprocess_script"
        )._ChildProcessObserver,
        "transformers": PreTrainedModel,
    }
    distributed.destroy_process_group()


#: Each private name, and which of the objects above have it.
TABLE = {
    # PyTorch
    "_C": "torch",
    "_current_graph_task_id": "torch's core",
    "_foreach_copy_": "torch",
    "_foreach_div": "torch",
    "_foreach_mul": "torch",
    "_inductor": "torch",
    "_iterator": "DataLoader",
    "_ops": "torch",
    "_post_accumulate_grad_hooks": "a tensor",
    "_reversed_padding_repeated_twice": "a module",
    "_schema": "an operation",
    "_state_dict_hooks": "a module",
    "_state_dict_pre_hooks": "a module",
    "_version": "a tensor",
    "_DTYPE_SHAPE_CONSTRAINTS": "semi-structured",
    "_FORCE_CUTLASS": "semi-structured",
    # FSDP
    "_comm_ctx": "its state",
    "_contiguities": "its handle's flat parameter",
    "_exec_order_data": "FSDP1",
    "_fqns": "its handle's flat parameter",
    "_get_fsdp_state": "FSDP2",
    "_handle": "FSDP1",
    "_is_root": "FSDP1",
    "_params": "its handle's flat parameter",
    "_post_forward_indices": "its group",
    "_reset_flat_param_grad_info_if_needed": "its handle",
    "_shapes": "its handle's flat parameter",
    "_shard_param_infos": "its handle's flat parameter",
    # Lightning
    "_average_model": "WeightAveraging",
    "_combined_loader": "its loop",
    "_ddp_kwargs": "DDPStrategy",
    "_first_loop_iter": "its connector",
    "_get_train_description": "bar",
    "_on_after_step": "LightningOptimizer",
    "_on_before_step": "LightningOptimizer",
    "_run_subcommand": "LightningCLI",
    "_to_lightning_optimizer": "LightningOptimizer",
    "_last_global_step_saved": "ModelCheckpoint",
    "_logger_connector": "trainer",
    "_monitor_candidates": "ModelCheckpoint",
    "_on_before_batch_transfer": "LightningModule",
    "_save_distributed_checkpoint": "ModelParallelStrategy",
    "_save_topk_checkpoint": "ModelCheckpoint",
    "_state_dict_type": "FSDPStrategy",
    "_terminate_all": "launcher",
    # MLflow, transformers
    "_active_experiment_id": "mlflow",
    "_experiment_id": "MLFlowLogger",
    "_experiment_name": "MLFlowLogger",
    "_keep_in_fp32_modules": "transformers",
    "_keep_in_fp32_modules_strict": "transformers",
    "_keys_to_ignore_on_save": "transformers",
    "_no_split_modules": "transformers",
    "_run_id": "MLFlowLogger",
    "_run_name": "MLFlowLogger",
    "_tracking_uri": "MLFlowLogger",
}
#: Of two names for the same in different versions, one is there.
EITHER = {"_fsdp_param_group", "_fsdp_param_groups"}


@pytest.mark.parametrize("name", TABLE)
def test_a_private_name_is_still_there(name: str, owners: dict[str, Any]) -> None:
    owner = owners[TABLE[name]]
    assert hasattr(owner, name), f"{name} is gone from {TABLE[name]}: find what took its place"


def test_one_of_two_names_is_there(owners: dict[str, Any]) -> None:
    assert any(hasattr(owners["its state"], name) for name in EITHER)


@pytest.mark.parametrize("name", sorted(LOOKED_FOR))
def test_a_name_is_still_looked_for(name: str) -> None:
    assert name in inspect.getsource(LOOKED_FOR[name])


def test_no_other_private_name_is_used() -> None:
    used: dict[str, str] = {}
    own: set[str] = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            own |= _defined(node)
            for name in _mentioned(node):
                used[name] = path.name
    listed = TABLE.keys() | EITHER | SPELLED | LOOKED_FOR.keys()
    foreign = used.keys() - (own - listed)
    told = {f"{name} in {used[name]}" for name in foreign - listed - _operations()}
    assert not told, "put these into the table, with an object that has them"
    assert listed <= foreign, f"not used any more: {listed - foreign}"


def _defined(node: ast.AST) -> set[str]:
    """Names that the package gives itself."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.AnnAssign | ast.Assign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        flat = [part for t in targets for part in (t.elts if isinstance(t, ast.Tuple) else [t])]
        names = {part.id for part in flat if isinstance(part, ast.Name)}
        return names | {part.attr for part in flat if _is_of_self(part)}
    return set()


def _is_of_self(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def _mentioned(node: ast.AST) -> Iterator[str]:
    """Private names of attributes, and in strings."""
    name: Any = None
    if isinstance(node, ast.Attribute):
        name = node.attr
    elif isinstance(node, ast.Constant):
        name = node.value
    private = isinstance(name, str) and name.startswith("_") and name.isidentifier()
    if private and not name.startswith("__") and name != "_":
        yield name


def _operations() -> set[str]:
    """Private operations of PyTorch, which are compared with by name."""
    found = ast.parse((PACKAGE / "weights" / "operations.py").read_text(encoding="utf-8"))
    return {name for node in ast.walk(found) for name in _mentioned(node)}
