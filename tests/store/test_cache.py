"""The bounded cache: keeps the newest, forgets the rest, never more than it may."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from splitfed.store.cache import Bounded


@pytest.mark.parametrize("most", [1, 2, 5])
def test_it_keeps_the_most_recent(most: int) -> None:
    """Of ten entries the last `most` are there, and no other."""
    cache: Bounded[int, str] = Bounded(most)
    for key in range(10):
        cache.put(key, str(key))
    assert [key for key in range(10) if cache.get(key) is not None] == list(range(10 - most, 10))


def test_what_is_read_or_written_again_is_recent() -> None:
    """`get` and `put` both move an entry to the front."""
    cache: Bounded[str, int] = Bounded(2)
    cache.put("a", 1)
    cache.put("b", 2)
    cache.get("a")
    cache.put("c", 3)
    assert (cache.get("a"), cache.get("b")) == (1, None)
    cache.put("a", 4)
    cache.put("d", 5)
    assert (cache.get("a"), cache.get("c")) == (4, None)


def test_none_is_kept_if_none_may_be() -> None:
    """With `most=0` a put answers its value and keeps nothing."""
    cache: Bounded[str, int] = Bounded(0)
    assert cache.put("a", 1) == 1
    assert cache.get("a") is None


def test_an_entry_can_be_taken_out() -> None:
    """Once; the second time there is none."""
    cache: Bounded[str, int] = Bounded(2)
    cache.put("a", 1)
    assert (cache.pop("a"), cache.pop("a"), cache.get("a")) == (1, None, None)


def test_threads_share_it() -> None:
    """Eight threads that put, get and pop raise nothing and leave no more than the bound."""
    cache: Bounded[int, int] = Bounded(4)

    def work(start: int) -> None:
        for key in range(start, start + 300):
            cache.put(key % 11, key)
            cache.get((key + 1) % 11)
            cache.pop((key + 2) % 11)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert sum(cache.get(key) is not None for key in range(11)) <= 4
