"""Extra passes that leave no trace: what they log, count, draw and change is undone afterwards."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableSet
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torchmetrics import Metric

# A longer list is only cut back to its length, and a larger tensor is not put back.
_LONG, _LARGE = 1000, 2**20


@contextmanager
def traceless(trainer: Any, module: nn.Module, parameters: Iterable[Tensor] = ()) -> Iterator[None]:
    """Let a training step run without a trace.

    What it logs goes nowhere. Buffers (such as BatchNorm's), metrics, the plain attributes of
    modules and the random number generators are put back afterwards, so that the next call sees
    the same random numbers.

    Args:
        trainer: The trainer.
        module: Whose training step runs.
        parameters: Its parameters that the step itself changes, which are put back.
    """
    metrics = [(m, _metric_state(m)) for m in module.modules() if isinstance(m, Metric)]
    buffers = [
        (owner, name, buffer, buffer.clone())
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
    ]
    values = [(parameter, parameter.detach().clone()) for parameter in parameters]
    attributes = [_attributes_of(owner) for owner in module.modules() if _is_plain(owner)]
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
            except BaseException as error:  # noqa: BLE001, isolate_rng puts nothing back on errors
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
        for put_back in attributes:
            put_back()
        for owner, name, buffer, value in buffers:
            _hold(owner, name, buffer)
            buffer.copy_(value)
        with torch.no_grad():
            for parameter, value in values:
                parameter.copy_(value)
        for metric, state in metrics:
            vars(metric).update(state)


def copied(batch: Any) -> Any:
    """A copy of a batch, for a pass that may change it, as ``batch.pop("labels")`` does."""
    return copy.deepcopy(batch)


def _hold(module: nn.Module, name: str, buffer: Tensor) -> None:
    """Give a module a buffer again that may have been replaced or deleted."""
    if not hasattr(module, name):
        module.register_buffer(name, buffer)
    setattr(module, name, buffer)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module's attributes are its author's, and not a wrapper's."""
    if isinstance(module, Metric | FSDPModule | FullyShardedDataParallel):
        return False
    return not type(module).__module__.startswith("torch.")


def _attributes_of(module: nn.Module) -> Callable[[], None]:
    """A function that puts a module's attributes back, without PyTorch's and Lightning's own."""
    own = vars(module)
    before = {name: value for name, value in own.items() if name not in _KNOWN}
    seen: set[int] = set()
    contents = [_contents_of(value, seen) for value in before.values()]

    def put_back() -> None:
        for name in [name for name in own if name not in _KNOWN and name not in before]:
            del own[name]
        own.update(before)
        for content in contents:
            content()

    return put_back


def _contents_of(value: Any, seen: set[int]) -> Callable[[], None]:
    """A function that puts back the content of a container, and of those in it, each once."""
    if id(value) in seen:  # it may even hold itself
        return lambda: None
    if isinstance(value, dict | list | deque | MutableSet):
        seen.add(id(value))
    if isinstance(value, Tensor):
        return _values_of(value)
    if isinstance(value, list) and len(value) > _LONG:
        length = len(value)
        return lambda: value.__delitem__(slice(length, None))
    if isinstance(value, dict):
        items = dict(value)
        inner = [_contents_of(each, seen) for each in items.values()]
        return lambda: _each(value.clear, lambda: value.update(items), *inner)
    if isinstance(value, list | deque | MutableSet):
        elements = list(value)
        inner = [_contents_of(each, seen) for each in elements]
        fill = value.update if isinstance(value, set) else getattr(value, "extend", None)
        if fill is not None:
            return lambda: _each(value.clear, lambda: fill(elements), *inner)
    return lambda: None


def _values_of(tensor: Tensor) -> Callable[[], None]:
    if tensor.numel() > _LARGE or tensor.requires_grad or tensor.layout != torch.strided:
        return lambda: None
    version, before = tensor._version, tensor.clone()
    return lambda: None if tensor._version == version else _each(lambda: tensor.copy_(before))


def _each(*acts: Callable[[], object]) -> None:
    for act in acts:
        act()


# Attributes of PyTorch and Lightning.
_KNOWN = {*vars(pl.LightningModule()), "log", "log_dict"}


def _metric_state(metric: Metric) -> dict[str, Any]:
    """A metric's attributes, with copies of its states."""
    return vars(metric) | {
        name: value.clone() if isinstance(value, Tensor) else list(value)
        for name, value in metric.metric_state.items()
    }


@contextmanager
def notices_random_numbers() -> Iterator[list[bool]]:
    """Find out whether a ``with`` block draws random numbers of PyTorch, numpy or Python.

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
def fresh_batches(loader: CombinedLoader, count: int) -> Iterator[tuple[Iterator[Any], bool]]:
    """Read a loader that a training loop is using from its start, and leave no trace.

    Its iterators and random number generators are as before when the block ends, but not what an
    iterable data set changes in itself when it is read. A loader that can be read only once, such
    as a generator, starts with the batches that the training loop has not taken yet; the loop will
    still get them.

    Args:
        loader: The loader.
        count: The number of batches to read at most.

    Yields:
        The batches, and whether those that the training loop has taken are missing.
    """
    generators = {
        generator
        for inner in loader.flattened
        for owner in (inner, getattr(inner, "sampler", None))
        if isinstance(generator := getattr(owner, "generator", None), torch.Generator)
    }
    states = [(generator, generator.get_state()) for generator in generators]
    once = [isinstance(inner, Iterator) for inner in loader.flattened]
    again = copy.copy(loader)
    again._iterator = None  # that of the training loop
    again.flattened = [
        _ahead(loader, place, count) if once[place] else _copy_of(inner)
        for place, inner in enumerate(loader.flattened)
    ]
    try:
        yield (batch for batch, _, _ in again), any(once)
    finally:
        again.reset()
        for generator, state in states:
            generator.set_state(state)


def _ahead(loader: CombinedLoader, place: int, count: int) -> _Batches:
    """The next batches of one of a loader's iterators, which will yield them again."""
    mode: Any = loader._iterator
    if len(mode.iterators) != len(loader.flattened):
        raise ValueError(
            "Initial masks are found on training batches, which one of several loaders in a row "
            "(CombinedLoader, mode='sequential') gives only once: put a DataLoader in its place, "
            "or choose init='magnitude'."
        )
    taken = list(islice(mode.iterators[place], count))
    mode.iterators[place] = chain(taken, mode.iterators[place])
    return _Batches(taken)


class _Batches(list[Any]):
    """Batches in a list that a tree of loaders takes for a loader."""


def _copy_of(loader: Any) -> Any:
    # A loader with persistent workers has one iterator, and the training loop is using it.
    loader = copy.copy(loader)
    if hasattr(loader, "_iterator"):
        loader._iterator = None
    return loader
