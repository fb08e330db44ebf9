"""What a commit costs follows what is live: not how long the run is, nor how many clients there ever were."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from harness_store import Hooked, Nth, Point, again, batch, drain, hooked, record, sgd

from splitfed.accumulator.accumulator import Accumulator
from splitfed.errors import CorruptedError
from splitfed.protocol.ids import BatchId
from splitfed.store.store import GradientStore
from splitfed.store.table import LEAST_RECORDS


def commit_one(store: GradientStore, accumulator: Accumulator, seq: int, client: str = "a") -> None:
    """One batch, its forward among it, and the commit that folds it."""
    head = store.latest_version()
    store.pile().create(batch(seq, client), record(base_version=head))
    assert accumulator.step() is not None


def things(root: Path) -> list[str]:
    """Files and folders of a local store but for its records, which are for ever."""
    found = (path.relative_to(root).as_posix() for path in root.rglob("*"))
    return [name for name in found if "/commit/" not in name and ".locks" not in name]


def test_nothing_piles_up_in_a_local_store(tmp_path: Path) -> None:
    """Two windows later there are as many files and folders, whoever came and went."""
    store = GradientStore(tmp_path / "store", sync="process")
    accumulator = Accumulator(Point(), store, sgd(), keep_versions=2)
    counts = []
    for number in range(4 * 64):
        commit_one(store, accumulator, 0, f"client-{number}")
        if number % 64 == 63:
            accumulator.step()
            counts.append(len([name for name in things(tmp_path / "store") if "/applied/" not in name]))
    assert max(counts[1:]) <= counts[0] + 1, counts


def test_a_commit_writes_what_it_closes_and_not_all_that_ever_was(store_url: str) -> None:
    """With a thousand clients on record a commit of one batch still writes a few hundred bytes."""
    written: dict[str, int] = {}

    def note(operation: str, key: str, perform):  # type: ignore[no-untyped-def]
        written[operation] = written.get(operation, 0) + 1
        return perform()

    store = hooked(store_url, note)
    accumulator = Accumulator(Point(), store, sgd(), keep_versions=2)
    for number in range(1_000):
        store.pile().create(batch(0, f"client-{number}"), record())
    accumulator.step()
    before = store.latest_version()
    for seq in range(1, 2 * LEAST_RECORDS):
        commit_one(store, accumulator, seq, "client-7")
    records = [store.blobs.get(store.lineage().keys.commit(before + n)) for n in range(1, 2 * LEAST_RECORDS)]
    assert max(len(data or b"") for data in records) < 800
    tables = [len(store.blobs.get(key) or b"") for key in store.blobs.list("body/applied")]
    assert sum(tables) / (2 * LEAST_RECORDS) < 4_096
    fresh = again(store)
    assert len(fresh.lineage().counted()) == 1_000 + 2 * LEAST_RECORDS - 1


def test_the_table_is_the_same_from_whichever_version_it_is_read(store_url: str) -> None:
    """The last one on file and the records since say at each version what was closed by then."""
    store = GradientStore(store_url, sync="process")
    accumulator = Accumulator(Point(), store, sgd(), keep_versions=64)
    for seq in range(2 * LEAST_RECORDS + 3):
        commit_one(store, accumulator, seq)
    for version in range(store.latest_version() + 1):
        assert list(again(store).lineage().applied(version)) == [batch(seq) for seq in range(version)]


@pytest.mark.parametrize("hint", [True, False])
def test_the_newest_version_is_found_in_few_reads(store_url: str, hint: bool) -> None:
    """With the hint and without."""
    store = GradientStore(store_url, sync="process")
    accumulator = Accumulator(Point(), store, sgd(), keep_versions=2)
    for seq in range(200):
        commit_one(store, accumulator, seq)
    if not hint:
        store.blobs.delete("body/head")
    count = Nth()
    fresh = again(store)
    fresh.blobs = Hooked(fresh.blobs, count)  # type: ignore[assignment]
    with count.armed():
        assert fresh.latest_version() == 200
    assert count.count <= 4 * math.log2(200)


def test_a_late_repeat_is_answered_in_few_reads(store_url: str) -> None:
    """However many commits came after it."""
    store = GradientStore(store_url, sync="process")
    accumulator = Accumulator(Point(), store, sgd(), keep_versions=2)
    for seq in range(100):
        commit_one(store, accumulator, seq)
    lineage = again(store).lineage()
    lineage.counted()
    count = Nth()
    lineage.blobs = Hooked(lineage.blobs, count)  # type: ignore[assignment]
    with count.armed():
        assert lineage.outcome(batch(3)).status == "stored"
    assert count.count <= 2


# ------------------------------------------------------------------------- records that are missing


def begun(url: str, versions: int) -> GradientStore:
    """A store with some commits."""
    store = GradientStore(url, sync="process")
    accumulator = Accumulator(Point(), store, sgd())
    for seq in range(versions):
        commit_one(store, accumulator, seq)
    return store


def test_a_record_in_the_middle_isnt_taken_for_the_end(store_url: str) -> None:
    """Lost together with the hint: the newest version is still the newest, and no gradient is rejected."""
    store = begun(store_url, 6)
    store.blobs.delete(store.lineage().keys.commit(3))
    store.blobs.delete("body/head")
    fresh = again(store)
    assert fresh.latest_version() == 6
    fresh.pile().create(batch(6), record(base_version=6))
    with pytest.raises(CorruptedError, match=r"record of version 3 .* is missing.*splitfed repair"):
        Accumulator(Point(), fresh, sgd()).step()
    assert fresh.pile().waiting() == [batch(6)]


def test_the_newest_record_that_is_missing_is_said(store_url: str) -> None:
    """A process that took the one before for the newest would fold its gradients away."""
    store = begun(store_url, 6)
    store.blobs.delete(store.lineage().keys.commit(6))
    with pytest.raises(CorruptedError, match=r"record of version 6 .* is missing.*splitfed repair"):
        again(store).latest_version()


def test_records_are_a_chain(store_url: str) -> None:
    """Each names the one before by its hash, so none of them can be another."""
    store = begun(store_url, 3)
    commits = [again(store).lineage().commit(version) for version in range(4)]
    assert [commit.parent for commit in commits[1:]] == [commit.digest for commit in commits[:-1]]
    assert commits[0].parent == ""


# ----------------------------------------------------------------------------------- other branches


def test_gradients_of_an_abandoned_branch_are_closed_as_stale(store_url: str) -> None:
    """Their weights are no ancestor of what they would be added to."""
    store = begun(store_url, 3)
    store.pile().create(BatchId("b", 1, 0), record(base_version=3))
    store.pile().create(BatchId("b", 1, 1), record(base_version=1))
    assert store.rollback(1) == ["a/1/1", "a/1/2"]
    store.pile().create(BatchId("b", 1, 2), record(base_version=4))
    (commit,) = drain(Accumulator(Point(), again(store), sgd()))
    assert list(commit.stale) == [BatchId("b", 1, 0)]
    assert list(commit.folded) == [BatchId("b", 1, 1), BatchId("b", 1, 2)]
    assert commit.abandoned == ((2, 3),)


def test_a_branch_stays_abandoned(store_url: str) -> None:
    """Over later commits and later rollbacks; and one to before it abandons that rollback too."""
    store = begun(store_url, 3)
    store.rollback(1)
    accumulator = Accumulator(Point(), again(store), sgd())
    commit_one(again(store), accumulator, 10)
    assert again(store).lineage().commit(5).abandoned == ((2, 3),)
    assert again(store).rollback(0) == ["a/1/0", "a/1/10"]
    newest = again(store).lineage().commit(6)
    assert [version for version in range(7) if newest.is_abandoned(version)] == [1, 2, 3, 4, 5]
    assert again(store).rollback(5) == []
    restored = again(store).lineage().commit(7)
    assert [version for version in range(8) if restored.is_abandoned(version)] == [2, 3, 6]
