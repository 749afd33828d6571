"""Powers of two by which numbers of any size come near one, which costs none of their digits."""

from __future__ import annotations

import torch
from torch import Tensor

# Of float32: the bits behind the exponent, and the exponents of the units there are.
_FRACTION, _LEAST, _MOST = 23, 1, 253


def unit_of(size: Tensor) -> Tensor:
    """The largest power of two that is not above a size, in the range of float32.

    What is computed from numbers in this unit by sums and products alone is, to the bit, what it
    would be without, but that it leaves float32 neither above nor below.

    Args:
        size: float32, not negative. Zero and what is not finite give the ends of the range.
    """
    exponents = (size.view(torch.int32) >> _FRACTION).clamp(_LEAST, _MOST)
    return (exponents << _FRACTION).view(torch.float32)
