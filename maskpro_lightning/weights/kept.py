"""Keeps weights sparse while any optimizer trains them.

A mask takes one bit per weight. A pruned number is zeroed by a product of integers, its bits times
0; times 1, a kept number stays as it is. Zero times NaN would be NaN.

Shape suffixes: ``W`` bytes of bits, ``8`` the bits of a byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import is_initialized
from torch.optim import Optimizer

from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.weights.admission import check_mask, each_once, is_maskable
from maskpro_lightning.weights.layout import INTEGERS, block_size, local
from maskpro_lightning.weights.names import clean_name
from maskpro_lightning.weights.parts import Parts
from maskpro_lightning.weights.targets import Target, find_targets

Masks = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


def keep_sparse(
    optimizer: Optimizer,
    model: nn.Module,
    pattern: str | NMPattern = "2:4",
    masks: Masks | None = None,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> SparseWeights:
    """Let an optimizer train a model under its masks: what is pruned stays exactly zero.

    Args:
        optimizer: Any optimizer; it may hold other parameters, too.
        model: The model.
        pattern: The pattern of its masks.
        masks: Bool masks by parameter name, True for kept, which are applied to the weights. By
            default the weights' own zeros are the pruned ones.
        include: Which layers are masked, as in :func:`find_targets`.
        exclude: Which layers are not.

    Returns:
        The weights under their masks; :meth:`SparseWeights.release` lets the optimizer go.

    Raises:
        TypeError: a mask is not a bool tensor.
        ValueError: a weight, or a mask if masks are given, keeps more than N of M; masks do not fit
            the weights; or the optimizer has none of the weights.
    """
    pattern = NMPattern.parse(pattern)
    targets = find_targets(model, pattern, include, exclude)
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    if not any(id(target.parameter) in held for target in targets):
        raise ValueError(
            f"{type(optimizer).__name__} has none of the {len(targets)} weights under masks, such "
            f"as {targets[0].name!r}: make it of this model's own parameters, not of a copy or of "
            f"those before the model was wrapped or converted."
        )
    sparse = SparseWeights(targets, pattern, masks, model=model)
    sparse.follow(optimizer)
    return sparse


class SparseWeights:
    """Weights, each with a mask; pruned values stay zero.

    Args:
        targets: The weights.
        pattern: The pattern.
        masks: Bool masks of whole weights by name, at most N kept in every group; pruned values are
            zeroed now. By default the weights' own zeros are the pruned ones.
        model: The model that FSDP has wrapped, if it has.

    Raises:
        TypeError: a mask is not a bool tensor.
        ValueError: a mask is missing, has another shape or keeps more than N; or, without masks, a
            weight has more than N nonzeros in a group.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        pattern: NMPattern,
        masks: Masks | None = None,
        *,
        model: nn.Module | None = None,
    ) -> None:
        self.pattern, self._parts = pattern, Parts(targets, pattern, model)
        self._names: dict[Tensor, str] = {
            weight: name for name, weight in self._parts.weights.items()
        }
        self._kept: dict[str, _Kept] = {}
        self._handles: list[Any] = []
        self._followed: set[Optimizer] = set()
        self._zeroed: dict[Tensor, tuple[int, int]] = {}  # gradients, since the last step
        found = self._nonzeros() if masks is None else each_once(list(self._parts.weights), masks)
        for name, mask in found:
            if masks is not None:
                self._check_mask(name, mask)
            own = self._parts.take(name, mask)
            self._kept[name] = _Kept(own.to(self._parts.own(name).device))
        self._parts.reshard()  # masks may have been found in forward passes
        self.zero_all()

    @property
    def bytes(self) -> int:
        """Bytes that the masks take on this rank."""
        return sum(kept.bytes for kept in self._kept.values())

    def follow(self, optimizer: Optimizer) -> None:
        """Keep pruned weights at zero through an optimizer's steps; again changes nothing.

        Gradients are zeroed as they come, also those of weights that are frozen or that no
        optimizer holds as yet, and again before the step, so that neither gradient norms nor
        moments contain them. Moments that the optimizer has already are zeroed now.
        """
        if optimizer in self._followed:
            return
        if not self._followed:
            self._handles += map(self._first_hook, self._names)
        self._followed.add(optimizer)
        self._handles += [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        for weight in self._held_by(optimizer):
            for value in optimizer.state.get(weight, {}).values():
                if _is_moment(value, weight):
                    self._kept[self._names[weight]].apply(value)

    def release(self) -> None:
        """Leave optimizers and weights alone again."""
        while self._handles:
            self._handles.pop().remove()
        self._followed.clear()

    def zero_all(self) -> None:
        """Zero the pruned values of all weights."""
        for name, kept in self._kept.items():
            kept.apply(self._parts.weights[name])

    def zero_gradients(self, optimizer: Optimizer) -> None:
        """Zero the gradients that an optimizer has of pruned weights."""
        for weight in self._held_by(optimizer):
            if weight.grad is None or self._zeroed.get(weight) != _state(weight.grad):
                self._zero_gradient(weight)

    def zero_copy(self, model: nn.Module, prefix: str = "") -> None:
        """Zero the pruned values in a copy of the model with the same names of parameters."""
        for name, value in model.named_parameters():
            kept = self._kept.get(clean_name(name).removeprefix(prefix))
            if kept is not None:
                kept.apply(value)

    def masks(self) -> Iterator[tuple[str, Tensor]]:
        """Names and whole masks, bool, True for kept; a collective for each that is sharded."""
        for name, kept in self._kept.items():
            yield name, self._parts.join(name, kept.mask())

    @torch.no_grad()
    def faults(self, state: Mapping[str, Any] | None = None) -> list[str]:
        """A line for each weight whose pruned values are not all zero.

        Args:
            state: Check the whole tensors of this state dict instead of the weights.
        """
        if state is None:
            self._parts.reshard()
            state = self._parts.weights
        found = []
        for name, value in state.items():
            kept = self._kept.get(clean_name(name))
            if kept is None or not isinstance(value, Tensor):
                continue
            own = local(value.detach())
            if own.shape == kept.shape and (wrong := kept.violations(own)):
                found.append(f"{name!r} has {wrong} numbers that are not zero where it is pruned")
        return found

    def _first_hook(self, weight: Tensor) -> Any:
        """Zero a weight's gradient before the user's own hooks read it."""
        frozen = not weight.requires_grad
        # Hooks stay through a change of requires_grad, but a frozen weight takes none.
        weight.requires_grad_()
        handle = weight.register_post_accumulate_grad_hook(self._zero_gradient)
        weight.requires_grad_(not frozen)
        hooks = weight._post_accumulate_grad_hooks
        for key in list(hooks)[:-1]:  # PyTorch runs them in the order of a plain dict
            hooks[key] = hooks.pop(key)
        return handle

    def _held_by(self, optimizer: Optimizer) -> Iterator[Tensor]:
        for group in optimizer.param_groups:
            yield from (weight for weight in group["params"] if weight in self._names)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Zero the gradients that the step will use: now, or when its closure has computed them."""
        closure = kwargs.get("closure") or next(iter(args[1:]), None)
        if not callable(closure):
            self.zero_gradients(optimizer)
            return None

        def masked() -> Any:
            loss = closure()
            self.zero_gradients(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": masked}
        return (args[0], masked, *args[2:]), kwargs

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for weight in self._held_by(optimizer):
            self._zeroed.pop(weight, None)
            self._kept[self._names[weight]].apply(weight)

    def _zero_gradient(self, weight: Tensor) -> None:
        if weight.grad is not None:
            self._kept[self._names[weight]].apply(weight.grad)
            if not is_initialized():  # collectives may write into it without counting
                self._zeroed[weight] = _state(weight.grad)

    def _nonzeros(self) -> Iterator[tuple[str, Tensor]]:
        for name in self._parts.weights:
            mask = self._parts.whole(name) != 0
            if (told := self._excess(name, mask)) is not None:
                raise ValueError(
                    f"{name!r} is not {self.pattern}: {told}, and without masks its zeros are "
                    f"what is kept to. Learn a mask first (MaskProCallback), give masks or their "
                    f'file, or leave the layer out: exclude=["{name.rpartition(".")[0]}"].'
                )
            yield name, mask

    def _check_mask(self, name: str, mask: Tensor) -> None:
        check_mask(name, mask, self._parts.layouts[name].shape)
        if mask.dtype != torch.bool:
            raise TypeError(f"The mask of {name!r} must be a bool tensor, got {mask.dtype}.")
        if (told := self._excess(name, mask)) is not None:
            raise ValueError(
                f"The mask of {name!r} is not {self.pattern}: {told.replace('nonzero', 'kept')}. "
                f"Give masks of this pattern."
            )

    def _excess(self, name: str, kept: Tensor) -> str | None:
        """The first group that keeps more than N, for a message; None if there is none."""
        input_dim = self._parts.layouts[name].input_dim
        count_G = self.pattern.group(kept, input_dim).sum(-1, dtype=torch.int32).flatten()
        wrong_G = count_G > self.pattern.n
        if not wrong_G.any():
            return None
        first, wrong = int(wrong_G.nonzero()[0]), int(wrong_G.sum())
        return (
            f"group {first} has {int(count_G[first])} nonzero weights ({wrong} of "
            f"{count_G.numel()} groups have too many)"
        )


def pack_bits(mask: Tensor) -> Tensor:
    """A bool tensor in a bit per number, uint8 (W,); its first eighth in the lowest bits."""
    flat = mask.flatten().to(torch.uint8)
    planes_8W = nn.functional.pad(flat, (0, -len(flat) % 8)).view(8, -1)
    shifted_8W = planes_8W << torch.arange(8, dtype=torch.uint8, device=flat.device)[:, None]
    return shifted_8W.sum(0, dtype=torch.uint8)


def unpack_bits(bits_W: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`pack_bits`."""
    size = torch.Size(shape)
    mask_8W = (bits_W & _powers(bits_W.device)[:, None]).bool()
    return mask_8W.flatten()[: size.numel()].view(size)


def _is_moment(value: Any, weight: Tensor) -> bool:
    """Whether an optimizer's state has a number for each of a weight, and no code of 8 bits."""
    if not isinstance(value, Tensor) or value.shape != weight.shape:
        return False
    return type(local(value)) in (Tensor, nn.Parameter) and is_maskable(value)


def _state(gradient: Tensor) -> tuple[int, int]:
    """Changes when a weight gets another gradient, or when its gradient is written into."""
    return id(gradient), gradient._version


@cache
def _powers(device: torch.device) -> Tensor:
    return torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=device)


class _Kept:
    """One rank's part of a mask in bits, in blocks of rows that are packed one by one."""

    def __init__(self, mask: Tensor) -> None:
        self.shape = mask.shape
        row = mask[:1].numel()
        # Larger blocks than those of groups, since a weight takes only a byte or two here.
        self._rows = max(1, 4 * block_size(mask.device) // max(1, row))
        self._blocks = [pack_bits(block) for block in mask.split(self._rows)] if row else []

    @property
    def bytes(self) -> int:
        return sum(block.nbytes for block in self._blocks)

    def mask(self) -> Tensor:
        """The mask, bool."""
        device = self._blocks[0].device if self._blocks else None
        whole = torch.ones(self.shape, dtype=torch.bool, device=device)
        self.apply(whole)
        return whole

    @torch.no_grad()
    def apply(self, tensor: Tensor) -> None:
        """Zero the pruned values of a tensor of the mask's shape, in place."""
        for part, kept in self._through(tensor):
            if part.dtype == torch.bool:
                part &= kept
            else:
                part.view(INTEGERS[part.dtype.itemsize]).mul_(kept)

    def violations(self, tensor: Tensor) -> int:
        """The number of pruned values that are not zero."""
        wrong = [((part != 0) & ~kept).sum() for part, kept in self._through(tensor)]
        return int(torch.stack(wrong).sum()) if wrong else 0

    def _through(self, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        own = local(tensor.detach())
        if own.shape != self.shape:
            raise RuntimeError(
                f"A mask of shape {tuple(self.shape)} met numbers of shape {tuple(own.shape)}: "
                f"something has put another tensor in the weight's place."
            )
        for part, bits_W in zip(
            own.split(self._rows) if self._blocks else (), self._blocks, strict=True
        ):
            yield part, unpack_bits(bits_W.to(own.device), part.shape)
