"""Fits in processes of their own, for tests of ranks and of sudden ends.

``python process_fit.py TASK FOLDER RANKS``; what each rank has to tell lies in ``FOLDER/RANK.pt``.
"""

from __future__ import annotations

import math
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from modules import (
    BATCH,
    FAST,
    Net,
    ResumableLoader,
    dataset,
    everything,
    loader,
    quiet_trainer,
)
from rules import mask_callback
from tiny_models import VOCABULARY
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from maskpro_lightning import MaskProCallback
from maskpro_lightning.modules.language import CausalLM
from maskpro_lightning.modules.loading import loading_late
from maskpro_lightning.optim.estimators import EstimatorName

LR: dict[EstimatorName, float] = {"policy": FAST, "straight_through": 0.1}


def masks(estimator: EstimatorName = "policy") -> MaskProCallback:
    """Steps that change, and so small that rounding errors stay small over sixteen of them."""

    def scheduler(optimizer: Optimizer) -> LinearLR:
        return LinearLR(optimizer, 1, 0.1, total_iters=16)

    return mask_callback(
        estimator=estimator, lr=LR[estimator], published=True, lr_scheduler=scheduler
    )


def fit_ranks(
    folder: Path,
    ranks: int,
    estimator: EstimatorName,
    epochs: int,
    ckpt_path: Path | None = None,
    module: Net | None = None,
) -> dict[str, Any]:
    """A fit whose every step sees the eight rows that one rank would see."""
    callback = masks(estimator)
    trainer = quiet_trainer(
        folder,
        callback,
        ModelCheckpoint(folder / "checkpoints", "{epoch}", save_top_k=-1),
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        use_distributed_sampler=False,
        max_epochs=epochs,
    )
    rank = trainer.global_rank
    sampler = DistributedSampler(dataset(), num_replicas=ranks, rank=rank, shuffle=False)
    data = loader(batch_size=BATCH // ranks, sampler=sampler)
    module = module or Net()
    if rank:  # which shall not matter, as DDP takes the weights of the first rank
        for parameter in module.parameters():
            parameter.data.add_(1)
    trainer.fit(module, data, loader(16), ckpt_path=ckpt_path)
    return {"rank": rank} | everything(trainer, module, callback)


def resume(folder: Path, ranks: int) -> None:
    told: dict[str, Any] = {}
    for estimator in get_args(EstimatorName):
        runs = folder / estimator
        whole = fit_ranks(runs / "whole", ranks, estimator, epochs=4)
        half = fit_ranks(runs / "half", ranks, estimator, epochs=2)
        path = runs / "half" / "checkpoints" / "epoch=1.ckpt"
        resumed = fit_ranks(runs / "resumed", ranks, estimator, epochs=4, ckpt_path=path)
        bad = fit_ranks(runs / "bad", ranks, estimator, epochs=2, module=BadOnOneRank())
        told[estimator] = {"whole": whole, "half": half, "resumed": resumed, "bad": bad}
        module = ByHand()
        told[estimator]["by hand"] = fit_ranks(runs / "hand", ranks, estimator, 4, module=module)
    torch.save(told, folder / f"{whole['rank']}.pt")


KILLED_STEPS = 24


def short_fit(folder: Path, ckpt_path: Path | None = None) -> dict[str, Any]:
    """A fit that saves every step."""
    callback, module = mask_callback(lr=FAST), Net()
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = quiet_trainer(folder, callback, save, max_steps=KILLED_STEPS, val_check_interval=3)
    data = ResumableLoader(dataset(), batch_size=BATCH)
    trainer.fit(module, data, loader(16), ckpt_path=ckpt_path, weights_only=True)
    return everything(trainer, module, callback)


def kills(folder: Path, kills: int) -> None:
    """Fits that are killed so many times at random moments, each time resumed from what is left.

    Forked, since importing everything takes longer than fitting.
    """
    torch.set_num_threads(1)  # a forked process would wait for threads that it does not have
    told: dict[str, Any] = {"whole": short_fit(folder / "whole"), "ends": [], "reached": []}
    chance, runs = random.Random(0), folder / "0"
    while len(told["reached"]) < kills:
        steps = sorted(int(path.stem.removeprefix("step=")) for path in runs.glob("*.ckpt"))
        child = os.fork()
        if child == 0:
            path = runs / f"step={steps[-1]}.ckpt" if steps else None
            torch.save(short_fit(runs, path), folder / "end.pt")
            os._exit(0)
        # After some steps, fast or slow as they may be, at any moment of the next.
        goal, ended = len(steps) + chance.randrange(KILLED_STEPS // 3), None
        while ended is None and len(list(runs.glob("*.ckpt"))) < goal:
            time.sleep(0.002)
            ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] == signal.SIGKILL:
            told["reached"].append(steps[-1] if steps else 0)
            for path in runs.glob("*.ckpt"):
                torch.load(path, weights_only=True)
        else:
            told["ends"].append(torch.load(folder / "end.pt", weights_only=False))
            runs = folder / str(len(told["ends"]))
    torch.save(told, folder / "0.pt")


class BadOnOneRank(Net):
    """The second rank's loss is NaN on its second and third batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        bad = self.trainer.global_rank == 1 and batch_idx in (1, 2)
        return super().training_step(batch, batch_idx) * (math.nan if bad else 1)


class ByHand(Net):
    """Optimizes manually."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Dies(Net):
    """A rank is killed in the midst of a step, as by the kernel when memory is short."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_rank == self.rank and self.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


def mlflow(
    folder: Path,
    ranks: int,
    tracking_uri: str | None = None,
    strategy: str = "ddp",
    module: Net | None = None,
) -> None:
    logger = MLFlowLogger("ranks", tracking_uri=tracking_uri or f"sqlite:///{folder}/mlflow.db")
    callback, save = mask_callback(lr=FAST), ModelCheckpoint()
    trainer = quiet_trainer(
        folder,
        *(callback, save),
        devices=ranks,
        strategy=strategy,
        max_steps=4,
        log_every_n_steps=2,
        logger=logger,
    )
    module = module or Net()
    trainer.fit(module, loader(), loader(16))
    if tracking_uri is not None:
        told = everything(trainer, module, callback) | {"saved": save.best_model_path}
        torch.save(
            told | {"kept": trainer.loggers == [logger]}, folder / f"{trainer.global_rank}.pt"
        )


def away(folder: Path, ranks: int) -> None:
    """With a server that is down."""
    mlflow(folder, ranks, "http://127.0.0.1:9")


def spawned(folder: Path, ranks: int) -> None:
    """On ranks that learn late which one they are."""
    mlflow(folder, ranks, strategy="ddp_spawn")


def first_dies(folder: Path, ranks: int) -> None:
    mlflow(folder, ranks, module=Dies(0))


def second_dies(folder: Path, ranks: int) -> None:
    mlflow(folder, ranks, module=Dies(1))


def local(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """This rank's parts."""
    return {
        name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for name, tensor in tensors.items()
    }


def loads(folder: Path, ranks: int) -> None:
    """Fits of sharded models whose weights came at once, and late."""
    tokens = torch.randint(VOCABULARY, (8, 8), generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(tokens), batch_size=4)
    told: dict[str, Any] = {}
    for dtype in ("auto", "bfloat16"):
        for late in (False, True):
            callback = mask_callback(lr=FAST)
            trainer = quiet_trainer(
                folder,
                callback,
                devices=ranks,
                strategy=ModelParallelStrategy(ranks, 1),
                max_steps=2,
            )
            with loading_late() if late else nullcontext():
                module = CausalLM(str(folder / "model"), dtype=dtype)
            assert next(module.parameters()).is_meta == late
            trainer.fit(module, data)
            assert isinstance(module.model, FSDPModule)
            assert callback.optimizer is not None
            told[f"{dtype} {'late' if late else 'at once'}"] = {
                "training": [part.training for part in module.modules()],
                "tied": module.model.lm_head.weight is module.model.model.embed_tokens.weight,
                "shards": local(dict(module.named_parameters())),
                "buffers": dict(module.named_buffers()),
                "logits": local(callback.optimizer.logits()),
                "masks": local(callback.optimizer.masks()),
            }
    torch.save(told, folder / f"{trainer.global_rank}.pt")


_TASKS = (resume, kills, mlflow, away, spawned, first_dies, second_dies, loads)
TASKS = {task.__name__: task for task in _TASKS}

if __name__ == "__main__":
    task = TASKS[sys.argv[1]]
    task(Path(sys.argv[2]), int(sys.argv[3]))
