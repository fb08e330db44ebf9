"""The versions of a lineage, read.

Readers probe for the next commit record on every request: one failing GET, no listing, and no replica that answers
at an old version for long. What is cached here can't change: records, and the files that they name with their hashes.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from splitfed.blobs.contract import Blobs, Buffer
from splitfed.errors import CorruptedError, ExpiredError, FormatError, MissingError
from splitfed.model.fingerprint import is_entry
from splitfed.model.skeleton import Fingerprint
from splitfed.protocol import safetensors
from splitfed.protocol.ids import BatchId
from splitfed.protocol.packing import read_json, unpack_tree
from splitfed.store.batchset import BatchSet
from splitfed.store.cache import Bounded
from splitfed.store.commit import Commit
from splitfed.store.layout import Keys

T = TypeVar("T")
CACHED = 4


class Versions:
    """Reads one lineage.

    Args:
        blobs: Where it lies.
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
        self._verified: dict[int, bool] = {}
        """Whether the cached weights of a version have the hash of their commit; absent until that is known."""

    def fingerprint(self) -> Fingerprint:
        """The architecture that this lineage was begun with.

        Raises:
            MissingError: nobody has begun it.
        """
        data = self.blobs.get(self.keys.fingerprint)
        if data is None:
            raise MissingError(
                f"the store has no lineage {self.name!r} yet: a SplitServer or Accumulator begins it with its "
                "module's weights"
            )
        fingerprint: Fingerprint = read_json(data, self.keys.fingerprint)
        if not all(map(is_entry, fingerprint.values())):
            raise FormatError(f"{self.keys.fingerprint} isn't a fingerprint: expected an object for each tensor")
        return fingerprint

    def head(self) -> int:
        """The newest version, or -1 if there is none. Always asks the store."""
        version = self._head
        if version < 0:
            hint = self.blobs.get(self.keys.head)
            version = int(bytes(hint)) if hint is not None and bytes(hint).isdigit() and len(hint) <= 12 else -1
            if version >= 0 and self._find(version) is None:
                version = -1
        while self._find(version + 1) is not None:
            version += 1
        self._head = max(self._head, version)
        return self._head

    def checked_head(self) -> int:
        """As `head`, after a look that the newest version known here is still what it was: for what is begun on it.

        Raises:
            CorruptedError: the run was deleted or replaced meanwhile, and all that is cached here is of the old one.
        """
        version, known = self._head, self._commits.get(self._head)
        if version >= 0:
            data = self.blobs.get(self.keys.commit(version))
            if data is None or (known is not None and Commit.from_json(data).nonce != known.nonce):
                raise CorruptedError(
                    f"version {version} of lineage {self.name!r} isn't there any more, or is another: the run was "
                    "deleted or begun anew while a server or accumulator used it, and that one has to be started anew"
                )
        return self.head()

    def commit(self, version: int) -> Commit:
        """The record of a version.

        Raises:
            MissingError: there is no such version.
        """
        found = self._find(version)
        if found is None:
            raise MissingError(f"lineage {self.name!r} has no version {version}: the newest is {self.head()}")
        return found

    def state(self, version: int) -> dict[str, Tensor]:
        """The distinct tensors of a version by first name; they share mapped memory and mustn't be changed.

        The file's hash is checked in the background, once per process and version; a later call tells.

        Raises:
            ExpiredError: its weights have left the retention window.
            CorruptedError: they aren't what was committed.
        """
        if self._verified.get(version) is False:
            return self.checked_state(version)
        return self._cached(self._states, version, self._load_state)

    def checked_state(self, version: int) -> dict[str, Tensor]:
        """As `state`, with the hash checked before the answer: for what will be built upon or handed out."""
        found = self._states.get(version)
        if found is not None and self._verified.get(version) and version == self._head:  # an older one may have expired
            return found
        data = self._file(version, "weights")  # if it was suspect, it may have been restored from a copy meanwhile
        self._verified[version] = True
        return self._states.put(version, self._decoded(version, data))

    def weights(self, version: int) -> dict[str, Tensor]:
        """A version's tensors under all their names, as the module's `state_dict()` has them; copies."""
        copies = {name: tensor.clone() for name, tensor in self.checked_state(version).items()}
        return {name: copies[entry.get("tied", name)] for name, entry in self.fingerprint().items()}

    def counted(self) -> BatchSet:
        """The batches counted by now.

        The head and its table are two reads: commits in between may take the table away, and then it is asked again.
        """
        while True:
            head = self.head()
            try:
                return self.applied(head)
            except ExpiredError:
                if self.head() == head:
                    raise

    def forget(self, version: int) -> None:
        """Read a version's tensors from the store again next time: someone wrote to the ones in memory."""
        self._states.pop(version)
        self._frozen.clear()

    def outcome(self, batch: BatchId) -> str:
        """What became of a counted batch: 'stored', or 'rejected'. Searches the records, newest first."""
        for version in range(self.head(), 0, -1):
            commit = self.commit(version)
            if batch in commit.folded or batch in commit.stale:
                return "stored"
            if batch in commit.rejected or batch in commit.skipped:
                return "rejected"
        return "stored"

    def optimizer(self, version: int) -> Any:
        """The state of optimizer and scheduler at a version, or `None` if none has stepped."""
        if "optimizer" not in self.commit(version).files:
            return None
        return unpack_tree("Optimizer", self._file(version, "optimizer"))

    def applied(self, version: int) -> BatchSet:
        """The batches counted up to a version."""
        return self._cached(self._applied, version, self._load_applied)

    def _find(self, version: int) -> Commit | None:
        found = self._commits.get(version)
        if found is None:
            data = self.blobs.get(self.keys.commit(version))
            found = None if data is None else self._commits.put(version, Commit.from_json(data))
        return found

    def _cached(self, cache: Bounded[int, T], version: int, load: Callable[[int], T]) -> T:
        found = cache.get(version)
        return cache.put(version, load(version)) if found is None else found

    def _load_applied(self, version: int) -> BatchSet:
        return BatchSet.from_json(read_json(self._file(version, "applied"), f"the applied table of version {version}"))

    def _load_state(self, version: int) -> dict[str, Tensor]:
        self._verified.pop(version, None)
        return self._decoded(version, self._file(version, "weights", wait=False))

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
                raise CorruptedError(f"the frozen parameters of lineage {self.name!r} are missing or changed")
            self._frozen[name] = safetensors.decode(data)[0]
        return self._frozen[name]

    def _file(self, version: int, kind: str, *, wait: bool = True) -> memoryview:
        """A file of a commit, its hash checked now, or in the background for the next call to tell."""
        commit = self.commit(version)
        data = self.blobs.get(self.keys.versioned(kind, version, commit.nonce))
        if data is None:
            raise ExpiredError(
                f"the {kind} of version {version} of lineage {self.name!r} have left the retention window (the "
                "newest is "
                f"{self.head()}): raise keep_versions of the Accumulator, or go on with a newer version"
            )
        if not wait:
            threading.Thread(target=self._verify, args=(commit, data), daemon=True).start()
        elif sha256([data]) != commit.files[kind]:
            raise self._corrupted(version, kind)
        return data

    def _verify(self, commit: Commit, data: Buffer) -> None:
        self._verified[commit.version] = sha256([data]) == commit.files["weights"]

    def _corrupted(self, version: int, kind: str) -> CorruptedError:
        return CorruptedError(
            f"the {kind} of version {version} of lineage {self.name!r} aren't what was committed: the file was changed "
            "from outside. Restore it from a copy, or go back with GradientStore.rollback()"
        )


def sha256(parts: list[Any]) -> str:
    """SHA-256 of the joined parts."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()
