r"""The distribution over N:M masks: N draws without replacement from softmax(logits), per group.

Write :math:`w_i = e^{\pi_i}` for the weights of one group, ``S`` for the kept set and
:math:`q = \sum_{j \notin S} w_j`. Drawing without replacement is a race of independent clocks,
:math:`T_i \sim \mathrm{Exp}(w_i)`: the first N to ring are kept. Everything below follows from

.. math:: P(S) = \int_0^\infty q e^{-qt} \prod_{i \in S} (1 - e^{-w_i t}) \, dt

with :math:`q e^{-qt}` the density of the first ring outside ``S``. All terms are positive and only
the ratios :math:`a_i = w_i / q` enter. So no digits are lost in a group that has all but decided
(one ratio at :math:`10^{10}`); computing :math:`1 - p_i` by subtraction would lose them.

Shape suffixes: ``G`` groups (any leading dimensions), ``M`` group size, ``K`` quadrature nodes,
``C`` masks of one group. Arithmetic is float32 unless the logits are float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from maskpro_lightning.masks import columns, philox
from maskpro_lightning.masks.pattern import NMPattern

# Up to here 2^N subsets are cheaper than the quadrature.
_LARGEST_N_BY_ORDERS = 8
# Ratios are cut off here: a larger one changes a score by less than e^-27 and could overflow.
_LARGEST_LOG_RATIO = 27.0
# Trapezoids in log-time converge exponentially in 1 / step. Left of -18 lies less than e^-18 of
# the first ring's probability.
_NODE_STEP = 0.25
_FIRST_NODE = -18.0


def sample(logits_GM: Tensor, exponential_GM: Tensor, pattern: NMPattern) -> Tensor:
    """Draw one mask per group: the first N of a race of clocks.

    Args:
        logits_GM: Real (..., M).
        exponential_GM: Standard exponential noise of the same shape.
        pattern: The pattern; M is the size of the last dimension.

    Returns:
        bool (..., M), exactly N kept per group.
    """
    logits_M, noise_M = _real(logits_GM).unbind(-1), exponential_GM.unbind(-1)
    return torch.stack(columns.winners(logits_M, noise_M, pattern.n), dim=-1).bool()


def mode(logits_GM: Tensor, pattern: NMPattern) -> Tensor:
    """The most likely mask of each group, bool (..., M): the N highest logits."""
    return pattern.top(logits_GM)


def log_prob(logits_GM: Tensor, kept_GM: Tensor, pattern: NMPattern) -> Tensor:
    """Log-probability of each group's kept set, float (...).

    Args:
        logits_GM: Real (..., M).
        kept_GM: bool (..., M), exactly N kept per group.
        pattern: The pattern.
    """
    log_ratio_GM, _ = _against_the_rest(_real(logits_GM), kept_GM)
    if pattern.n > _LARGEST_N_BY_ORDERS:
        nodes = _race(log_ratio_GM, kept_GM, pattern)
        return torch.stack([value_G for _, value_G in nodes]).logsumexp(0)
    ahead, _ = _orders(_kept_ratios(log_ratio_GM, kept_GM, pattern.n))
    return logsigmoid(log_ratio_GM).masked_fill(~kept_GM, 0).sum(-1) + ahead[-1].log()


def score(logits_GM: Tensor, kept_GM: Tensor, pattern: NMPattern) -> Tensor:
    """The exact gradient of :func:`log_prob` with respect to the logits, (..., M).

    It sums to zero over a group, and its expectation over masks is zero. Exact to rounding for
    N <= 8, by a sum over 2^N subsets; beyond, by quadrature (error below 1e-6).

    Args:
        logits_GM: Real (..., M).
        kept_GM: bool (..., M), exactly N kept per group.
        pattern: The pattern.
    """
    logits_GM = _real(logits_GM)
    if pattern.n <= min(2, _LARGEST_N_BY_ORDERS):
        flags = kept_GM.to(logits_GM.dtype).unbind(-1)
        return torch.stack(columns.score(logits_GM.unbind(-1), flags, pattern.n), dim=-1)
    log_ratio_GM, share_GM = _against_the_rest(logits_GM, kept_GM)
    if pattern.n <= _LARGEST_N_BY_ORDERS:
        gain_GN = _orders_score(_kept_ratios(log_ratio_GM, kept_GM, pattern.n))
        gain_GM = gain_GN.gather(-1, _slots(kept_GM).clamp(0, pattern.n - 1))
    else:
        gain_GM = _race_score(log_ratio_GM, kept_GM, pattern)
    gain_GM = gain_GM * kept_GM.to(gain_GM.dtype)
    return gain_GM - share_GM * gain_GM.sum(-1, keepdim=True)


def entropy(logits_GM: Tensor, pattern: NMPattern) -> Tensor:
    """Entropy of each group's mask, (...), in nats (by natural logarithms), at most log C(M, N).

    A sum over all C(M, N) masks of a group: 6 for 2:4, 70 for 4:8, 12870 for 8:16.
    """
    logits_GM = _real(logits_GM)
    total_G = logits_GM.new_zeros(logits_GM.shape[:-1])
    for kept_M in pattern.sets(logits_GM.device):
        log_p_G = log_prob(logits_GM, kept_M.expand_as(logits_GM), pattern)
        total_G -= torch.special.xlogy(log_p_G.exp(), log_p_G.exp())
    return total_G


def gap_information(pattern: NMPattern, logit_scale: float) -> float:
    """Fisher information of the gap between a kept and a pruned logit before anything is learned.

    That is the mean square of the difference of their scores, where kept logits are ``logit_scale``
    and pruned ones 0. Estimated from 2^15 draws, always the same ones.
    """
    noise_GM = philox.exponential((0, 0), torch.tensor(0), torch.arange(2**15), pattern.m)
    fresh_GM = (torch.arange(pattern.m) < pattern.n).float().expand_as(noise_GM) * logit_scale
    score_GM = score(fresh_GM, sample(fresh_GM, noise_GM, pattern), pattern)
    kept_GN, pruned_GP = score_GM[:, : pattern.n], score_GM[:, pattern.n :]
    gap_GNP = kept_GN[:, :, None] - pruned_GP[:, None, :]
    return float(gap_GNP.square().mean())


def _real(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _against_the_rest(logits_GM: Tensor, kept_GM: Tensor) -> tuple[Tensor, Tensor]:
    """log(w_i / q) of every weight, and w_j / q of those outside the kept set (else zero)."""
    ahead_GM = logits_GM - logits_GM.masked_fill(kept_GM, -math.inf).amax(-1, keepdim=True)
    rest_GM = ahead_GM.masked_fill(kept_GM, -math.inf).exp()
    q_G1 = rest_GM.sum(-1, keepdim=True)
    return ahead_GM - q_G1.log(), rest_GM / q_G1


def _slots(kept_GM: Tensor) -> Tensor:
    """The number of each kept weight among its group's kept ones, from 0; int64 (..., M)."""
    return kept_GM.cumsum(-1) - 1


def _kept_ratios(log_ratio_GM: Tensor, kept_GM: Tensor, n: int) -> Tensor:
    """The ratios of the kept weights, in order, (..., N)."""
    ratio_GM = log_ratio_GM.clamp(max=_LARGEST_LOG_RATIO).exp()
    slot_GM = _slots(kept_GM).masked_fill(~kept_GM, n)  # slot N collects the pruned weights
    ratio_GN = ratio_GM.new_zeros((*ratio_GM.shape[:-1], n + 1))
    return ratio_GN.scatter_(-1, slot_GM, ratio_GM)[..., :n]


def _orders(ratio_GN: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Sum over the orders in which the kept weights can be drawn, subset by subset.

    R(B) = 1 + the ratios of the kept weights not in B is what remains once B is drawn. Then
    f(B) = sum over a in B of f(B - a) (1 + a) / R(B - a), and P(S) is f(S) times the product of
    a / (1 + a). Every term lies in [0, 1] and f(S) in [1 / N!, N!].

    Returns:
        f and R, lists over the 2^N subsets as bit masks.
    """
    ratios = ratio_GN.unbind(-1)
    everything = 2 ** len(ratios) - 1
    remains = [torch.ones_like(ratios[0])] * (everything + 1)
    for drawn in range(everything - 1, -1, -1):
        next_ = (~drawn & (drawn + 1)).bit_length() - 1
        remains[drawn] = remains[drawn | 1 << next_] + ratios[next_]
    ahead = [torch.ones_like(ratios[0])] * (everything + 1)
    for drawn in range(1, everything + 1):
        before = [
            ahead[drawn ^ 1 << i] * (1 + ratio) / remains[drawn ^ 1 << i]
            for i, ratio in enumerate(ratios)
            if drawn >> i & 1
        ]
        ahead[drawn] = torch.stack(before).sum(0)
    return ahead, remains


def _orders_score(ratio_GN: Tensor) -> Tensor:
    """d log P / d logit of the kept weights, (..., N): 1 - the sum of each one's expected shares.

    After the set B, a weight not drawn yet has the share a / R(B) of the next draw. Given S, its
    first draws were B with probability f(B) b(B) / f(S), where b(B) sums over the orders of the
    draws after B.
    """
    ahead, remains = _orders(ratio_GN)
    ratios = ratio_GN.unbind(-1)
    behind = [torch.ones_like(ratios[0])] * len(ahead)
    share = [torch.zeros_like(ratios[0])] * len(ratios)
    for drawn in range(len(ahead) - 2, -1, -1):
        left = [i for i in range(len(ratios)) if not drawn >> i & 1]
        follows = sum((1 + ratios[i]) * behind[drawn | 1 << i] for i in left)
        behind[drawn] = follows / remains[drawn]
        came_first = ahead[drawn] * behind[drawn] / (ahead[-1] * remains[drawn])
        for i in left:
            share[i] = share[i] + came_first
    return 1 - torch.stack(share, dim=-1) * ratio_GN


def _race(
    log_ratio_GM: Tensor, kept_GM: Tensor, pattern: NMPattern
) -> Iterator[tuple[Tensor, Tensor]]:
    """The integral of P(S) at each node of log-time y = log(q t).

    Yields:
        log x_i = log(w_i t), (..., M), and the logarithm of the node's share of P(S), (...).
    """
    for y in _nodes(pattern.n):
        log_x_GM = log_ratio_GM + y
        rung_GM = _log_rung(log_x_GM).masked_fill(~kept_GM, 0)
        yield log_x_GM, rung_GM.sum(-1) + (y - math.exp(y) + math.log(_NODE_STEP))


def _race_score(log_ratio_GM: Tensor, kept_GM: Tensor, pattern: NMPattern) -> Tensor:
    """d log P / d logit: E[x_i / (e^x_i - 1)], x_i = w_i T, T the first ring outside S, given S."""
    nodes = list(_race(log_ratio_GM, kept_GM, pattern))
    weight_KG = torch.stack([value_G for _, value_G in nodes]).softmax(0)
    gain_GM = torch.zeros_like(log_ratio_GM)
    for (log_x_GM, _), weight_G in zip(nodes, weight_KG, strict=True):
        gain_GM += weight_G[..., None] * _bernoulli(log_x_GM)
    return gain_GM


def _nodes(n: int) -> list[float]:
    # N slow clocks move the integrand's peak to log(N + 1); 2.5 beyond the peak it has vanished.
    count = math.ceil((math.log(n + 1) + 2.5 - _FIRST_NODE) / _NODE_STEP)
    return [_FIRST_NODE + _NODE_STEP * k for k in range(count + 1)]


def _log_rung(log_x: Tensor) -> Tensor:
    """log(1 - exp(-x)), the log-probability that a clock has rung."""
    # Far below 0 the expression is log x, and x itself would underflow.
    return torch.where(log_x < -80, log_x, (-torch.expm1(-log_x.clamp(min=-80).exp())).log())


def _bernoulli(log_x: Tensor) -> Tensor:
    """x / (e^x - 1), which falls from 1 to 0."""
    x = log_x.clamp(-80, 4.4).exp()  # outside it is 1 and 0 to float32 precision
    return x / torch.expm1(x)
