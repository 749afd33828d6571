r"""The probability that a weight is kept, and the gradient of the expected value of the kept ones.

A draw is a walk over sets. After the set B, the next weight is a with probability
:math:`s_a(B)`: softmax(logits) over the weights not in B. Let :math:`c_a` be the value of keeping
a, :math:`f(B)` the probability that the walk visits B, and :math:`V(B)` the expected value of the
draws that remain after B:

.. math::
    P(a \in S) &= \sum_{B \not\ni a} f(B) \, s_a(B), \qquad
    V(B) = \sum_{a \notin B} s_a(B) \, (c_a + V(B + a)) \\
    \nabla_a V(\emptyset) &= \sum_{B \not\ni a} f(B) \, s_a(B) \, (c_a + V(B + a) - V(B))

This is the policy gradient of a walk, exact to rounding. Large patterns have too many sets of
fewer than N weights (8:16 has 26,333). For these, a draw is a race of clocks (see
``distribution``), and

.. math::
    \nabla_a = \sum_{b \neq a} (c_a - c_b) K_{ab}, \qquad
    K_{ab} = \int_0^\infty t \, \phi_a \phi_b \, P(\text{N - 1 of the others have rung by } t) \, dt

with :math:`\phi` the densities of the clocks' times: a difference of values counts as much as a
and b compete for the last place. The integral is a sum over nodes in log-time.

Shape suffixes: ``M`` group size, ``G`` groups, ``B`` sets of one size, ``A`` weights not in a set,
``K`` nodes, ``N`` the number of clocks that have rung, 0 to N - 1.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import combinations

import torch
from torch import Tensor

from maskpro_lightning.masks import columns
from maskpro_lightning.masks.pattern import NMPattern

# With more sets than this the quadrature is faster than the walk.
_MOST_SETS = 300
# Trapezoids in log-time converge exponentially in 1 / step: the error is 6e-8 for 8:16. Even less
# lies right of the last node, 2.5 after the peak at log(N + 1).
_NODE_STEP = 1 / 3


def probabilities(logits_GM: Tensor, pattern: NMPattern) -> Tensor:
    """Probability that each weight is kept, (..., M); sums to N. Differentiable.

    Args:
        logits_GM: Real (..., M).
        pattern: The pattern.
    """
    logits_MG = _groups_last(logits_GM)
    if _walks(pattern):
        kept_MG = _walk_probabilities(logits_MG, pattern)
    else:
        kept_MG = torch.stack(
            [_race_probability(logits_MG, j, pattern.n) for j in range(pattern.m)]
        )
    return _groups_first(kept_MG, logits_GM)


def gradient(logits_GM: Tensor, values_GM: Tensor, pattern: NMPattern) -> Tensor:
    """Gradient of the sum of values times :func:`probabilities` in the logits, (..., M).

    It sums to zero over a group. Exact to rounding where a group has at most 300 sets of fewer
    than N weights (all patterns with M <= 8 and all with N <= 2); else by quadrature, with an error
    below 1e-6 of the largest difference of values.

    Args:
        logits_GM: Real (..., M).
        values_GM: The value of keeping each weight, (..., M).
        pattern: The pattern.
    """
    logits_MG, values_MG = _groups_last(logits_GM), _groups_last(values_GM)
    if pattern.n <= 2 and _walks(pattern):
        columns_M = columns.inclusion_gradient(logits_MG.unbind(), values_MG.unbind(), pattern.n)
        return _groups_first(torch.stack(columns_M), logits_GM)
    gradient_of = _walk_gradient if _walks(pattern) else _race_gradient
    return _groups_first(gradient_of(logits_MG, values_MG, pattern), logits_GM)


def _groups_last(tensor_GM: Tensor) -> Tensor:
    real_GM = tensor_GM if tensor_GM.dtype == torch.float64 else tensor_GM.float()
    return real_GM.movedim(-1, 0).reshape(real_GM.shape[-1], -1)


def _groups_first(tensor_MG: Tensor, like_GM: Tensor) -> Tensor:
    return tensor_MG.T.reshape(like_GM.shape)


# The walk


def _walks(pattern: NMPattern) -> bool:
    return sum(math.comb(pattern.m, k) for k in range(pattern.n)) <= _MOST_SETS


@cache
def _steps(n: int, m: int) -> list[tuple[Tensor, Tensor]]:
    """The steps of the walk from the sets of 0, 1, … N - 1 weights, in lexicographic order.

    Returns:
        Pairs of int64 (B, A): the weights not in each set, and the number of the set that each of
        them leads to, among the sets of the next size.
    """
    steps = []
    for size in range(n):
        number = {kept: i for i, kept in enumerate(combinations(range(m), size + 1))}
        left = [[a for a in range(m) if a not in kept] for kept in combinations(range(m), size)]
        following = [
            [number[tuple(sorted((*kept, a)))] for a in free]
            for kept, free in zip(combinations(range(m), size), left, strict=True)
        ]
        steps.append((torch.tensor(left), torch.tensor(following)))
    return steps


def _shares(logits_MG: Tensor, pattern: NMPattern) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each size's steps on the logits' device, with the shares of the next draw, (B, A, G)."""
    steps = [tuple(table.to(logits_MG.device) for table in s) for s in _steps(pattern.n, pattern.m)]
    return [(left, following, logits_MG[left].softmax(1)) for left, following in steps]


def _walk_probabilities(logits_MG: Tensor, pattern: NMPattern) -> Tensor:
    kept_MG = torch.zeros_like(logits_MG)
    through_BG = torch.ones_like(logits_MG[:1])
    for left_BA, following_BA, share_BAG in _shares(logits_MG, pattern):
        flow_BAG = through_BG[:, None] * share_BAG
        kept_MG = kept_MG.index_add(0, left_BA.flatten(), flow_BAG.flatten(0, 1))
        through_BG = _collect(flow_BAG, following_BA)
    return kept_MG


def _walk_gradient(logits_MG: Tensor, values_MG: Tensor, pattern: NMPattern) -> Tensor:
    shares = _shares(logits_MG, pattern)
    surpluses = []  # of each step over what its set is worth, (B, A, G)
    worth_BG: Tensor | None = None
    for left_BA, following_BA, share_BAG in reversed(shares):
        step_BAG = values_MG[left_BA]
        if worth_BG is not None:
            step_BAG += worth_BG[following_BA]
        worth_BG = (share_BAG * step_BAG).sum(1)
        surpluses.append(step_BAG.sub_(worth_BG[:, None]))
    gradient_MG = torch.zeros_like(values_MG)
    through_BG = torch.ones_like(values_MG[:1])
    for left_BA, following_BA, share_BAG in shares:
        flow_BAG = share_BAG.mul_(through_BG[:, None])
        moved_BAG = surpluses.pop().mul_(flow_BAG)
        gradient_MG.index_add_(0, left_BA.flatten(), moved_BAG.flatten(0, 1))
        if surpluses:
            through_BG = _collect(flow_BAG, following_BA)
    return gradient_MG


def _collect(flow_BAG: Tensor, following_BA: Tensor) -> Tensor:
    """The probability that the walk visits each set of the next size, (B, G)."""
    sets = int(following_BA.max()) + 1
    through_BG = flow_BAG.new_zeros(sets, flow_BAG.shape[-1])
    return through_BG.index_add(0, following_BA.flatten(), flow_BAG.flatten(0, 1))


# The race


def _race_gradient(logits_MG: Tensor, values_MG: Tensor, pattern: NMPattern) -> Tensor:
    # Time is in units of the clock with the N-th highest logit: clocks compete for the last place
    # only around the time that it rings.
    log_rate_MG = logits_MG - logits_MG.topk(pattern.n, dim=0).values[-1]
    gradient_MG = torch.zeros_like(logits_MG)
    for y in _nodes(-9, pattern.n):  # earlier, two clocks ring with probability below e^-18
        x_MG = (log_rate_MG + y).clamp(max=5).exp()
        silent_MG = (-x_MG).exp()
        rung_MG = -torch.expm1(-x_MG)
        ringing_MG = x_MG * silent_MG
        # A rival of the clock that is left out counts as 1, and weighted by its value.
        rivals_2MG = torch.stack([ringing_MG, ringing_MG * values_MG])
        against_2MG = _one_rival(silent_MG, rung_MG, rivals_2MG, pattern.n)
        gradient_MG += _NODE_STEP * ringing_MG * (values_MG * against_2MG[0] - against_2MG[1])
    return gradient_MG


def _one_rival(silent_MG: Tensor, rung_MG: Tensor, rivals_2MG: Tensor, n: int) -> Tensor:
    """For each clock a, the weighted sum over its rivals b of P(N - 1 of the others have rung).

    Args:
        silent_MG: Probability that a clock has not rung.
        rung_MG: Probability that it has.
        rivals_2MG: Two sets of weights for the rivals.
        n: N.

    Returns:
        The sums for both sets of weights, (2, M, G).
    """
    m, groups = silent_MG.shape

    def with_clock(count_3NG: Tensor, i: int) -> Tensor:
        """The distribution of the number of rung clocks, without a rival and with either weight."""
        more_3NG = count_3NG * silent_MG[i]
        more_3NG[:, 1:] += count_3NG[:, :-1] * rung_MG[i]
        more_3NG[1:] += count_3NG[0] * rivals_2MG[:, i, None]
        return more_3NG

    nothing_3NG = silent_MG.new_zeros(3, n, groups)
    nothing_3NG[0, 0] = 1
    before = [nothing_3NG]
    for i in range(m - 1):
        before.append(with_clock(before[-1], i))
    after_3NG = nothing_3NG
    against_2MG = torch.empty_like(rivals_2MG)
    for i in range(m - 1, -1, -1):
        first_3NG, last_3NG = before.pop(), after_3NG.flip(1)
        against_2MG[:, i] = (first_3NG[1:] * last_3NG[0] + first_3NG[0] * last_3NG[1:]).sum(1)
        after_3NG = with_clock(after_3NG, i)
    return against_2MG


def _race_probability(logits_MG: Tensor, j: int, n: int) -> Tensor:
    """P(fewer than n other clocks ring before clock j), (G)."""
    total_G = torch.zeros_like(logits_MG[0])
    ahead_MG = logits_MG - logits_MG[j]
    for y in _nodes(-18, n):
        rung_MG = -torch.expm1(-(ahead_MG + y).clamp(max=5).exp())
        # Distribution of the number of clocks that have rung, one clock at a time.
        count_G = [torch.ones_like(total_G)] + [torch.zeros_like(total_G)] * (n - 1)
        for i in range(len(logits_MG)):
            if i != j:
                rung_G = rung_MG[i]
                count_G = [
                    count * (1 - rung_G) + (fewer * rung_G if fewer is not None else 0)
                    for count, fewer in zip(count_G, [None, *count_G[:-1]], strict=True)
                ]
        total_G = total_G + sum(count_G) * (_NODE_STEP * math.exp(y - math.exp(y)))
    return total_G


def _nodes(first: float, n: int) -> list[float]:
    count = math.ceil((math.log(n + 1) + 2.5 - first) / _NODE_STEP)
    return [first + _NODE_STEP * k for k in range(count + 1)]
