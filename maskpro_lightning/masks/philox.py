"""Random numbers that are a function of a key and a counter, not of a generator's history.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), written
with tensor operations, gives the same numbers on every device and for every split of the counters
over processes. So ranks need not send each other masks: each draws the same ones.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Key = tuple[int, int] | tuple[Tensor, Tensor]


def key_of(*parts: object) -> tuple[int, int]:
    """A Philox key, two 32-bit words, from anything that prints, such as a seed and a name."""
    digest = blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox(
    key: Key, counter: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words for each counter.

    Args:
        key: Two 32-bit words, as numbers or as int64 scalars.
        counter: Four int64 tensors of broadcastable shapes, each value in [0, 2^32).

    Returns:
        Four int64 tensors of the broadcast shape, each value uniform in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 holds a product modulo 2^64, the sign bit included. A word's upper 32 bits are cut
        # off before it is multiplied.
        product0, product1 = (c0 & _LOW) * _MULTIPLIERS[0], (c2 & _LOW) * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1, (product0 >> 32) ^ c3 ^ k1, product0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0 & _LOW, c1 & _LOW, c2 & _LOW, c3 & _LOW


def exponential(key: Key, step: Tensor, groups_G: Tensor, m: int) -> Tensor:
    """Standard exponential noise for whole groups, a function of its arguments alone.

    Args:
        key: Two 32-bit words, see :func:`key_of`.
        step: int64 scalar in [0, 2^48); the draw's number.
        groups_G: int64 (G,), the groups' numbers.
        m: Numbers per group.

    Returns:
        float32 (G, m), each value in (2^-33, 17). The smallest values, which win a draw, have
        full relative precision.
    """
    return torch.stack(exponential_columns(key, step, groups_G, m), dim=-1)


def exponential_columns(key: Key, step: Tensor, groups_G: Tensor, m: int) -> list[Tensor]:
    """The ``m`` columns of :func:`exponential`, each of the shape of ``groups_G``."""
    uniforms = [(word.float() + 0.5) * 2**-32 for word in random_words(key, step, groups_G, m)]
    return [-torch.log1p(-uniform.clamp(max=1 - 2**-24)) for uniform in uniforms]


def random_words(
    key: Key, step: Tensor, groups_G: Tensor, m: int, *, stream: int | Tensor = 0
) -> list[Tensor]:
    """Random 32-bit words for whole groups, ``m`` int64 columns of the shape of ``groups_G``.

    Args:
        key: Two 32-bit words.
        step: int64 scalar in [0, 2^48).
        groups_G: int64 (G,), the groups' numbers.
        m: Words per group.
        stream: 0 for draws; up to 2^16 - 1 for other numbers of the same step, which are
            independent of them.
    """
    blocks = -(-m // 4)
    found: list[Tensor] = []
    for block in range(blocks):
        place = groups_G * blocks + block
        high = step >> 32 ^ stream << 16  # no step has these bits
        found += philox(key, (place & _LOW, place >> 32, step & _LOW, high))
    return found[:m]
