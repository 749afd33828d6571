"""Which weights of a model get a mask, and along which of their dimensions groups lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.weights.admission import is_maskable, kind_of
from maskpro_lightning.weights.sharding import flat_shapes

# What wrappers of PyTorch put into names; without it one name holds under every strategy.
_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class Target:
    """A weight to be masked.

    Attributes:
        name: The parameter's name in the model, free of wrappers' prefixes.
        module: The layer that owns it.
        parameter: The weight, or this rank's part of it.
        input_dim: The dimension that the layer sums over; groups lie along it.
        shape: The whole weight's shape.
    """

    name: str
    module: nn.Module
    parameter: nn.Parameter
    input_dim: int
    shape: torch.Size


def find_targets(
    model: nn.Module,
    pattern: str | NMPattern,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    *,
    on_meta: bool = False,
) -> list[Target]:
    """Choose the weights to mask.

    By default these are the weights of ``nn.Linear``, Hugging Face's ``Conv1D``, convolutions
    (along input channels, as hardware does it) and fused experts (3-D weights of a module whose
    class is named ``…Experts``). Left out: embeddings and whatever is tied to one, output
    embeddings (``lm_head``), depthwise convolutions, LoRA factors, everything inside a metric.

    Args:
        model: Any module; names are relative to it.
        pattern: "2:4", or a pattern.
        include: Globs over the names of parameters, layers or whole parts of the model. They
            replace the default choice: what they match is masked even if left out by default.
        exclude: Globs, likewise, of what to leave out. A shared weight is left out by any of its
            names.
        on_meta: Whether weights without values will do, as for a plan.

    Returns:
        The targets in the model's order, each weight once.

    Raises:
        ValueError: nothing matched; a glob matches nothing; a chosen weight cannot be masked (its
            inputs are not a multiple of M, it is quantised, parametrised or on the meta device).
    """
    pattern = NMPattern.parse(pattern)
    include = _globs("include", include)
    exclude = _globs("exclude", exclude) or ()
    _refuse_idle_globs(model, (*(include or ()), *exclude))
    named: dict[int, list[Target]] = {}  # a shared weight has several names
    for target in _candidates(model):
        named.setdefault(id(target.parameter), []).append(target)

    left_out = _left_out_by_default(model) if include is None else set()
    chosen = [
        targets[0]
        for weight, targets in named.items()
        if weight not in left_out
        and (include is None or any(_matches(include, target.name) for target in targets))
        and not any(_matches(exclude, target.name) for target in targets)
    ]
    if not chosen:
        raise ValueError(
            f"No layer of {type(model).__name__} is left to mask: its {len(named)} maskable "
            f"weights are all left out (include={include}, exclude={list(exclude)})."
        )
    for target in chosen:
        _refuse_unsuitable(target, pattern, on_meta)
    return chosen


def parameter_groups(targets: Iterable[Target]) -> list[dict[str, object]]:
    """The targets as named parameter groups of an optimizer, one for each ``input_dim``."""
    groups: dict[int, list[tuple[str, Tensor]]] = {}
    for target in targets:
        groups.setdefault(target.input_dim, []).append((target.name, target.parameter))
    return [{"params": params, "input_dim": dim} for dim, params in groups.items()]


def describe(model: nn.Module, targets: Sequence[Target], pattern: NMPattern) -> str:
    """One line: layers, weights and share of the model that are masked."""
    masked, total = count(model, targets)
    return (
        f"{pattern} masks on {len(targets)} weights: {masked:,} of the model's {total:,} "
        f"numbers ({masked / total:.1%})."
    )


def count(model: nn.Module, targets: Sequence[Target]) -> tuple[int, int]:
    """Numbers in the targets and in the whole model, over all ranks that share it."""
    shapes = flat_shapes(model)
    sizes = [shapes.get(id(p), p.shape).numel() for p in model.parameters()]
    return sum(target.shape.numel() for target in targets), sum(sizes)


def clean_name(name: str) -> str:
    """A parameter's or module's name without what PyTorch's wrappers put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "").removesuffix("." + wrapper[:-1]).removesuffix(wrapper[:-1])
    return name


def _globs(argument: str, globs: Sequence[str] | None) -> tuple[str, ...] | None:
    if isinstance(globs, str):
        raise TypeError(f'{argument} is a list of globs: write {argument}=["{globs}"].')
    return None if globs is None else tuple(globs)


def _matches(globs: Iterable[str], name: str) -> bool:
    """Whether a glob matches a parameter, its layer or any module around it."""
    parts = name.split(".")
    around = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return any(fnmatchcase(each, glob) for glob in globs for each in around)


def _candidates(model: nn.Module) -> Iterator[Target]:
    """Everything that could be masked, a shared weight under each of its names."""
    metrics = {
        id(inner) for module in model.modules() if _is_metric(module) for inner in module.modules()
    }
    shapes = flat_shapes(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in metrics:
            continue
        for parameter_name, input_dim in _weights(module, shapes):
            weight = getattr(module, parameter_name)
            full_name = clean_name(f"{name}.{parameter_name}".removeprefix("."))
            if weight is not None:
                shape = shapes.get(id(weight), weight.shape)
                yield Target(full_name, module, weight, input_dim, shape)


def _weights(module: nn.Module, shapes: Mapping[int, torch.Size]) -> Iterator[tuple[str, int]]:
    """The weights that a layer multiplies its inputs with, and the dimension it sums over."""
    # Not the class's own name alone, as fully_shard puts a subclass in its place.
    kinds = [kind.__name__ for kind in type(module).__mro__]
    if isinstance(module, nn.Linear):
        yield "weight", -1
    elif "Conv1D" in kinds and hasattr(module, "nf"):
        yield "weight", 0  # transformers' Conv1D stores (inputs, outputs)
    elif isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        if module.in_channels != module.groups:  # depthwise: nothing to cut into groups
            yield "weight", 1
    elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        yield "in_proj_weight", -1
    elif kinds[0].endswith("Experts"):
        transposed = getattr(module, "is_transposed", False)
        for name, parameter in module.named_parameters(recurse=False):
            if len(shapes.get(id(parameter), parameter.shape)) == 3:
                yield name, -2 if transposed else -1


def _left_out_by_default(model: nn.Module) -> set[int]:
    """Embeddings and output embeddings, with whatever is tied to them, and LoRA's factors."""
    layers: list[nn.Module] = []
    for name, module in model.named_modules(remove_duplicate=False):
        output = getattr(module, "get_output_embeddings", lambda: None)()
        layers += [] if output is None else [output]
        by_name = clean_name(name).endswith("lm_head") or "lora_" in name
        if by_name or isinstance(module, nn.Embedding | nn.EmbeddingBag):
            layers.append(module)
    return {id(weight) for layer in layers for weight in layer.parameters()}


def _is_metric(module: nn.Module) -> bool:
    return any(kind.__module__.startswith("torchmetrics") for kind in type(module).__mro__)


def _refuse_idle_globs(model: nn.Module, globs: Iterable[str]) -> None:
    modules = model.named_modules(remove_duplicate=False)
    parameters = model.named_parameters(remove_duplicate=False)
    names = [clean_name(name) for name, _ in (*modules, *parameters)]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(
                f"{glob!r} matches no layer or parameter of {type(model).__name__}; its layers "
                f"are named like {max(names, key=len)!r}."
            )


def _refuse_unsuitable(target: Target, pattern: NMPattern, on_meta: bool) -> None:
    weight, layer = target.parameter, target.name.rpartition(".")[0]
    remedy = f'leave it out with exclude=["{layer or target.name}"]'
    if target.name.rpartition(".")[2] not in target.module._parameters:
        raise ValueError(
            f"{target.name!r} is computed from other parameters (weight_norm or another "
            f"parametrization), so a mask written into it is lost: {remedy} or remove the "
            f"parametrization first."
        )
    if not is_maskable(weight):
        raise ValueError(
            f"{target.name!r} holds {kind_of(weight)} numbers; masks need dense floating-point "
            f"weights of at least 16 bits: {remedy} or load the model unquantised."
        )
    if weight.is_meta and not on_meta:
        raise ValueError(
            f"{target.name!r} is on the meta device, without values: load the weights before "
            f"masking."
        )
    if target.shape[target.input_dim] % pattern.m:
        raise ValueError(
            f"{target.name!r} has {target.shape[target.input_dim]} input features, not a "
            f"multiple of {pattern.m} (pattern {pattern}): {remedy} or choose another pattern."
        )
