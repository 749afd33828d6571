"""Which weights of a model get a mask, and along which of their dimensions groups lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from maskpro_lightning.pattern import NMPattern

# What wrappers of PyTorch put into names; without it one name holds under every strategy.
_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class Target:
    """A weight to be masked.

    Attributes:
        name: The parameter's name in the model, free of wrappers' prefixes.
        module: The layer that owns it.
        parameter: The weight.
        input_dim: The dimension that the layer sums over; groups lie along it.
    """

    name: str
    module: nn.Module
    parameter: nn.Parameter
    input_dim: int


def find_targets(
    model: nn.Module,
    pattern: str | NMPattern,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> list[Target]:
    """Choose the weights to mask.

    By default these are the weights of ``nn.Linear``, Hugging Face's ``Conv1D``, convolutions
    (along input channels, as hardware does it) and fused experts (3-D weights of a module whose
    class is named ``…Experts``). Left out: embeddings and whatever is tied to one, output
    embeddings (``lm_head``), depthwise convolutions, LoRA factors, everything inside a metric.

    Args:
        model: Any module; names are relative to it.
        pattern: "2:4", or a pattern.
        include: Globs over the names of layers or parameters. They replace the default choice:
            what they match is masked even if it is left out by default.
        exclude: Globs over names of layers or parameters to leave out.

    Returns:
        The targets in the model's order, each weight once.

    Raises:
        ValueError: nothing matched; a glob matches nothing; a chosen weight cannot be masked (its
            inputs are not a multiple of M, it is quantised, parametrised or on the meta device).
    """
    pattern = NMPattern.parse(pattern)
    include = _globs("include", include)
    exclude = _globs("exclude", exclude) or ()
    candidates = list(_candidates(model))
    _refuse_idle_globs(model, (*(include or ()), *exclude))

    left_out = _left_out_by_default(model) if include is None else set()
    targets: dict[int, Target] = {}
    for layer, target in candidates:
        wanted = id(target.parameter) not in left_out and "lora_" not in target.name
        if include is not None:
            wanted = _matches(include, layer, target.name)
        if wanted and not _matches(exclude, layer, target.name):
            targets.setdefault(id(target.parameter), target)
    if not targets:
        raise ValueError(
            f"No layer of {type(model).__name__} is left to mask: its {len(candidates)} maskable "
            f"weights are all left out (include={include}, exclude={list(exclude)})."
        )
    _refuse_unsuitable(targets.values(), pattern)
    return list(targets.values())


def parameter_groups(targets: Iterable[Target]) -> list[dict[str, object]]:
    """The targets as named parameter groups of an optimizer, one for each ``input_dim``."""
    groups: dict[int, list[tuple[str, Tensor]]] = {}
    for target in targets:
        groups.setdefault(target.input_dim, []).append((target.name, target.parameter))
    return [{"params": params, "input_dim": dim} for dim, params in groups.items()]


def describe(model: nn.Module, targets: Sequence[Target], pattern: NMPattern) -> str:
    """One line: layers, weights and share of the model that are masked."""
    masked = sum(target.parameter.numel() for target in targets)
    total = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{pattern} masks on {len(targets)} weights: {masked:,} of the model's {total:,} "
        f"numbers ({masked / total:.1%})."
    )


def clean_name(name: str) -> str:
    """A parameter's or module's name without what PyTorch's wrappers put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "").removesuffix("." + wrapper[:-1]).removesuffix(wrapper[:-1])
    return name


def _globs(argument: str, globs: Sequence[str] | None) -> tuple[str, ...] | None:
    if isinstance(globs, str):
        raise TypeError(f'{argument} is a list of globs: write {argument}=["{globs}"].')
    return None if globs is None else tuple(globs)


def _matches(globs: Iterable[str], *names: str) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs for name in names)


def _candidates(model: nn.Module) -> Iterator[tuple[str, Target]]:
    """Everything that could be masked, with the name of its layer."""
    metrics: set[int] = set()
    for name, module in model.named_modules():
        if _is_metric(module):
            metrics.update(id(inner) for inner in module.modules())
        if id(module) in metrics:
            continue
        layer = clean_name(name)
        for parameter_name, parameter in module.named_parameters(recurse=False):
            input_dim = _input_dim(module, parameter_name, parameter)
            if input_dim is not None:
                full_name = f"{layer}.{parameter_name}" if layer else parameter_name
                yield layer, Target(full_name, module, parameter, input_dim)


def _input_dim(module: nn.Module, name: str, parameter: nn.Parameter) -> int | None:
    """The dimension that a layer sums over, or None where there is none to cut into groups."""
    if name == "weight" and isinstance(module, nn.Linear):
        return -1
    if name == "weight" and type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return 0  # transformers' Conv1D stores (inputs, outputs)
    if name == "weight" and isinstance(module, _ConvNd):
        depthwise = parameter.shape[1] == 1
        return None if depthwise or isinstance(module, _ConvTransposeNd) else 1
    if name == "in_proj_weight" and isinstance(module, nn.MultiheadAttention):
        return -1
    if type(module).__name__.endswith("Experts") and parameter.dim() == 3:
        return -2 if getattr(module, "is_transposed", False) else -1
    return None


def _left_out_by_default(model: nn.Module) -> set[int]:
    """Parameters of embeddings and output embeddings, which tied weights are as well."""
    left_out: set[int] = set()
    for name, module in model.named_modules():
        output = getattr(module, "get_output_embeddings", lambda: None)()
        for layer in (module, output):
            embedding = isinstance(layer, nn.Embedding | nn.EmbeddingBag) or layer is output
            if layer is not None and (embedding or clean_name(name).split(".")[-1] == "lm_head"):
                left_out.update(id(p) for p in layer.parameters(recurse=False))
    return left_out


def _is_metric(module: nn.Module) -> bool:
    return any(kind.__module__.startswith("torchmetrics") for kind in type(module).__mro__)


def _refuse_idle_globs(model: nn.Module, globs: Iterable[str]) -> None:
    names = {clean_name(name) for name, _ in (*model.named_modules(), *model.named_parameters())}
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(
                f"{glob!r} matches no layer or parameter of {type(model).__name__}; its layers "
                f"are named like {max(names, key=len)!r}."
            )


def _refuse_unsuitable(targets: Iterable[Target], pattern: NMPattern) -> None:
    for target in targets:
        weight, layer = target.parameter, target.name.rpartition(".")[0]
        remedy = f'leave it out with exclude=["{layer or target.name}"]'
        if is_parametrized(target.module) or not weight.is_leaf:
            raise ValueError(
                f"{target.name!r} is computed from other parameters (weight_norm or another "
                f"parametrization), so a mask written into it is lost: {remedy} or remove the "
                f"parametrization first."
            )
        if not weight.is_floating_point() or weight.layout is not weight.data.layout:
            raise ValueError(
                f"{target.name!r} holds {weight.dtype} numbers; masks need floating-point "
                f"weights: {remedy} or load the model unquantised."
            )
        if weight.is_meta:
            raise ValueError(
                f"{target.name!r} is on the meta device, without values: load the weights before "
                f"masking."
            )
        if weight.shape[target.input_dim] % pattern.m:
            raise ValueError(
                f"{target.name!r} has {weight.shape[target.input_dim]} input features, not a "
                f"multiple of {pattern.m} (pattern {pattern}): {remedy} or choose another pattern."
            )
