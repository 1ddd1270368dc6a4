"""How far a model gives a secret away that stood in a device's data (Carlini et al. 2019, arXiv:1802.08232).

All that the secret might have been is ranked by the model's probability. Exposure is how many bits of the secret the
rank takes away: ``log2(candidates) - log2(rank)``. A model that knows nothing ranks the true one anywhere, which gives
1.44 bits (``1 / ln 2``) on average; one that learnt it by heart gives all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedpt_flwr.uncertainty import bootstrap_ratio

_SEED = 20_241_001


def rank_of(nats: npt.NDArray[np.float64], secret: int) -> float:
    """The rank of the true candidate, from 1; among equals the middle one.

    Args:
        nats: What each candidate costs the model, ``(candidates,)``.
        secret: The place of the true one.
    """
    return 1.0 + float((nats < nats[secret]).sum()) + (float((nats == nats[secret]).sum()) - 1) / 2


def exposure_bits(rank: float, candidates: int) -> float:
    """Bits of a secret that are given away."""
    return math.log2(candidates) - math.log2(rank)


def exposure(ranks: Sequence[float], candidates: int) -> dict[str, Any]:
    """The exposure of several canaries.

    Args:
        ranks: Of each.
        candidates: For each of them.

    Returns:
        ``value``, the mean in bits; ``ci95``, by the bootstrap over canaries; ``first``, the share of those that are
        the likeliest of all candidates; ``canaries``, how many there are; ``most``, the bits of a whole secret.
    """
    bits = np.asarray([exposure_bits(rank, candidates) for rank in ranks])
    low, high = bootstrap_ratio(bits, np.ones_like(bits), seed=_SEED)
    return {
        "value": float(bits.mean()),
        "ci95": [low, high],
        "first": float(np.mean([rank == 1.0 for rank in ranks])),
        "canaries": len(ranks),
        "most": math.log2(candidates),
    }
