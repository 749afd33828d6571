"""Statistics of masks and logits during a fit: how undecided they are, and how much they change."""

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
# Probabilities above 1 - 10^-5 count as the same.
_NINES = 5
# With more masks than this, a group's entropy is estimated from its draw, not summed over masks.
_LARGEST_SUM = 128


class MaskChange(Metric):
    """Share of groups, in [0, 1], whose masks differ between two sets of masks."""

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
    """Mean entropy of a group's mask in units of log C(M, N), in [0, 1]; 1 is undecided.

    Exact if a group has at most 128 masks. Otherwise estimated by the mean of -log P of the drawn
    masks, whose expectation is the entropy.
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
    """Statistics of each weight's masks, and of all together under the name ""; a collective.

    Returns:
        By parameter name, each in [0, 1]: ``entropy`` (in units of log C(M, N)), ``changed`` (the
        share of groups whose most likely mask, of the N highest logits, is not the initial one),
        ``churn`` (the share of groups whose mask was changed by the last draw).
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
    # One collective, since torchmetrics' own synchronization needs one for each number.
    sums = optimizer.over_ranks(
        torch.tensor(
            [
                [float(n) for n in (entropy.entropy, changed.changed, redrawn[name], entropy.total)]
                for name, (entropy, changed) in layers.items()
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
    """Counts of each weight's groups in bins of [0, 1]; a collective.

    Returns:
        By parameter name ``BINS`` rows with the bin's number, ``bin``, and numbers of groups:
        ``confidence``, those with x in the bin, where the most likely mask has probability
        1 - 10^-5x; ``retained``, those with the share of their squared weights that the initial
        mask keeps in the bin; ``changed``, those of the latter whose most likely mask is not the
        initial one.
    """
    names = ("confidence", "retained", "changed")
    counts = torch.zeros(len(optimizer.names), len(names), BINS, dtype=torch.float64)
    rows = dict(zip(optimizer.names, counts, strict=True))
    for groups in optimizer.groups():
        mode_GM = distribution.mode(groups.logits_GM, groups.pattern)
        doubt_G = -distribution.log_prob(groups.logits_GM, mode_GM, groups.pattern).expm1()
        nines_G = -doubt_G.clamp(10.0**-_NINES, 1).log10() / _NINES
        square_GM = groups.dense_GM.float().square()
        # A group of zeros loses nothing.
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
