"""The newest of numbered records is found in few questions, whatever there are and wherever one begins."""

from __future__ import annotations

import math

import pytest

from splitfed.store.search import newest


@pytest.mark.parametrize("count", [*range(20), 1_000, 20_000, 2**17 - 1, 2**17, 2**17 + 1])
def test_the_newest_is_found(count: int) -> None:
    """In at most 2 log₂ n and two questions."""
    asked = []

    def exists(number: int) -> bool:
        asked.append(number)
        return number < count

    assert newest(exists) == count - 1
    assert len(asked) <= 2 * math.log2(count + 1) + 2
    if count:
        assert newest(exists, known=count // 2) == count - 1
