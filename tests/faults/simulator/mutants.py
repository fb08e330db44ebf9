"""Wrong variants of real functions: what somebody might well write, and what the protocol doesn't stand.

Each is installed in place of the real one for a run, and some seed has to show that something is wrong. A mutant that
no seed catches is a hole in the simulator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any
from unittest import mock

from tests.faults.simulator.scheduler import current

from splitfed.accumulator import accumulator as accumulating
from splitfed.accumulator import fold as folding
from splitfed.accumulator.accumulator import Accumulator
from splitfed.accumulator.buffers import _Merger
from splitfed.accumulator.mean import StreamingMean
from splitfed.blobs.memory import MemoryBlobs
from splitfed.errors import MissingError, StoreError
from splitfed.model import execution
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import GradientRecord
from splitfed.protocol.packing import pack, peek
from splitfed.server.runner import Runner
from splitfed.server.server import SplitServer
from splitfed.store.batches import Pile, Sealer
from splitfed.store.batchset import BatchSet
from splitfed.store.clients import Clients
from splitfed.store.commit import Commit
from splitfed.store.lineage import Lineage

Changes = Iterator[tuple[Any, str, Any]]
"""What to replace: of which object, under which name, by what."""
MUTANTS: dict[str, Callable[[], Changes]] = {}
RARE: dict[str, Callable[[], Changes]] = {}
"""Those that take more seeds than a test can run."""
WAITING = {
    "a base that isn't an ancestor": (
        "today the accumulator folds gradients of a branch that a rollback has abandoned; once it closes them as "
        "stale, set ledger.BASES_ARE_ANCESTORS and let the mutant fold them again"
    ),
    "a checksum that nobody reads": (
        "files have no checksum of their own yet; once they have, storage needs a fault that flips a bit, and the "
        "mutant leaves the comparison out"
    ),
}
"""What can't be tried before the library has it, and why."""


def mutant(make: Callable[[], Changes]) -> Callable[[], Changes]:
    """Enter a mutant into the table, under its name in words."""
    MUTANTS[make.__name__.replace("_", " ")] = make
    return make


def rare(make: Callable[[], Changes]) -> Callable[[], Changes]:
    """Enter a mutant into the table of those that are seldom caught."""
    RARE[make.__name__.replace("_", " ")] = make
    return make


@contextmanager
def installed(name: str) -> Iterator[None]:
    """The library with one thing wrong."""
    with ExitStack() as stack:
        for owner, attribute, wrong in (MUTANTS | RARE)[name]():
            stack.enter_context(mock.patch.object(owner, attribute, wrong))
        yield


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
    real = Lineage.publish

    def publish(self: Lineage, commit: Commit, state: Any, optimizer: Any, applied: BatchSet) -> Commit | None:
        verdict = commit.verdict
        kept = [batch for batch in applied if batch not in verdict or batch in verdict.folded]
        return real(self, commit, state, optimizer, BatchSet(kept))

    yield Lineage, "publish", publish


@mutant
def rollback_with_the_old_table() -> Changes:
    """A rollback brings back the table of the older version too."""
    real = Lineage.rollback

    def rollback(self: Lineage, version: int) -> Any:
        with mock.patch.object(self, "applied", lambda _, held=self.applied: held(version)):
            return real(self, version)

    yield Lineage, "rollback", rollback


# ---------------------------------------------------------------------------------------------- commits


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
        if fiber is None or fiber.process.is_dead:
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

    def publish(self: Accumulator, head: int, folded: Any, older: Any, applied: Any) -> Commit:
        self._pile.drop(folded.verdict)
        return real(self, head, folded, older, applied)

    yield Accumulator, "_publish", publish


@mutant
def deleted_without_asking_the_head() -> Changes:
    """Who computed a commit deletes what it folded, though another may have won with other batches."""
    real = Accumulator._publish

    def publish(self: Accumulator, head: int, folded: Any, older: Any, applied: Any) -> Commit:
        try:
            return real(self, head, folded, older, applied)
        except MissingError:
            self._pile.drop(folded.verdict)
            raise

    yield Accumulator, "_publish", publish


@mutant
def order_of_arrival() -> Changes:
    """The mean is summed up as batches come, here: the last one first."""
    real = StreamingMean.add

    class Arrival(StreamingMean):
        def __init__(self) -> None:
            super().__init__()
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

    def sweep(self: Lineage, keep: int) -> int:
        for version in range(1, self.head() - 2 * keep):
            self.blobs.delete(self.keys.commit(version))
        return real(self, keep)

    yield Lineage, "sweep", sweep


@mutant
def sweep_of_what_no_commit_names() -> Changes:
    """Files of the version that comes next are garbage as long as no commit names them."""
    real = Lineage.sweep

    def sweep(self: Lineage, keep: int) -> int:
        head = self.head()
        for kind in ("weights", "optimizer", "applied"):
            for key in self.blobs.list(f"{self.name}/{kind}"):
                found = self.keys.parse_versioned(key)
                if found is not None and found[0] > head:
                    self.blobs.delete(key)
        return real(self, keep)

    yield Lineage, "sweep", sweep


@mutant
def sweep_without_the_window() -> Changes:
    """Only the newest version stays."""
    real = Lineage.sweep
    yield Lineage, "sweep", lambda self, keep: real(self, 1)


# ----------------------------------------------------------------------------------------- servers: batches


@mutant
def acknowledged_before_the_create() -> Changes:
    """The answer goes out first; the file is written with the next request."""
    real = Sealer.store
    deferred: dict[int, Callable[[], Any]] = {}

    def store(self: Sealer, batch: BatchId, record: GradientRecord, **options: Any) -> str:
        earlier = deferred.pop(id(self), None)
        if earlier is not None:
            with suppress(StoreError):
                earlier()
        deferred[id(self)] = lambda: real(self, batch, record, **options)
        return "stored"

    yield Sealer, "store", store


@mutant
def error_of_the_create_ignored() -> Changes:
    """A batch is acknowledged though the storage has refused it."""
    real = Sealer.store

    def store(self: Sealer, batch: BatchId, record: GradientRecord, **options: Any) -> str:
        try:
            return real(self, batch, record, **options)
        except StoreError:
            return "stored"

    yield Sealer, "store", store


@mutant
def skip_that_overtakes() -> Changes:
    """A number that is given up closes all before it that no commit has, whether they are pending or not."""

    def tidy(self: Sealer, client_id: str, incarnation: int, housekeeping: Any) -> None:
        real(self, client_id, incarnation, replace(housekeeping, abandoned=()))
        for last in housekeeping.abandoned:
            for seq in range(min(last, 1_000) + 1):
                batch = BatchId(client_id, incarnation, seq)
                if not self._is_counted(batch):
                    skip = GradientRecord("skip", 0, 0.0, 1.0, "", self._numerics, {}, [])
                    self._pile.blobs.put(self._pile.keys.gradient(batch), pack(skip))

    real = Sealer.tidy
    yield Sealer, "tidy", tidy


@mutant
def parts_dropped_before_the_seal() -> Changes:
    """The parts of a batch are deleted as they are read."""
    real = Sealer._parts

    def parts(self: Sealer, batch: BatchId, seal: Any) -> Any:
        found = real(self, batch, seal)
        for version, number in seal.parts:
            self._pile.drop_part(version, batch, number)
        return found

    yield Sealer, "_parts", parts


@mutant
def digest_not_compared() -> Changes:
    """A file under that id is a success, whatever is in it."""

    def create(self: Pile, key: str, record: GradientRecord, name: str, *, durable: bool) -> str | None:
        if self.blobs.create(key, pack(record), durable=durable):
            return None
        data = self.blobs.get(key)
        return None if data is None else str(peek(GradientRecord, data, ("kind",))["kind"])

    yield Pile, "_create", create


@rare
def file_looked_for_after_the_table() -> Changes:
    """A batch that is committed between the two looks is in neither. As it was: the simulator found it."""

    def is_known(self: Sealer, batch: BatchId) -> bool:
        return self._is_counted(batch) or self._pile.peek(batch) is not None

    yield Sealer, "is_known", is_known


@rare
def skip_that_meets_a_late_gradient() -> Changes:
    """A number that is given up while its gradient lands is an error. As it was: the simulator found it."""

    def tidy(self: Sealer, client_id: str, incarnation: int, housekeeping: Any) -> None:
        real(self, client_id, incarnation, replace(housekeeping, abandoned=()))
        for seq in housekeeping.abandoned:
            batch = BatchId(client_id, incarnation, seq)
            if not self.is_known(batch):
                self._pile.create(batch, GradientRecord("skip", 0, 0.0, 1.0, "", self._numerics, {}, []))

    real = Sealer.tidy
    yield Sealer, "tidy", tidy


@mutant
def processes_not_checked() -> Changes:
    """Older processes of a client may still count."""
    yield Clients, "check", lambda self, client_id, incarnation: None


@mutant
def one_number_for_all_processes() -> Changes:
    """A client's new process goes on under the number of its last."""
    real = Clients.open

    def opened(self: Clients, client_id: str, process: str | None = None) -> int:
        taken = [number for number in range(1, 60) if self._process(client_id, number)]
        return max(taken) if taken else real(self, client_id, process)

    yield Clients, "open", opened


# ---------------------------------------------------------------------------------------- servers: forwards


@mutant
def new_seed_on_replay() -> Changes:
    """A recompute draws other numbers, and nobody compares its outputs."""
    real = Runner._replay

    def replay(self: Runner, record: Any, *others: Any) -> Any:
        return real(self, replace(record, seed=record.seed ^ 1), *others)

    yield Runner, "_replay", replay
    yield execution, "check_replay", lambda *_: None


@mutant
def replay_at_the_head() -> Changes:
    """A recompute runs at the newest version."""
    real = Runner._replay

    def replay(self: Runner, record: Any, version: int, *others: Any) -> Any:
        return real(self, record, self._lineage.head(), *others)

    yield Runner, "_replay", replay
    yield execution, "check_replay", lambda *_: None


@mutant
def statistics_moved_twice() -> Changes:
    """A recompute begins with the buffers that the forward left."""
    real = Runner._replay

    def replay(self: Runner, record: Any, version: int, *others: Any) -> Any:
        first = real(self, record, version, *others)
        return real(self, replace(record, buffers=dict(first.buffers)), version, *others)

    yield Runner, "_replay", replay


@mutant
def forward_dropped_with_its_backward() -> Changes:
    """A forward's record is deleted before the client has confirmed the answer."""
    real = SplitServer.backward

    def backward(self: SplitServer, request: Any, /) -> Any:
        answer = real(self, request)
        if request.call is not None:
            pile = self._lines.of(request.client_id).pile
            pile.drop_forward(request.version, request.client_id, request.incarnation, request.call)
        return answer

    yield SplitServer, "backward", backward


@mutant
def forward_replaced_by_a_late_duplicate() -> Changes:
    """The last forward under a number is the one on record."""

    def put_forward(self: Pile, version: int, client_id: str, incarnation: int, call: int, record: Any) -> None:
        self.blobs.put(self.keys.forward(version, client_id, incarnation, call), pack(record))

    yield Pile, "put_forward", put_forward


@mutant
def buffers_of_the_version_for_a_call_that_continues() -> Changes:
    """Each call begins with the version's buffers, whatever the call before it has moved."""
    yield Runner, "_continued_buffers", lambda self, request, version: None
