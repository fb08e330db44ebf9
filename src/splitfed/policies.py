"""What staleness costs: the weight s(τ) of a gradient that was computed τ commits ago.

A weight damps a gradient and leaves the denominator of the mean alone (see `averaging`), so that one stale batch among
fresh ones moves the model less instead of being blown up to full size again.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from splitfed.errors import InputError

StalenessWeight = Callable[[int], float]


def constant(staleness: int) -> float:
    """s(τ) = 1: a stale gradient counts like a fresh one.

    Raises:
        InputError: the staleness is negative.
    """
    _check(staleness)
    return 1.0


def inverse_sqrt(staleness: int) -> float:
    """s(τ) = 1/√(1+τ), the weight of FedBuff (Nguyen et al. 2022, arXiv 2106.06639, section 5).

    Raises:
        InputError: the staleness is negative.
    """
    _check(staleness)
    return 1.0 / math.sqrt(1 + staleness)


def _check(staleness: int) -> None:
    if staleness < 0:
        raise InputError(f"staleness {staleness} isn't allowed: expected 0 or more commits")
