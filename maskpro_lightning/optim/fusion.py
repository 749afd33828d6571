"""Compiles the mask step into one loop where a compiler can and where it pays."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from maskpro_lightning.masks.pattern import NMPattern

_log = logging.getLogger(__name__)

Step = Callable[..., tuple[Tensor, ...]]

# Compiling takes ten seconds or more; with this many weights some forty steps win that back.
_PAYS_FROM = 2**24
# The loop's code grows with the square of M, and beyond N = 2 the score is no single loop.
_LARGEST_N, _LARGEST_M = 2, 8


class Fusion:
    """Runs the mask step, compiled or as it is.

    Both draw the same masks, unless two weights tie within a rounding error: compiled exponentials
    and logarithms may differ in the last bit.

    Args:
        fused: True compiles, and raises if that fails. False does not compile. None compiles where
            it pays, and goes on uncompiled if that fails.
        weights: All weights with their patterns.

    Raises:
        ValueError: ``fused`` is True and a pattern keeps more than 2 of a group, or M > 8.
        RuntimeError: ``fused`` is True and there is no compiler for the weights' device.
    """

    def __init__(self, fused: bool | None, weights: Iterable[tuple[Tensor, NMPattern]]) -> None:
        weights = list(weights)
        self._required = fused is True
        if fused:
            for _, pattern in weights:
                if not _has_loop(pattern):
                    raise ValueError(
                        f"The mask step for {pattern} cannot be fused, only those with N <= "
                        f"{_LARGEST_N} and M <= {_LARGEST_M}: leave fused=None."
                    )
        if fused is None:
            fused = sum(w.numel() for w, p in weights if _has_loop(p)) >= _PAYS_FROM
        missing = _missing({weight.device.type for weight, _ in weights}) if fused else None
        if missing and self._required:
            raise RuntimeError(
                f"A fused mask step needs {missing}: install it or leave fused=None."
            )
        self._active = fused and not missing

    @classmethod
    def off(cls) -> Fusion:
        """One that compiles nothing, for steps that happen once."""
        return cls(False, [])

    def __call__(self, step: Step, pattern: NMPattern, *arguments: Any) -> tuple[Tensor, ...]:
        """Call a function of the module ``transition`` with its arguments."""
        if not self._active or not _has_loop(pattern):
            return step(pattern, *arguments)
        from torch._dynamo.exc import TorchDynamoException

        try:
            return _run(step, pattern, *arguments)
        except TorchDynamoException as error:
            if self._required:
                raise RuntimeError("The fused mask step cannot be compiled here.") from error
            self._active = False
            reason = " ".join(str(error).split())[:200]
            _log.warning("The mask step goes on without being fused, which failed: %s", reason)
            return step(pattern, *arguments)


def _run(step: Step, pattern: NMPattern, groups: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """A step, compiled."""
    blocks = [value for value in arguments if isinstance(value, Tensor) and value.dim()]
    flat_groups, *flat = _collapsed([groups[..., None], *blocks])
    flat_blocks = iter(flat)
    found = _compiled(step)(
        pattern,
        flat_groups[..., 0],
        *(
            next(flat_blocks)
            if isinstance(value, Tensor) and value.dim()
            else _scalar(value, groups)
            for value in arguments
        ),
    )
    dims = flat_groups.dim() - 1
    return tuple(result.view(*groups.shape, *result.shape[dims:]) for result in found)


def _collapsed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views with as few dimensions as strides allow: each number of dimensions is compiled anew."""
    sizes: list[int] = []
    outer = 0
    for dim, size in enumerate(tensors[0].shape[:-1]):
        if size > 1 and sizes and all(t.stride(outer) == size * t.stride(dim) for t in tensors):
            sizes[-1] *= size
        elif size > 1:
            sizes.append(size)
        outer = dim if size > 1 else outer
    return [_alone(tensor.view(*(sizes or [1]), tensor.shape[-1])) for tensor in tensors]


def _alone(view: Tensor) -> Tensor:
    """The same memory as a tensor of its own: of a view, compilers look at the base's shape."""
    memory = view.untyped_storage()
    return view.new_empty(0).set_(memory, view.storage_offset(), view.shape, view.stride())


def _scalar(value: Any, groups: Tensor) -> Any:
    """A number as a scalar tensor, since each Python number would be compiled anew.

    It is filled, since copying a number to a device would wait for the device.
    """
    if isinstance(value, tuple):
        return tuple(_scalar(part, groups) for part in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        dtype = torch.int64 if isinstance(value, int) else torch.float32
        return torch.full((), value, dtype=dtype, device=groups.device)
    return value


def _has_loop(pattern: NMPattern) -> bool:
    return pattern.n <= _LARGEST_N and pattern.m <= _LARGEST_M


def _missing(devices: set[str]) -> str | None:
    """What is missing to compile for devices, or None."""
    if devices - {"cpu"} and find_spec("triton") is None:
        return f"Triton for {', '.join(sorted(devices - {'cpu'}))}"
    usual = "clang++" if sys.platform == "darwin" else "g++"
    if shutil.which(os.environ.get("CXX", usual)) is None:  # where torch.compile looks for one
        return "a C++ compiler such as g++"
    return None


@cache
def _compiled(step: Step) -> Step:
    # By its heuristics the compiler would not vectorize values a group apart, which it can gather.
    options = {"cpp.enable_tiling_heuristics": False}
    known = torch._inductor.list_options()
    compiled: Step = torch.compile(
        step,
        dynamic=True,
        fullgraph=True,
        options={name: value for name, value in options.items() if name in known},
    )
    return compiled
