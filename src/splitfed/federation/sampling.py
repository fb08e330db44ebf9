"""Who is asked to train in a round: a function of the seed, the round's number and the ids, and of nothing else.

Each client's ticket is a hash of the three, and the lowest tickets win. So any coordinator draws the same clients, in
any version of Python; and a client that joins displaces at most one other from a round's sample.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

from splitfed.errors import InputError


def sample(ids: Iterable[str], count: int, seed: int, number: int) -> tuple[str, ...]:
    """Draw clients without replacement, each equally likely.

    Args:
        ids: The clients to draw from.
        count: How many; all if there are fewer.
        seed: The run's seed.
        number: The round's number.

    Returns:
        The drawn ids, sorted.
    """

    def ticket(client_id: str) -> bytes:
        return hashlib.sha256(f"{seed}/{number}/{client_id}".encode()).digest()

    return tuple(sorted(sorted(set(ids), key=ticket)[:count]))


def sample_size(clients_per_round: int | float | None, known: int, least: int) -> int:
    """How many clients to draw.

    Args:
        clients_per_round: A number, a share of those known (above 0, at most 1), or `None` for all.
        known: How many there are.
        least: How many there must be at least.
    """
    if clients_per_round is None:
        return known
    if isinstance(clients_per_round, int):
        return min(clients_per_round, known)
    return min(known, max(least, math.ceil(clients_per_round * known - 1e-9)))


def check_sample_size(clients_per_round: int | float | None, least: int) -> None:
    """Refuse a setting that can't be meant.

    Raises:
        InputError: not a number of at least `least`, nor a share above 0 and at most 1, nor `None`.
    """
    if clients_per_round is None:
        return
    is_count = type(clients_per_round) is int and clients_per_round >= least
    is_share = isinstance(clients_per_round, float) and 0 < clients_per_round <= 1
    if not is_count and not is_share:
        raise InputError(
            f"clients_per_round is {clients_per_round!r}: expected an integer of at least min_clients={least}, a share "
            "such as 0.1, or None for all"
        )
