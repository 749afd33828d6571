"""What a run of MaskPro looks like from outside, as torchmetrics."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from maskpro_lightning.masks import distribution
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.optim.optimizer import MaskPro

#: Bins of :func:`histograms`, of equal width over [0, 1].
BINS = 20
# Probabilities above 1 - 10^-5 are not told apart.
_NINES = 5
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
    layers = {name: (MaskEntropy(), MaskChange()) for name in optimizer.names}
    for groups in optimizer.groups():
        mode_GM = distribution.mode(groups.logits_GM, groups.pattern)
        entropy, changed = layers[groups.name]
        for metric in layers[groups.name]:
            metric.to(mode_GM.device)
        entropy.update(groups.logits_GM, groups.drawn_GM, groups.pattern)
        changed.update(mode_GM, groups.initial_GM)
    redrawn = optimizer.redrawn()
    # Not torchmetrics' own way of joining ranks, which asks for each number on its own.
    sums = optimizer.over_ranks(
        torch.tensor(
            [
                [float(entropy.entropy), float(changed.changed), float(redrawn[name]), groups]
                for name, (entropy, changed) in layers.items()
                for groups in (float(entropy.total),)
            ],
            dtype=torch.float64,
        )
    )
    sums = torch.cat([sums, sums.sum(0, keepdim=True)])
    shares = (sums[:, :3] / sums[:, 3:]).tolist()
    names = ("entropy", "changed", "churn")
    return {
        layer: dict(zip(names, values, strict=True))
        for layer, values in zip([*layers, ""], shares, strict=True)
    }


def histograms(optimizer: MaskPro) -> dict[str, list[dict[str, int]]]:
    """Each weight's groups by how decided they are, and by what the initial mask kept of them.

    Returns:
        By parameter name ``BINS`` rows: ``bin``, the number of a bin of [0, 1]; ``confidence``, the
        groups whose most likely mask has a probability 1 - 10^-5x with x in it; ``retained``, those
        of whose squared weights the initial mask keeps a share in it; ``changed``, how many of
        these left that mask.
    """
    names = ("confidence", "retained", "changed")
    counts = torch.zeros(len(optimizer.names), len(names), BINS, dtype=torch.float64)
    rows = dict(zip(optimizer.names, counts, strict=True))
    for groups in optimizer.groups():
        mode_GM = distribution.mode(groups.logits_GM, groups.pattern)
        doubt_G = -distribution.log_prob(groups.logits_GM, mode_GM, groups.pattern).expm1()
        nines_G = -doubt_G.clamp(10.0**-_NINES, 1).log10() / _NINES
        square_GM = groups.dense_GM.float().square()
        # Of a group of zeros nothing is lost.
        retained_G = ((square_GM * groups.initial_GM).sum(-1) / square_GM.sum(-1)).nan_to_num(1)
        changed_G = (mode_GM != groups.initial_GM).any(-1)
        for row, values_G in zip(
            rows[groups.name], (nines_G, retained_G, retained_G[changed_G]), strict=True
        ):
            row += _counts(values_G)
    counts = optimizer.over_ranks(counts.flatten(1)).view_as(counts).round().long()
    return {
        layer: [
            {"bin": b, **dict(zip(names, bins, strict=True))}
            for b, bins in enumerate(counts_3B.T.tolist())
        ]
        for layer, counts_3B in zip(optimizer.names, counts, strict=True)
    }


def _counts(values_G: Tensor) -> Tensor:
    """The number of values in each bin, int64 (BINS,) on the CPU."""
    bins_G = (values_G * BINS).long().clamp(0, BINS - 1)
    return bins_G.bincount(minlength=BINS).cpu()
