"""A lineage: a line of versions, how it is read, and the protocol that adds a version.

The commit is the create-once of `commit/<v+1>.json`. Everything that it names was written before,
under names of its own, so a reader sees a whole version or none, and of two accumulators that race
one wins. "Exists" can mean "I won and the reply was lost", so the record carries a nonce that is
read back.

Readers probe for the next commit record on every request: one failing GET, no listing, and no
replica that answers at an old version for long. What is cached here can't change: records, and the
files that they name with their hashes.

The trap: after an ambiguous create, one's own files may be the ones that the record names. They are
left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from splitfed.errors import (
    CorruptedError,
    ExpiredError,
    FormatError,
    InputError,
    MissingError,
    StoreError,
    UnsupportedError,
)
from splitfed.model.fingerprint import compare, is_entry
from splitfed.model.skeleton import Fingerprint
from splitfed.model.stamp import check_stamp
from splitfed.protocol import checksum, parallel, safetensors
from splitfed.protocol.ids import BatchId
from splitfed.protocol.packing import pack_tree, read_json, unpack_tree
from splitfed.store.batchset import BatchSet, Outcome
from splitfed.store.cache import Bounded
from splitfed.store.checked import Checked
from splitfed.store.commit import Commit
from splitfed.store.layout import REFERENCE, TRANSIENT, Keys
from splitfed.store.retention import Retention
from splitfed.store.search import newest
from splitfed.store.table import Table, is_due

T = TypeVar("T")
CACHED = 4
"""Versions of one lineage whose tensors stay in memory."""
PRUNE_EVERY = 64
"""So often, in versions, a sweep removes empty folders."""


class Lineage:
    """One line of versions, read and written.

    Args:
        blobs: The storage backend.
        name: `body`, `client` or `body@<id>`.
    """

    def __init__(self, blobs: Checked, name: str) -> None:
        self.blobs = blobs
        self.keys = Keys(name, by_version=not blobs.required)
        self.name = name
        self._head = -1
        self._commits: Bounded[int, Commit] = Bounded(16 * CACHED)
        self._states: Bounded[int, dict[str, Tensor]] = Bounded(CACHED)
        self._tables: Bounded[int, Table] = Bounded(CACHED)
        self._frozen: dict[str, dict[str, Tensor]] = {}
        self._retention = Retention(blobs, self.keys)
        self.warned_of_unused = False
        """Whether it was said that a body's weights came too late (`beginning`)."""
        self._newest = b""
        """The record of the newest version, as it was read and found to be that."""
        self._hint = -1
        """The version that the hint was last seen to name, or made to."""
        self._verified: set[int] = set()
        """The versions whose cached weights have their commit's hash."""

    @property
    def known(self) -> int:
        """The newest version that this process has seen, or -1; nothing is read."""
        return self._head

    def fingerprint(self) -> Fingerprint:
        """The architecture that this lineage was begun with.

        Raises:
            MissingError: nobody has begun it.
        """
        data = self.blobs.get(self.keys.fingerprint)
        if data is None:
            self.confirm(now=True)
            raise MissingError(
                f"the store has no lineage {self.name!r} yet: "
                "a SplitServer or Accumulator begins it with its module's weights"
            )
        fingerprint: Fingerprint = read_json(data, self.keys.fingerprint)
        if not all(map(is_entry, fingerprint.values())):
            raise FormatError(
                f"{self.keys.fingerprint} isn't a fingerprint: expected an object for each tensor"
            )
        return fingerprint

    def head(self) -> int:
        """The newest version, or -1 if there is none. Always asks the store."""
        version = self._head
        if version < 0:
            version = self._hinted()
        if version < 0:
            version = self._listed()
        while self._find(version + 1) is not None:
            version += 1
        self._head = max(self._head, version)  # other threads look too
        return self._head

    def _hinted(self) -> int:
        """The version that the hint names, or -1 if there is no hint.

        Raises:
            CorruptedError: that version was committed, and its record isn't there any more.
        """
        version, _ = read_hint(self.blobs, self.keys)
        if version >= 0 and self._find(version) is None:
            # It is written after the record: without it, what its gradients did would be undone.
            raise self._lost_record(version)
        return version

    def _lost_record(self, version: int) -> CorruptedError:
        return CorruptedError(
            f"the record of version {version} of lineage {self.name!r} is missing, and it was "
            f"there: {self.keys.commit(version)!r} was deleted from outside. Restore it from a "
            "copy, or run `splitfed repair`"
        )

    def _listed(self) -> int:
        """A version near the newest, by the weights that are on file; -1 if there is none.

        A walk along the records would take one that is missing for the end.
        """
        for version in sorted(self.kept(), reverse=True):
            if self._find(version) is not None:
                return version
        # No weights at all, or only those of a commit under way.
        return newest(lambda version: self._find(version) is not None)

    def kept(self) -> set[int]:
        """The versions whose weights are on file, those of a commit under way among them."""
        files = map(self.keys.parse_versioned, self.blobs.list(f"{self.name}/weights"))
        return {file[0] for file in files if file is not None}

    def confirm(self, *, now: bool = False) -> None:
        """Check that the store still holds the run that is cached here.

        A run that was deleted, or begun again under the same URL, would otherwise be mixed with
        what is known of the old one, and a batch acknowledged that counts nowhere.

        Args:
            now: Whether something is missing that must be there: then all that tells is read.

        Raises:
            CorruptedError: the run was deleted or replaced meanwhile.
        """
        if not now and not self.blobs.is_look_due():
            return
        # A commit's record is never another: while the newest that is known is there, the run is.
        if not (self.blobs.has_format() if self._head < 0 else self._is_newest_known()):
            raise self.blobs.gone()

    def _is_newest_known(self) -> bool:
        """Whether the newest version known here is there, and what it was."""
        head = self._head  # another thread may find a newer one while this one reads
        key = self.keys.commit(head)
        data = self.blobs.raw.get(key)
        if data is None:
            return False
        # Most often the bytes that were found to be the record's before.
        if data == self._newest:
            return True
        known = self._commits.get(head)
        if known is None:
            return True
        if sha256([data]) == known.digest:
            self._newest = bytes(data)
            return True
        # Other bytes: damaged, which is said as that, or another commit.
        found = self.blobs.get(key)
        return found is not None and Commit.from_json(found).nonce == known.nonce

    def checked_head(self) -> int:
        """As `head`, after a check that the newest version known here is still what it was.

        For who begins something on it.

        Raises:
            CorruptedError: the run was deleted or replaced meanwhile.
        """
        # One read tells it here, on whatever storage: a commit under another nonce, or none.
        if self._head >= 0 and not self._is_newest_known():
            raise self.blobs.gone()
        return self.head()

    def commit(self, version: int) -> Commit:
        """The record of a version.

        Raises:
            MissingError: there is no such version.
            CorruptedError: its record was deleted.
        """
        found = self._find(version)
        if found is None:
            head = self.head()
            if 0 <= version < head:
                self.confirm(now=True)
                raise self._lost_record(version)
            raise MissingError(
                f"lineage {self.name!r} has no version {version}: the newest is {head}"
            )
        return found

    def check_branch(self, version: int) -> None:
        """Refuse a version that a rollback has undone, as far as is known here: nothing is read.

        Raises:
            ExpiredError: it was undone.
        """
        newest = self._commits.get(self._head)
        if newest is not None and newest.abandoned and newest.is_abandoned(version):
            raise ExpiredError(
                f"version {version} of lineage {self.name!r} was undone by a rollback, so a batch "
                "that was begun there is lost and counts nowhere: the loop may go on"
            )

    def state(self, version: int) -> dict[str, Tensor]:
        """The distinct tensors of a version, by first name.

        They share mapped memory and mustn't be changed.

        Raises:
            ExpiredError: its weights have left the retention window.
            CorruptedError: they were changed since they were written.
        """
        return self._cached(self._states, version, self._load_state)

    def checked_state(self, version: int) -> dict[str, Tensor]:
        """As `state`, for who builds upon it or hands it out: it is the one that was committed."""
        found = self._states.get(version)
        # Only the head is answered from memory: an older version may have expired.
        if found is not None and version in self._verified and version == self._head:
            return found
        data = self._file(version, "weights")
        self._verified.add(version)
        return self._states.put(version, self.decoded(version, data))

    def weights(self, version: int) -> dict[str, Tensor]:
        """Copies of a version's tensors, with the keys of the module's `state_dict()`."""
        copies = {name: tensor.clone() for name, tensor in self.checked_state(version).items()}
        return {name: copies[entry.get("tied", name)] for name, entry in self.fingerprint().items()}

    def optimizer(self, version: int) -> Any:
        """The state of optimizer and scheduler at a version, or `None` if none has stepped."""
        if "optimizer" not in self.commit(version).files:
            return None
        return unpack_tree("Optimizer", self._file(version, "optimizer"))

    def applied(self, version: int) -> BatchSet:
        """The batches that were closed up to a version."""
        return self._table(version).closed

    def counted(self) -> BatchSet:
        """The batches that are closed by now."""
        return self._newest_table().closed

    def outcome(self, batch: BatchId) -> Outcome:
        """What became of a closed batch; one that was stale counts as folded.

        Raises:
            AlreadyAppliedError: that isn't known any more.
        """
        return self._newest_table().outcome(batch)

    def ran_elsewhere(self, batch: BatchId, version: int) -> bool:
        """Whether a closed batch was computed at another version than this one.

        As far as is known here: nothing is read. Records that aren't at hand say nothing.
        """
        for number in range(self._head, -1, -1):
            commit = self._commits.get(number)
            if commit is None:
                return False
            if batch in commit.verdict:
                # Of one that was given up, or whose file was damaged, no version is on record.
                is_known = batch in commit.folded or batch in commit.stale
                return is_known and commit.base_of(batch) != version
        return False

    def _newest_table(self) -> Table:
        # The head and its table are two reads. Commits in between may take the table out of the
        # retention window: then the head has moved, and the question is asked again.
        while True:
            head = self.head()
            try:
                return self._table(head)
            except ExpiredError:
                if self.head() == head:
                    raise

    def _table(self, version: int) -> Table:
        """The table of a version: the last that is known or on file, and the records since."""
        found = self._tables.get(version)
        if found is not None:
            return found
        base = self.commit(version).base
        since: list[Commit] = []
        number = version
        while found is None:
            found = self._load_table(base) if number == base else self._tables.get(number)
            if found is None:
                since.append(self.commit(number))
                number -= 1
        for commit in reversed(since):
            found = found.adding(commit.verdict)
        return self._tables.put(version, found)

    def forget(self, version: int) -> None:
        """Drop a version's tensors from memory, because they were written to."""
        self._states.pop(version)
        self._verified.discard(version)
        self._frozen.clear()

    def initialise(
        self,
        fingerprint: Fingerprint,
        state: Mapping[str, Tensor],
        source: int | None = None,
        part: str | None = None,
        durability: str | None = None,
        default: str = "gradient",
    ) -> bool:
        """Publish version 0, unless it exists; the first writer wins.

        Args:
            fingerprint: The module's architecture.
            state: Its tensors by first name.
            source: The version of `body` that they are, for the line of one client.
            part: The stamp of the body's cut, if it has one.
            durability: What is on file when a batch is acknowledged; `None` for what the lineage
                was begun with ...
            default: ... or for this, if it is new.

        Returns:
            Whether there was no version before.

        Raises:
            ArchitectureError: the lineage was begun with another architecture, or for another part
                of a model.
            UnsupportedError: nobody has begun it, and the tensors are on the meta device.
        """
        empty = next((name for name, tensor in state.items() if tensor.is_meta), None)
        if empty is not None and self.head() < 0:
            raise UnsupportedError(
                f"{empty!r} is on the meta device, so it has no value, and lineage {self.name!r} "
                "has no version yet to take one from: "
                "begin the store with a module that has its weights"
            )
        if self.blobs.get(self.keys.fingerprint) is None:
            text = json.dumps(fingerprint, indent=1).encode()
            for key in (self.keys.spare, self.keys.fingerprint):
                self.blobs.create(key, [text])
        module = "the client half" if self.name == "client" else "the body"
        compare(self.fingerprint(), fingerprint, module)
        if self.head() >= 0:
            self._check_part(part)
            self._check_durability(durability)
            self._restore_frozen(state)
            return False
        frozen = self._create_frozen(state)
        commit = Commit(0, "initial", "", {}, frozen, source=source, part=part)
        commit = replace(commit, durability=durability or default)
        made = self.publish(commit, state, None)
        if made is None and frozen is not None and self.commit(0).frozen != frozen:
            self.blobs.delete(self.keys.frozen(frozen))
        self._check_part(part)
        self._check_durability(durability)
        return True

    @property
    def durability(self) -> str:
        """What is on file when a batch is acknowledged: its 'gradient', or its recipes ('log')."""
        return self.commit(0).durability if self.head() >= 0 else "gradient"

    def window(self, own: int) -> int:
        """How many versions of a log stay: what its first accumulator has decided on.

        Args:
            own: What this one would decide.

        Raises:
            FormatError: the record of it holds no number.
        """
        key = self.keys.window
        if self.blobs.get(key) is None:
            self.blobs.create(key, [json.dumps({"keep_versions": own}).encode()])
        found = read_json(self.blobs.get(key), key).get("keep_versions")
        if type(found) is not int:
            raise FormatError(f"{key!r} holds {found!r}: expected the number of versions that stay")
        return found

    def _check_durability(self, durability: str | None) -> None:
        found = self.commit(0).durability
        if durability is not None and durability != found:
            raise InputError(
                f"lineage {self.name!r} was begun with durability={found!r}, and this process is "
                f"set to durability={durability!r}: all processes of a run need the same, so leave "
                "it out here, or begin a new run"
            )

    def _check_part(self, part: str | None) -> None:
        """Compare the stamp of a body with that of whoever began the lineage."""
        if part is not None:
            first = f"the one that {self.name!r} began with"
            check_stamp(self.commit(0).part, part, "this body", first)

    def holds(self, version: int, state: Mapping[str, Tensor]) -> bool:
        """Whether a version has the bits of `state`, by the hashes in its commit."""
        commit = self.commit(version)
        frozen = self._frozen_parts(state)
        if frozen and not _is_file(frozen, commit.frozen):
            return False
        return _is_file(self.weights_file(version, state), commit.files["weights"])

    def publish(self, commit: Commit, state: Mapping[str, Tensor], optimizer: Any) -> Commit | None:
        """Make `commit.version` from these.

        Args:
            commit: What its record is to say; its nonce, files, time and what follows from the
                record before are filled in here.
            state: Its tensors by first name.
            optimizer: The state of optimizer and scheduler, if they have stepped.

        Returns:
            The commit, or `None` if another won that version.

        Raises:
            StoreError: the storage failed, and whether the commit came about is unknown.
        """
        version = commit.version
        nonce = uuid.uuid4().hex[:16]
        commit = replace(commit, nonce=nonce, time=time.time())
        table = Table()
        contents: dict[str, list[Any]] = {}
        place: tuple[int, int] | None = None
        if version > 0:
            parent = self.commit(version - 1)
            abandoned = commit.abandoned or parent.abandoned
            halves = parent.halves if commit.halves is None else commit.halves
            commit = replace(commit, parent=parent.digest, abandoned=abandoned, halves=halves)
            table = self._table(version - 1).adding(commit.verdict)
            place = parent.table or (version - 1, 0)
        if place is None or is_due(version, place):
            contents["applied"] = table.to_file()
            place = (version, len(contents["applied"][0]))
        commit = replace(commit, table=place)
        contents["weights"] = checksum.sealed(self.weights_file(version, state))
        if optimizer is not None:
            contents["optimizer"] = checksum.sealed(pack_tree("Optimizer", optimizer))
        keys = {kind: self.keys.versioned(kind, version, nonce) for kind in contents}
        files = self._write({keys[kind]: parts for kind, parts in contents.items()})
        files = {kind: files[keys[kind]] for kind in sorted(keys)}
        self._create_record(replace(commit, files=files))
        winner = self.commit(version)
        if winner.nonce != nonce:
            # No record names these files, and none ever will: the version is taken.
            for kind in files:
                self.blobs.delete(self.keys.versioned(kind, version, nonce))
            return None
        self._tables.put(version, table)
        with contextlib.suppress(StoreError):  # a hint only
            self._put_hint(winner)
        return winner

    def _write(self, contents: Mapping[str, list[Any]]) -> dict[str, str]:
        """Create files, all of them before this returns; the SHA-256 of each, by its key.

        Large ones are written at the same time, and hashed meanwhile.
        """

        def create(key: str) -> str:
            self.blobs.create(key, contents[key])
            return ""

        def digest(key: str) -> str:
            return sha256(contents[key])

        tasks = [partial(work, key) for work in (create, digest) for key in contents]
        num_bytes = sum(memoryview(part).nbytes for parts in contents.values() for part in parts)
        if parallel.is_worth_it(num_bytes):
            found = parallel.together(*tasks)
        else:
            found = [task() for task in tasks]
        return dict(zip(contents, found[len(contents) :], strict=True))

    def confirm_hint(self) -> None:
        """Have the hint hold the newest known record: to be called before gradients are deleted.

        It is the second copy of that record. Who commits may be killed before it is written; were
        the gradients deleted then, and the record lost later, nothing would say that they count.

        Raises:
            StoreError: it can't be written.
        """
        if self._hint < self._head:
            self._hint, _ = read_hint(self.blobs, self.keys)
        if self._hint < self._head:
            self._put_hint(self.commit(self._head))

    def _put_hint(self, commit: Commit) -> None:
        self.blobs.put(self.keys.head, [hint_at(commit)])
        self._hint = commit.version

    def restate(
        self, commit: Commit, state: Mapping[str, Tensor], *, optimizer: bool = True
    ) -> Commit | None:
        """Make `commit.version` from a given state; no further batch is closed by it.

        Args:
            commit: What its record is to say.
            state: Its tensors by first name.
            optimizer: Whether the optimizer's state goes on.

        Returns:
            The commit, or `None` if another won that version.
        """
        last = commit.version - 1
        kept = self.optimizer(last) if optimizer else None
        record = replace(commit, frozen=self.commit(last).frozen)
        return self.publish(record, state, kept)

    def rollback(self, version: int, *, halves: int | None = None) -> tuple[Commit, list[str]]:
        """Make head + 1 from the state of an older version; no batch that is closed counts again.

        Args:
            version: The older one.
            halves: The version of the halves that belongs to what comes back (`together`).

        Returns:
            The commit, and the ids of the batches that are thereby lost.

        Raises:
            InputError: the version isn't older than the head.
            ExpiredError: it has left the retention window.
        """
        head = self.head()
        if not 0 <= version < head:
            raise InputError(
                f"can't roll back to version {version}: expected one from 0 to {head - 1}"
            )
        lost = [str(batch) for commit in self._undone(version, head) for batch in commit.folded]
        state = self.checked_state(version)
        target = self.commit(version)
        # Its applied table goes on from the head's, not from the old version's: with that, batches
        # that are closed and still on file would be folded a second time.
        commit = Commit(
            version=head + 1,
            kind="rollback",
            nonce="",
            files={},
            frozen=target.frozen,
            restored=version,
            abandoned=(*target.abandoned, (version + 1, head)),
            halves=halves,
        )
        made = self.publish(commit, state, self.optimizer(version))
        if made is None:
            raise StoreError(f"version {head + 1} was committed meanwhile: try the rollback again")
        return made, lost

    def has_left(self, version: int) -> bool:
        """Whether a version that was the newest a moment ago has left the window since.

        Far away, where a commit takes as long as many reads, nobody asks for a newer one.
        """
        newest = self.head() if self.blobs.is_near else self._head
        if newest - version < 2:
            return False
        key = self.keys.versioned("weights", version, self.commit(version).nonce)
        return self.blobs.raw.get(key) is None

    def sweep(self, keep: int, keep_bytes: int | None = 0, *, first: bool = False) -> int:
        """Delete what no reader may need any more; without clocks, and never beyond the head.

        Args:
            keep: How many of the newest versions stay.
            keep_bytes: So many bytes of older versions, and of the open calls that need them, stay
                besides (`retention`); `None` for its default.
            first: Whether the weights of version 0 stay too, for a replay.

        Returns:
            How many forwards, parts and pins were dropped with their versions.
        """
        self.blobs.sweep()
        head = self.head()
        if head % PRUNE_EVERY == 0:
            for folder in (*TRANSIENT, REFERENCE, "grad"):
                self.blobs.prune(f"{self.name}/{folder}")
        oldest = head - keep + 1
        if not self._retention.is_due(oldest):
            return 0
        # What is open is listed right before its weights may go: a call that is recorded in between
        # finds that they are gone, and runs again at a newer version.
        held, dropped = self._retention.sort(oldest, keep_bytes) if oldest > 0 else (set(), [])
        self._sweep_files(head, oldest, held, first=first)
        for key in dropped:
            self.blobs.delete(key)
        return len(dropped)

    def _sweep_files(self, head: int, oldest: int, held: set[int], *, first: bool) -> None:
        """Delete the files of expired versions, and those that no commit names."""
        # Later versions need the table that the oldest one needs.
        base = self.commit(max(0, oldest)).base
        floors = {"weights": oldest, "optimizer": oldest, "applied": base}
        for kind, floor in floors.items():
            for key in self.blobs.list(f"{self.name}/{kind}"):
                found = self.keys.parse_versioned(key)
                if found is None:
                    continue
                version, nonce = found
                if first and version == 0 and nonce == self.commit(0).nonce:
                    continue
                if version < floor:
                    is_over = kind != "weights" or version not in held
                else:
                    # Files of head + 1 may be those of a commit under way: they are left alone.
                    is_over = version <= head and self.commit(version).nonce != nonce
                if is_over:
                    self.blobs.delete(key)

    def _find(self, version: int) -> Commit | None:
        found = self._commits.get(version)
        if found is None:
            data = self.blobs.get(self.keys.commit(version))
            found = None if data is None else self._commits.put(version, Commit.from_json(data))
        return found

    def _create_record(self, record: Commit) -> None:
        try:
            self.blobs.create(self.keys.commit(record.version), [record.to_json()])
        except StoreError:
            # It may have been created and the reply lost: the nonce says whose record it is.
            found = self._find(record.version)
            if found is None or found.nonce != record.nonce:
                raise

    def _undone(self, version: int, head: int) -> list[Commit]:
        """The commits that are in the head's state and not in a version's, oldest first."""
        found = []
        # The younger of the two goes back until both have met.
        while version != head:
            if version > head:
                version = self._before(version)
                continue
            commit = self.commit(head)
            if commit.restored is None:
                found.append(commit)
            head = self._before(head)
        return found[::-1]

    def _before(self, version: int) -> int:
        """The version that one was made from."""
        restored = self.commit(version).restored
        return version - 1 if restored is None else restored

    def weights_file(self, version: int, state: Mapping[str, Tensor]) -> list[Any]:
        """The weights file of a version, without its checksum: a function of its state."""
        frozen = self._frozen_names()
        kept = {name: tensor for name, tensor in state.items() if name not in frozen}
        return safetensors.encode(kept, {"lineage": self.name, "version": str(version)})

    def _frozen_names(self) -> list[str]:
        return [name for name, entry in self.fingerprint().items() if entry.get("role") == "frozen"]

    def _frozen_parts(self, state: Mapping[str, Tensor]) -> list[Any] | None:
        """The file of the parameters that never train; `None` if there are none."""
        frozen = self._frozen_names()
        return safetensors.encode({name: state[name] for name in frozen}) if frozen else None

    def _create_frozen(self, state: Mapping[str, Tensor]) -> str | None:
        """Store the parameters that never train; returns the hash that names their file."""
        frozen = self._frozen_parts(state)
        if frozen is None:
            return None
        parts = checksum.sealed(frozen)
        digest = sha256(parts)
        self.blobs.create(self.keys.frozen(digest), parts)
        return digest

    def _restore_frozen(self, state: Mapping[str, Tensor]) -> None:
        """Write the frozen parameters again if they are lost, and these are the same."""
        name = self.commit(self.head()).frozen
        if name is None or any(state[one].is_meta for one in self._frozen_names()):
            return
        try:
            self._frozen_state(name)  # read once: whoever begins here needs it soon
        except CorruptedError:
            parts = checksum.sealed(self._frozen_parts(state) or [])
            if sha256(parts) == name:
                self.blobs.create(self.keys.frozen(name), parts)

    def _cached(self, cache: Bounded[int, T], version: int, load: Callable[[int], T]) -> T:
        found = cache.get(version)
        return cache.put(version, load(version)) if found is None else found

    def _load_table(self, version: int) -> Table:
        data = self._file(version, "applied")
        return Table.from_json(read_json(data, f"the applied table of version {version}"))

    def _load_state(self, version: int) -> dict[str, Tensor]:
        commit, data = self._read(version, "weights")
        self._verified.discard(version)
        if not self.blobs.required and sha256([data]) != commit.files["weights"]:
            raise self._corrupted(version, "weights")  # a store of format 1 has no checksums
        return self.decoded(version, data)

    def decoded(self, version: int, data: memoryview) -> dict[str, Tensor]:
        """The distinct tensors of a version, from the bytes of its weights file.

        Raises:
            CorruptedError: they can't be read.
        """
        commit = self.commit(version)
        try:
            state = safetensors.decode(data)[0]
        except FormatError as error:
            raise self._corrupted(version, "weights") from error
        if commit.frozen is not None:
            state |= self._frozen_state(commit.frozen)
        return state

    def _frozen_state(self, name: str) -> dict[str, Tensor]:
        if name not in self._frozen:
            with contextlib.suppress(CorruptedError, FormatError):
                data = self.blobs.get(self.keys.frozen(name))
                if data is not None and sha256([data]) == name:
                    self._frozen[name] = safetensors.decode(data)[0]
        if name not in self._frozen:
            raise CorruptedError(
                f"the frozen parameters of lineage {self.name!r} are missing or changed: "
                f"restore {self.keys.frozen(name)!r} from a copy, or run `splitfed repair` and "
                "begin a server of the same model, which writes them again"
            )
        return self._frozen[name]

    def _file(self, version: int, kind: str) -> memoryview:
        """A file of a commit, with the bytes that were committed."""
        commit, data = self._read(version, kind)
        if sha256([data]) != commit.files[kind]:
            raise self._corrupted(version, kind)
        return data

    def _read(self, version: int, kind: str) -> tuple[Commit, memoryview]:
        """A commit, and a file of it as it is."""
        commit = self.commit(version)
        key = self.keys.versioned(kind, version, commit.nonce)
        try:
            data = self.blobs.get(key)
        except (CorruptedError, FormatError) as error:
            raise self._corrupted(version, kind) from error
        if data is None:
            self.confirm(now=True)
            head = self.head()
            if version == (self.commit(head).base if kind == "applied" else head):
                raise CorruptedError(
                    f"the {kind} of version {version} of lineage {self.name!r} are missing, and "
                    f"the newest version {head} needs them: {key!r} was deleted from outside. "
                    "Restore it from a copy, or run `splitfed repair`"
                )
            raise ExpiredError(
                f"the {kind} of version {version} of lineage {self.name!r} "
                f"have left the retention window (the newest is {head}): "
                "raise keep_versions of the Accumulator, or keep_bytes for calls that are open; "
                "or go on with a newer version"
            )
        return commit, data

    def _corrupted(self, version: int, kind: str) -> CorruptedError:
        key = self.keys.versioned(kind, version, self.commit(version).nonce)
        return CorruptedError(
            f"the {kind} of version {version} of lineage {self.name!r} aren't what was committed: "
            f"{key!r} was changed from outside. Restore it from a copy, run `splitfed repair`, "
            "or go back with GradientStore.rollback()"
        )


def hint_at(commit: Commit) -> bytes:
    """The hint at the newest version. It holds the record too, for one that gets lost."""
    return json.dumps({"version": commit.version, "record": commit.to_json().decode()}).encode()


def read_hint(blobs: Checked, keys: Keys) -> tuple[int, str]:
    """The version that the hint names, or -1; and its record, or ''."""
    try:
        found = read_json(blobs.get(keys.head), keys.head)
    except (FormatError, CorruptedError):  # missing, damaged, or of format 1
        return -1, ""
    version = found.get("version")
    if type(version) is not int or version < 0:
        return -1, ""
    return version, str(found.get("record", ""))


def _is_file(parts: list[Any], digest: str | None) -> bool:
    """Whether a file has these contents; those of format 1 were written without a checksum."""
    return digest in (sha256(checksum.sealed(parts)), sha256(parts))


def sha256(parts: Iterable[Any]) -> str:
    """SHA-256 of the joined parts."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()
