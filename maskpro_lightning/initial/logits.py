"""Initial logits: far apart where a mask was an easy choice, close together where it was not."""

from __future__ import annotations

import torch
from torch import Tensor

from maskpro_lightning.initial.initializers import blocks
from maskpro_lightning.masks.pattern import NMPattern

# Nothing is beyond doubt, and the initial mask stays the most likely one.
_LEAST, _MOST = 0.2, 3.0


@torch.no_grad()
def graded(
    weight: Tensor, mask: Tensor, pattern: NMPattern, input_dim: int, scale: float
) -> Tensor:
    r"""Logits whose most likely mask is the given one, and which know how close each choice was.

    A weight's place is as sure as the exchange with its best rival on the other side is costly:
    with w the kept and v the pruned one, :math:`s = \sqrt{\max(0, w^2 - v^2)}` in units of its mean
    over the weight, within [0.2, 3]. A kept weight starts at ``scale * (1 + s) / 2``, a pruned one
    at ``scale * (1 - s) / 2``; the gap of two typical ones is ``scale``.

    Args:
        weight: The whole dense weight.
        mask: Its mask, bool, on the same device.
        pattern: The pattern.
        input_dim: The dimension that groups lie along.
        scale: In units of logits.

    Returns:
        float32 in the weight's shape and layout. Where weights are not finite, or all alike, s is
        1 for all.
    """
    logits = torch.empty_like(weight, dtype=torch.float32)
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for values_GM, kept_GM, sure_GM in blocks(pattern, input_dim, weight, mask, logits):
        square_GM = values_GM.float().square()
        least_kept_G1 = square_GM.masked_fill(~kept_GM, torch.inf).amin(-1, keepdim=True)
        most_pruned_G1 = square_GM.masked_fill(kept_GM, 0).amax(-1, keepdim=True)
        cost_GM = torch.where(kept_GM, square_GM - most_pruned_G1, least_kept_G1 - square_GM)
        sure_GM.copy_(cost_GM.clamp(min=0).sqrt())
        total += sure_GM.sum(dtype=torch.float64)
    mean = (total / max(1, weight.numel())).float()
    for kept_GM, logits_GM in blocks(pattern, input_dim, mask, logits):
        sure_GM = (logits_GM / mean).nan_to_num(1).clamp(_LEAST, _MOST)
        logits_GM.copy_(scale / 2 * (1 + torch.where(kept_GM, sure_GM, -sure_GM)))
    return logits
