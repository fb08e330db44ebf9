"""Mutants of the store's lineages and of accumulators: the applied table, commits, garbage."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from tests.faults.simulator.scheduler import current
from tests.faults.simulator.table import Changes, mutant

from splitfed.accumulator import accumulator as accumulating
from splitfed.accumulator import fold as folding
from splitfed.accumulator.accumulator import Accumulator
from splitfed.accumulator.buffers import _Merger
from splitfed.accumulator.mean import StreamingMean
from splitfed.blobs.memory import MemoryBlobs
from splitfed.errors import MissingError, StoreError
from splitfed.protocol.ids import BatchId
from splitfed.store.batchset import BatchSet, Verdict
from splitfed.store.commit import Commit
from splitfed.store.lineage import Lineage
from splitfed.store.table import Table

# ------------------------------------------------------------------------------------- the applied table


@mutant
def window_that_slides() -> Changes:
    """The table takes all that is older than the newest few of a process for counted."""
    real = BatchSet.__contains__

    def contains(self: BatchSet, batch: BatchId) -> bool:
        newest = max((b.seq for b in self if b[:2] == batch[:2]), default=-1)
        return batch.seq <= newest - 2 or real(self, batch)

    yield BatchSet, "__contains__", contains


@mutant
def table_without_what_was_closed_unfolded() -> Changes:
    """Stale, rejected and skipped batches aren't entered."""
    real = Table.adding

    def adding(self: Table, verdict: Verdict) -> Table:
        return real(self, Verdict(folded=verdict.folded))

    yield Table, "adding", adding


@mutant
def base_that_isnt_an_ancestor() -> Changes:
    """Gradients of a branch that a rollback has undone are folded."""
    yield Commit, "is_abandoned", lambda self, version: False


@mutant
def no_nonce_read_back() -> Changes:
    """A record that exists is taken for another's, whatever it says."""

    def create_record(self: Lineage, record: Commit) -> None:
        if not self.blobs.create(self.keys.commit(record.version), [record.to_json()]):
            for kind in record.files:
                self.blobs.delete(self.keys.versioned(kind, record.version, record.nonce))
            raise MissingError("another has won")

    yield Lineage, "_create_record", create_record


@mutant
def own_files_deleted_after_an_ambiguous_commit() -> Changes:
    """An error of the create is taken for a commit that hasn't come about."""

    def create_record(self: Lineage, record: Commit) -> None:
        try:
            self.blobs.create(self.keys.commit(record.version), [record.to_json()])
        except StoreError:
            with suppress(StoreError):
                for kind in record.files:
                    self.blobs.delete(self.keys.versioned(kind, record.version, record.nonce))
            raise

    yield Lineage, "_create_record", create_record


@mutant
def create_that_asks_first() -> Changes:
    """A create that looks whether the key exists, and then writes."""
    real = MemoryBlobs.create

    def create(self: MemoryBlobs, key: str, parts: Any, *, durable: bool = True) -> bool:
        fiber = current()
        if fiber is None or fiber.process.is_dead or fiber.process.world.is_landing:
            return real(self, key, parts)
        if self.get(key) is not None:
            return False
        fiber.process.pause(2)
        self.put(key, parts)
        return True

    yield MemoryBlobs, "create", create


@mutant
def gradients_deleted_before_the_commit() -> Changes:
    """What is folded is deleted as soon as it is read."""
    real = Accumulator._publish

    def publish(self: Accumulator, head: int, folded: Any, *others: Any) -> Commit:
        self._pile.drop(folded.verdict)
        return real(self, head, folded, *others)

    yield Accumulator, "_publish", publish


@mutant
def deleted_without_asking_the_head() -> Changes:
    """Who computed a commit deletes what it folded, though another may have won with other batches."""
    real = Accumulator._publish

    def publish(self: Accumulator, head: int, folded: Any, *others: Any) -> Commit:
        try:
            return real(self, head, folded, *others)
        except MissingError:
            self._pile.drop(folded.verdict)
            raise

    yield Accumulator, "_publish", publish


@mutant
def order_of_arrival() -> Changes:
    """The mean is summed up as batches come, here: the last one first."""
    real = StreamingMean.add

    class Arrival(StreamingMean):
        def __init__(self, keeps: int = 1) -> None:
            super().__init__()  # none is kept, whatever may be
            self._given: list[tuple[BatchId, Any, Any]] = []

        def add(self, batch_id: BatchId, gradients: Any, **numbers: Any) -> None:
            self._given.append((batch_id, gradients, numbers))
            fresh = StreamingMean()
            fresh._check_order = lambda _: None  # type: ignore[method-assign]
            for batch, each, its in reversed(self._given):
                real(fresh, batch, each, **its)
            vars(self).update({name: value for name, value in vars(fresh).items() if name != "_check_order"})

    yield folding, "StreamingMean", Arrival


@mutant
def staleness_of_the_wrong_head() -> Changes:
    """How old a base is is asked of the head that the commit will make."""
    real = folding.sort_batches

    def sort_batches(batches: Any, headers: Any, head: int, *others: Any) -> Any:
        return real(batches, headers, head + 1, *others)

    yield accumulating, "sort_batches", sort_batches


@mutant
def plain_mean_of_statistics() -> Changes:
    """Running statistics are averaged, as if all updates of a commit were one step."""
    yield _Merger, "statistic", _Merger.mean


# ---------------------------------------------------------------------------------------------- garbage


@mutant
def collected_records() -> Changes:
    """Old commit records are garbage too."""
    real = Lineage.sweep

    def sweep(self: Lineage, keep: int, *others: Any, **options: Any) -> int:
        for version in range(1, self.head() - 2 * keep):
            self.blobs.delete(self.keys.commit(version))
        return real(self, keep, *others, **options)

    yield Lineage, "sweep", sweep


@mutant
def sweep_of_what_no_commit_names() -> Changes:
    """Files of the version that comes next are garbage as long as no commit names them."""
    real = Lineage.sweep

    def sweep(self: Lineage, keep: int, *others: Any, **options: Any) -> int:
        head = self.head()
        for kind in ("weights", "optimizer", "applied"):
            for key in self.blobs.list(f"{self.name}/{kind}"):
                found = self.keys.parse_versioned(key)
                if found is not None and found[0] > head:
                    self.blobs.delete(key)
        return real(self, keep, *others, **options)

    yield Lineage, "sweep", sweep


@mutant
def sweep_without_the_window() -> Changes:
    """Only the newest version stays."""
    real = Lineage.sweep
    yield Lineage, "sweep", lambda self, keep, *others, **options: real(self, 1, *others, **options)
