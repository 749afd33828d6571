"""Weights that stay sparse while any optimizer trains them.

A mask is held in one bit per weight. What is pruned is zeroed by a product of integers, the bits of
a number times 0 or 1, which leaves kept numbers as they are and takes NaN, too.

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
from maskpro_lightning.weights.admission import check_mask, each_once
from maskpro_lightning.weights.layout import block_size, local
from maskpro_lightning.weights.names import clean_name
from maskpro_lightning.weights.sharding import layouts, reshard
from maskpro_lightning.weights.targets import Target, find_targets

Masks = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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
        masks: Bool masks by parameter name, True for kept, which are applied; by default the zeros
            that the weights have.
        include: Which layers are masked, as in :func:`find_targets`.
        exclude: Which layers are not.

    Returns:
        The weights under their masks; :meth:`SparseWeights.release` ends it.

    Raises:
        ValueError: without masks, a weight that is not N:M; else a mask that is not.
    """
    pattern = NMPattern.parse(pattern)
    targets = find_targets(model, pattern, include, exclude)
    sparse = SparseWeights(targets, pattern, masks, model=model)
    sparse.follow(optimizer)
    return sparse


class SparseWeights:
    """Weights, each with a mask that optimizers keep to.

    Args:
        targets: The weights. Those without masks have at most N nonzeros in every group.
        pattern: The pattern.
        masks: Bool masks of whole weights by name, at most N kept in every group; the weights are
            zeroed where they prune. By default the weights' own zeros.
        model: What FSDP has wrapped, if it has.

    Raises:
        TypeError: a mask is not a bool tensor.
        ValueError: a mask is missing, of another shape or keeps more than N; or there are none and
            a weight has more than N nonzeros. Names it, and what to do.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        pattern: NMPattern,
        masks: Masks | None = None,
        *,
        model: nn.Module | None = None,
    ) -> None:
        self.pattern, self._model = pattern, model
        self._reshard()
        parts = [(t.parameter, pattern, t.input_dim) for t in targets]
        self._layouts = dict(zip([t.name for t in targets], layouts(model, parts), strict=True))
        self._weights: dict[str, Tensor] = {t.name: t.parameter for t in targets}
        self._names = {weight: name for name, weight in self._weights.items()}
        self._kept: dict[str, _Kept] = {}
        self._handles: list[Any] = []
        self._zeroed: dict[Tensor, tuple[int, int]] = {}  # gradients, since the last step
        found = self._nonzeros() if masks is None else each_once(list(self._weights), masks)
        for name, mask in found:
            if masks is not None:
                self._check_mask(name, mask)
            layout = self._layouts[name]
            own = layout.own(layout.take(mask))
            self._kept[name] = _Kept(own.to(local(self._weights[name]).device))
        self.zero_all()

    @property
    def bytes(self) -> int:
        """Memory that the masks take on this rank."""
        return sum(kept.bytes for kept in self._kept.values())

    def follow(self, optimizer: Optimizer) -> None:
        """See to it that an optimizer's steps leave pruned weights at zero.

        Their gradients are zeroed as they come and once more before the step, so that neither
        norms nor moments have a part of them; moments that an optimizer has already are zeroed now.
        """
        self._handles += [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        for weight in self._held_by(optimizer):
            for value in optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    self._kept[self._names[weight]].apply(value)
            if weight.requires_grad:
                self._handles.append(weight.register_post_accumulate_grad_hook(self._zero_gradient))

    def release(self) -> None:
        """Leave optimizers and weights alone again."""
        while self._handles:
            self._handles.pop().remove()

    def zero_all(self) -> None:
        """Zero what is pruned of all weights."""
        for name, kept in self._kept.items():
            kept.apply(self._weights[name])

    def zero_gradients(self, optimizer: Optimizer) -> None:
        """Zero the gradients that an optimizer has of pruned weights."""
        for weight in self._held_by(optimizer):
            if weight.grad is None or self._zeroed.get(weight) != _state(weight.grad):
                self._zero_gradient(weight)

    def zero_copy(self, model: nn.Module, prefix: str = "") -> None:
        """Zero what is pruned in a copy of the model, whose parameters have the same names."""
        for name, value in model.named_parameters():
            kept = self._kept.get(clean_name(name).removeprefix(prefix))
            if kept is not None:
                kept.apply(value)

    def masks(self) -> Iterator[tuple[str, Tensor]]:
        """Names and whole masks, bool, True for kept; each a collective where it is sharded."""
        for name, kept in self._kept.items():
            yield name, self._layouts[name].whole(kept.mask())

    @torch.no_grad()
    def faults(self, state: Mapping[str, Any] | None = None) -> list[str]:
        """What is not zero although it is pruned, a line for each weight.

        Args:
            state: Look at a state dict's whole tensors instead of the weights.
        """
        if state is None:
            self._reshard()
            state = self._weights
        found = []
        for name, value in state.items():
            kept = self._kept.get(clean_name(name))
            if kept is None or not isinstance(value, Tensor):
                continue
            own = local(value.detach())
            if own.shape == kept.shape and (wrong := kept.violations(own)):
                found.append(f"{name!r} has {wrong} numbers that are not zero where it is pruned")
        return found

    def _reshard(self) -> None:
        if self._model is not None:
            reshard(self._model)

    def _held_by(self, optimizer: Optimizer) -> Iterator[Tensor]:
        for group in optimizer.param_groups:
            yield from (weight for weight in group["params"] if weight in self._names)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Zero the gradients that the step will use, be it after its closure."""
        closure = kwargs.get("closure") or next(iter(args[1:]), None)
        if closure is None:
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
            if not is_initialized():  # what other ranks write into it is not counted
                self._zeroed[weight] = _state(weight.grad)

    def _nonzeros(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self._weights.items():
            mask = self._layouts[name].whole(local(weight.detach())) != 0
            if (told := self._excess(name, mask)) is not None:
                raise ValueError(
                    f"{name!r} is not {self.pattern}: {told}, and without masks its zeros are "
                    f"what is kept to. Learn a mask first (MaskProCallback), give masks or their "
                    f'file, or leave the layer out: exclude=["{name.rpartition(".")[0]}"].'
                )
            yield name, mask

    def _check_mask(self, name: str, mask: Tensor) -> None:
        check_mask(name, mask, self._layouts[name].shape)
        if mask.dtype != torch.bool:
            raise TypeError(f"The mask of {name!r} must be a bool tensor, got {mask.dtype}.")
        if (told := self._excess(name, mask)) is not None:
            raise ValueError(
                f"The mask of {name!r} is not {self.pattern}: {told.replace('nonzero', 'kept')}. "
                f"Give masks of this pattern."
            )

    def _excess(self, name: str, kept: Tensor) -> str | None:
        """What groups keep more than N, if any."""
        layout = self._layouts[name]
        count_G = self.pattern.group(kept, layout.input_dim).sum(-1, dtype=torch.int32).flatten()
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


def _state(gradient: Tensor) -> tuple[int, int]:
    """What is another once a gradient is another, or was written into."""
    return id(gradient), gradient._version


@cache
def _powers(device: torch.device) -> Tensor:
    return torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=device)


class _Kept:
    """One rank's part of a mask, bool, in bits; blocks of rows, each packed on its own."""

    def __init__(self, mask: Tensor) -> None:
        self.shape = mask.shape
        row = mask[:1].numel()
        # Twice as many as the groups that a cache holds: a weight here takes a byte or two.
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
        """Zero what is pruned in a tensor of the mask's shape, in place."""
        for part, kept in self._through(tensor):
            if part.dtype == torch.bool:
                part &= kept
            else:
                part.view(_INTEGERS[part.dtype.itemsize]).mul_(kept)

    def violations(self, tensor: Tensor) -> int:
        """How many numbers are not zero where they are pruned."""
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
