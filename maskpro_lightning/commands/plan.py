"""What a fit needs before it is started: bytes on each rank and forward passes per step.

Works on a model without memory (``torch.device("meta")``), so a laptop plans for a cluster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.optim.estimators import EstimatorName
from maskpro_lightning.optim.lessons import WAITING
from maskpro_lightning.optim.masked_weight import MaskedWeight
from maskpro_lightning.optim.states import LogitsDtype, Memory
from maskpro_lightning.optim.together import SMALL
from maskpro_lightning.weights.layers import CONVOLUTIONS, TRANSPOSED
from maskpro_lightning.weights.layout import Layout, block_size
from maskpro_lightning.weights.targets import Target

Strategy = Literal["ddp", "fsdp1", "fsdp2"]
# Bytes that an update takes on the way for each weight of a block, if it is not compiled.
_TEMPORARIES = 48


@dataclass(frozen=True)
class Plan:
    """What the rank that needs most needs.

    Attributes:
        state: Bytes by what they hold: "weights" of the whole model, "gradients" if the estimator
            needs them, then the masks' state.
        gathered: Bytes of the largest unit, which a sharded forward pass makes whole for a while.
        activations: Estimate of the bytes of a step's activations; None if the rows of
            a batch are not known.
        forwards: Forward passes of a step, a backward pass counting as two.
        workspace: Estimate of the bytes that the update of masks takes on the way, after the
            passes.
        sent: Bytes of weights and gradients that a rank sends in a step, and as many that it takes.
    """

    state: dict[str, int]
    gathered: int
    activations: int | None
    forwards: int
    workspace: int = 0
    sent: int = 0

    @property
    def total(self) -> int:
        """Bytes at the peak, in the passes or in the update."""
        passes = self.gathered + (self.activations or 0)
        return sum(self.state.values()) + max(passes, self.workspace)


def plan(
    model: nn.Module,
    targets: Sequence[Target],
    *,
    devices: int,
    strategy: Strategy = "fsdp2",
    estimator: EstimatorName = "straight_through",
    rows: int | None = None,
    pattern: str | NMPattern = "2:4",
    memory: Memory = "plain",
    logits_dtype: LogitsDtype = "float32",
    teacher: bool = False,
    device: str = "cuda",
) -> Plan:
    """Add up what a fit keeps on the rank that keeps most.

    Args:
        model: The model, on any device, unsharded.
        targets: Its weights that are masked.
        devices: Number of ranks.
        strategy: "ddp" keeps everything on each rank; "fsdp1" cuts the weights of a unit, laid
            end to end, into equal runs; "fsdp2" cuts each weight along its first dimension.
        estimator: As for the fit.
        rows: Vectors that a layer sees in a step of one rank: tokens, or samples times positions.
        pattern: As for the fit, like what follows.
        memory: "plain" or "lean".
        logits_dtype: "float32" or "bfloat16".
        teacher: Whether each step asks the dense weights, too, for a distillation.
        device: What it runs on, which decides how many groups are updated at once.

    Raises:
        ValueError: an unknown strategy, or less than one device.
    """
    _refuse_unknown(strategy, devices)
    share = _share_by(strategy)
    state = {"weights": _weights(model, share, devices)}
    if estimator == "straight_through":
        shared = strategy if devices > 1 else "ddp"
        state["gradients"] = _gradients(
            model, targets, shared, lambda p: share(p, devices) * p.element_size()
        )
    pattern, parts = NMPattern.parse(pattern), []
    for target in targets:
        layout = _part(target, pattern, strategy, devices)
        parts.append((math.prod(layout.padded_size), target.parameter.element_size()))
        weight = torch.empty(layout.padded_size, dtype=target.parameter.dtype, device="meta")
        mask = torch.empty(layout.padded_size, dtype=torch.bool, device="meta")
        logits = mask.to(getattr(torch, logits_dtype))
        lean = memory == "lean" and not layout.cut
        kept = MaskedWeight.state(layout, weight, mask, mask, logits, lean=lean)
        kept.pop("redrawn")  # a number for each of many groups
        for name, value in kept.items():
            state[name] = state.get(name, 0) + value.numel() * value.element_size()
    forwards = {"policy": 2, "straight_through": 3}[estimator] + teacher
    seen = None if rows is None else _activations(model, rows, estimator)
    if seen is not None and teacher:
        seen += _compared(model, rows or 0, estimator)
    small = sum(size for size, _ in parts if size < pattern.m * SMALL)  # done as one
    largest = max(small, *(size for size, _ in parts))
    block = min(largest, pattern.m * block_size(torch.device(device)))
    copied = strategy == "fsdp1" and devices > 1  # a part that may be cut
    workspace = _TEMPORARIES * block + copied * max(size * each for size, each in parts)
    sent = _sent(model, strategy, devices, estimator, teacher)
    return Plan(state, _gathered(model, strategy, devices), seen, forwards, workspace, sent)


def plan_training(
    model: nn.Module,
    targets: Sequence[Target],
    optimizers: Sequence[Optimizer],
    *,
    devices: int,
    strategy: Strategy = "fsdp2",
    teacher: nn.Module | None = None,
    rows: int | None = None,
) -> Plan:
    """The same for a training under masks, :class:`SparseFinetuning`.

    Args:
        model: The model, on the meta device: its optimizers make a step, to see what they keep.
        targets: Its weights that are masked.
        optimizers: Those that train it.
        devices: As for :func:`plan`, like strategy and rows.
        strategy: How to shard.
        teacher: The part that a distillation keeps a dense copy of, on every rank.
        rows: Vectors that a layer sees in a step of one rank.

    Raises:
        ValueError: as :func:`plan`; or the model has memory.
    """
    _refuse_unknown(strategy, devices)
    if not all(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("The model of a plan has no memory: make it under torch.device('meta').")
    share = _share_by(strategy)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = {
        "weights": _weights(model, share, devices),
        "gradients": sum(share(p, devices) * p.element_size() for p in trained),
        "optimizer": _kept_by(optimizers, lambda value: share(value, devices)),
        "masks": sum(math.ceil(share(target.parameter, devices) / 8) for target in targets),
    }
    seen = None if rows is None else _activations(model, rows, "straight_through")
    if teacher is not None:
        state["dense copy"] = _weights(teacher, _all, devices)
        seen = None if rows is None else (seen or 0) + _activations(teacher, rows, "policy")
    forwards = 3 if teacher is None else 4
    return Plan(state, _gathered(model, strategy, devices), seen, forwards)


def hours(model: nn.Module, rows: int, forwards: int, steps: int, tflops: float) -> float:
    """Estimate how long the passes of a fit take.

    A weight that multiplies costs a multiplication and an addition for each row; attention itself,
    which grows with the square of the length, and the update of masks come on top.

    Args:
        model: The model, unsharded.
        rows: Vectors that a layer sees in a step of one rank.
        forwards: Forward passes of a step.
        steps: Steps of the fit.
        tflops: What a device does of these in a second, in units of 10^12.
    """
    weights = {
        parameter: parameter.numel()
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
        if parameter.dim() > 1
    }
    return 2 * sum(weights.values()) * rows * forwards * steps / (tflops * 1e12) / 3600


def table(found: Plan, title: str) -> Table:
    """What is needed, part by part, for a terminal."""
    parts = {**found.state, "largest unit, gathered": found.gathered}
    parts |= {} if found.activations is None else {"activations (estimate)": found.activations}
    parts |= {"or workspace of the update (estimate)": found.workspace} if found.workspace else {}
    rows = Table(title=title)
    rows.add_column("what")
    rows.add_column("GB", justify="right")
    for name, size in {**parts, "at the peak": found.total}.items():
        rows.add_row(name, gigabytes(size), style="bold" if name == "at the peak" else None)
    return rows


def gigabytes(size: int) -> str:
    """Bytes in units of 10^9."""
    return f"{size / 1e9:,.0f}" if size >= 1e11 else f"{size / 1e9:.3g}"


def _refuse_unknown(strategy: str, devices: int) -> None:
    if strategy not in get_args(Strategy) or devices < 1:
        raise ValueError(
            f"There is no plan for {strategy!r} on {devices} devices: strategy is one of "
            f"{', '.join(get_args(Strategy))}, and devices at least 1."
        )


def _share_by(strategy: Strategy) -> Callable[[Tensor, int], int]:
    """How many numbers of a tensor a rank has at most."""
    return {"ddp": _all, "fsdp1": _run, "fsdp2": _rows}[strategy]


def _weights(model: nn.Module, share: Callable[[Tensor, int], int], devices: int) -> int:
    weights = [*model.parameters(), *model.buffers()]
    return sum(share(w, devices) * w.element_size() for w in weights)


def _gathered(model: nn.Module, strategy: Strategy, devices: int) -> int:
    whole = max((_bytes(unit.parameters()) for unit in _units(model)), default=0)
    return 0 if strategy == "ddp" or devices == 1 else whole


def _sent(
    model: nn.Module,
    strategy: Strategy,
    devices: int,
    estimator: EstimatorName,
    teacher: bool,
) -> int:
    """Bytes that a rank sends in a step, where messages go round in a ring.

    Each pass gathers each unit's weights, of which a rank sends its part to all others. What is in
    no unit is kept between a forward and its backward pass. Gradients go the other way.
    """
    inside = sum(_bytes(unit.parameters()) for unit in _units(model))
    outside = _bytes(model.parameters()) - inside
    gradients = _bytes(p for p in model.parameters() if p.requires_grad)
    learns = estimator == "straight_through"
    if strategy == "ddp":
        moved = 2 * gradients * learns
    else:
        forwards = (1 if learns else 2) + teacher
        moved = forwards * (inside + outside) + (inside + gradients) * learns
    return moved * (devices - 1) // devices


def _kept_by(optimizers: Sequence[Optimizer], share: Callable[[Tensor], int]) -> int:
    """Bytes of the state that optimizers have after a step."""
    kept = 0
    for optimizer in optimizers:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        for weight in weights:
            weight.grad = None
        for state in optimizer.state.values():
            values = (value for value in state.values() if isinstance(value, Tensor))
            kept += sum(share(value) * value.element_size() for value in values)
    return kept


def _part(target: Target, pattern: NMPattern, strategy: Strategy, devices: int) -> Layout:
    """Where the largest part of a weight lies that a rank may have."""
    whole = Layout.of(target.parameter, pattern, target.input_dim)
    if devices == 1 or strategy == "ddp":
        return whole
    if strategy == "fsdp1":
        return Layout.run(whole, 0, _run(target.parameter, devices), ())
    rows = math.ceil(whole.shape[0] / devices)
    return replace(whole, size=(rows, *whole.shape[1:]))


def _gradients(
    model: nn.Module,
    targets: Sequence[Target],
    strategy: Strategy,
    size_of: Callable[[Tensor], int],
) -> int:
    """Bytes of gradients that are there at once: all unmasked ones, and of one masked weight.

    FSDP1 has those of all weights at its end, FSDP2 of a unit, beside what waits for a message.
    """
    masked = {id(target.parameter) for target in targets}
    others = (p for p in model.parameters() if p.requires_grad and id(p) not in masked)
    sizes = [size_of(target.parameter) for target in targets]
    there = max(sizes)
    if strategy == "fsdp2":
        units = ([p for p in unit.parameters() if id(p) in masked] for unit in _units(model))
        unit = max(sum(map(size_of, weights)) for weights in units)
        there = min(sum(sizes), unit + WAITING * targets[0].parameter.element_size())
    elif strategy == "fsdp1":
        there = sum(sizes)
    return sum(map(size_of, others)) + there


def _all(weight: Tensor, devices: int) -> int:
    return weight.numel()


def _run(weight: Tensor, devices: int) -> int:
    return math.ceil(weight.numel() / devices)


def _rows(weight: Tensor, devices: int) -> int:
    if not weight.dim():
        return 1
    return math.ceil(weight.shape[0] / devices) * weight.shape[1:].numel()


def _units(model: nn.Module) -> list[nn.Module]:
    """The blocks that one shards on their own: members of lists, or else the whole model."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return [block for blocks in lists for block in blocks] or [model]


def _bytes(tensors: Iterator[nn.Parameter]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _activations(model: nn.Module, rows: int, estimator: EstimatorName) -> int:
    """Estimate from the weights' shapes what is alive at once, in bytes.

    Without gradients that is the widest block, or the loss; with them all inputs and outputs of
    weights, what norms keep, and the loss. Element-wise functions that are made of several
    operations, and keys and values that a model caches, come on top.
    """
    widths = [width for module in model.modules() for width in _widths(module)]
    output, size = (widths[-1][1], widths[-1][2]) if widths else (0, 0)
    # The loss takes a softmax in float32, of a copy if the output is of less.
    loss = output * (4 if size >= 4 else 8)
    if estimator == "policy":
        return rows * max([loss + output * size, *map(_widest, model.modules())])
    kept = sum((inputs + outputs) * size for inputs, outputs, size in widths)
    return rows * (kept + sum(map(_normed, model.modules())) * 4 + loss)


def _compared(model: nn.Module, rows: int, estimator: EstimatorName) -> int:
    """Estimate what a distillation holds beside the loss of the training step, in bytes.

    That is the dense output, both outputs in float32, their softmax and the gradients of all that.
    """
    _, output, size = ([(0, 0, 4)] + [w for module in model.modules() for w in _widths(module)])[-1]
    full, half = (20, 24) if estimator == "straight_through" else (16, 22)
    return rows * output * (full if size >= 4 else half)


def _widths(module: nn.Module) -> list[tuple[int, int, int]]:
    """Numbers of a row that goes into and comes out of a module's own weights, and their bytes."""
    found = []
    for weight in module.parameters(recurse=False):
        if isinstance(module, nn.Embedding):
            found.append((0, weight.shape[1], weight.element_size()))
        elif weight.dim() > 1:
            convolves = isinstance(module, (*CONVOLUTIONS, *TRANSPOSED))
            shape = weight.shape[:2] if convolves else weight.shape[-2:]
            inputs, outputs = (shape[1], shape[0])
            if "Conv1D" in type(module).__name__:  # transformers' own is (inputs, outputs)
                inputs, outputs = outputs, inputs
            found.append((inputs, outputs, weight.element_size()))
    return found


def _widest(module: nn.Module) -> int:
    """Bytes of a row that are alive in a module at once, inside of its children left out.

    The layers of a chain follow each other; of other modules we take all to be needed together.
    """
    own = [max(i + o, 2 * o) * size for i, o, size in _widths(module)]
    if isinstance(module, nn.Sequential | nn.ModuleList):
        return 0
    layers = (child for child in module.children() if not isinstance(child, nn.Embedding))
    together = [(i + o) * size for child in layers for i, o, size in _widths(child)]
    return max([sum(together), *own])


def _normed(module: nn.Module) -> int:
    """Numbers of a row that a module normalises, which it does and keeps in float32."""
    weight = getattr(module, "weight", None)
    if "Norm" not in type(module).__name__ or not isinstance(weight, Tensor):
        return 0
    return weight.numel()
