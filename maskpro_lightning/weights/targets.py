"""Chooses the weights of a model that get a mask, and the dimension that their groups lie along."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.weights import reasons
from maskpro_lightning.weights.layers import own_parameters, weights_of
from maskpro_lightning.weights.names import clean_name, joined
from maskpro_lightning.weights.probing import computed_in_forward
from maskpro_lightning.weights.sharding import flat_shapes

# Names that a glob which matches nothing is answered with.
_SUGGESTED = 2


@dataclass(frozen=True)
class Target:
    """A weight to be masked.

    Attributes:
        name: The parameter's name in the model, without the prefixes of wrappers.
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


@dataclass(frozen=True)
class LeftOut:
    """A weight of two or more dimensions that gets no mask.

    Attributes:
        name: The parameter's name in the model, without the prefixes of wrappers.
        parameter: The weight, or this rank's part of it.
        numbers: The number of elements of the whole weight.
        reason: Why it is left out; reads on from the name.
    """

    name: str
    parameter: nn.Parameter
    numbers: int
    reason: str


@dataclass(frozen=True)
class Selection:
    """A model's weights of two or more dimensions, each once.

    Attributes:
        targets: Those to mask, in the model's order.
        left_out: The others.
    """

    targets: list[Target]
    left_out: list[LeftOut]


def find_targets(
    model: nn.Module,
    pattern: str | NMPattern,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    *,
    on_meta: bool = False,
) -> list[Target]:
    """Choose the weights to mask.

    By default these are the weights that layers of PyTorch and transformers multiply with, in
    groups along the dimension that is summed over: linear layers, convolutions (along input
    channels, as hardware does it), attention, recurrent layers, fused experts. Left out are
    embeddings and weights tied to one, output embeddings (``lm_head``), LoRA factors, metrics, and
    weights that cannot be masked: those whose number of inputs is no multiple of M, and those that
    are quantised, parametrised or computed in ``forward``. :func:`select` lists them with reasons.

    Args:
        model: Any module; names are relative to it.
        pattern: "2:4", or a pattern.
        include: Globs over the names of parameters, layers or whole parts of the model. They
            replace the default choice: what they match is masked, even if left out by default. A
            glob with a dimension, ``"*.experts.w:-2"``, adds to the choice instead: it matches
            names of parameters of two or more dimensions, and says what their product sums over.
            Layers that are not known need it.
        exclude: Globs over the same names, of what to leave out. Any of its names leaves out a
            shared weight.
        on_meta: Whether weights may be without values, as for a plan.

    Returns:
        The targets in the model's order, each weight once.

    Raises:
        TypeError: include or exclude is a string instead of a list.
        ValueError: nothing is left to mask; a glob matches nothing; weights that are included by
            name cannot be masked (all are named); weights have no values yet.
    """
    return select(model, pattern, include, exclude, on_meta=on_meta).targets


def select(
    model: nn.Module,
    pattern: str | NMPattern,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    *,
    on_meta: bool = False,
) -> Selection:
    """Choose the weights to mask as :func:`find_targets` does, with reasons against the others."""
    pattern = NMPattern.parse(pattern)
    include, dimensions = _with_dimensions(_globs("include", include))
    exclude = _globs("exclude", exclude) or ()
    named = (*(include or ()), *dimensions)
    _refuse_idle_globs(model, (*named, *exclude))
    candidates: dict[int, list[_Candidate]] = {}  # a shared weight has several names
    for candidate in _candidates(model, dimensions):
        candidates.setdefault(id(candidate.target.parameter), []).append(candidate)
    _refuse_unknown(named, [one.target for several in candidates.values() for one in several])

    why = reasons.left_out_by_default(model) if include is None else {}
    targets: list[Target] = []
    unfit: dict[str, str] = {}
    probed: dict[type[nn.Module], str | None] = {}
    sharing = reasons.sharing(model.parameters())
    for weight, several in candidates.items():
        target, names = several[0].target, [one.target.name for one in several]
        by_name = any(_matches(named, name) for name in names)
        if any(_matches(exclude, name) for name in names):
            why[weight] = "is excluded"
        elif include is not None and not by_name:
            why[weight] = "is not included"
        elif by_name or weight not in why:
            reason = _unfit(several[0], pattern, probed)
            if reason is None and weight in sharing:
                reason = "shares its memory with another parameter: make both one, or clone it"
            if reason is None:
                targets.append(target)
            else:
                why[weight] = reason
                unfit |= {target.name: reason} if by_name else {}
    _refuse_unfit(unfit)
    left_out = list(_left_out(model, targets, why))
    if not targets:
        raise ValueError(
            f"No layer of {type(model).__name__} is left to mask: {_told(left_out)}. Choose "
            f"another pattern, include or exclude."
        )
    _refuse_without_values(targets, on_meta)
    return Selection(targets, left_out)


def parameter_groups(targets: Iterable[Target]) -> list[dict[str, object]]:
    """The targets as named parameter groups of an optimizer, one for each ``input_dim``."""
    groups: dict[int, list[tuple[str, Tensor]]] = {}
    for target in targets:
        groups.setdefault(target.input_dim, []).append((target.name, target.parameter))
    return [{"params": params, "input_dim": dim} for dim, params in groups.items()]


def count(model: nn.Module, targets: Sequence[Target]) -> tuple[int, int]:
    """The number of elements of the targets and of the whole model, over all ranks."""
    shapes = flat_shapes(model)
    sizes = [_shape(parameter, shapes).numel() for parameter in model.parameters()]
    return sum(target.shape.numel() for target in targets), sum(sizes)


def _globs(argument: str, globs: Sequence[str] | None) -> tuple[str, ...] | None:
    if isinstance(globs, str):
        raise TypeError(f'{argument} is a list of globs: write {argument}=["{globs}"].')
    return None if globs is None else tuple(globs)


def _with_dimensions(
    globs: tuple[str, ...] | None,
) -> tuple[tuple[str, ...] | None, dict[str, int]]:
    """Globs without a dimension (None if all have one), and the dimensions of the others."""
    ends = {glob: re.fullmatch(r"(.+):(-?\d+)", glob) for glob in globs or ()}
    dimensions = {end[1]: int(end[2]) for end in ends.values() if end}
    plain = tuple(glob for glob, end in ends.items() if not end)
    return (None if dimensions and not plain else globs and plain), dimensions


def _matches(globs: Iterable[str], name: str) -> bool:
    """Whether a glob matches a parameter, its layer or any module around it."""
    parts = name.split(".")
    around = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return any(fnmatchcase(each, glob) for glob in globs for each in around)


def _left_out(
    model: nn.Module, targets: Sequence[Target], why: Mapping[int, str]
) -> Iterator[LeftOut]:
    """All weights of two or more dimensions that are no targets."""
    shapes = flat_shapes(model)
    metrics = reasons.metrics_in(model)
    seen = {id(target.parameter) for target in targets}
    for name, module in model.named_modules():
        for parameter_name, weight in own_parameters(module).items():
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            shape = _shape(weight, shapes)
            if len(shape) > 1:
                reason = why.get(id(weight)) or reasons.unknown(module, parameter_name, metrics)
                yield LeftOut(joined(name, parameter_name), weight, shape.numel(), reason)


def _shape(weight: Tensor, shapes: Mapping[int, torch.Size]) -> torch.Size:
    """A whole weight's shape; () for a lazy one."""
    return torch.Size(()) if reasons.is_lazy(weight) else shapes.get(id(weight), weight.shape)


@dataclass(frozen=True)
class _Candidate:
    """A weight that could be masked, and the number of products side by side along its groups."""

    target: Target
    products: int


def _candidates(model: nn.Module, dimensions: Mapping[str, int]) -> Iterator[_Candidate]:
    """Everything that could be masked, a shared weight under each of its names."""
    metrics = reasons.metrics_in(model)
    shapes = flat_shapes(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in metrics:
            continue
        known = {name: (dim, products) for name, dim, products in weights_of(module, shapes)}
        for parameter_name in dict.fromkeys((*known, *own_parameters(module))):
            full_name = joined(name, parameter_name)
            said = [(dim, 1) for glob, dim in dimensions.items() if fnmatchcase(full_name, glob)]
            said += [known[parameter_name]] if parameter_name in known else []
            weight = getattr(module, parameter_name) if said else None
            if weight is not None:
                shape, (dim, products) = _shape(weight, shapes), said[0]
                if parameter_name in known or len(shape) > 1:
                    yield _Candidate(Target(full_name, module, weight, dim, shape), products)


def _refuse_idle_globs(model: nn.Module, globs: Iterable[str]) -> None:
    modules = model.named_modules(remove_duplicate=False)
    parameters = model.named_parameters(remove_duplicate=False)
    names = [clean_name(name) for name, _ in (*modules, *parameters) if name]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(
                f"{glob!r} matches no layer or parameter of {type(model).__name__}; the nearest is "
                f"{_nearest(glob, names)}."
            )


def _nearest(glob: str, names: Sequence[str]) -> str:
    """What may have been meant: the glob, its parts replaced by names of layers, or whole names."""
    parts = dict.fromkeys(part for name in names for part in name.split("."))
    meant = ".".join(
        part if any(fnmatchcase(each, part) for each in parts) else _like(part, list(parts))
        for part in glob.split(".")
    )
    if any(fnmatchcase(name, meant) for name in names):
        return repr(meant)
    return " or ".join(map(repr, get_close_matches(glob, names, _SUGGESTED, 0)))


def _like(glob: str, parts: Sequence[str]) -> str:
    """The name that is nearest to a part of a glob, between the same asterisks."""
    word, names = glob.strip("*"), {part.lower(): part for part in parts}
    near = get_close_matches(word.lower(), names, 1)
    return glob.replace(word, names[near[0]]) if word and near else glob


def _refuse_unknown(named: Iterable[str], known: Sequence[Target]) -> None:
    """Refuse globs that match only parameters whose product is not known."""
    idle = [glob for glob in named if not any(_matches([glob], target.name) for target in known)]
    if idle:
        raise ValueError(
            f"include={idle} matches no weight whose product is known: give a parameter's own name "
            f'and the dimension that its product sums over, such as "{idle[0]}.weight:-1".'
        )


def _unfit(
    candidate: _Candidate, pattern: NMPattern, probed: dict[type[nn.Module], str | None]
) -> str | None:
    """Why a weight cannot be masked; reads on from its name. None if it can."""
    target, module = candidate.target, candidate.target.module
    if target.name.rpartition(".")[2] not in own_parameters(module):
        return "is computed from other parameters (weight_norm or another parametrization)"
    if reasons.is_lazy(target.parameter):
        return None  # refused with those that have no values
    shape, dim = target.shape, target.input_dim
    reason = reasons.unfit(target.parameter, shape, dim, candidate.products, pattern)
    if reason is not None:
        return reason
    if type(module) not in probed:
        probed[type(module)] = computed_in_forward(module, shape)
    made_by = probed[type(module)]
    if made_by is not None:
        return f"is multiplied only through other weights that forward computes ({made_by})"
    return None


def _refuse_unfit(unfit: Mapping[str, str]) -> None:
    if unfit:
        told = "; ".join(f"{name!r} {reason}" for name, reason in unfit.items())
        layers = ", ".join(f'"{name.rpartition(".")[0] or name}"' for name in unfit)
        raise ValueError(
            f"{len(unfit)} of the included weights cannot be masked: {told}. Leave them out with "
            f"exclude=[{layers}]."
        )


def _refuse_without_values(targets: Sequence[Target], on_meta: bool) -> None:
    lazy = [target.name for target in targets if reasons.is_lazy(target.parameter)]
    if lazy:
        raise ValueError(
            f"{lazy[0]!r} has no shape yet ({len(lazy)} of {len(targets)} weights are lazy): run "
            f"the model once on a batch before masking."
        )
    empty = [target.name for target in targets if target.parameter.is_meta]
    if empty and not on_meta:
        raise ValueError(
            f"{empty[0]!r} is on the meta device, without values ({len(empty)} of {len(targets)} "
            f"weights): load the weights before masking."
        )


def _told(left_out: Sequence[LeftOut]) -> str:
    """Each reason for which weights are left out, once, with the first weight's name."""
    first = {each.reason: each.name for each in reversed(left_out)}
    told = [f"{name!r} {reason}" for reason, name in reversed(first.items())]
    return "; ".join(told) or "it has no weights of two dimensions"
