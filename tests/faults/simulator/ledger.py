"""The ledger: all that happened to the storage and between clients and servers, and what is wrong at first sight.

It looks at each change as it is made, through a store of its own on which nothing goes wrong: a version must be whole
the moment its record is there, a batch may be deleted only once it is closed.
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any

from tests.faults.simulator.network import Sent
from tests.faults.simulator.scheduler import Fiber
from torch import Tensor

from splitfed.errors import (
    AlreadyAppliedError,
    CorruptedError,
    ExpiredError,
    FormatError,
    SplitFedError,
    StoreCapabilityError,
    StoreError,
    SupersededError,
    UnreachableError,
)
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import BackwardRequest, ForwardRequest, GradientRecord, LossRequest, SumRecord
from splitfed.protocol.packing import unpack
from splitfed.store import layout
from splitfed.store.batches import OUTCOMES
from splitfed.store.batchset import Outcome
from splitfed.store.commit import Commit
from splitfed.store.store import GradientStore
from splitfed.store.sums import read_batch

if TYPE_CHECKING:
    from tests.faults.simulator.world import World

HOSTILE = "mallory"
CLOSER = "closer"
"""Makes one batch at the very end: what isn't folded is closed only together with something that is."""


class Ledger:
    """What happened.

    Args:
        world: The run.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.wrong: list[str] = []
        self.head = -1
        self.commits: list[Commit] = []
        self.weights: list[dict[str, Tensor]] = []
        """Of each version."""
        self.closed: dict[BatchId, int] = {}
        """The batches that are in a commit, and in which."""
        self.files: dict[BatchId, GradientRecord] = {}
        """Each gradient file that ever was."""
        self.sums: list[SumRecord] = []
        """The files of sums that ever were."""
        self.damaged: set[str] = set()
        """The keys of files that a bit has changed in."""
        self._open: dict[BatchId, GradientRecord] = {}
        """Those of batches that are in no commit yet."""
        self.requests: list[Sent] = []
        self.acknowledged: dict[BatchId, list[Sent]] = {}
        self.store: GradientStore
        self._sleepers: list[tuple[int, Fiber]] = []
        self._incarnations: dict[str, int] = {}

    @property
    def num_open(self) -> int:
        """How many batches that can be folded are in no commit yet."""
        most = self.world.plan.max_staleness
        return sum(
            record.kind == "gradient" and not self._is_stale(self.head, record.base_version, most)
            for record in self._open.values()
        )

    def watch(self, store: GradientStore) -> None:
        """Look at the storage through this store."""
        self.store = store
        self._lineage, self._pile = store.lineage(), store.pile()

    def fail(self, what: str, error: BaseException | None = None) -> None:
        """Something is wrong."""
        if error is not None:
            last = traceback.extract_tb(error.__traceback__)[-6:]
            what += "".join(f"\n    {frame.filename}:{frame.lineno} {frame.name}" for frame in last)
        self.wrong.append(f"step {self.world.scheduler.steps}: {what}")
        self.world.scheduler.after(1, self.world.stop)

    # ----------------------------------------------------------------------------------- sleepers

    def wake_after(self, commits: int, fiber: Fiber | None) -> None:
        """Wake a fiber after so many further commits."""
        assert fiber is not None
        self._sleepers.append((self.head + commits, fiber))

    def wake_all(self) -> None:
        """Wake all that sleep."""
        for _, fiber in self._sleepers:
            self.world.scheduler.unpark(fiber)
        self._sleepers = []

    # ------------------------------------------------------------------------------------ storage

    def created(self, key: str) -> None:
        """A key was created."""
        keys = self._lineage.keys
        batch = keys.parse_gradient(key)
        if batch is not None:
            record = self._pile.read(batch)
            assert record is not None
            self.files.setdefault(batch, record)
            if batch not in self.closed:
                self._open[batch] = record
        elif key == keys.commit(self.head + 1):
            self._committed(self.head + 1)
        client_id = layout.parse_client(key)
        if client_id is not None and key == layout.client(client_id, self.newest_incarnation(client_id) + 1):
            self._incarnations[client_id] = self.newest_incarnation(client_id) + 1

    def replaced(self, key: str, *, existed: bool) -> None:
        """A key is about to be written without asking whether it exists."""
        keys = self._lineage.keys
        batch = keys.parse_gradient(key)
        is_record = any(key == keys.commit(version) for version in range(self.head + 2))
        is_again = existed and (batch is not None or keys.parse_sum(key) is not None)
        if is_record or is_again or keys.parse_versioned(key) is not None:
            self.fail(f"{key} is overwritten")

    def written(self, key: str) -> None:
        """A key was written without asking whether it existed."""
        if self._lineage.keys.parse_sum(key) is None:
            return
        found = unpack(SumRecord, self.store.blobs.get(key) or b"")
        holder = key.rpartition("/")[2].split("-")[1]
        names = list(map(read_batch, found.batches))
        if len(set(names)) != len(names):
            self.fail(f"{key} names a batch twice")
        for batch, digest, num_samples in zip(names, found.digests, found.num_samples, strict=True):
            record = self.files.get(batch)
            if record is None:
                self.fail(f"{key} names batch {batch}, which isn't on file")
                return
            expected = (record.digest, record.num_samples, record.base_version, record.loss_scale, record.holder)
            own = (digest, num_samples, found.base_version, found.loss_scale, holder)
            if own != expected:
                self.fail(f"{key} has batch {batch} as {own}: expected {expected}")
        self.sums.append(found)

    def deleted(self, key: str) -> None:
        """A key that exists is about to be deleted."""
        keys = self._lineage.keys
        batch = keys.parse_gradient(key)
        if batch is not None and batch not in self.closed:
            self.fail(f"batch {batch} is deleted and in no commit")
        if any(key == keys.commit(version) for version in range(self.head + 1)):
            self.fail(f"the record {key} is deleted at version {self.head}")
        found = keys.parse_versioned(key)
        if found is None:
            return
        version, nonce = found
        if version > self.head:
            self.fail(f"{key} is deleted at version {self.head}: its commit may still come")
        elif version > self.head - self.world.plan.keep_versions and nonce == self.commits[version].nonce:
            self.fail(f"{key} is deleted at version {self.head}, within the retention window")

    def _committed(self, version: int) -> None:
        try:
            commit = self._lineage.commit(version)
            weights = self._lineage.weights(version)
            applied = self._lineage.applied(version)
        except SplitFedError as error:
            self.fail(f"version {version} isn't whole: {error}")
            return
        self.head = version
        self.commits.append(commit)
        self.weights.append(weights)
        for batch, outcome in commit.verdict.items():
            self._close(commit, batch, outcome)
        self._check_groups(commit)
        if set(applied) != set(self.closed):
            difference = sorted(set(applied) ^ set(self.closed))
            self.fail(f"the applied table of version {version} isn't the sum of all records: {difference}")
        due = [fiber for wanted, fiber in self._sleepers if wanted <= version]
        self._sleepers = [(wanted, fiber) for wanted, fiber in self._sleepers if wanted > version]
        for fiber in due:
            self.world.scheduler.unpark(fiber)

    def _check_groups(self, commit: Commit) -> None:
        """What was added up before is of batches that are folded, of one base version and loss scale, each once."""
        batches = [batch for group in commit.groups for batch in group]
        folded = set(commit.folded)
        if len(set(batches)) != len(batches) or not folded.issuperset(batches):
            self.fail(f"commit {commit.version} has groups {commit.groups} of {sorted(folded)}")
            return
        for group in commit.groups:
            shared = {(self.files[batch].base_version, self.files[batch].loss_scale) for batch in group}
            if len(group) < 2 or len(shared) != 1:
                self.fail(f"commit {commit.version} has a group {group} of {shared}")

    def _close(self, commit: Commit, batch: BatchId, outcome: Outcome) -> None:
        if batch in self.closed:
            self.fail(f"batch {batch} is in commits {self.closed[batch]} and {commit.version}")
        self.closed[batch] = commit.version
        self._open.pop(batch, None)
        record = self.files.get(batch)
        if record is None:
            self.fail(f"commit {commit.version} closes batch {batch}, which was never made")
            return
        expected = OUTCOMES[record.kind]
        if self.is_damaged(batch) and outcome is Outcome.REJECTED:
            return
        if expected is Outcome.SKIPPED:
            base = commit.version - 1
        else:
            base = record.base_version
            if commit.base_of(batch) != base:
                self.fail(f"commit {commit.version} says base {commit.base_of(batch)} of {batch}: it was {base}")
        most = self.world.plan.max_staleness
        if expected is Outcome.FOLDED and self._is_stale(commit.version - 1, base, most):
            expected = Outcome.STALE
        if outcome is not expected:
            self.fail(f"commit {commit.version} has {batch} as {outcome.value}: expected {expected.value}")

    def is_damaged(self, batch: BatchId) -> bool:
        """Whether the file of a batch was damaged: it is to be rejected, unless it was read before."""
        return self._lineage.keys.gradient(batch) in self.damaged

    def _is_stale(self, head: int, base: int, most: int | None) -> bool:
        if most is not None and head - base > most:
            return True
        return BASES_ARE_ANCESTORS and base not in self.ancestors(head)

    def ancestors(self, version: int) -> set[int]:
        """The versions that a version was made from, and itself."""
        found = set()
        while version >= 0:
            found.add(version)
            restored = self.commits[version].restored
            version = version - 1 if restored is None else restored
        return found

    # ----------------------------------------------------------------------------------- requests

    def newest_incarnation(self, client_id: str) -> int:
        """The newest process of a client; 0 if there is none."""
        return self._incarnations.get(client_id, 0)

    def sent(self, sent: Sent) -> None:
        """A client sends a request."""
        request = sent.request
        if sent.verb == "backward" and request.call is not None and request.counted:
            sent.network.parts[request.seq, request.part] = sent
        self.requests.append(sent)

    def served(self, sent: Sent, answer: Any, newest: int) -> None:
        """A server has answered a request; when it came, `newest` was its client's newest process."""
        status = getattr(answer, "status", "")
        sent.came_late |= sent.batch in self.closed
        ahead = sent.request.forward if isinstance(sent.request, LossRequest) else sent.request
        incarnation = ahead.incarnation
        if status in ("stored", "part") and incarnation is not None and incarnation < newest:
            self.fail(f"{sent.network.process.name}, process {incarnation}, may count though {newest} has begun")

    def answered(self, sent: Sent) -> None:
        """A client has got its answer."""
        if sent.verb == "forward" and sent.answer.incarnation is not None and sent.request.grad:
            sent.network.calls[sent.request.call] = sent
        batch = sent.batch
        if batch is not None and sent.answer.status in ("stored", "rejected"):
            self.acknowledged.setdefault(batch, []).append(sent)
            if batch.client_id != HOSTILE:
                self.world.batches += 1

    def refused(self, sent: Sent, error: SplitFedError) -> None:
        """A client has got an error, for good."""
        request = sent.request
        name = sent.network.process.name
        if isinstance(error, CorruptedError | FormatError) and any(repr(key) in str(error) for key in self.damaged):
            return
        if isinstance(error, StoreError | UnreachableError):
            if isinstance(error, CorruptedError | StoreCapabilityError):
                self.fail(f"{name} was answered {error!r}")
            return
        if request.client_id == HOSTILE or sent.network.is_forked:
            return
        ahead = request.forward if isinstance(request, LossRequest) else request
        if isinstance(error, SupersededError):
            if self.newest_incarnation(request.client_id) <= (ahead.incarnation or 0):
                self.fail(f"{name} was told that it is superseded, and it is the newest")
        elif isinstance(error, ExpiredError | AlreadyAppliedError):
            if self._has_lost_pin(sent):
                return
            oldest = self._oldest(sent)
            is_kept = oldest > self.head - self.world.plan.keep_versions
            if is_kept and oldest in self.ancestors(self.head):
                self.fail(f"{name} got {error!r} though version {oldest} is in the window of {self.head}")
        else:
            self.fail(f"{name} got {error!r}")

    def _has_lost_pin(self, sent: Sent) -> bool:
        """Whether the file is damaged that says at which version a one-trip batch ran: it can't run there again."""
        batch = sent.batch
        return batch is not None and sent.verb == "loss" and self._lineage.keys.pin(batch) in self.damaged

    def _oldest(self, sent: Sent) -> int:
        """The oldest version that a request needs."""
        request = sent.request
        if isinstance(request, BackwardRequest):
            parts = [] if request.seal is None else [version for version, _ in request.seal.parts]
            return min([request.version, *parts])
        ahead = request.forward if isinstance(request, LossRequest) else request
        assert isinstance(ahead, ForwardRequest)
        continued = sent.network.calls.get(ahead.previous) if ahead.previous is not None else None
        return sent.head if continued is None else continued.answer.version


BASES_ARE_ANCESTORS = True
"""Whether a gradient of a branch that a rollback has abandoned must end as stale."""
