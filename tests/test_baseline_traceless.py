"""Laws of measuring a baseline: nothing else may see that a batch was evaluated or read twice."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import CatMetric, MeanMetric, Metric, MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryPrecision

from maskpro_lightning.fit.traceless import fresh_batches, notices_random_numbers, traceless

# --- without a trace ----------------------------------------------------------------------------


class Recorder(DummyLogger):
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Any] = []

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self.rows.append((args, kwargs))


class Everything(pl.LightningModule):
    """A training step that leaves every trace there is."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.mean, self.all = MeanMetric(), CatMetric()
        self.scores = MetricCollection([BinaryAccuracy(), BinaryPrecision()])
        self.register_buffer("counter", torch.zeros(2))

    @torch.no_grad()
    def training_step(self, x: Tensor) -> list[float]:
        y = self.norm(x)
        self.counter += 1
        self.mean.update(y.abs())
        self.all.update(y[:, 0].detach())
        self.scores.update(y.flatten().sigmoid(), (x > 0).flatten().int())
        self.log("mean", self.mean(y.abs()))
        self.log_dict({"loss": y.sum()})
        for logger in self.trainer.loggers:
            logger.log_metrics({"loss": 0.0})
        return [float(torch.rand(())), np.random.rand(), random.random()]  # noqa: NPY002


@pytest.fixture
def module() -> Everything:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    module = Everything()
    module.trainer = SimpleNamespace(loggers=[Recorder(), Recorder()])  # type: ignore[assignment]
    module.log = module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    module.training_step(torch.randn(8, 4))  # so that there is something to lose
    del module.log, module.log_dict
    return module


def observed(module: Everything) -> dict[str, Any]:
    """Everything that a training step leaves behind, as things that can be compared."""
    metrics = {
        f"{name}.{attribute}": plain(getattr(metric, attribute))
        for name, metric in module.named_modules()
        if isinstance(metric, Metric)
        for attribute in (*metric._defaults, "_update_count", "_computed", "_forward_cache")
    }
    buffers = {name: plain(buffer) for name, buffer in module.named_buffers()}
    generators = {
        "torch": plain(torch.get_rng_state()),
        "numpy": repr(np.random.get_state()),  # noqa: NPY002
        "python": random.getstate(),
    }
    loggers = {
        "loggers": [id(logger) for logger in module.trainer.loggers],
        "rows": [len(logger.rows) for logger in module.trainer.loggers],
        "overridden": sorted({"log", "log_dict"} & vars(module).keys()),
    }
    return metrics | buffers | generators | loggers


def plain(value: Any) -> Any:
    """A copy of numbers, tensors and lists of them that ``==`` can compare."""
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    return value.tolist() if isinstance(value, Tensor) else value


def differences(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if one[name] != other[name]}


def run(module: Everything, x: Tensor, *, fails: bool = False) -> list[float]:
    with traceless(module.trainer, module):
        result = module.training_step(x)
        if fails:
            raise ArithmeticError("in the step")
        return result


def test_a_training_step_leaves_traces_unless_it_is_traceless(module: Everything) -> None:
    before = observed(module)
    module.log = module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    module.training_step(torch.randn(8, 4))
    assert differences(before, observed(module)) >= {
        *("counter", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"),
        *("mean.mean_value", "mean._update_count", "mean._forward_cache", "all.value"),
        *("scores.BinaryAccuracy.tp", "scores.BinaryPrecision._update_count"),
        *(*GENERATORS, "rows"),
    }


def test_nothing_is_left_of_a_traceless_step(module: Everything) -> None:
    before = observed(module)
    run(module, torch.ones(8, 4))
    assert differences(before, observed(module)) == set()


GENERATORS = {"torch", "numpy", "python"}


def test_nothing_is_left_of_a_traceless_step_that_failed(module: Everything) -> None:
    before = observed(module)
    with pytest.raises(ArithmeticError, match="in the step"):
        run(module, torch.ones(8, 4), fails=True)
    assert differences(before, observed(module)) <= GENERATORS


def test_a_traceless_step_that_failed_used_no_random_numbers(module: Everything) -> None:
    before = observed(module)
    with pytest.raises(ArithmeticError, match="in the step"):
        run(module, torch.ones(8, 4), fails=True)
    assert not differences(before, observed(module)) & GENERATORS


def test_the_next_step_sees_the_same_random_numbers(module: Everything) -> None:
    x = torch.ones(8, 4)
    numbers = [run(module, x), run(module, x)]
    module.log = module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    numbers.append(module.training_step(x))
    assert numbers[0] == numbers[1] == numbers[2] != module.training_step(x)


def test_what_a_module_logs_with_is_given_back(module: Everything) -> None:
    def log(*args: Any, **kwargs: Any) -> None: ...

    module.log = log  # type: ignore[method-assign]
    run(module, torch.randn(8, 4))
    assert module.log is log
    assert "log_dict" not in vars(module)


def test_a_trainer_without_loggers_gets_none(module: Everything) -> None:
    module.trainer.loggers = []
    with traceless(module.trainer, module):
        assert module.trainer.loggers == []
    assert module.trainer.loggers == []


def test_a_buffer_that_is_replaced_is_put_back(module: Everything) -> None:
    before = observed(module)
    with traceless(module.trainer, module):
        module.counter = module.counter + 1
    assert differences(before, observed(module)) == set()


def test_a_buffer_that_is_deleted_is_put_back(module: Everything) -> None:
    before = observed(module)
    with traceless(module.trainer, module):
        del module.counter
    assert differences(before, observed(module)) == set()


# --- random numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draw", "answer"),
    [
        pytest.param(lambda: torch.rand(1), True, id="torch"),
        pytest.param(lambda: dropout(torch.ones(4), 0.5), True, id="dropout"),
        pytest.param(np.random.rand, True, id="numpy"),
        pytest.param(random.random, True, id="Python"),
        pytest.param(lambda: dropout(torch.ones(4), 0.5, training=False), False, id="no dropout"),
        pytest.param(lambda: torch.ones(4).sum(), False, id="none"),
    ],
)
def test_random_numbers_are_noticed(draw: Any, answer: bool) -> None:
    with notices_random_numbers() as used:
        draw()
    assert used == [answer]


# --- batches a second time ----------------------------------------------------------------------


def seeded_loader(**kwargs: Any) -> DataLoader[Any]:
    return DataLoader(
        TensorDataset(torch.arange(8.0)),  # type: ignore[arg-type]
        generator=torch.Generator().manual_seed(0),
        **{"batch_size": 2, "shuffle": True} | kwargs,
    )


def taken(batches: Iterator[Any], count: int) -> list[str]:
    return [str(next(batches)) for _ in range(count)]


def in_use(loader: Any, *, read_again: bool) -> list[str]:
    """The batches of two epochs, during the first of which they may be read a second time."""
    combined = CombinedLoader(loader)
    epoch = (batch for batch, _, _ in combined)
    found = taken(epoch, 2)
    if read_again:
        with fresh_batches(combined, 3) as (batches, _):
            assert len({*taken(batches, 3)}) == 3
    found += taken(epoch, 2)
    return found + taken((batch for batch, _, _ in combined), 4)


@pytest.mark.parametrize(
    "loader",
    [
        pytest.param(seeded_loader, id="shuffled"),
        pytest.param(lambda: [seeded_loader(), seeded_loader(batch_size=1)], id="two loaders"),
    ],
)
def test_reading_batches_again_leaves_no_trace(loader: Callable[[], Any]) -> None:
    assert in_use(loader(), read_again=True) == in_use(loader(), read_again=False)
