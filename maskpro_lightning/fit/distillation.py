"""The dense model as teacher: a loss that asks for its outputs instead of the data's labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div

Divergence = Literal["kl", "mse", "cosine"]


@dataclass(frozen=True)
class Distillation:
    """What of a module shall come out under masks as it does dense.

    Args:
        part: Name of the submodule whose outputs are compared, such as "model"; "" is the module
            itself, if its training step calls its ``forward``. The part puts out a tensor, a tuple
            that begins with one, or what has ``logits`` or ``last_hidden_state``.
        divergence: "kl", of the softmax over the last dimension, in nats per row; "mse", relative
            to the mean square of the dense output; "cosine", one minus the similarity over the
            last dimension; or a function of (masked, dense) outputs that returns a scalar.

    Raises:
        ValueError: an unknown divergence.
    """

    part: str
    divergence: Divergence | Callable[[Tensor, Tensor], Tensor] = "kl"

    def __post_init__(self) -> None:
        if not callable(self.divergence) and self.divergence not in _DIVERGENCES:
            raise ValueError(
                f"divergence is one of {', '.join(_DIVERGENCES)} or a function of two outputs; got "
                f"{self.divergence!r}."
            )

    def part_of(self, module: nn.Module) -> nn.Module:
        """The submodule that is compared.

        Raises:
            ValueError: there is none of this name.
        """
        try:
            return module.get_submodule(self.part)
        except AttributeError:
            names = ", ".join(repr(name) for name, _ in module.named_children())
            raise ValueError(
                f"{type(module).__name__} has no part {self.part!r} to distill; its parts are "
                f"{names}."
            ) from None

    def between(self, masked: Tensor, dense: Tensor) -> Tensor:
        """The divergence of two outputs, a scalar in float32."""
        measure = self.divergence if callable(self.divergence) else _DIVERGENCES[self.divergence]
        return measure(masked.float(), dense.float())


class Teacher:
    """Holds the dense outputs of one batch and compares the outputs under a mask with them.

    Args:
        distillation: What is compared.
        module: The module; its part is hooked only within the two contexts.
    """

    def __init__(self, distillation: Distillation, module: nn.Module) -> None:
        self._distillation = distillation
        self._part = distillation.part_of(module)
        self._dense: list[Tensor] = []

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """Remember what the part puts out; the weights have to be dense."""
        with self._outputs() as outputs:
            yield
        self._dense = [output.detach() for output in outputs]

    @contextmanager
    def asking(self) -> Iterator[list[Tensor]]:
        """Compare what the part puts out.

        Yields:
            A list that holds the loss once the block has ended: the mean divergence over the
            part's calls.

        Raises:
            RuntimeError: the part was not called, or not as often as for the dense weights.
        """
        found: list[Tensor] = []
        with self._outputs() as outputs:
            yield found
        if not outputs or len(outputs) != len(self._dense):
            raise RuntimeError(
                f"The training step called {self._distillation.part!r}, which is to be distilled, "
                f"{len(outputs)} times under a mask and {len(self._dense)} times dense: name a "
                f"part whose forward every training step calls."
            )
        pairs = zip(outputs, self._dense, strict=True)
        found.append(torch.stack([self._distillation.between(m, d) for m, d in pairs]).mean())

    @contextmanager
    def _outputs(self) -> Iterator[list[Tensor]]:
        outputs: list[Tensor] = []

        def see(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append(_tensor_of(output))

        handle = self._part.register_forward_hook(see)
        try:
            yield outputs
        finally:
            handle.remove()


def _tensor_of(output: Any) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    if isinstance(output, Tensor):
        return output
    raise TypeError(
        f"The part to be distilled puts out a {type(output).__name__}: name one that puts out a "
        f"tensor, a tuple that begins with one, or what has logits or last_hidden_state."
    )


def _kl(masked: Tensor, dense: Tensor) -> Tensor:
    classes = dense.shape[-1]
    return kl_div(
        masked.log_softmax(-1).view(-1, classes),
        dense.log_softmax(-1).view(-1, classes),
        log_target=True,
        reduction="batchmean",
    )


def _mse(masked: Tensor, dense: Tensor) -> Tensor:
    return (masked - dense).square().mean() / dense.square().mean()


def _cosine(masked: Tensor, dense: Tensor) -> Tensor:
    return 1 - cosine_similarity(masked, dense, dim=-1).mean()


_DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": _kl,
    "mse": _mse,
    "cosine": _cosine,
}
