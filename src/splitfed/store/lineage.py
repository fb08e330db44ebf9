"""A lineage: a line of versions, and the protocol that adds one.

The commit is the create-once of `commit/<v+1>.json`. Everything that it names was written before, under names of its
own, so a reader sees a whole version or none, and of two accumulators that race one wins. "Exists" can mean "I won
and the reply was lost", so the record carries a nonce that is read back.

The trap: after an ambiguous create, one's own files may be the ones that the record names. They are left alone.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from splitfed.errors import InputError, StoreError
from splitfed.model.fingerprint import compare
from splitfed.model.skeleton import Fingerprint
from splitfed.protocol import safetensors
from splitfed.protocol.packing import pack_tree
from splitfed.store.batchset import BatchSet
from splitfed.store.commit import Commit
from splitfed.store.versions import Versions, sha256


class Lineage(Versions):
    """One lineage, read and written."""

    def initialise(self, fingerprint: Fingerprint, state: Mapping[str, Tensor], source: int | None = None) -> None:
        """Publish version 0, unless somebody has; first writer wins.

        Args:
            fingerprint: The module's architecture.
            state: Its tensors by first name.
            source: The version of `body` that they are, for the line of one client.

        Raises:
            ArchitectureError: the lineage was begun with another architecture.
        """
        if self.blobs.get(self.keys.fingerprint) is None:
            self.blobs.create(self.keys.fingerprint, [json.dumps(fingerprint, indent=1).encode()])
        compare(self.fingerprint(), fingerprint, "the client half" if self.name == "client" else "the body")
        if self.head() >= 0:
            return
        frozen = self._frozen_names()
        name = None
        if frozen:
            parts = safetensors.encode({name: state[name] for name in frozen})
            name = sha256(parts)
            self.blobs.create(self.keys.frozen(name), parts)
        made = self.publish(Commit(0, "initial", "", {}, name, source=source), state, None, BatchSet())
        if made is None and name is not None and self.commit(0).frozen != name:
            self.blobs.delete(self.keys.frozen(name))

    def publish(self, commit: Commit, state: Mapping[str, Tensor], optimizer: Any, applied: BatchSet) -> Commit | None:
        """Make `commit.version` from these; the record's nonce, files and time are filled in here.

        Returns:
            The commit, or `None` if another won that version.

        Raises:
            StoreError: the storage failed, and whether the commit came about can't be told.
        """
        nonce = uuid.uuid4().hex[:16]
        frozen = self._frozen_names()
        kept = {name: tensor for name, tensor in state.items() if name not in frozen}
        contents: dict[str, list[Any]] = {
            "weights": safetensors.encode(kept, {"lineage": self.name, "version": str(commit.version)})
        }
        if optimizer is not None:
            contents["optimizer"] = pack_tree("Optimizer", optimizer)
        contents["applied"] = [json.dumps(applied.to_json(), separators=(",", ":")).encode()]
        for kind, parts in contents.items():
            self.blobs.create(self.keys.versioned(kind, commit.version, nonce), parts)
        files = {kind: sha256(parts) for kind, parts in contents.items()}
        own = replace(commit, nonce=nonce, files=files, time=time.time())
        try:
            self.blobs.create(self.keys.commit(commit.version), [own.to_json()])
        except StoreError:
            if (found := self._find(commit.version)) is None or found.nonce != nonce:
                raise
        winner = self.commit(commit.version)
        if winner.nonce != nonce:
            for kind in files:
                self.blobs.delete(self.keys.versioned(kind, commit.version, nonce))
            return None
        with contextlib.suppress(StoreError):  # a hint only
            self.blobs.put(self.keys.head, [str(commit.version).encode()])
        return winner

    def restate(self, commit: Commit, state: Mapping[str, Tensor], *, optimizer: bool = True) -> Commit | None:
        """Make `commit.version` from a given state, with what was counted before it and nothing more.

        Args:
            commit: What its record is to say.
            state: Its tensors by first name.
            optimizer: Whether the optimizer's state goes on.

        Returns:
            The commit, or `None` if another won that version.
        """
        last = commit.version - 1
        kept = self.optimizer(last) if optimizer else None
        return self.publish(replace(commit, frozen=self.commit(last).frozen), state, kept, self.applied(last))

    def sweep(self, keep: int) -> int:
        """Delete what no reader may need any more; without clocks, and never beyond the head.

        Args:
            keep: How many of the newest versions stay.

        Returns:
            How many forwards and parts were dropped with their versions.
        """
        head = self.head()
        oldest = head - keep + 1
        for kind in ("weights", "optimizer", "applied"):
            for key in self.blobs.list(f"{self.name}/{kind}"):
                found = self.keys.parse_versioned(key)
                if found and found[0] <= head and (found[0] < oldest or self.commit(found[0]).nonce != found[1]):
                    self.blobs.delete(key)
        if oldest <= 0:
            return 0
        dropped = 0
        for key in self.blobs.list(f"{self.name}/pin"):
            pinned = bytes(self.blobs.get(key) or b"")
            if pinned.isdigit() and int(pinned) < oldest:
                self.blobs.delete(key)
                dropped += 1
        for kind in ("forward", "part"):
            versions = {self.keys.parse_transient(key) for key in self.blobs.list(f"{self.name}/{kind}")}
            expired = [v for v in versions if v is not None and v < oldest]
            dropped += sum(self.blobs.delete_tree(f"{self.name}/{kind}/{version:010d}") for version in expired)
        return dropped

    def rollback(self, version: int) -> tuple[Commit, list[str]]:
        """Make head + 1 from the state of an older version; nothing that was counted may count again.

        Returns:
            The commit, and the ids of the batches that are thereby lost.

        Raises:
            InputError: the version isn't older than the head.
            ExpiredError: it has left the retention window.
        """
        head = self.head()
        if not 0 <= version < head:
            raise InputError(f"can't roll back to version {version}: expected one from 0 to {head - 1}")
        kept = set(self._folds(version))
        lost = [str(batch) for v in self._folds(head) if v not in kept for batch in self.commit(v).folded]
        state = self.checked_state(version)
        commit = Commit(head + 1, "rollback", "", {}, self.commit(version).frozen, restored=version)
        made = self.publish(commit, state, self.optimizer(version), self.applied(head))
        if made is None:
            raise StoreError(f"version {head + 1} was committed meanwhile: try the rollback again")
        return made, lost

    def _folds(self, version: int) -> list[int]:
        """The commits whose folds are in the state of a version, oldest first; a rollback leaves out what it undid."""
        found = []
        while version > 0:
            commit = self.commit(version)
            if commit.restored is None:
                found.append(version)
            version = version - 1 if commit.restored is None else commit.restored
        return found[::-1]

    def _frozen_names(self) -> list[str]:
        return [name for name, entry in self.fingerprint().items() if entry.get("role") == "frozen"]
