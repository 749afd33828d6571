"""Distillation from the dense model: a loss that compares outputs, instead of one with labels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div

from maskpro_lightning.weights.modes import evaluating

Divergence = Literal["kl", "mse", "cosine"]


@dataclass(frozen=True)
class Distillation:
    """The part of a module whose outputs under a mask are to be those of the dense weights.

    Args:
        part: The name of the submodule, such as "model"; "" is the module itself, if its training
            step calls its ``forward``. The part returns a tensor, a tuple that begins with one, or
            an object with ``logits`` or ``last_hidden_state``.
        divergence: "kl", the Kullback-Leibler divergence of the softmax over the last dimension, in
            nats (by natural logarithms), mean over rows; "mse", the mean squared error divided by
            the mean square of the dense output; "cosine", one minus the cosine similarity over the
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
        """The submodule whose outputs are compared.

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
    """Compares the outputs for one batch under a mask with those of the same module when dense.

    Args:
        distillation: The part and the divergence.
        module: The module; its part is hooked only within the two contexts.
    """

    def __init__(self, distillation: Distillation, module: nn.Module) -> None:
        self._distillation = distillation
        self._part = distillation.part_of(module)
        self._dense: list[Tensor] = []

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """Within a ``with`` block, remember the part's outputs; the weights have to be dense."""
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


class DenseTeacher:
    """Compares a part's outputs with those of a dense copy, which is called whenever the part is.

    Args:
        distillation: The part and the divergence.
        module: The module in training; its part is hooked only within the context.
        teacher: The dense copy; it runs without gradients and in evaluation mode.
    """

    def __init__(self, distillation: Distillation, module: nn.Module, teacher: nn.Module) -> None:
        self._distillation = distillation
        self._part = distillation.part_of(module)
        self._teacher = teacher

    @contextmanager
    def asking(self) -> Iterator[list[Tensor]]:
        """Compare what the part puts out.

        Yields:
            A list that holds the loss once the block has ended: the mean divergence over the
            part's calls.

        Raises:
            RuntimeError: the part was not called.
        """
        found: list[Tensor] = []
        losses: list[Tensor] = []

        def compare(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # It may be the user's own, so its modes and its requires_grad stay as they are.
            with torch.no_grad(), evaluating(self._teacher):
                dense = self._teacher(*args, **kwargs)
            losses.append(self._distillation.between(_tensor_of(output), _tensor_of(dense)))

        handle = self._part.register_forward_hook(compare, with_kwargs=True)
        try:
            yield found
        finally:
            handle.remove()
        if not losses:
            raise RuntimeError(
                f"The training step did not call {self._distillation.part!r}, which is to be "
                f"distilled: name a part whose forward every training step calls."
            )
        found.append(torch.stack(losses).mean())


Dense = nn.Module | Mapping[str, Tensor] | str | PathLike[str]


def dense_part(distillation: Distillation, module: nn.Module, dense: Dense | None) -> nn.Module:
    """The dense copy of a module's part.

    Args:
        distillation: Names the part.
        module: The module.
        dense: The dense part itself; or its weights, or those of the module, as a mapping, a file
            (safetensors or PyTorch's) or a folder of safetensors. None copies the part as it is.

    Raises:
        ValueError: a weight is missing or has another shape.
    """
    if isinstance(dense, nn.Module):
        return dense
    part = copy.deepcopy(distillation.part_of(module))
    if dense is None:
        return part
    state = dense if isinstance(dense, Mapping) else _read(Path(dense))
    prefix = f"{distillation.part}." if distillation.part else ""
    by_name = part.state_dict(keep_vars=True)
    # Named as in the part or as in the module; the same name can be in both.
    named = [state, {name.removeprefix(prefix): value for name, value in state.items()}]
    own, missing = min(((n, _missing(by_name, n)) for n in named), key=lambda pair: len(pair[1]))
    if missing:
        raise ValueError(
            f"The dense weights lack {missing[0]!r}, and {len(missing) - 1} more of the "
            f"{len(by_name)} that {distillation.part!r} has: give those of the same architecture."
        )
    try:
        part.load_state_dict(
            {name: own[name] for name in own.keys() & by_name.keys()}, strict=False
        )
    except RuntimeError as error:
        raise ValueError(f"The dense weights do not fit {distillation.part!r}: {error}") from None
    return part


def _missing(by_name: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that are not given; a shared one is, under any of its names."""
    found = {id(value) for name, value in by_name.items() if name in given}
    return [name for name, value in by_name.items() if id(value) not in found]


def _read(path: Path) -> Mapping[str, Tensor]:
    """The weights in a file, or in all files of a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    state: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            state |= load_file(file)
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
            state |= loaded.get("state_dict", loaded)
    return state


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
