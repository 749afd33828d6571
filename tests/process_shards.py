"""Runs on 1, 2 and 4 ranks, in processes of their own, for tests of sharding.

``python process_shards.py FOLDER TASK ...`` forks a process for each rank; what they have to tell
lies in ``FOLDER/TASK-RANKS-RANK.pt``, by the name of the case.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args
from unittest import mock

import lightning.pytorch as pl
import oracle
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies import fsdp as lightning_fsdp
from live_bytes import LiveBytes
from modules import quiet_trainer
from rules import mask_callback, mask_optimizer
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.functional import mse_loss
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from maskpro_lightning import (
    Distillation,
    MaskPro,
    MaskProCallback,
    NMPattern,
    SparseFinetuning,
    export_sparse,
    find_targets,
    parameter_groups,
)
from maskpro_lightning.files import streaming
from maskpro_lightning.initial import calibration, initializers, reconstruction
from maskpro_lightning.optim.estimators import EstimatorName
from maskpro_lightning.tracking.metrics import mask_metrics
from maskpro_lightning.weights import layout
from maskpro_lightning.weights.sharding import reshard

STEPS, LR = 8, 20.0


class Conv1D(nn.Module):
    """A layer that stores its weight as (inputs, outputs), as Hugging Face's of this name."""

    __module__ = "transformers.pytorch_utils"  # by which it is known

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.nx, self.nf = inputs, outputs
        self.weight = nn.Parameter(oracle.random(inputs, outputs, seed=5) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Model(nn.Module):
    """Weights of three layouts; 3 outputs are fewer than 4 ranks, 20 / 4 inputs cut groups.

    Args:
        channels: Four times as many inputs has ``transposed``; 6 cut groups on 4 ranks, 8 do not.
    """

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, channels, 3, padding=1)
        self.transposed = Conv1D(4 * channels, 12)
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 3)
        with torch.no_grad():
            for seed, weight in enumerate((self.conv, self.first, self.second)):
                shape = weight.weight.shape
                scale = shape[1:].numel() ** -0.5
                weight.weight.copy_(oracle.random(*shape, seed=seed) * scale)
                weight.bias.fill_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.transposed(self.conv(x).relu().flatten(1))
        return self.second(self.first(hidden).relu())


class Chain(nn.Module):
    """Two linear layers."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.first, self.second = map(nn.Linear, sizes, sizes[1:])
        for seed, layer in enumerate((self.first, self.second)):
            shape = layer.weight.shape
            layer.weight.data = oracle.random(*shape, seed=seed) / shape[1] ** 0.5
            layer.bias.data.fill_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.flatten(1)).relu())


def weights(model: nn.Module) -> list[dict[str, Any]]:
    """The weights as parameter groups, by name, whatever wraps the model."""
    named = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in model.named_parameters()}
    dims = {"conv.weight": 1, "transposed.weight": 0, "first.weight": -1, "second.weight": -1}
    return [{"params": [(n, named[n])], "input_dim": d} for n, d in dims.items() if n in named]


# What each strategy makes of a model, and over how many ranks data is split ("all", or a number).


def ddp(model: nn.Module, ranks: int) -> nn.Module:
    return model


def fsdp2(model: nn.Module, ranks: int, **kwargs: Any) -> nn.Module:
    mesh = kwargs.pop("mesh", None) or init_device_mesh("cpu", (ranks,))
    for layer in model.children():
        fully_shard(layer, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def fsdp2_by_inputs(model: nn.Module, ranks: int) -> nn.Module:
    """Shards along dimension 1: 12 and 20 inputs on 4 ranks cut groups."""
    return fsdp2(model, ranks, shard_placement_fn=lambda p: Shard(min(1, p.dim() - 1)))


def fsdp1(
    model: nn.Module, ranks: int, kind: str = "FULL_SHARD", units: int = 2, **kwargs: Any
) -> nn.Module:
    wrapped = partial(
        FullyShardedDataParallel,
        sharding_strategy=ShardingStrategy[kind],
        use_orig_params=True,
        device_id=torch.device("cpu"),
        **kwargs,
    )
    for name, layer in list(model.named_children())[-units:]:
        setattr(model, name, wrapped(layer))
    return wrapped(model)


def tp(model: nn.Module, ranks: int, mesh: DeviceMesh | None = None) -> nn.Module:
    # As DTensors in between, for which ranks may have a different number of inputs.
    plan = {"first": ColwiseParallel(use_local_output=False), "second": RowwiseParallel()}
    return parallelize_module(model, mesh or init_device_mesh("cpu", (ranks,)), plan)


def tp_and_fsdp2(model: nn.Module, ranks: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "tensor"))
    return fsdp2(tp(model, 2, mesh["tensor"]), ranks, mesh=mesh["data"])


def hsdp2(model: nn.Module, ranks: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
    return fsdp2(model, ranks, mesh=mesh)


def hybrid(model: nn.Module, ranks: int) -> nn.Module:
    return fsdp1(model, ranks, "HYBRID_SHARD", device_mesh=init_device_mesh("cpu", (2, ranks // 2)))


Wrap = Callable[[nn.Module, int], nn.Module]
#: By name: how to wrap, and how many ranks see the same data.
STRATEGIES: dict[str, tuple[Wrap, Callable[[int], int]]] = {
    "ddp": (ddp, lambda _: 1),
    "fsdp2": (fsdp2, lambda _: 1),
    "fsdp2 keeping": (partial(fsdp2, reshard_after_forward=False), lambda _: 1),
    "fsdp2 by inputs": (fsdp2_by_inputs, lambda _: 1),
    "hsdp2": (hsdp2, lambda _: 1),
    "fsdp1": (fsdp1, lambda _: 1),
    "fsdp1 keeping": (partial(fsdp1, kind="SHARD_GRAD_OP"), lambda _: 1),
    "fsdp1 unsharded": (partial(fsdp1, kind="NO_SHARD"), lambda _: 1),
    "hybrid": (hybrid, lambda _: 1),
    "tp": (tp, lambda ranks: ranks),
    "tp and fsdp2": (tp_and_fsdp2, lambda _: 2),
}
#: What is learned from gradients, and where else than on one device. Of 24 or 32 inputs, 4 ranks
#: cut groups of 8 once, of 16 into two or four; of 10 inputs they have 3, 3, 3 and 1.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any], tuple[str, ...]]] = {
    "2:4": (Model, "2:4", {}, tuple(name for name in STRATEGIES if name != "ddp")),
    "4:8": (partial(Chain, 16, 24, 6), "4:8", {}, ("fsdp1", "hybrid", "fsdp2 by inputs", "tp")),
    "8:16": (partial(Chain, 16, 32, 6), "8:16", {}, ("fsdp1", "hybrid", "fsdp2 by inputs", "tp")),
    "8:16 in four": (partial(Chain, 16, 16, 6), "8:16", {}, ("fsdp1", "tp")),
    "2:5": (partial(Chain, 16, 10, 6), "2:5", {"include": "second.weight"}, ("tp",)),
    "lean": (Model, "2:4", {"memory": "lean"}, ("fsdp1", "fsdp2", "fsdp2 by inputs", "tp")),
    "bfloat16": (Model, "2:4", {"logits_dtype": "bfloat16"}, ("fsdp1", "fsdp2")),
}


def applies(name: str, ranks: int) -> bool:
    """Two meshes need four ranks to be two."""
    return ranks == 4 or name not in ("hsdp2", "hybrid", "tp and fsdp2")


class Run:
    """A few steps of one strategy, watched from outside."""

    def __init__(
        self,
        strategy: str,
        ranks: int,
        estimator: EstimatorName = "policy",
        make: Callable[[], nn.Module] = Model,
        include: str = "",
        **rule: Any,
    ) -> None:
        wrap, copies = STRATEGIES[strategy]
        model = make()
        outputs = model.second.out_features
        self.model = wrap(model, ranks)
        rule = {
            "lr": LR if estimator == "policy" else 0.1,
            "published": True,
            "logit_scale": 1.0,
        } | rule
        groups = [g for g in weights(self.model) if include in g["params"][0][0]]
        self.optimizer = mask_optimizer(groups, estimator=estimator, model=self.model, **rule)
        self._estimator = estimator
        parts, part = ranks // copies(ranks), dist.get_rank() // copies(ranks)
        self._x = oracle.random(8, 4, 2, 2, seed=20).chunk(parts)[part]
        self._y = oracle.random(8, outputs, seed=21).chunk(parts)[part]
        self.losses: list[float] = []
        self.sent: list[int] = []  # numbers in each collective of our own

    def loss(self) -> Tensor:
        loss = mse_loss(self.model(self._x), self._y)
        if self._estimator == "straight_through":
            loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        return mean / dist.get_world_size()

    def train(self, steps: int) -> None:
        def counting(tensor: Tensor, **kwargs: Any) -> Any:
            self.sent.append(tensor.numel())
            return dist.all_reduce(tensor, **kwargs)

        with mock.patch.object(layout, "all_reduce", counting):
            for _ in range(steps):
                self.losses.append(float(self.optimizer.step(self.loss)))

    def told(self) -> dict[str, Any]:
        """What must not depend on the ranks, whole; and the bytes that this rank keeps."""
        logits = {
            masked.name: masked.layout.whole(masked.layout.own(masked.logits)).clone()
            for _, _, masked in self.optimizer._masked_weights()
        }
        state = self.optimizer.state.values()
        kept = [
            value.to_local() if isinstance(value, DTensor) else value
            for tensors in state
            for name, value in tensors.items()
            if name != "redrawn"
        ]
        versions = ("initial", "drawn", "mode")
        return {
            "logits": logits,
            **{version: dict(self.optimizer.whole_masks(version)) for version in versions},
            "losses": self.losses,
            "sent": self.sent,
            "split": sum(len(layout.across) for layout in self.optimizer.layouts.values()),
            "weight_bytes": sum(layout.local(p).nbytes for p in self.model.parameters()),
            "bytes": sum(value.untyped_storage().nbytes() for value in kept),
        }


def core(ranks: int, folder: Path) -> Iterator[tuple[str, Any]]:
    """MaskPro without a trainer."""
    for name in STRATEGIES:
        if applies(name, ranks):
            run = Run(name, ranks)
            run.optimizer.begin()
            start = run.told()
            run.train(STEPS)
            yield name, {"start": start, "end": run.told()}
    for family, (make, pattern, rule, names) in FAMILIES.items():
        for name in names if ranks > 1 else ("ddp", *names):
            if applies(name, ranks):
                run = Run(name, ranks, "straight_through", make, pattern=pattern, **rule)
                run.optimizer.begin()
                start = run.told()
                run.train(STEPS)
                yield f"{family} {name}", {"start": start, "end": run.told()}
    for name in ("ddp", "fsdp1", "fsdp2", "fsdp2 by inputs"):
        run = Run(name, ranks)
        run.optimizer.begin()
        saved = run.optimizer.state_dict()
        run.optimizer.load_state_dict(saved)
        yield f"damaged {name}", _damaged(run.optimizer, saved)


class Taken(TorchDispatchMode):
    """Counts the bytes that a rank takes from others, of weights and of gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "allreduce" not in func.__name__:
            sizes = [sum(tensor.nbytes for tensor in tree_leaves(arg)) for arg in args[:2]]
            self.bytes += max(sizes) - min(sizes)
        return func(*args, **(kwargs or {}))


def traffic(ranks: int, folder: Path) -> Iterator[tuple[str, Any]]:
    """What a step takes from others, of layers that all ranks can share evenly."""
    for name in ("fsdp1", "fsdp2") if ranks > 1 else ():
        for estimator in get_args(EstimatorName):
            run = Run(name, ranks, estimator, partial(Chain, 16, 32, 8))
            run.train(1)
            with Taken() as taken:
                run.train(1)
            yield f"{name} {estimator}", taken.bytes


def _damaged(optimizer: MaskPro, saved: dict[str, Any]) -> str:
    """What is said to masks of which a rank's part keeps everything."""
    for tensors in saved["state"].values():
        tensors["masks"] = tensors["masks"].clone().fill_(255)
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        return str(error)
    return ""


# --- fits -----------------------------------------------------------------------------------------


class OnCPU(FSDPStrategy):
    """Lightning wants GPUs for its own class, and PyTorch a device for flat parameters."""

    def __init__(self, **kwargs: Any) -> None:
        policy = partial(lambda_auto_wrap_policy, lambda_fn=lambda m: type(m) is nn.Linear)
        super().__init__(auto_wrap_policy=policy, **kwargs)

    def model_sharded_context(self) -> Any:
        return nullcontext()

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if self.sharding_strategy is ShardingStrategy.HYBRID_SHARD:  # its own mesh is of GPUs, too
            ranks = (2, dist.get_world_size() // 2)
            self.kwargs["device_mesh"] = init_device_mesh("cpu", ranks)
        kwargs = self.kwargs | {"sharding_strategy": self.sharding_strategy}
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **kwargs)


class Fitted(pl.LightningModule):
    """The model, its losses, and what its strategy asks it to do to itself."""

    callback: Any = None

    def __init__(self, wrap: Callable[[nn.Module, Any], None] | None = None) -> None:
        super().__init__()
        self._wrap = wrap
        self.model: nn.Module | None = None
        self.losses: list[float] = []
        self.validated: list[Tensor] = []

    def configure_model(self) -> None:
        if self.model is None:
            self.model = Model()
            if self._wrap is not None:
                self._wrap(self.model, self.device_mesh)

    def loss(self, batch: Any) -> Tensor:
        assert self.model is not None
        return mse_loss(self.model(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(self.loss(batch).detach())
        self.log("held_out_loss", self.validated[-1], sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ByHand(Fitted):
    """Optimizes manually."""

    def __init__(self, wrap: Callable[[nn.Module, Any], None] | None = None) -> None:
        super().__init__(wrap)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Losses(pl.Callback):
    def __init__(self, masks: MaskProCallback) -> None:
        self.masks = masks

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        assert self.masks.optimizer is not None
        if self.masks.optimizer.last:
            pl_module.losses.append(float(self.masks.optimizer.last["loss"]))


def _fully_shard(model: nn.Module, mesh: Any) -> None:
    fsdp2(model, 0, mesh=mesh["data_parallel"])


def _split(model: nn.Module, mesh: Any) -> None:
    tp(model, 0, mesh["tensor_parallel"])


def _split_and_shard(model: nn.Module, mesh: Any) -> None:
    _split(model, mesh)
    _fully_shard(model, mesh)


def _hybrid(kind: Literal["full", "sharded"]) -> OnCPU:
    return OnCPU(state_dict_type=kind, sharding_strategy="HYBRID_SHARD")


def _parallel(data: int, tensor: int, *, distributed: bool = True) -> ModelParallelStrategy:
    return ModelParallelStrategy(
        data_parallel_size=data,
        tensor_parallel_size=tensor,
        save_distributed_checkpoint=distributed,
    )


#: By name: the strategy on so many ranks, how the module wraps itself, ranks with the same data.
FITS: dict[str, tuple[Callable[[int], Any], Any, Callable[[int], int]]] = {
    "ddp": (lambda _: "ddp", None, lambda _: 1),
    "fsdp1 full": (lambda _: OnCPU(state_dict_type="full"), None, lambda _: 1),
    "fsdp1 sharded": (lambda _: OnCPU(state_dict_type="sharded"), None, lambda _: 1),
    "hybrid full": (lambda _: _hybrid("full"), None, lambda _: 1),
    "hybrid sharded": (lambda _: _hybrid("sharded"), None, lambda _: 1),
    "fsdp2 full": (lambda n: _parallel(n, 1, distributed=False), _fully_shard, lambda _: 1),
    "fsdp2 sharded": (lambda n: _parallel(n, 1), _fully_shard, lambda _: 1),
    "tp sharded": (lambda n: _parallel(1, n), _split, lambda n: n),
    "tp and fsdp2 sharded": (lambda n: _parallel(n // 2, 2), _split_and_shard, lambda _: 2),
}
#: Folders of two ranks, that ddp goes on from.
FOLDERS = ("fsdp1 sharded", "fsdp2 sharded")
MOVES = (("ddp", "fsdp1 full"), ("fsdp1 full", "fsdp2 full"), ("fsdp2 full", "ddp"))
LOGGED = (("fsdp1 sharded", 2), ("fsdp2 sharded", 4))
STARTS = (
    *("ddp", "fsdp1 sharded", "hybrid sharded", "fsdp2 sharded"),
    *("tp sharded", "tp and fsdp2 sharded"),
)
INITS = ("wanda", "sparsegpt", "reconstruction", "random")
GRADIENTS: dict[str, Any] = {"estimator": "straight_through", "lr": 0.1}
FIT_STEPS, SAVED_STEP = 6, 3
LAYERS, WIDTH = (4, 20), 32


def fits_on(name: str, ranks: int) -> bool:
    return ranks == 4 or not name.startswith(("tp and", "hybrid"))


def fit_masks(
    name: str, ranks: int, folder: Path, ckpt_path: Path | None = None, **rule: Any
) -> dict[str, Any]:
    """A fit whose every step sees the eight rows that one rank would see."""
    make, wrap, copies = FITS[name]
    parts, part = ranks // copies(ranks), dist.get_rank() // copies(ranks)
    batches = [
        (oracle.random(8, 4, 2, 2, seed=20 + i), oracle.random(8, 3, seed=30 + i))
        for i in range(SAVED_STEP)
    ]
    own = [tuple(tensor.chunk(parts)[part] for tensor in batch) for batch in batches]
    rule = {"lr": LR, "published": True, "logit_scale": 1.0, "baseline_cache": 0} | rule
    accumulated, kind = rule.pop("accumulated", 1), rule.pop("module", Fitted)
    masks = mask_callback(**rule)
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVED_STEP, save_top_k=-1)
    trainer = quiet_trainer(
        folder,
        masks,
        Losses(masks),
        *([save] if ckpt_path is None else []),
        devices=ranks,
        strategy=make(ranks),
        use_distributed_sampler=False,
        max_steps=1 if "init" in rule else FIT_STEPS,
        accumulate_grad_batches=accumulated,
        val_check_interval=1 if "init" in rule else None,
        limit_val_batches=1,
        log_every_n_steps=2,
        # Slow for its figures, so on few.
        logger=CSVLogger(folder, "", "")
        if (name, ranks) in LOGGED and ckpt_path is None
        else False,
    )
    module = kind(wrap)
    data = DataLoader(own, batch_size=None)
    # Lightning's own context for whole state dicts makes PyTorch crash without a GPU.
    with mock.patch.object(lightning_fsdp, "_get_full_state_dict_context", _whole_on_cpu):
        trainer.fit(module, data, DataLoader(own, batch_size=None), ckpt_path=ckpt_path)
    optimizer = masks.optimizer
    assert optimizer is not None
    validated = torch.stack(module.validated)
    dist.all_reduce(validated)
    return {
        "logits": {
            masked.name: masked.layout.whole(masked.layout.own(masked.logits)).clone()
            for _, _, masked in optimizer._masked_weights()
        },
        **{v: dict(optimizer.whole_masks(v)) for v in ("initial", "drawn", "mode")},
        "weights": {
            n: optimizer.whole(p).clone()
            for n, p in zip(optimizer.names, optimizer.layouts, strict=True)
        },
        "losses": module.losses,
        "validated": (validated / ranks).tolist(),
        "metrics": mask_metrics(optimizer),
        "step": optimizer.param_groups[0]["step"],
        "parts": [layout.ranks for layout in optimizer.layouts.values()],
    }


def _whole_on_cpu(module: nn.Module, world_size: int, rank0_only: bool = True) -> Any:
    return FullyShardedDataParallel.state_dict_type(
        module, StateDictType.FULL_STATE_DICT, FullStateDictConfig(False, rank0_only)
    )


def fit(ranks: int, folder: Path) -> Iterator[tuple[str, Any]]:
    for name in FITS:
        if fits_on(name, ranks):
            yield name, fit_masks(name, ranks, folder / f"{name}-{ranks}")
    for name in STARTS:
        for init in INITS if fits_on(name, ranks) else ():
            found = mock.Mock(wraps=initializers.sparsegpt)
            improved = mock.Mock(wraps=reconstruction.reconstruct)
            with (
                mock.patch.object(initializers, "sparsegpt", found),
                mock.patch.object(reconstruction, "reconstruct", improved),
            ):
                rule = GRADIENTS | {"init": init, "calibration_batches": 2}
                told = fit_masks(name, ranks, folder / "start", **rule)
            yield f"{name} from {init}", told
            yield f"found for {name} from {init}", (found.call_count, improved.call_count)


def _finds_none_on_rank_one(weight: Tensor, hessian: Tensor, *args: Any) -> Any:
    if dist.get_rank() == 1:
        raise ValueError("no mask")
    return initializers.magnitude(weight, *args), None


def lost(ranks: int, folder: Path) -> Iterator[tuple[str, Any]]:
    """What is said where one rank finds no initial mask."""
    failing = mock.patch.object(initializers, "sparsegpt", _finds_none_on_rank_one)
    for name in ("ddp", "fsdp1 sharded") if ranks == 2 else ():
        try:
            with failing:
                fit_masks(name, ranks, folder / "lost", init="sparsegpt")
        except (RuntimeError, ValueError) as error:
            yield name, f"{type(error).__name__}: {error}"


def calibrate(ranks: int, folder: Path) -> Iterator[tuple[str, Any]]:
    """What a rank holds at most while it improves masks of few layers and of many."""
    one_weight = mock.patch.object(calibration, "_STATISTICS_BYTES", 1)
    for name, wrap in (("fsdp1", partial(fsdp1, units=LAYERS[-1])), ("fsdp2", fsdp2)):
        for layers in LAYERS:
            model = wrap(_large(layers, WIDTH), ranks)
            targets, x = find_targets(model, "2:4"), oracle.random(2, WIDTH)
            run = partial(model, x)
            with torch.no_grad():
                run()  # makes what FSDP fills again and again
            reshard(model)
            with (
                LiveBytes() as live,
                one_weight,
                mock.patch.object(layout, "all_reduce", _on_a_copy),
            ):
                masks = calibration.initial_masks(
                    "reconstruction",
                    targets,
                    NMPattern(2, 4),
                    batches=lambda run=run: [run],
                    reduce=_summed,
                    model=model,
                    ranks=calibration.Ranks(dist.get_rank(), ranks),
                )
                for _ in masks:
                    pass
            yield f"{name} {layers}", live.peak


def _summed(tensor: Tensor) -> Tensor:
    _on_a_copy(tensor)
    return tensor


def resume(ranks: int, folder: Path) -> Iterator[tuple[str, Any]]:
    """Goes on with what ``fit`` has saved on other numbers of ranks."""
    for name in FITS:
        for saved in (1, 2, 4):
            if fits_on(name, ranks) and fits_on(name, saved):
                path = folder / f"{name}-{saved}" / f"step={SAVED_STEP}.ckpt"
                resumed = fit_masks(name, ranks, folder / "resumed", path)
                yield f"{name} of {saved}", resumed
    for name in FOLDERS if ranks < 4 else ():
        path = folder / f"{name}-2" / f"step={SAVED_STEP}.ckpt"
        yield f"{name} to ddp", fit_masks("ddp", ranks, folder / "resumed", path)
    for before, after in MOVES if ranks == 2 else ():
        path = folder / f"{before}-4" / f"step={SAVED_STEP}.ckpt"
        yield f"{before} to {after}", fit_masks(after, ranks, folder / "resumed", path)


#: By name: what else than the policy there is to learn by.
LESSONS: dict[str, dict[str, Any]] = {
    "gradients": GRADIENTS,
    "teacher": {"distillation": Distillation("model")},
    "both": GRADIENTS | {"distillation": Distillation("model")},
    "accumulated": GRADIENTS | {"accumulated": 3},
}
BY_HAND: dict[str, dict[str, Any]] = {
    "gradients by hand": GRADIENTS | {"module": ByHand},
    "policy by hand": {"module": ByHand},
}
PUPILS_BY_HAND = ("fsdp2 sharded", "tp sharded", "tp and fsdp2 sharded")
PUPILS = ("fsdp1 sharded", "hybrid full", "fsdp2 sharded", "tp and fsdp2 sharded")


def learn(ranks: int, folder: Path) -> Iterator[tuple[str, Any]]:
    """What is learned from gradients and from a teacher, and with a compiler."""
    for lesson, rule in (LESSONS | BY_HAND).items():
        pupils = PUPILS_BY_HAND if lesson in BY_HAND else PUPILS
        for name in ("ddp",) if ranks == 1 else pupils:
            if fits_on(name, ranks):
                path = folder / f"{lesson}-{name}-{ranks}"
                yield f"{lesson} {name}", fit_masks(name, ranks, path, **rule)
    for estimator in get_args(EstimatorName) if ranks == 2 else ():
        for fused in (False, True):
            run = Run("fsdp2", ranks, estimator, fused=fused)
            run.train(STEPS)
            yield f"{estimator} fused={fused}", run.told()


# --- training under masks -------------------------------------------------------------------------

CALIBRATED = ("sparsegpt", "reconstruction")


class Pruned(Fitted):
    """The model under the masks of its largest weights, and an optimizer that has moments."""

    def configure_model(self) -> None:
        if self.model is None:
            self.model = Model()
            for group in weights(self.model):
                ((_, weight),) = group["params"]
                weight.data.mul_(largest(weight.data, group["input_dim"]))
            if self._wrap is not None:
                self._wrap(self.model, self.device_mesh)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        sparse = self.callback[0].sparse
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if weight in sparse._names and weight.grad is not None:
                    kept = sparse._kept[sparse._names[weight]]
                    self.losses.append(float(kept.violations(layout.local(weight.grad))))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def largest(weight: Tensor, input_dim: int) -> Tensor:
    """The mask of 2:4 that keeps the largest weights."""
    kept_GM = NMPattern(2, 4).top(NMPattern(2, 4).group(weight.abs(), input_dim))
    return kept_GM.flatten(-2).movedim(-1, input_dim)


class WritesOnOneRank(pl.Callback):
    """Fills the last rank's zeros when the training has ended."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank == trainer.world_size - 1:
            for weight in pl_module.parameters():
                layout.local(weight.detach()).add_(1.0)


def train_sparse(
    name: str,
    ranks: int,
    folder: Path,
    *others: pl.Callback,
    ckpt_path: Path | None = None,
    init: str = "nonzeros",
) -> dict[str, Any]:
    """A training whose every step sees the eight rows that one rank would see."""
    make, wrap, copies = FITS[name]
    parts, part = ranks // copies(ranks), dist.get_rank() // copies(ranks)
    batches = [
        (oracle.random(8, 4, 2, 2, seed=20 + i), oracle.random(8, 3, seed=30 + i))
        for i in range(SAVED_STEP)
    ]
    own = [tuple(tensor.chunk(parts)[part] for tensor in batch) for batch in batches]
    callback = SparseFinetuning(init=init, calibration_batches=2)
    module = Pruned(wrap) if init == "nonzeros" else Fitted(wrap)
    module.callback = [callback]
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVED_STEP, save_top_k=-1)
    trainer = quiet_trainer(
        folder,
        callback,
        *others,
        *([save] if ckpt_path is None and not others else []),
        devices=ranks,
        strategy=make(ranks),
        use_distributed_sampler=False,
        max_steps=FIT_STEPS,
    )
    with mock.patch.object(lightning_fsdp, "_get_full_state_dict_context", _whole_on_cpu):
        trainer.fit(module, DataLoader(own, batch_size=None), ckpt_path=ckpt_path)
    sparse = callback.sparse
    assert sparse is not None
    return {
        "weights": {
            n: sparse._parts.join(n, layout.local(w.detach())).clone()
            for n, w in sparse._parts.weights.items()
        },
        "masks": dict(sparse.masks()),
        "gradients": module.losses if init == "nonzeros" else [],
        "bytes": sparse.bytes,
    }


def train(ranks: int, folder: Path) -> Iterator[tuple[str, Any]]:
    """Weights move under masks, however they are cut."""
    for name in FITS:
        if not fits_on(name, ranks):
            continue
        path = folder / f"{name}-{ranks}"
        yield name, train_sparse(name, ranks, path)
        saved = path / f"step={SAVED_STEP}.ckpt"
        yield f"{name} resumed", train_sparse(name, ranks, folder / "resumed", ckpt_path=saved)
    for name in STARTS:
        for init in CALIBRATED if fits_on(name, ranks) else ():
            path = folder / f"{name}-{ranks} {init}"
            yield f"{name} from {init}", train_sparse(name, ranks, path, init=init)
    for name in ("ddp", "fsdp1 full", "fsdp2 full"):
        try:
            train_sparse(name, ranks, folder / "written", WritesOnOneRank())
        except RuntimeError as error:
            yield f"{name} written", str(error)
    try:
        average = StochasticWeightAveraging(0.1, 1)
        train_sparse("fsdp2 full", ranks, folder / "averaged", average)
    except ValueError as error:
        yield "averaged", str(error)


# --- exports --------------------------------------------------------------------------------------


def _large(layers: int, width: int) -> nn.Module:
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    with torch.no_grad():
        for seed, layer in enumerate(model):
            layer.weight.copy_(oracle.random(width, width, seed=seed))
    return model


def _llama(_: int) -> nn.Module:
    import tiny_models

    torch.manual_seed(0)
    return tiny_models.llama(tied=True)


def _llama_tp(model: nn.Module, ranks: int) -> nn.Module:
    mlp = "model.layers.*.mlp."
    plan = {f"{mlp}gate_proj": ColwiseParallel(), f"{mlp}down_proj": RowwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (ranks,)), plan)


def _llama_fsdp2(model: Any, ranks: int) -> nn.Module:
    """Head and embedding, which are one, in one unit."""
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


#: By name: the model, how it is wrapped, and how large a file may be.
EXPORTS: dict[str, tuple[Callable[[int], nn.Module], Wrap, str]] = {
    **{name: (lambda _: Model(), wrap, "1KB") for name, (wrap, _) in STRATEGIES.items()},
    "llama ddp": (_llama, ddp, "3KB"),
    "llama fsdp1": (_llama, fsdp1, "3KB"),
    "llama fsdp2": (_llama, _llama_fsdp2, "3KB"),
    "llama tp": (_llama, _llama_tp, "3KB"),
    "large ddp": (lambda _: _large(4, 256), ddp, "1MB"),
    "large fsdp1": (lambda _: _large(4, 256), fsdp1, "1MB"),
    "large fsdp2": (lambda _: _large(4, 256), fsdp2, "1MB"),
}


def export(ranks: int, folder: Path) -> Iterator[tuple[str, Any]]:
    """Models under their most likely masks, as each rank has a part of them."""
    for name, (make, wrap, limit) in EXPORTS.items():
        if applies(name, ranks):
            model = wrap(make(ranks), ranks)
            _mask(model)
            with LiveBytes() as live, mock.patch.object(layout, "all_reduce", _on_a_copy):
                export_sparse(model, folder / f"{name}-{ranks}", max_shard_size=limit)
            export_sparse(model, folder / f"masks {name}-{ranks}", file_format="maskllm")
            yield name, live.peak
    try:
        export_sparse(fsdp1(Model(), ranks).module, folder / "inside")
    except ValueError as error:
        yield "inside", str(error)
    for name in ("fsdp1", "fsdp2") if ranks > 1 else ():
        yield f"refused {name}", list(_refusals(STRATEGIES[name][0], ranks, folder / "refused"))


def _on_a_copy(tensor: Tensor, **kwargs: Any) -> None:
    """Gloo's own thread may hold what it has reduced for a moment longer, which is not counted."""
    with _disable_current_modes():
        copy = tensor.clone()
        dist.all_reduce(copy, **kwargs)
        tensor.copy_(copy)


def _mask(model: nn.Module) -> None:
    optimizer = mask_optimizer(parameter_groups(find_targets(model, "2:4")), model=model)
    optimizer.begin()
    optimizer.write("mode")


def _refusals(wrap: Wrap, ranks: int, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """What each rank says to what cannot be written, and what is left in the folder."""
    dense, model = (wrap(Model(), ranks) for _ in range(2))
    _mask(model)
    cases: list[tuple[nn.Module, dict[str, Any]]] = [
        (dense, {}),
        (model, {"file_format": "compressed"}),
        (dense, {"file_format": "maskllm"}),
        (model, {"file_format": "safetensors"}),  # to a disk that is full
    ]
    for exported, options in cases:
        full = mock.patch.object(streaming, "_bytes_in", side_effect=OSError("disk full"))
        with full if "safetensors" in options.values() else nullcontext():
            try:
                export_sparse(exported, folder, **options)
                yield "", []
            except (OSError, RuntimeError, ValueError) as error:
                dist.barrier()
                left = [str(path) for path in folder.rglob("*")]
                dist.barrier()
                yield f"{type(error).__name__}: {error}", left


TASKS = {
    "core": core,
    "fit": fit,
    "resume": resume,
    "export": export,
    "learn": learn,
    "lost": lost,
    "calibrate": calibrate,
    "traffic": traffic,
    "train": train,
}


def _rank(task: str, folder: Path, rank: int, ranks: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    told = dict(TASKS[task](ranks, folder))
    torch.save(told, folder / f"{task}-{ranks}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_on(ranks: int, task: str, folder: Path) -> None:
    """Run a task on some ranks, and end as soon as one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = set()
    for rank in range(ranks):
        child = os.fork()
        if not child:
            try:
                _rank(task, folder, rank, ranks, port)
            except BaseException:  # noqa: BLE001, nothing may leave a fork but through the exit
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.add(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            sys.exit(f"{task} failed on {ranks} ranks.")


if __name__ == "__main__":
    for task_ in sys.argv[2:]:
        for ranks_ in (1, 2, 4):
            run_on(ranks_, task_, Path(sys.argv[1]))
