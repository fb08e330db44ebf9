"""Mutants of servers and of the files of batches: gradients, parts, skips, processes, forwards and their replay."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from tests.faults.simulator.table import Changes, mutant, rare

from splitfed.errors import StoreError
from splitfed.model import execution
from splitfed.protocol import checksum
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import GradientRecord
from splitfed.protocol.packing import pack, peek
from splitfed.server.runner import Runner
from splitfed.server.server import SplitServer
from splitfed.store.batches import Pile, Sealer
from splitfed.store.clients import Clients

# ----------------------------------------------------------------------------------------- servers: batches


@mutant
def checksum_unread() -> Changes:
    """Files have checksums, and nobody compares them."""
    yield checksum, "check", lambda data, **options: None


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
                if batch not in self._lineage.counted():
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

    def create(self: Pile, key: str, record: GradientRecord, name: str, *, durable: bool) -> tuple[str | None, bool]:
        if self.blobs.create(key, pack(record), durable=durable):
            return None, True
        data = self.blobs.get(key)
        return None if data is None else str(peek(GradientRecord, data, ("kind",))["kind"]), False

    yield Pile, "_create", create


@rare
def file_looked_for_after_the_table() -> Changes:
    """A batch that is committed between the two looks is in neither. As it was: the simulator found it."""

    def is_known(self: Sealer, batch: BatchId) -> bool:
        return batch in self._lineage.counted() or self._pile.peek(batch) is not None

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
