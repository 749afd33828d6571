"""Fits in processes of their own, for tests of ranks and of sudden ends.

``python process_fit.py TASK FOLDER RANKS``; what each rank has to tell lies in ``FOLDER/RANK.pt``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
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
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DistributedSampler

from maskpro_lightning import MaskProCallback
from maskpro_lightning.optimizer import Estimator

LR: dict[Estimator, float] = {"policy": FAST, "straight_through": 0.1}


def masks(estimator: Estimator = "policy") -> MaskProCallback:
    """Steps that change, and so small that rounding errors stay small over sixteen of them."""

    def scheduler(optimizer: Optimizer) -> LinearLR:
        return LinearLR(optimizer, 1, 0.1, total_iters=16)

    return MaskProCallback(
        estimator=estimator, lr=LR[estimator], normalize=False, lr_scheduler=scheduler
    )


def fit_ranks(
    folder: Path, ranks: int, estimator: Estimator, epochs: int, ckpt_path: Path | None = None
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
    module = Net()
    trainer.fit(module, data, loader(16), ckpt_path=ckpt_path)
    return {"rank": rank} | everything(trainer, module, callback)


def resume(folder: Path, ranks: int) -> None:
    told: dict[str, Any] = {}
    for estimator in get_args(Estimator):
        runs = folder / estimator
        whole = fit_ranks(runs / "whole", ranks, estimator, epochs=4)
        half = fit_ranks(runs / "half", ranks, estimator, epochs=2)
        path = runs / "half" / "checkpoints" / "epoch=1.ckpt"
        resumed = fit_ranks(runs / "resumed", ranks, estimator, epochs=4, ckpt_path=path)
        told[estimator] = {"whole": whole, "half": half, "resumed": resumed}
    torch.save(told, folder / f"{whole['rank']}.pt")


def slow(folder: Path, ranks: int) -> None:
    """Goes on until it is killed; saves every second step."""

    class Slow(Net):
        def on_train_batch_end(self, *_: Any) -> None:
            time.sleep(0.05)

    assert ranks == 1
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = quiet_trainer(folder, masks(), save, max_steps=-1)
    trainer.fit(Slow(), ResumableLoader(dataset(), batch_size=BATCH), loader(16))


def mlflow(folder: Path, ranks: int) -> None:
    logger = MLFlowLogger("ranks", tracking_uri=f"sqlite:///{folder}/mlflow.db")
    trainer = quiet_trainer(
        folder,
        MaskProCallback(lr=FAST),
        devices=ranks,
        strategy="ddp",
        max_steps=4,
        log_every_n_steps=2,
        logger=logger,
    )
    trainer.fit(Net(), loader(), loader(16))


if __name__ == "__main__":
    task = {"resume": resume, "slow": slow, "mlflow": mlflow}[sys.argv[1]]
    task(Path(sys.argv[2]), int(sys.argv[3]))
