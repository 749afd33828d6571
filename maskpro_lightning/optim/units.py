"""Powers of two that bring numbers of any size near 1 without a loss of digits."""

from __future__ import annotations

import torch
from torch import Tensor

# Of float32: bits of the fraction; the least and the largest biased exponent of a unit.
_FRACTION, _LEAST, _MOST = 23, 1, 253


def unit_of(size: Tensor) -> Tensor:
    """The largest power of two that is not above a size, in the range of float32.

    A division by it is exact. So sums and products of numbers in this unit have the digits that
    they would have without it, but neither overflow nor underflow.

    Args:
        size: float32, not negative. Zero gives the least unit, infinity and NaN the largest.
    """
    exponents = (size.view(torch.int32) >> _FRACTION).clamp(_LEAST, _MOST)
    return (exponents << _FRACTION).view(torch.float32)
