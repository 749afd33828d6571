"""N:M patterns: N weights are kept in every group of M consecutive ones.

Shape suffixes: ``G`` groups, ``M`` group size, ``N`` kept per group. Groups lie in the last
dimension; all leading dimensions count groups.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

_YAML_BASE = 60


@dataclass(frozen=True)
class NMPattern:
    """Keep ``n`` of every ``m`` consecutive weights along the input dimension.

    ``n`` counts *kept* weights; tools that count pruned ones call our 3:4 "1:4".

    Args:
        n: Kept weights per group, 1 <= n < m.
        m: Group size.

    Raises:
        TypeError: ``n`` or ``m`` is not an integer.
        ValueError: not 1 <= n < m.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        for name, value in (("n", self.n), ("m", self.m)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} of an N:M pattern must be an int, got {value!r}.")
        if not 1 <= self.n < self.m:
            raise ValueError(
                f"The pattern {self.n}:{self.m} keeps {self.n} of every {self.m} weights, but "
                f'1 <= N < M must hold: write "2:4" to keep two of four.'
            )

    @classmethod
    def parse(cls, pattern: str | int | NMPattern) -> NMPattern:
        """Read ``"2:4"``; a pattern passes through.

        YAML 1.1 reads ``2:4`` without quotes as a number of base 60, which is understood, too.

        Raises:
            TypeError: neither a string, such a number nor a pattern.
            ValueError: not of the form "N:M" with 1 <= N < M.
        """
        if isinstance(pattern, cls):
            return pattern
        if isinstance(pattern, int) and not isinstance(pattern, bool):
            n, m = divmod(pattern, _YAML_BASE)
            if not 1 <= n < m:
                raise ValueError(
                    f"{pattern} is not an N:M pattern: write kept weights, a colon and the group "
                    f'size, in quotes, such as "2:4".'
                )
            return cls(n, m)
        if not isinstance(pattern, str):
            raise TypeError(f'A pattern is a string like "2:4", got {pattern!r}.')
        found = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*", pattern, flags=re.ASCII)
        if found is None:
            raise ValueError(
                f"{pattern!r} is not an N:M pattern: write kept weights, a colon and the group "
                f'size, such as "2:4".'
            )
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Share of weights that are zero, 1 - N/M."""
        return 1 - self.n / self.m

    @property
    def num_sets(self) -> int:
        """Number of different masks of one group, C(M, N)."""
        return math.comb(self.m, self.n)

    def sets(self, device: torch.device | None = None) -> Tensor:
        """Every mask of one group in lexicographic order, bool of shape (C(M, N), M)."""
        kept = torch.tensor(list(combinations(range(self.m), self.n)), device=device)
        nothing = torch.zeros(len(kept), self.m, dtype=torch.bool, device=device)
        return nothing.scatter(1, kept, value=True)

    def group(self, tensor: Tensor, input_dim: int = -1) -> Tensor:
        """View a weight as groups: ``(..., inputs, ...)`` to ``(..., inputs / M, M)``.

        Groups are numbered by their place in this view, flattened.

        Args:
            tensor: A weight, or anything of its shape. Never copied: writing into the view
                writes into ``tensor``.
            input_dim: The dimension that the layer sums over.

        Raises:
            ValueError: M does not divide the size of ``input_dim``.
        """
        size = tensor.shape[input_dim]
        if size % self.m:
            raise ValueError(
                f"A dimension of {size} cannot be cut into groups of {self.m} (pattern {self})."
            )
        groups: Tensor = tensor.movedim(input_dim, -1).unflatten(-1, (size // self.m, self.m))
        return groups

    def top(self, scores_GM: Tensor) -> Tensor:
        """The N highest scores of each group, as a bool mask; of equal scores the first is kept.

        Args:
            scores_GM: Shape (..., M), any real dtype, no NaN.
        """
        # A stable sort settles ties alike on every device, unlike topk. Up to M = 16, counting the
        # rivals of each weight gives the same result several times faster.
        if self.m > 16:
            order = scores_GM.sort(dim=-1, descending=True, stable=True).indices
            kept = torch.zeros_like(scores_GM, dtype=torch.bool)
            return kept.scatter_(-1, order[..., : self.n], True)
        rivals = torch.zeros_like(scores_GM, dtype=torch.uint8)
        for j in range(self.m):
            score = scores_GM[..., j : j + 1]
            rivals[..., :j] += score > scores_GM[..., :j]
            rivals[..., j + 1 :] += score >= scores_GM[..., j + 1 :]
        return rivals < self.n

    def check(self, mask: Tensor, input_dim: int = -1, name: str = "mask") -> None:
        """Refuse a mask that does not keep exactly N of every M.

        Args:
            mask: A bool mask in the weight's shape.
            input_dim: The dimension that the layer sums over.
            name: What the error message calls it.

        Raises:
            TypeError: ``mask`` is not bool.
            ValueError: M does not divide the inputs, or a group has another number of kept
                weights; names the first such group.
        """
        if mask.dtype != torch.bool:
            raise TypeError(f"{name} must be a bool tensor, got {mask.dtype}.")
        kept_G = self.group(mask, input_dim).sum(-1, dtype=torch.int32).flatten()
        wrong_G = kept_G != self.n
        if wrong_G.any():
            first = int(wrong_G.nonzero()[0])
            raise ValueError(
                f"{name} is not {self}: group {first} keeps {int(kept_G[first])} of {self.m} "
                f"weights ({int(wrong_G.sum())} of {kept_G.numel()} groups are wrong)."
            )
