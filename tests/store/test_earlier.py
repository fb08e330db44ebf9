"""What the store has of a batch that is repeated: whether it is known, and the version that it ran at."""

from __future__ import annotations

import pytest
from harness_store import Point, batch, record, sgd

from splitfed.accumulator.accumulator import Accumulator
from splitfed.protocol.messages import GradientRecord
from splitfed.store.earlier import Earlier, find_earlier
from splitfed.store.store import GradientStore


@pytest.fixture
def store(store_url: str) -> GradientStore:
    """An empty store."""
    return GradientStore(store_url, sync="process")


def accumulating(store: GradientStore, keep_versions: int = 16) -> Accumulator:
    """Commits what waits on each step."""
    return Accumulator(Point(), store, sgd(), keep_versions=keep_versions)


def earlier(store: GradientStore, seq: int) -> Earlier:
    """What is known of a batch of client "a"."""
    return find_earlier(store.lineage(), store.pile(), batch(seq))


def test_an_unknown_batch(store: GradientStore) -> None:
    """Neither pending nor closed."""
    accumulating(store)
    assert earlier(store, 3) == Earlier(is_known=False)


def test_pending_batches(store: GradientStore) -> None:
    """The version is in the file; a number that was given up ran nowhere."""
    accumulator = accumulating(store)
    store.pile().create(batch(0), record())
    accumulator.step()
    store.pile().create(batch(1), record(base_version=1))
    store.pile().create(batch(2), GradientRecord("skip", 0, 0.0, 1.0, "", "", {}, []))
    assert [earlier(store, seq) for seq in (1, 2)] == [Earlier(True, 1), Earlier(True, None)]


def test_closed_batches_at_any_distance(store: GradientStore) -> None:
    """Two a commit, one of them a version older: the record of their commit says which is which."""
    accumulator = accumulating(store, keep_versions=64)
    for version in range(20):
        store.pile().create(batch(2 * version), record(base_version=version))
        store.pile().create(batch(2 * version + 1), record(base_version=max(0, version - 1)))
        accumulator.step()
    found = [earlier(store, seq) for seq in range(40)]
    assert all(one.is_known for one in found)
    assert [one.version for one in found[::2]] == list(range(20))
    assert [one.version for one in found[1::2]] == [0, *range(19)]


def test_a_version_that_leaves_the_window_soon_is_none(store: GradientStore) -> None:
    """Of eight versions that are kept, those that have older ones behind them for as long as they may be needed."""
    accumulator = accumulating(store, keep_versions=8)
    for version in range(30):
        store.pile().create(batch(version), record(base_version=version))
        accumulator.step()
    kept = [int(key.rpartition("/")[2].partition("-")[0]) for key in store.blobs.list("body/weights")]
    found = [earlier(store, seq) for seq in range(30)]
    assert all(one.is_known for one in found)
    assert [one.version for one in found] == [None] * (kept[0] + 2) + list(range(kept[0] + 2, 30))


def test_a_batch_that_was_skipped_or_stale(store: GradientStore) -> None:
    """Closed by a commit: one ran nowhere, the other at a version of its own."""
    accumulator = Accumulator(Point(), store, sgd(), max_staleness=1)
    for version in range(3):
        store.pile().create(batch(version), record(base_version=version))
        accumulator.step()
    store.pile().create(batch(3), record(base_version=0))
    store.pile().create(batch(4), GradientRecord("skip", 0, 0.0, 1.0, "", "", {}, []))
    store.pile().create(batch(5), record(base_version=3))
    accumulator.step()
    assert [earlier(store, seq).is_known for seq in (3, 4)] == [True, True]
    assert earlier(store, 4).version is None
