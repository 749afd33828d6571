"""The initial mask's loss on a batch: measured without a trace, then remembered."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchmetrics import Metric


class BaselineCache:
    """Baselines by the content of their batch, so that shuffling does no harm.

    Args:
        size: Number of batches to remember; the one not seen for longest goes first.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.hits = 0
        self.lookups = 0
        self._losses: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, key: str | None) -> Tensor | None:
        """The baseline of a batch, or None if it has to be measured."""
        self.lookups += 1
        if key is None or key not in self._losses:
            return None
        self.hits += 1
        self._losses.move_to_end(key)
        return self._losses[key]

    def put(self, key: str | None, loss: Tensor) -> None:
        if key is None:
            return
        self._losses[key] = loss.detach()
        while len(self._losses) > self.size:
            self._losses.popitem(last=False)

    @property
    def hit_rate(self) -> float:
        """Share of lookups that were answered, in [0, 1]."""
        return self.hits / max(1, self.lookups)

    def state_dict(self) -> dict[str, Any]:
        """The baselines as plain numbers. Under DDP a collective call: every rank's, united."""
        losses = {key: float(loss) for key, loss in self._losses.items()}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            everyone: list[dict[str, float]] = [{}] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, losses)
            losses = {key: loss for one in everyone for key, loss in one.items()}
        return {"losses": losses, "hits": self.hits, "lookups": self.lookups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with saved baselines."""
        first = max(0, len(state["losses"]) - self.size)
        losses = islice(state["losses"].items(), first, None)
        self._losses = OrderedDict((str(k), torch.tensor(float(loss))) for k, loss in losses)
        self.hits, self.lookups = int(state["hits"]), int(state["lookups"])


def fingerprint(batch: Any) -> str | None:
    """A hash of a batch's content, or None if it holds something that cannot be hashed.

    Goes into mappings, sequences and objects with attributes.
    """
    content = blake2b(digest_size=16)
    try:
        return content.hexdigest() if _feed(content, batch) else None
    except RecursionError:  # it holds itself
        return None


def _feed(content: blake2b, item: Any) -> bool:
    if isinstance(item, Tensor):
        if item.layout != torch.strided:
            return False
        content.update(f"{item.dtype}{tuple(item.shape)}".encode())
        plain = item.detach().cpu().resolve_conj().resolve_neg().contiguous()
        content.update(plain.flatten().view(torch.uint8).numpy().data)
        return True
    if item is None or isinstance(item, str | bytes | int | float | complex):
        content.update(repr(item).encode() + b"\0")
        return True
    kind = "mapping" if isinstance(item, Mapping) else type(item).__name__
    if isinstance(item, Mapping):
        item = [entry for pair in item.items() for entry in pair]
    elif not isinstance(item, Sequence):
        if not getattr(item, "__dict__", None):
            return False
        item = [entry for pair in vars(item).items() for entry in pair]
    content.update(f"{kind}{len(item)}".encode())
    return all(_feed(content, entry) for entry in item)


@contextmanager
def traceless(trainer: Any, module: nn.Module) -> Iterator[None]:
    """Let a training step run without a trace.

    What it logs goes nowhere; buffers (such as BatchNorm's), metrics and the random number
    generators are put back afterwards, so that the next call sees the same random numbers.
    What a step changes in plain Python attributes is out of reach.
    """
    metrics = [(m, _metric_state(m)) for m in module.modules() if isinstance(m, Metric)]
    buffers = [
        (owner, name, buffer, buffer.clone())
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
    ]
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger()] if loggers else []
    silenced = {name: module.__dict__.get(name) for name in ("log", "log_dict")}
    for name in silenced:
        module.__dict__[name] = lambda *args, **kwargs: None
    failure = None
    try:
        with isolate_rng():
            try:
                yield
            except BaseException as error:  # noqa: BLE001, isolate_rng loses its way otherwise
                failure = error
        if failure is not None:
            raise failure
    finally:
        for name, original in silenced.items():
            if original is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = original
        trainer.loggers = loggers
        for owner, name, buffer, value in buffers:
            owner._buffers[name] = buffer
            buffer.copy_(value)
        for metric, state in metrics:
            vars(metric).update(state)


def _metric_state(metric: Metric) -> dict[str, Any]:
    states = {
        name: value.clone() if isinstance(value, Tensor) else list(value)
        for name, value in ((name, getattr(metric, name)) for name in metric._defaults)
    }
    cached = ("_update_count", "_computed", "_forward_cache")
    return states | {name: getattr(metric, name) for name in cached}


@contextmanager
def notices_random_numbers() -> Iterator[list[bool]]:
    """Tell whether a generator of PyTorch, numpy or Python was used.

    Yields:
        A list that holds the answer once the block has ended.
    """
    used: list[bool] = []
    before = _generator_states()
    yield used
    used.append(before != _generator_states())


def _generator_states() -> list[Any]:
    torch_states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        torch_states += torch.cuda.get_rng_state_all()
    numpy_state = [str(part) for part in np.random.get_state()]  # noqa: NPY002
    return [[bytes(s.numpy()) for s in torch_states], numpy_state, random.getstate()]


@contextmanager
def fresh_batches(loader: CombinedLoader) -> Iterator[Iterator[Any]]:
    """The batches of a loader that a training loop is using, from the start, and no trace of it.

    Its iterators and random number generators are as before when the block ends. What an iterable
    data set itself changes when it is read is out of reach.
    """
    generators = {
        generator
        for inner in loader.flattened
        for owner in (inner, getattr(inner, "sampler", None))
        if isinstance(generator := getattr(owner, "generator", None), torch.Generator)
    }
    states = [(generator, generator.get_state()) for generator in generators]
    copies = iter([_copy_of(inner) for inner in loader.flattened])
    again = CombinedLoader(tree_map(lambda _: next(copies), loader.iterables), loader._mode)
    try:
        yield (batch for batch, _, _ in again)
    finally:
        again.reset()
        for generator, state in states:
            generator.set_state(state)


def _copy_of(loader: Any) -> Any:
    # A loader with persistent workers has one iterator, and the training loop is using it.
    loader = copy.copy(loader)
    if hasattr(loader, "_iterator"):
        loader._iterator = None
    return loader
