"""Estimators from flat arguments, as many tests change one number at a time."""

from __future__ import annotations

from typing import Any

from maskpro_lightning import MaskPro, MaskProCallback, Policy, StraightThrough
from maskpro_lightning.optim.estimators import Estimator, estimator_of

NUMBERS = ("lr", "logit_scale", "momentum", "published", "baseline_cache")


def estimator(name: str, **numbers: Any) -> Estimator:
    """The estimator of a name with numbers of its own; those of the other one are left out."""
    if name == "policy":
        return Policy(**numbers)
    if name != "straight_through":
        return estimator_of(name)  # which refuses it
    return StraightThrough(**{k: v for k, v in numbers.items() if k in ("lr", "logit_scale")})


def grouped_rule(rule: dict[str, Any]) -> dict[str, Any]:
    """What constructors take, from arguments where an estimator's numbers stand beside its name."""
    rule = dict(rule)
    numbers = {name: rule.pop(name) for name in NUMBERS if rule.get(name) is not None}
    name = rule.pop("estimator", "policy")
    return {"estimator": estimator(name, **numbers) if isinstance(name, str) else name, **rule}


def mask_optimizer(params: Any, pattern: Any = "2:4", **rule: Any) -> MaskPro:
    """A MaskPro, by default of the policy."""
    return MaskPro(params, pattern, **grouped_rule(rule))


def mask_callback(pattern: Any = "2:4", **rule: Any) -> MaskProCallback:
    """A MaskProCallback, by default of the policy, from the largest weights."""
    return MaskProCallback(pattern, **{"init": "magnitude", **grouped_rule(rule)})
