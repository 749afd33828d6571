"""Takes each masked weight's gradient during the backward pass, learns from it and frees it.

A hook on each weight hands its gradient to ``lessons`` once it has been accumulated, so never are
the gradients of more than a few weights in memory.
"""

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
from maskpro_lightning.optim.lessons import Lesson, Lessons
from maskpro_lightning.optim.masked_weight import Draw, MaskedWeight
from maskpro_lightning.optim.states import States
from maskpro_lightning.weights.layout import local
from maskpro_lightning.weights.sharding import shows_gradients_late

# Each with its parameter group.
MaskedWeights = Iterable[tuple[dict[str, Any], Tensor, MaskedWeight]]


class Gradients:
    """Takes the gradients of masked weights, and records which have come.

    Args:
        names: The weights' names.
        states: Where the weights lie.
        fusion: Runs the step of a block.

    Attributes:
        all_finite: Whether all gradients of the last step were finite, a bool scalar.
        unreached: The names of weights that no gradient has reached yet.
    """

    def __init__(self, names: Iterable[str], states: States, fusion: Fusion) -> None:
        self._states, self._fusion = states, fusion
        self.unreached = set(names)
        self.all_finite = torch.tensor(True)
        self.forget()

    def forget(self) -> None:
        """Begin a step anew."""
        # The gradients of this step, whether any has come, and how many backward passes there were.
        self._lessons = Lessons(self._fusion)
        self._arrived = False
        self._passes = 0

    @contextmanager
    def taken(
        self,
        weights: Callable[[], MaskedWeights],
        backward_passes: int,
        reduce: Callable[[Tensor], object] | None,
    ) -> Iterator[None]:
        """Within a ``with`` block, take each gradient once it has been accumulated.

        Args:
            weights: Gives the weights with their present state.
            backward_passes: The number of backward passes that one step learns from.
            reduce: Averages a gradient over ranks in place, if nothing else does.
        """
        share, part = 1 / backward_passes, self._passes
        self._passes += backward_passes
        later: dict[str, Callable[[], None]] = {}

        def take(group: dict[str, Any], masked: MaskedWeight, parameter: Tensor) -> None:
            if reduce is not None and parameter.grad is not None:
                reduce(local(parameter.grad))
            self._take(group, parameter, masked, share, part)

        def see(group: dict[str, Any], masked: MaskedWeight, parameter: Tensor) -> None:
            if _recomputes():  # another checkpointed call may add to this gradient
                later[masked.name] = partial(take, group, masked, parameter)
            else:
                take(group, masked, parameter)

        handles = [
            parameter.register_post_accumulate_grad_hook(partial(see, group, masked))
            for group, parameter, masked in weights()
            if parameter.requires_grad and not shows_gradients_late(parameter)
        ]
        try:
            yield
            for take_now in later.values():
                take_now()
            self._take_late(weights(), share, part)
            self._lessons.finish()
        except BaseException:
            self.forget()
            raise
        finally:
            for handle in handles:
                handle.remove()

    def finish(self, weights: MaskedWeights, device: torch.device) -> Tensor:
        """Learn from the gradients that have not been taken yet, and end the step.

        Args:
            weights: All of them.
            device: That of the loss.

        Returns:
            The share of gradients that were not finite, float32 scalar.

        Raises:
            RuntimeError: no weight got a gradient in this step.
        """
        weights = list(weights)
        for group, parameter, masked in weights:
            if not shows_gradients_late(parameter):
                self._take(group, parameter, masked, share=1, part=self._passes)
        if not self._passes:
            self._take_late(weights, share=1, part=0)
        self._lessons.finish()
        if not self._arrived:
            self.forget()
            raise RuntimeError(
                "No gradient has reached any masked weight: loss.backward() has to be called, and "
                "weights need requires_grad=True and a part in the loss."
            )
        finite = torch.stack([each.to(device) for each in self._lessons.finite])
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
        layout, found = masked.layout, parameter.grad
        if found is None and not layout.flat:
            return
        if found is None:  # an empty run of FSDP1; other ranks' runs of the weight may have one
            gradient = masked.weight.new_zeros(layout.size)
        else:
            gradient, self._arrived = local(found), True
            self.unreached.discard(masked.name)
        if tuple(gradient.shape) != layout.size:
            raise RuntimeError(
                f"The gradient of {masked.name!r} is {tuple(gradient.shape)}, but this rank's part "
                f"of it is {layout.size}: masks learn from what ranks have averaged, so leave out "
                f"no_sync()."
            )
        slabs, draw = self._states.slabs[parameter], Draw(group["seed"], group["step"] + 1)
        lesson = Lesson(masked, gradient, slabs, draw, group["lr"] * share, part)
        parameter.grad = None
        self._lessons.add(lesson, hold=layout.flat)

    def _take_late(self, weights: MaskedWeights, share: float, part: int) -> None:
        """Learn from the gradients that FSDP1 shows when a backward pass is over."""
        late = [each for each in weights if shows_gradients_late(each[1])]
        if not late:
            return
        empty = {masked.name for _, _, masked in late if not masked.layout.size[0]}
        self.unreached -= empty  # they will never have a gradient
        self._arrived |= len(empty) == len(late)
        for group, parameter, masked in late:
            self._take(group, parameter, masked, share, part)
        self._lessons.finish()
        self._states.free_gradients()


def _recomputes() -> bool:
    """Whether this runs within the backward pass of a reentrant checkpoint.

    There, a weight that several checkpointed calls use gets a part of its gradient from each.
    """
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.backward.__code__:
            return True
        frame = frame.f_back
    return False
