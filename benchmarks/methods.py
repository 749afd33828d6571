"""Ways to find a mask: one-shot, and learners that get the same number of forward passes.

A forward-equivalent is one forward pass over a training batch; a backward pass counts as two.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import torch
from cases import Case
from categorical import CategoricalMasks
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from maskpro_lightning import (
    Distillation,
    MaskPro,
    NMPattern,
    Policy,
    StraightThrough,
    find_targets,
    parameter_groups,
)
from maskpro_lightning.initial.calibration import initial_masks
from maskpro_lightning.initial.initializers import sparsegpt
from maskpro_lightning.initial.statistics import Inputs, InputStatistics
from maskpro_lightning.optim.estimators import Estimator

#: Calibration batches of every method, and how often each goes through them.
CALIBRATION_BATCHES = 16
_DISTILLATION = Distillation("")
PASSES = {"magnitude": 0, "wanda": 1, "sparsegpt": 1, "reconstruction": 7}


class Workbench:
    """A case, the weights to mask, which must be dense, and what one seed decides: the batches.

    Args:
        case: The model and its data.
        pattern: The pattern.
        seed: Decides which batches are calibrated on and the order they are learned in.
    """

    def __init__(self, case: Case, pattern: NMPattern, seed: int) -> None:
        self.case, self.pattern, self.seed = case, pattern, seed
        self.targets = find_targets(case.model, pattern)
        self.weights = sum(target.parameter.numel() for target in self.targets)
        self.dense = {t.name: t.parameter.detach().clone() for t in self.targets}
        self._generator = torch.Generator().manual_seed(seed)
        self.calibration = self.epoch()[:CALIBRATION_BATCHES]

    def epoch(self) -> list[int]:
        """The numbers of all training batches in a new order."""
        return torch.randperm(len(self.case.training), generator=self._generator).tolist()

    def loss(self, number: int) -> Tensor:
        """The loss on a training batch."""
        return self.case.loss_of(self.case.training[number])

    def divergence(self, number: int, dense: Tensor) -> Tensor:
        """What the outputs on a training batch differ from the dense model's, in nats."""
        return _DISTILLATION.between(self.case.logits_of(self.case.training[number]), dense)

    def calibrate(self) -> Iterator[Callable[[], Tensor]]:
        """Calls that run the model on a calibration batch each."""
        return (partial(self.loss, number) for number in self.calibration)

    def one_shot(self, method: str) -> tuple[dict[str, Tensor], int]:
        """The masks of a method of ``initial_masks``, and what they cost in forward passes."""
        masks = dict(initial_masks(method, self.targets, self.pattern, batches=self.calibrate))
        return masks, PASSES[method] * len(self.calibration)

    def write(self, masks: Mapping[str, Tensor]) -> None:
        """Write the dense weights under masks, each exactly N:M, into the model."""
        for target in self.targets:
            mask = masks[target.name]
            self.pattern.check(mask, target.input_dim, f"the mask of {target.name!r}")
            target.parameter.detach().copy_(self.dense[target.name].where(mask, 0))

    def deployed_loss(self, masks: Mapping[str, Tensor], batches: Sequence[Any]) -> float:
        """The held-out loss under masks; the weights are given back as they were."""
        before = [target.parameter.detach().clone() for target in self.targets]
        self.write(masks)
        loss = self.case.held_out_loss(batches)
        for target, weight in zip(self.targets, before, strict=True):
            target.parameter.detach().copy_(weight)
        return loss

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Make the model dense and frozen again after a ``with`` block."""
        try:
            yield
        finally:
            for target in self.targets:
                target.parameter.detach().copy_(self.dense[target.name])
                target.parameter.requires_grad_(False).grad = None


@torch.no_grad()
def sparsegpt_with_update(bench: Workbench) -> int:
    """Write SparseGPT's pruned and updated weights, block by block; returns forward passes.

    As published: the inputs that a block's weights are solved for come from the network whose
    earlier blocks are pruned. A block is what shares a name up to the first number.
    """
    passes = 0
    for _, block in groupby(bench.targets, lambda target: re.findall(r"^\D*\d*", target.name)):
        some = {target.name: target for target in block}
        inputs = Inputs(list(some.values()), {})
        with InputStatistics(inputs, second_moments=True) as statistics:
            for run in bench.calibrate():
                run()
        passes += len(bench.calibration)
        for name, target in some.items():
            hessian = statistics.hessian[name]
            _, updated = sparsegpt(target.parameter, hessian, bench.pattern, target.input_dim)
            target.parameter.copy_(updated)
    return passes


class Learner(ABC):
    """Learns masks from one training batch after the other.

    Attributes:
        bytes: Memory held beyond the weights themselves, in bytes.
    """

    bytes = 0

    @abstractmethod
    def step(self, number: int) -> int:
        """Learn from a training batch; returns the forward-equivalents that it took."""

    @abstractmethod
    def masks(self) -> dict[str, Tensor]:
        """The masks to deploy."""


class MaskProLearner(Learner):
    """:class:`MaskPro` as the callback drives it: the rate falls linearly to 0.

    Args:
        bench: Its model and data.
        masks: The initial masks.
        steps: Steps that will be made.
        estimator: The estimator.
        distilling: Whether to learn from the dense model's outputs instead of the labels.
        how: What else :class:`MaskPro` takes.
    """

    def __init__(
        self,
        bench: Workbench,
        masks: Mapping[str, Tensor],
        steps: int,
        estimator: Estimator,
        *,
        distilling: bool = False,
        **how: Any,
    ) -> None:
        self._bench, self._distilling = bench, distilling
        self._baselines: dict[int, Tensor] = {}
        self._policy = not estimator.needs_gradients
        for target in bench.targets:
            target.parameter.requires_grad_(not self._policy)
        groups = parameter_groups(bench.targets)
        self.optimizer = MaskPro(groups, bench.pattern, estimator=estimator, seed=bench.seed, **how)
        self.optimizer.begin(masks)
        fall = 1 / steps if estimator.rate_falls else 0
        self._scheduler = LambdaLR(self.optimizer, lambda step: max(0.0, 1 - fall * step))

    def step(self, number: int) -> int:
        cost = self._from_loss(number) if self._policy else self._from_gradients(number)
        self._scheduler.step()
        return cost

    def masks(self) -> dict[str, Tensor]:
        return self.optimizer.masks("mode")

    @torch.no_grad()
    def _from_loss(self, number: int) -> int:
        new = number not in self._baselines
        if new:
            with self.optimizer.applied("initial"):
                self._baselines[number] = self._bench.loss(number)
        self.optimizer.step(partial(self._bench.loss, number), self._baselines[number])
        self.bytes = self._held()
        return 1 + new

    def _from_gradients(self, number: int) -> int:
        def look(_: Tensor) -> None:
            self.bytes = max(self.bytes, self._held())

        if self._distilling:
            with torch.no_grad(), self.optimizer.applied("dense"):
                dense = self._bench.case.logits_of(self._bench.case.training[number])

        def closure() -> Tensor:
            bench = self._bench
            loss = bench.divergence(number, dense) if self._distilling else bench.loss(number)
            loss.backward()
            return loss

        # Called before the optimizer's own, which frees the gradient.
        handles = [
            t.parameter.register_post_accumulate_grad_hook(look) for t in self._bench.targets
        ]
        self.optimizer.step(closure)
        for handle in handles:
            handle.remove()
        return 4 if self._distilling else 3

    def _held(self) -> int:
        state = [t for held in self.optimizer.state.values() for t in held.values()]
        gradients = [target.parameter.grad for target in self._bench.targets]
        return sum(t.numel() * t.element_size() for t in (*state, *gradients) if t is not None)


class CategoricalLearner(Learner):
    """:class:`CategoricalMasks`, one gradient a step."""

    def __init__(
        self, bench: Workbench, masks: Mapping[str, Tensor], steps: int, *, lr: float
    ) -> None:
        self._bench = bench
        for target in bench.targets:
            target.parameter.requires_grad_()
        self._learned = CategoricalMasks(
            bench.targets, bench.pattern, masks, lr=lr, steps=steps, seed=bench.seed
        )

    def step(self, number: int) -> int:
        self._learned.step(partial(self._bench.loss, number))
        self.bytes = self._learned.bytes
        return 3

    def masks(self) -> dict[str, Tensor]:
        return self._learned.masks()


#: Initial mask and settings to choose among, by learner.
LEARNERS: dict[str, tuple[str, Sequence[Mapping[str, float]]]] = {
    "published": (
        "sparsegpt",
        [{"lr": lr, "logit_scale": scale} for lr in (5, 10, 20) for scale in (6, 10)],
    ),
    "categorical": ("sparsegpt", [{"lr": lr} for lr in (3e-4, 1e-3, 3e-3, 1e-2)]),
    "policy": ("reconstruction", [{}]),
    "policy_from_sparsegpt": ("sparsegpt", [{}]),
    "straight_through": ("sparsegpt", [{}]),
    "distilled": ("sparsegpt", [{}]),
}
#: Further settings of a learner, where a model's best was the smallest.
FURTHER: dict[tuple[str, str], Sequence[Mapping[str, float]]] = {
    ("categorical", "smollm2"): [{"lr": 1e-4}]
}


def settings_of(method: str, model: str) -> list[Mapping[str, float]]:
    """The settings to choose among; of a method that has none, the empty one."""
    if method not in LEARNERS:
        return [{}]
    return [*LEARNERS[method][1], *FURTHER.get((method, model), ())]


def learner(
    method: str,
    bench: Workbench,
    masks: Mapping[str, Tensor],
    forwards: int,
    setting: Mapping[str, float],
) -> tuple[Learner, int]:
    """A learner and the number of steps that take it ``forwards`` forward-equivalents.

    Raises:
        ValueError: they are too few for one step.
    """
    policy = method in ("published", "policy", "policy_from_sparsegpt")
    distilling = method == "distilled"
    steps = steps_within(forwards, bench, policy=policy, distilling=distilling)
    if steps < 1:
        raise ValueError(f"{forwards} forward-equivalents are left for {method}: give more.")
    if method == "categorical":
        return CategoricalLearner(bench, masks, steps, lr=setting["lr"]), steps
    estimator: Estimator = StraightThrough()
    if method == "published":
        estimator = Policy(lr=setting["lr"], logit_scale=setting["logit_scale"], published=True)
    elif policy:
        estimator = Policy().for_fit(bench.pattern, len(bench.targets), steps)
    return MaskProLearner(bench, masks, steps, estimator, distilling=distilling), steps


def steps_within(forwards: int, bench: Workbench, *, policy: bool, distilling: bool = False) -> int:
    """How many steps of a learner take at most so many forward-equivalents."""
    if not policy:
        return forwards // (4 if distilling else 3)
    # A batch that is seen for the first time costs two forward passes.
    return max(forwards // 2, forwards - len(bench.case.training))


def share_changed(masks: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """The share of groups of four along the last dimension whose mask is another."""
    changed = [(found[n] != m).unflatten(-1, (-1, 4)).any(-1).flatten() for n, m in masks.items()]
    return float(torch.cat(changed).float().mean())


class Stopwatch:
    """Adds up the time spent inside ``with`` blocks, in seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start
