"""What a run of MaskPro looks like from outside, as torchmetrics."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from maskpro_lightning import distribution
from maskpro_lightning.optimizer import MaskPro
from maskpro_lightning.pattern import NMPattern

# Above, a group's entropy is estimated from its draw instead of summed over all masks.
_LARGEST_SUM = 128


class MaskChange(Metric):
    """Share of groups, in [0, 1], whose mask is not the same in two sets of masks."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    changed: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("changed", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, kept_GM: Tensor, other_GM: Tensor) -> None:
        """Compare two masks of the same groups, bool (..., M)."""
        self.changed += (kept_GM != other_GM).any(-1).sum()
        self.total += kept_GM.shape[:-1].numel()

    def compute(self) -> Tensor:
        return self.changed / self.total


class MaskEntropy(Metric):
    """Mean entropy of a group's mask in [0, 1], in units of log C(M, N), a group undecided.

    Exact where a group has up to 128 masks. Beyond, the mean of -log P of the drawn masks, whose
    expectation it is.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    entropy: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("entropy", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits_GM: Tensor, drawn_GM: Tensor, pattern: NMPattern) -> None:
        """Add groups with their logits and their drawn masks, (..., M)."""
        if pattern.num_sets <= _LARGEST_SUM:
            nats_G = distribution.entropy(logits_GM, pattern)
        else:
            nats_G = -distribution.log_prob(logits_GM, drawn_GM, pattern)
        self.entropy += nats_G.sum(dtype=torch.float64) / math.log(pattern.num_sets)
        self.total += nats_G.numel()

    def compute(self) -> Tensor:
        return (self.entropy / self.total).float()


def mask_metrics(optimizer: MaskPro) -> dict[str, dict[str, float]]:
    """Statistics of each weight's masks, and of all under the name "".

    Returns:
        By parameter name: ``entropy`` (in units of log C(M, N)), ``changed`` (share of groups
        whose most likely mask is not the initial one), ``churn`` (share of groups whose mask was
        changed by the last draw); each in [0, 1].
    """
    metrics: dict[str, tuple[MaskEntropy, MaskChange]] = {}
    redrawn: dict[str, Tensor] = {}
    for groups in optimizer.groups():
        if groups.name not in metrics:
            metrics[groups.name] = (MaskEntropy(), MaskChange())
            for metric in metrics[groups.name]:
                metric.to(groups.logits_GM.device)
        mode_GM = distribution.mode(groups.logits_GM, groups.pattern)
        entropy, changed = metrics[groups.name]
        entropy.update(groups.logits_GM, groups.drawn_GM, groups.pattern)
        changed.update(mode_GM, groups.initial_GM)
        redrawn[groups.name] = redrawn.get(groups.name, 0) + groups.redrawn
    names = ("entropy", "changed", "churn")
    sizes = {layer: int(found[0].total) for layer, found in metrics.items()}
    values = {
        layer: {
            "entropy": float(entropy.compute()),
            "changed": float(changed.compute()),
            "churn": int(redrawn[layer]) / sizes[layer],
        }
        for layer, (entropy, changed) in metrics.items()
    }
    values[""] = {
        name: sum(sizes[layer] * value[name] for layer, value in values.items())
        / sum(sizes.values())
        for name in names
    }
    return values
