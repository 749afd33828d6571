"""Host memory that a rank takes to load and shard a model: ``python benchmarks/loading.py``.

Two ranks (gloo) load a Llama with random weights and keep their halves of it (FSDP2). Counted is
the peak beyond what a rank has before, in MiB: of memory of its own, and of pages of files, which
ranks of a machine share and the kernel takes back when it needs them. "at once" is a ``CausalLM``
that has its weights from the start, "late" one that gets them in ``configure_model``, and
"transformers" is ``from_pretrained`` with a ``distributed_config``, where the installed one has
that: a shard of the files' dtype stays in them until it is written to.

glibc keeps what is freed of tensors below 32 MiB, and a small model has no others. Here it gives
back all of more than 1 MB, as it does where weights are large (``MALLOC_MMAP_THRESHOLD_``).
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import psutil  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from maskpro_lightning.modules.language import CausalLM
from maskpro_lightning.modules.loading import loading_late

RANKS = 2
WAYS = ("at once", "late", "transformers")
ASKED = ("auto", "bfloat16")


@contextmanager
def peak() -> Iterator[dict[str, float]]:
    """Peaks of this process's memory within the block, beyond what it had, in MiB."""
    process, done, found = psutil.Process(), threading.Event(), {"own": 0.0, "files": 0.0}

    def now() -> dict[str, float]:
        memory = process.memory_info()
        sizes = {"own": memory.rss - memory.shared, "files": memory.shared}
        return {kind: size / 2**20 for kind, size in sizes.items()}

    before = now()

    def watch() -> None:
        while not done.wait(0.001):
            for kind, size in now().items():
                found[kind] = max(found[kind], size - before[kind])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def load(way: str, path: str, dtype: str) -> torch.nn.Module:
    """A sharded model, in one of the ways."""
    if way == "transformers":
        sharded = DistributedConfig(fsdp_size=RANKS)
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, distributed_config=sharded
        )
        return model
    with loading_late() if way == "late" else nullcontext():
        module = CausalLM(path, dtype)
    names = ("data_parallel", "tensor_parallel")
    mesh = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=names)
    with mock.patch.object(CausalLM, "device_mesh", mesh):
        module.configure_model()
    sharded_model: torch.nn.Module = module.model
    return sharded_model


def on_rank(rank: int, port: int, way: str, path: str, dtype: str, folder: str) -> None:
    """Load, and leave the peaks and a sum of the shards in a file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    load(way, str(Path(folder, "warm")), "float32")  # what a first time takes is not counted
    with peak() as found:
        model = load(way, path, dtype)
    shards: dict[str, Any] = dict(model.named_parameters())
    total = sum(shard.detach().to_local().double().abs().sum().item() for shard in shards.values())
    torch.save((found, total), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def measure(way: str, path: str, dtype: str, folder: str) -> tuple[float, float, tuple[float, ...]]:
    """The largest peaks of a rank, and the sums of their shards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(on_rank, (port, way, path, dtype, folder), nprocs=RANKS)
    told = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(RANKS)]
    own, files = (max(found[kind] for found, _ in told) for kind in ("own", "files"))
    return own, files, tuple(total for _, total in told)


def save(folder: Path, width: int, layers: int, dtype: torch.dtype) -> int:
    """Write a Llama with random weights; the number of its weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        vocab_size=8192,
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(dtype)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """Measure each way for each dtype, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    args = parser.parse_args()
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "1000000")
    known = [field.name for field in fields(DistributedConfig)]
    ways = [way for way in WAYS if way != "transformers" or "fsdp_size" in known]
    table = Table()
    for name in ("files", "asked for", "loaded by"):
        table.add_column(name)
    for name in ("own", "of files", "shard"):
        table.add_column(name, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder, "warm"), 64, 1, torch.float32)
        for stored in (torch.float32, torch.float16):
            path = Path(folder, str(stored))
            count = save(path, args.width, args.layers, stored)
            for dtype in ASKED:
                sums = set()
                for way in ways:
                    own, files, shards = measure(way, str(path), dtype, folder)
                    sums.add(shards)
                    size = (stored if dtype == "auto" else torch.bfloat16).itemsize
                    numbers = [f"{n:.0f}" for n in (own, files, count * size / RANKS / 2**20)]
                    kind = str(stored).removeprefix("torch.")
                    table.add_row(kind, dtype, way, *numbers)
                assert len(sums) == 1, f"shards differ: {sums}"
    table.title = f"{count / 1e6:.0f} M weights on {RANKS} ranks: MiB of the one that takes most"
    Console().print(table)


if __name__ == "__main__":
    main()
