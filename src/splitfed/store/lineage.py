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
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from splitfed.blobs.contract import Blobs, Buffer
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
from splitfed.protocol import safetensors
from splitfed.protocol.ids import BatchId
from splitfed.protocol.packing import pack_tree, read_json, unpack_tree
from splitfed.store.batchset import BatchSet, Outcome
from splitfed.store.cache import Bounded
from splitfed.store.commit import Commit
from splitfed.store.layout import Keys

T = TypeVar("T")
CACHED = 4
"""Versions of one lineage whose tensors stay in memory."""
HASHED_AT_ONCE = 256 * 2**10
"""A file of so many bytes is hashed before a thread for it would have started."""


class Lineage:
    """One line of versions, read and written.

    Args:
        blobs: The storage backend.
        name: `body`, `client` or `body@<id>`.
    """

    def __init__(self, blobs: Blobs, name: str) -> None:
        self.blobs = blobs
        self.keys = Keys(name)
        self.name = name
        self._head = -1
        self._commits: Bounded[int, Commit] = Bounded(16 * CACHED)
        self._states: Bounded[int, dict[str, Tensor]] = Bounded(CACHED)
        self._applied: Bounded[int, BatchSet] = Bounded(CACHED)
        self._frozen: dict[str, dict[str, Tensor]] = {}
        self.warned_of_unused = False
        """Whether it was said that a body's weights came too late (`beginning`)."""
        self._verified: dict[int, bool] = {}
        """Whether a version's cached weights have their commit's hash; absent until it is known."""

    def fingerprint(self) -> Fingerprint:
        """The architecture that this lineage was begun with.

        Raises:
            MissingError: nobody has begun it.
        """
        data = self.blobs.get(self.keys.fingerprint)
        if data is None:
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
            # The hint spares a walk from version 0. It may be missing, stale or foreign, so the
            # record that it points at must be there.
            hint = bytes(self.blobs.get(self.keys.head) or b"")
            version = int(hint) if hint.isdigit() and len(hint) <= 12 else -1
            if version >= 0 and self._find(version) is None:
                version = -1
        while self._find(version + 1) is not None:
            version += 1
        self._head = max(self._head, version)  # other threads look too
        return self._head

    def checked_head(self) -> int:
        """As `head`, after a check that the newest version known here is still what it was.

        For who begins something on it: a run that was deleted and begun again under the same URL
        would otherwise be mixed with what is cached of the old one.

        Raises:
            CorruptedError: the run was deleted or replaced meanwhile.
        """
        version = self._head
        known = self._commits.get(version)
        if version >= 0:
            data = self.blobs.get(self.keys.commit(version))
            if data is None or (known is not None and Commit.from_json(data).nonce != known.nonce):
                raise CorruptedError(
                    f"version {version} of lineage {self.name!r} isn't there any more, "
                    "or is another: the run was deleted or begun anew "
                    "while a server or accumulator used it, and that one has to be started again"
                )
        return self.head()

    def commit(self, version: int) -> Commit:
        """The record of a version.

        Raises:
            MissingError: there is no such version.
        """
        found = self._find(version)
        if found is None:
            raise MissingError(
                f"lineage {self.name!r} has no version {version}: the newest is {self.head()}"
            )
        return found

    def state(self, version: int) -> dict[str, Tensor]:
        """The distinct tensors of a version, by first name.

        They share mapped memory and mustn't be changed. The file's hash is checked once per process
        and version: of a large file in the background, so that a later call raises.

        Raises:
            ExpiredError: its weights have left the retention window.
            CorruptedError: they aren't what was committed.
        """
        if self._verified.get(version) is False:
            return self.checked_state(version)
        return self._cached(self._states, version, self._load_state)

    def checked_state(self, version: int) -> dict[str, Tensor]:
        """As `state`, with the hash checked before the answer: to build upon, or to hand out."""
        found = self._states.get(version)
        # Only the head is answered from memory: an older version may have expired.
        if found is not None and self._verified.get(version) and version == self._head:
            return found
        # A file that was found corrupted is read again: it may have been restored from a copy.
        data = self._file(version, "weights")
        self._verified[version] = True
        return self._states.put(version, self._decoded(version, data))

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
        return self._cached(self._applied, version, self._load_applied)

    def counted(self) -> BatchSet:
        """The batches that are closed by now."""
        # The head and its table are two reads. Commits in between may take the table out of the
        # retention window: then the head has moved, and the question is asked again.
        while True:
            head = self.head()
            try:
                return self.applied(head)
            except ExpiredError:
                if self.head() == head:
                    raise

    def outcome(self, batch: BatchId) -> Outcome:
        """What became of a closed batch. Searches the records, newest first."""
        for version in range(self.head(), 0, -1):
            found = self.commit(version).verdict.outcome(batch)
            if found is not None:
                return found
        return Outcome.FOLDED

    def forget(self, version: int) -> None:
        """Drop a version's tensors from memory, because they were written to."""
        self._states.pop(version)
        self._frozen.clear()

    def initialise(
        self,
        fingerprint: Fingerprint,
        state: Mapping[str, Tensor],
        source: int | None = None,
        part: str | None = None,
    ) -> bool:
        """Publish version 0, unless it exists; the first writer wins.

        Args:
            fingerprint: The module's architecture.
            state: Its tensors by first name.
            source: The version of `body` that they are, for the line of one client.
            part: The stamp of the body's cut, if it has one.

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
            self.blobs.create(self.keys.fingerprint, [json.dumps(fingerprint, indent=1).encode()])
        module = "the client half" if self.name == "client" else "the body"
        compare(self.fingerprint(), fingerprint, module)
        if self.head() >= 0:
            self._check_part(part)
            return False
        frozen = self._create_frozen(state)
        commit = Commit(0, "initial", "", {}, frozen, source=source, part=part)
        made = self.publish(commit, state, None, BatchSet())
        if made is None and frozen is not None and self.commit(0).frozen != frozen:
            self.blobs.delete(self.keys.frozen(frozen))
        self._check_part(part)
        return True

    def _check_part(self, part: str | None) -> None:
        """Compare the stamp of a body with that of whoever began the lineage."""
        if part is not None:
            first = f"the one that {self.name!r} began with"
            check_stamp(self.commit(0).part, part, "this body", first)

    def holds(self, version: int, state: Mapping[str, Tensor]) -> bool:
        """Whether a version has the bits of `state`, by the hashes in its commit."""
        commit = self.commit(version)
        frozen = self._frozen_names()
        if frozen and commit.frozen != sha256(
            safetensors.encode({name: state[name] for name in frozen})
        ):
            return False
        found = sha256(self._contents(version, state, None, BatchSet())["weights"])
        return found == commit.files["weights"]

    def publish(
        self, commit: Commit, state: Mapping[str, Tensor], optimizer: Any, applied: BatchSet
    ) -> Commit | None:
        """Make `commit.version` from these; the record's nonce, files and time are filled in here.

        Args:
            commit: What its record is to say.
            state: Its tensors by first name.
            optimizer: The state of optimizer and scheduler, if they have stepped.
            applied: The batches that are closed with it.

        Returns:
            The commit, or `None` if another won that version.

        Raises:
            StoreError: the storage failed, and whether the commit came about is unknown.
        """
        version = commit.version
        nonce = uuid.uuid4().hex[:16]
        contents = self._contents(version, state, optimizer, applied)
        for kind, parts in contents.items():
            self.blobs.create(self.keys.versioned(kind, version, nonce), parts)
        files = {kind: sha256(parts) for kind, parts in contents.items()}
        self._create_record(replace(commit, nonce=nonce, files=files, time=time.time()))
        winner = self.commit(version)
        if winner.nonce != nonce:
            # No record names these files, and none ever will: the version is taken.
            for kind in files:
                self.blobs.delete(self.keys.versioned(kind, version, nonce))
            return None
        with contextlib.suppress(StoreError):  # a hint only
            self.blobs.put(self.keys.head, [str(version).encode()])
        return winner

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
        return self.publish(record, state, kept, self.applied(last))

    def rollback(self, version: int) -> tuple[Commit, list[str]]:
        """Make head + 1 from the state of an older version; no batch that is closed counts again.

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
        kept = set(self._versions_within(version))
        undone = [number for number in self._versions_within(head) if number not in kept]
        lost = [str(batch) for number in undone for batch in self.commit(number).folded]
        state = self.checked_state(version)
        commit = Commit(head + 1, "rollback", "", {}, self.commit(version).frozen, restored=version)
        # The applied table is the head's, not the old version's: with the old one, batches that are
        # closed and still on file would be folded a second time.
        made = self.publish(commit, state, self.optimizer(version), self.applied(head))
        if made is None:
            raise StoreError(f"version {head + 1} was committed meanwhile: try the rollback again")
        return made, lost

    def sweep(self, keep: int) -> int:
        """Delete what no reader may need any more; without clocks, and never beyond the head.

        Args:
            keep: How many of the newest versions stay.

        Returns:
            How many forwards and parts were dropped with their versions.
        """
        head = self.head()
        oldest = head - keep + 1
        self._sweep_files(head, oldest)
        if oldest <= 0:
            return 0
        return self._sweep_pins(oldest) + self._sweep_transient(oldest)

    def _sweep_files(self, head: int, oldest: int) -> None:
        """Delete the files of expired versions, and those that no commit names."""
        for kind in ("weights", "optimizer", "applied"):
            for key in self.blobs.list(f"{self.name}/{kind}"):
                found = self.keys.parse_versioned(key)
                if found is None:
                    continue
                version, nonce = found
                # Files of head + 1 may be those of a commit under way: they are left alone.
                if version <= head and (version < oldest or self.commit(version).nonce != nonce):
                    self.blobs.delete(key)

    def _sweep_pins(self, oldest: int) -> int:
        dropped = 0
        for key in self.blobs.list(f"{self.name}/pin"):
            pinned = bytes(self.blobs.get(key) or b"")
            if pinned.isdigit() and int(pinned) < oldest:
                self.blobs.delete(key)
                dropped += 1
        return dropped

    def _sweep_transient(self, oldest: int) -> int:
        dropped = 0
        for kind in ("forward", "part"):
            versions = {
                self.keys.parse_transient(key) for key in self.blobs.list(f"{self.name}/{kind}")
            }
            for version in versions:
                if version is not None and version < oldest:
                    dropped += self.blobs.delete_tree(f"{self.name}/{kind}/{version:010d}")
        return dropped

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

    def _versions_within(self, version: int) -> list[int]:
        """The commits whose folds are in the state of a version, oldest first."""
        found = []
        while version > 0:
            commit = self.commit(version)
            if commit.restored is None:
                found.append(version)
                version -= 1
            else:
                version = commit.restored
        return found[::-1]

    def _contents(
        self, version: int, state: Mapping[str, Tensor], optimizer: Any, applied: BatchSet
    ) -> dict[str, list[Any]]:
        """The files of a version, encoded, by kind."""
        frozen = self._frozen_names()
        kept = {name: tensor for name, tensor in state.items() if name not in frozen}
        metadata = {"lineage": self.name, "version": str(version)}
        contents: dict[str, list[Any]] = {"weights": safetensors.encode(kept, metadata)}
        if optimizer is not None:
            contents["optimizer"] = pack_tree("Optimizer", optimizer)
        contents["applied"] = [json.dumps(applied.to_json(), separators=(",", ":")).encode()]
        return contents

    def _frozen_names(self) -> list[str]:
        return [name for name, entry in self.fingerprint().items() if entry.get("role") == "frozen"]

    def _create_frozen(self, state: Mapping[str, Tensor]) -> str | None:
        """Store the parameters that never train; returns the hash that names their file."""
        frozen = self._frozen_names()
        if not frozen:
            return None
        parts = safetensors.encode({name: state[name] for name in frozen})
        digest = sha256(parts)
        self.blobs.create(self.keys.frozen(digest), parts)
        return digest

    def _cached(self, cache: Bounded[int, T], version: int, load: Callable[[int], T]) -> T:
        found = cache.get(version)
        return cache.put(version, load(version)) if found is None else found

    def _load_applied(self, version: int) -> BatchSet:
        data = self._file(version, "applied")
        return BatchSet.from_json(read_json(data, f"the applied table of version {version}"))

    def _load_state(self, version: int) -> dict[str, Tensor]:
        commit, data = self._read(version, "weights")
        self._verified.pop(version, None)
        if len(data) > HASHED_AT_ONCE:
            threading.Thread(target=self._verify, args=(commit, data), daemon=True).start()
        else:
            self._verify(commit, data)
            if not self._verified[version]:
                raise self._corrupted(version, "weights")
        return self._decoded(version, data)

    def _decoded(self, version: int, data: Buffer) -> dict[str, Tensor]:
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
            data = self.blobs.get(self.keys.frozen(name))
            if data is None or sha256([data]) != name:
                raise CorruptedError(
                    f"the frozen parameters of lineage {self.name!r} are missing or changed"
                )
            self._frozen[name] = safetensors.decode(data)[0]
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
        data = self.blobs.get(self.keys.versioned(kind, version, commit.nonce))
        if data is None:
            raise ExpiredError(
                f"the {kind} of version {version} of lineage {self.name!r} "
                f"have left the retention window (the newest is {self.head()}): "
                "raise keep_versions of the Accumulator, or go on with a newer version"
            )
        return commit, data

    def _verify(self, commit: Commit, data: Buffer) -> None:
        self._verified[commit.version] = sha256([data]) == commit.files["weights"]

    def _corrupted(self, version: int, kind: str) -> CorruptedError:
        return CorruptedError(
            f"the {kind} of version {version} of lineage {self.name!r} aren't what was committed: "
            "the file was changed from outside. "
            "Restore it from a copy, or go back with GradientStore.rollback()"
        )


def sha256(parts: Iterable[Any]) -> str:
    """SHA-256 of the joined parts."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()
