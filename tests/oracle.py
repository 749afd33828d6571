"""Slow, certain answers: by enumeration, in float64 or plain Python, importing nothing under test.

Shape suffixes: ``G`` groups (any leading dimensions), ``M`` group size, ``N`` kept per group,
``C`` masks of one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import permutations, product

import torch
from torch import Tensor


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def top(scores: Sequence[float], n: int) -> list[bool]:
    """Keep the n highest scores; of equal ones the first."""
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return [i in ranked[:n] for i in range(len(scores))]


def keeps_exactly(n: int, m: int, mask: Tensor, input_dim: int = -1) -> bool:
    """Whether every m consecutive entries along ``input_dim`` hold n True ones."""
    rows = mask.movedim(input_dim, -1).flatten(0, -2).tolist()
    return all(
        row[start : start + m].count(True) == n for row in rows for start in range(0, len(row), m)
    )


def sets(n: int, m: int) -> Tensor:
    """Every mask of m places that keeps n, (C, M), the one that keeps the first n first."""
    return torch.tensor([mask for mask in product((True, False), repeat=m) if sum(mask) == n])


def log_prob_by_orders(logits: Sequence[float], kept: Sequence[bool]) -> Tensor:
    """The definition: every order in which the kept weights can leave the urn, one by one."""
    pi = torch.tensor(logits, dtype=torch.float64)
    orders = []
    for order in permutations([i for i, k in enumerate(kept) if k]):
        left = list(range(len(logits)))
        log_p = torch.zeros((), dtype=torch.float64)
        for i in order:
            log_p = log_p + pi[i] - pi[left].logsumexp(0)
            left.remove(i)
        orders.append(log_p)
    return torch.stack(orders).logsumexp(0)


def log_prob(logits_GM: Tensor, kept_GM: Tensor) -> Tensor:
    """The same sum, shared between orders that drew the same weights: 2^N terms instead of N!."""
    logits_GM = logits_GM.double()
    groups, n = logits_GM.shape[:-1], int(kept_GM.sum(-1).max())
    kept_GN = logits_GM[kept_GM].view(*groups, n)
    rest = logits_GM[~kept_GM].view(*groups, -1)

    @cache
    def drawn(these: frozenset[int]) -> Tensor:
        if not these:
            return logits_GM.new_zeros(groups)
        ways = [drawn(these - {last}) + draw(last, these - {last}) for last in these]
        return torch.stack(ways).logsumexp(0)

    def draw(i: int, before: frozenset[int]) -> Tensor:
        urn = [kept_GN[..., j, None] for j in range(n) if j not in before]
        return kept_GN[..., i] - torch.cat([*urn, rest], dim=-1).logsumexp(-1)

    return drawn(frozenset(range(n)))


def score(logits_GM: Tensor, kept_GM: Tensor) -> Tensor:
    """The gradient of the log-probability, by automatic differentiation, (..., M)."""
    logits_GM = logits_GM.detach().double().requires_grad_()
    (gradient_GM,) = torch.autograd.grad(log_prob(logits_GM, kept_GM).sum(), logits_GM)
    return gradient_GM


def probabilities(logits_M: Tensor, n: int) -> Tensor:
    """Probability of each of :func:`sets`, (C,); differentiable."""
    kept_CM = sets(n, len(logits_M))
    return log_prob(logits_M.expand(kept_CM.shape), kept_CM).exp()


def inclusion(logits_M: Tensor, n: int) -> Tensor:
    """Probability that each weight is kept, (M,); differentiable."""
    return probabilities(logits_M, n) @ sets(n, len(logits_M)).double()


def entropy(logits_M: Tensor, n: int) -> Tensor:
    """Entropy of the kept set in nats, a scalar."""
    p_C = probabilities(logits_M, n)
    return -torch.xlogy(p_C, p_C).sum()


def philox(key: tuple[int, int], counter: Sequence[int]) -> list[int]:
    """Philox-4x32-10 of one counter, in Python's exact integers."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        high0, low0 = divmod(c0 * 0xD2511F53, 2**32)
        high1, low1 = divmod(c2 * 0xCD9E8D57, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]
