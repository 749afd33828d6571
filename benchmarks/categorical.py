"""MaskLLM's way (arXiv 2409.17481): a categorical distribution over all masks of each group.

Every group has a logit for each of its C(M, N) masks. A step draws, from Gumbel-softmax, weights
of all masks; the group's soft mask is their weighted sum, and gradients reach the logits through
it. Written from the paper's formulas.

Shape suffixes: ``G`` groups, ``C`` masks of a group, ``M`` group size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import AdamW

from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.weights.targets import Target

# The paper's: from the first step to the last, linearly.
_LOGIT_FACTOR, _TEMPERATURE = (100.0, 500.0), (4.0, 0.05)
_LOGIT_SPREAD, _PRIOR_STRENGTH, _KEPT_NORM = 0.01, 3.0, 1e-5


class CategoricalMasks:
    """Learns the logits of all masks of all groups with AdamW, whose rate falls linearly to 0.

    Args:
        targets: The weights, dense, whose gradients are required.
        pattern: The pattern.
        prior: Initial masks by name; a mask's logit starts higher the more it has in common.
        lr: The first learning rate.
        steps: Steps that will be made.
        seed: Seed of the logits and draws.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        pattern: NMPattern,
        prior: Mapping[str, Tensor],
        *,
        lr: float,
        steps: int,
        seed: int,
    ) -> None:
        self._targets, self._pattern, self._steps = targets, pattern, steps
        self._generator = torch.Generator().manual_seed(seed)
        self._sets_CM = pattern.sets().float()
        self._dense = {target.name: target.parameter.detach().clone() for target in targets}
        self._logits = {
            target.name: self._first_logits(pattern.group(prior[target.name], target.input_dim))
            for target in targets
        }
        self._optimizer = AdamW(self._logits.values(), lr=lr)
        self._lr, self._step = lr, 0
        #: Bytes held: dense weights, logits, moments, and the gradients of logits and weights.
        self.bytes = 0

    def step(self, loss: Callable[[], Tensor]) -> None:
        """Learn from a loss, computed once under soft masks and differentiated once."""
        done = self._step / self._steps
        soft = {target.name: self._soft_weight(target, done) for target in self._targets}
        for target in self._targets:
            target.parameter.detach().copy_(soft[target.name].detach())
        loss().backward()
        # The paper's regularizer, -1e-5 * |soft weight|^2, keeps the kept weights large.
        gradients = [
            _gradient(target) - 2 * _KEPT_NORM * soft[target.name].detach()
            for target in self._targets
        ]
        torch.autograd.backward(list(soft.values()), gradients)
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * (1 - done)
        self._optimizer.step()
        self._step += 1
        self.bytes = self._held()
        self._optimizer.zero_grad()
        for target in self._targets:
            target.parameter.grad = None

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        """The most likely mask of each group, bool in the weights' shapes."""
        found = {}
        for target in self._targets:
            mask = torch.empty_like(target.parameter, dtype=torch.bool)
            groups = self._pattern.group(mask, target.input_dim)
            best_G = self._logits[target.name].argmax(-1)
            groups.copy_(self._pattern.sets()[best_G].view_as(groups))
            found[target.name] = mask
        return found

    def _first_logits(self, prior: Tensor) -> Tensor:
        prior_GM = prior.flatten(0, -2).float()
        shape = len(prior_GM), len(self._sets_CM)
        logits_GC = torch.randn(shape, generator=self._generator) * _LOGIT_SPREAD
        common_GC = prior_GM @ self._sets_CM.T
        likeness_GC = common_GC - common_GC.mean(-1, keepdim=True)
        logits_GC += logits_GC.std() * _PRIOR_STRENGTH * likeness_GC
        return logits_GC.requires_grad_()

    def _soft_weight(self, target: Target, done: float) -> Tensor:
        """The dense weight under a drawn soft mask, differentiable in the logits."""
        logits_GC = self._logits[target.name]
        factor, temperature = (a + (b - a) * done for a, b in (_LOGIT_FACTOR, _TEMPERATURE))
        # Minus the logarithm of an exponential variable is Gumbel's.
        noise_GC = torch.empty_like(logits_GC).exponential_(generator=self._generator)
        gumbel_GC = -noise_GC.clamp_min_(torch.finfo(torch.float32).tiny).log()
        share_GC = ((factor * logits_GC + gumbel_GC) / temperature).softmax(-1)
        dense = self._dense[target.name].movedim(target.input_dim, -1)
        soft = dense * (share_GC @ self._sets_CM).view(dense.shape)
        return soft.movedim(-1, target.input_dim)

    def _held(self) -> int:
        moments = (m for state in self._optimizer.state.values() for m in state.values())
        logits = self._logits.values()
        gradients = [tensor.grad for tensor in logits]
        gradients += [target.parameter.grad for target in self._targets]
        tensors = (*self._dense.values(), *logits, *moments, *gradients)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _gradient(target: Target) -> Tensor:
    gradient = target.parameter.grad
    return torch.zeros_like(target.parameter) if gradient is None else gradient
