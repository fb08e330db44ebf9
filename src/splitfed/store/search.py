"""The newest of numbered records that are never deleted, found without a listing."""

from __future__ import annotations

from collections.abc import Callable


def newest(exists: Callable[[int], bool], known: int = -1) -> int:
    """The last number of those that exist, which follow each other without a gap.

    Beyond the one that is known the reach is doubled until nothing is there, and what lies between
    is halved: 2 log₂ n questions for n records.

    Args:
        exists: Whether there is a record of that number.
        known: One that exists, or the number before the first.
    """
    reach = 1
    while exists(known + reach):
        reach *= 2
    low = known + reach // 2
    high = known + reach
    while high - low > 1:
        middle = (low + high) // 2
        if exists(middle):
            low = middle
        else:
            high = middle
    return low
