"""The gradients of a step: each is taken as soon as it is there, learned from, and freed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from maskpro_lightning.optim.fusion import Fusion
from maskpro_lightning.optim.lessons import Lessons
from maskpro_lightning.optim.masked_weight import MaskedWeight
from maskpro_lightning.weights.layout import local

# Each with its parameter group.
MaskedWeights = Iterable[tuple[dict[str, Any], Tensor, MaskedWeight]]


class Gradients:
    """Takes the gradients of masked weights, and keeps account of what came.

    Args:
        names: The weights' names.
        fusion: Runs the step of a block.

    Attributes:
        all_finite: Whether all gradients of the last step were finite, a bool scalar.
        unreached: The names of weights that no gradient has reached yet.
    """

    def __init__(self, names: Iterable[str], fusion: Fusion) -> None:
        self._lessons = Lessons(fusion)
        self.unreached = set(names)
        self.all_finite = torch.tensor(True)
        self.forget()

    def forget(self) -> None:
        """Begin a step anew."""
        # Whether each gradient of this step was finite, and how many backward passes there were.
        self._finite: list[Tensor] = []
        self._passes = 0
        self._lessons.forget()

    @contextmanager
    def taken(
        self,
        weights: MaskedWeights,
        backward_passes: int,
        reduce: Callable[[Tensor], object] | None,
    ) -> Iterator[None]:
        """Within a ``with`` block, take each gradient when it has been accumulated.

        Args:
            weights: Those to learn of.
            backward_passes: How many of them one step learns from.
            reduce: Averages a gradient over ranks in place, where nothing else does.
        """
        share, part = 1 / backward_passes, self._passes
        self._passes += backward_passes
        later: dict[str, Callable[[], None]] = {}

        def take(group: dict[str, Any], masked: MaskedWeight, parameter: Tensor) -> None:
            if reduce is not None and parameter.grad is not None:
                reduce(local(parameter.grad))
            self._take(group, parameter, masked, share, part)

        def see(group: dict[str, Any], masked: MaskedWeight, parameter: Tensor) -> None:
            if _recomputes():  # which may add another part to this gradient
                later[masked.name] = partial(take, group, masked, parameter)
            else:
                take(group, masked, parameter)

        handles = [
            parameter.register_post_accumulate_grad_hook(partial(see, group, masked))
            for group, parameter, masked in weights
            if parameter.requires_grad
        ]
        try:
            yield
            for take_now in later.values():
                take_now()
            self._learn_the_rest()
        except BaseException:
            self._finite.clear()
            self._lessons.forget()
            raise
        finally:
            for handle in handles:
                handle.remove()

    def finish(self, weights: MaskedWeights, device: torch.device) -> Tensor:
        """Learn from the gradients that nobody has taken yet; a step is over.

        Args:
            weights: All of them.
            device: That of the loss.

        Returns:
            The share of gradients that were not finite, float32 scalar.

        Raises:
            RuntimeError: there was no gradient in this step.
        """
        for group, parameter, masked in weights:
            self._take(group, parameter, masked, share=1, part=self._passes)
        self._learn_the_rest()
        if not self._finite:
            raise RuntimeError(
                "No gradient has reached any masked weight: loss.backward() has to be called, and "
                "weights need requires_grad=True and a part in the loss."
            )
        finite = torch.stack([each.to(device) for each in self._finite])
        self.all_finite = finite.all()
        self.forget()
        return (~finite).float().mean()

    @torch.no_grad()
    def _take(
        self,
        group: dict[str, Any],
        parameter: Tensor,
        masked: MaskedWeight,
        share: float,
        part: int,
    ) -> None:
        """Learn from what is in a weight's ``grad``, and free it."""
        if parameter.grad is None:
            return
        gradient = local(parameter.grad)
        self.unreached.discard(masked.name)
        self._finite += self._lessons.take(masked, gradient, group, share=share, part=part)
        parameter.grad = None

    @torch.no_grad()
    def _learn_the_rest(self) -> None:
        """Learn from small gradients that wait for others of their kind."""
        self._finite += self._lessons.finish()


def _recomputes() -> bool:
    """Whether a gradient comes from within a reentrant checkpoint's own backward pass.

    A weight that several checkpointed calls use gets a part of its gradient from each.
    """
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.backward.__code__:
            return True
        frame = frame.f_back
    return False
