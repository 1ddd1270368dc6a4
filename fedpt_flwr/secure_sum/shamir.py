"""Shamir's secret sharing: a secret in shares, of which any ``threshold`` give it back and fewer say nothing.

Shares are points of a random polynomial over the integers modulo :data:`PRIME` whose value at 0 is the secret
(Shamir 1979, "How to share a secret"). The polynomial is drawn from the operating system, never from a seed.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

PRIME = 2**256 + 297
"""The smallest prime above every secret."""

SECRET_BYTES = 32
SHARE_BYTES = 33


def split(secret: bytes, threshold: int, points: Sequence[int]) -> list[bytes]:
    """A share of a secret for every point.

    Args:
        secret: Of :data:`SECRET_BYTES` bytes.
        threshold: How many shares give the secret back, at least 1.
        points: Where the polynomial is read: different whole numbers above 0, at least ``threshold``.

    Returns:
        A share of :data:`SHARE_BYTES` bytes for each point, in their order.

    Raises:
        ValueError: An argument is out of range.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes, got {len(secret)}")
    if not 1 <= threshold <= len(points):
        raise ValueError(f"the threshold must be from 1 to the {len(points)} shares, got {threshold}")
    if len(set(points)) != len(points) or not all(0 < point < PRIME for point in points):
        raise ValueError("points must be different whole numbers above 0")
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [_value_at(point, coefficients).to_bytes(SHARE_BYTES, "big") for point in points]


def _value_at(point: int, coefficients: Sequence[int]) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % PRIME
    return value


def weights_at_zero(points: Sequence[int]) -> dict[int, int]:
    """Lagrange's weights: with them the value at 0 is a sum over the values at these points.

    They depend on the points alone, so that many secrets that are shared among the same can use them.
    """
    weights = {}
    for point in points:
        above = below = 1
        for other in points:
            if other != point:
                above = above * other % PRIME
                below = below * (other - point) % PRIME
        weights[point] = above * pow(below, -1, PRIME) % PRIME
    return weights


def join(weights: Mapping[int, int], shares: Mapping[int, bytes]) -> bytes:
    """The secret, from as many shares as its threshold; from fewer, or from others, some other secret or none.

    Args:
        weights: Of :func:`weights_at_zero`, for the points of these shares.
        shares: By point.

    Raises:
        ValueError: A share has another length, or these cannot be shares of one secret.
    """
    total = 0
    for point, weight in weights.items():
        share = int.from_bytes(shares[point], "big")
        if len(shares[point]) != SHARE_BYTES or share >= PRIME:
            raise ValueError(f"the share at {point} is none")
        total = (total + weight * share) % PRIME
    if total >= 1 << (8 * SECRET_BYTES):
        raise ValueError("these are not shares of one secret")
    return total.to_bytes(SECRET_BYTES, "big")
