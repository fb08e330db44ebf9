"""`repair`: make a damaged store usable again, from what the store itself still holds.

The newest commit record is in the hint too, so it is written again with the same bytes; in place of
an older one comes a record that closes what that one closed. The table of closed batches is the sum
of the records. A newest version whose own files are lost is given up: a rollback to the newest
whole one follows, and lists the batches that are lost with it. What can't be rebuilt is set aside,
so that its batch or call is over and nothing waits for it.

Nothing is deleted: what is damaged is copied to `aside/` first. Repair takes the accumulator's
lock, and refuses if it can't have it.

The trap is a lost record of before. What it closed is in no other place than in the next table, or
nowhere: all numbers of a client that lie between known ones count as closed, so that no batch
counts twice.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from splitfed.diagnostics.integrity import (
    ASIDE,
    Damage,
    Verification,
    newest_of,
    read_records,
    verify,
)
from splitfed.errors import CorruptedError, FormatError, IdError, SplitFedError
from splitfed.protocol.ids import BatchId, check_lineage
from splitfed.protocol.messages import GradientRecord
from splitfed.protocol.packing import pack, read_json
from splitfed.store import layout
from splitfed.store.batchset import BatchSet, Verdict
from splitfed.store.commit import Commit
from splitfed.store.layout import Keys
from splitfed.store.lineage import Lineage, hint_at, read_hint, sha256
from splitfed.store.store import GradientStore
from splitfed.store.table import Table

# What follows from the model, which isn't here.
_BY_MODEL = re.compile(r"(?:format|fingerprint|beside)\.json$|/frozen-")
# What nothing but a replay needs.
_FOR_REPLAY = re.compile(r"/settings-|/kept/|/weights/0{10}-")
_NO_REPLAY = (
    "gone, and nothing but `splitfed replay` needs it; settings are written again by the next "
    "accumulator that has them"
)
LOST = "lost"
"""The kind of a record that stands for one whose content isn't known any more."""


@dataclass(slots=True)
class Repairs:
    """What `repair` has done."""

    actions: list[str] = field(default_factory=list)
    """In words, in order."""
    aside: list[str] = field(default_factory=list)
    """Where the damaged files are now."""
    lost: list[str] = field(default_factory=list)
    """The ids of batches that were acknowledged and count no more."""
    left: list[Damage] = field(default_factory=list)
    """What is still wrong."""


def repair(store: GradientStore) -> Repairs:
    """Rebuild what is damaged or missing, as far as the store holds what it takes.

    Raises:
        MissingError: there is no run in it.
        FormatError: it is of another format version.
        BusyError: an accumulator is at work on it.
        StoreError: the storage failed.
    """
    done = Repairs()
    found = verify(store)
    names = {"body", *(_lineage_of(damage) for damage in found.damages)}
    with store.alone(name for name in names if name is not None):
        _repair(store, found, done)
        for damage in verify(store).damages:
            if damage.kind == "missing" and _BY_MODEL.search(damage.key):
                text = "the next server or accumulator of the same model writes it again"
                done.actions.append(f"{damage.key}: {text}")
            elif damage.kind == "missing" and _FOR_REPLAY.search(damage.key):
                done.actions.append(f"{damage.key}: {_NO_REPLAY}")
            else:
                done.left.append(damage)
    return done


def _repair(store: GradientStore, found: Verification, done: Repairs) -> None:
    by_lineage: dict[str, list[Damage]] = {}
    for damage in found.damages:
        if damage.kind != "missing":
            _set_aside(store, damage.key, done)
        name = _lineage_of(damage)
        if name is None:
            _over(store, damage.key, done)
        else:
            by_lineage.setdefault(name, []).append(damage)
    for name, damages in by_lineage.items():
        _Mender(store, name, done).mend(damages)


def _lineage_of(damage: Damage) -> str | None:
    """The lineage that a damaged file is of; `None` for one of the store's own."""
    try:
        return check_lineage(damage.key.partition("/")[0])
    except IdError:
        return None


def _set_aside(store: GradientStore, key: str, done: Repairs) -> None:
    data = store.blobs.raw.get(key)
    if data is None:
        return
    if not data:  # as a power cut may leave it: nothing of it is there to be kept
        store.blobs.raw.delete(key)
        return
    place = f"{ASIDE}/{os.urandom(4).hex()}/{key}"
    if store.blobs.raw.create(place, [data]):
        store.blobs.raw.delete(key)
        done.aside.append(place)


def _over(store: GradientStore, key: str, done: Repairs) -> None:
    """A file beside the lineages that can't be rebuilt: what begins it anew does so by itself."""
    if layout.parse_client(key) is not None:
        # It says that this process was begun, which its name says too.
        store.blobs.create(key, [json.dumps({"process": ""}).encode()])
        done.actions.append(f"{key}: written again, without the name of the process")
    else:
        done.actions.append(f"{key}: set aside; whoever needs it begins it anew")


class _Mender:
    """Repairs one lineage."""

    def __init__(self, store: GradientStore, name: str, done: Repairs) -> None:
        self._store = store
        self._keys = Keys(name, by_version=not store.blobs.required)
        self._name = name
        self._done = done

    def mend(self, damages: list[Damage]) -> None:
        """Repair what is wrong in it: records first, since all else follows from them."""
        listed = self._store.blobs.list(self._name)
        newest = newest_of(self._store, self._keys, listed)
        self._fingerprint()
        for damage in damages:
            if not damage.key.startswith(f"{self._name}/commit/"):
                self._batch_or_call(damage)
        if newest < 0:
            return
        self._records(newest, listed)
        self._tables(newest)
        self._hint(newest)
        self._newest(newest)

    def _said(self, text: str) -> None:
        self._done.actions.append(text)

    def _fingerprint(self) -> None:
        """Write the one of the two copies that isn't there from the other."""
        both = (self._keys.fingerprint, self._keys.spare)
        for key, other in (both, both[::-1]):
            with suppress(CorruptedError, FormatError):
                data = self._store.blobs.get(other)
                if data is not None and self._store.blobs.create(key, [data]):
                    self._said(f"{key}: written again, from its copy")

    # ------------------------------------------------------------------------------------- records

    def _records(self, newest: int, listed: list[str]) -> None:
        records = read_records(self._store, self._keys, newest)
        for version in range(newest + 1):
            if version in records:
                continue
            found = self._hinted(version)
            how = "written again, from the hint"
            if found is None:
                found = self._in_place_of(version, records, newest, listed)
                how = f"its content is lost, and it closes {len(found.folded)} batches"
            key = self._keys.commit(version)
            if self._store.blobs.create(key, [found.to_json()]):
                self._said(f"{key}: {how}")
            data = self._store.blobs.get(key)
            if data is not None:
                records[version] = Commit.from_json(data)

    def _hinted(self, version: int) -> Commit | None:
        """The record of a version, if it is the newest: the hint holds it too."""
        hinted, record = read_hint(self._store.blobs, self._keys)
        if hinted != version:
            return None
        try:
            return Commit.from_json(record.encode())
        except FormatError:  # a hint that a splitfed of before has written holds none
            return None

    def _in_place_of(
        self, version: int, records: dict[int, Commit], newest: int, listed: list[str]
    ) -> Commit:
        """A record that closes what the lost one may have closed."""
        before = records.get(version - 1)
        after = records.get(version + 1)
        known = BatchSet()
        for record in records.values():
            known = known.union(record.verdict)
        closed = self._own_table(version, listed)
        if closed is None:
            closed = self._next_table(version, records, newest)
        pending = set(self._store.pile(self._name).waiting())
        closed = _filled(known) if closed is None else closed
        lost = [batch for batch in closed if batch not in known and batch not in pending]
        if version == 0:
            lost = []
        table, nonce, files = self._files_of(version, before, after, listed)
        near = before or after
        return Commit(
            version=version,
            kind=LOST,
            nonce=nonce,
            files=files,
            parent="" if before is None else before.digest,
            table=table,
            frozen=self._frozen(listed) if near is None else near.frozen,
            abandoned=() if before is None else before.abandoned,
            verdict=Verdict(folded=BatchSet(lost)),
            was=None if after is None else after.parent,
        )

    def _files_of(
        self, version: int, before: Commit | None, after: Commit | None, listed: list[str]
    ) -> tuple[tuple[int, int], str, dict[str, str]]:
        """The last table at a version, and which of its own files are there."""
        place = (version, 0)
        if after is not None and after.base <= version:
            place = after.table or place
        elif before is not None:
            place = before.table or (before.base, 0)
        files, nonce = {"weights": ""}, LOST
        if place[0] == version:
            files["applied"] = ""
        for key in listed:
            file = self._keys.parse_versioned(key)
            data = self._store.blobs.raw.get(key) if file and file[0] == version else None
            if file is not None and data is not None:
                nonce = file[1]
                files[key.split("/")[1]] = sha256([data])
        return place, nonce, files

    def _frozen(self, listed: list[str]) -> str | None:
        """The hash of the parameters that never train, by the name of their file."""
        start = f"{self._name}/frozen-"
        found = [key for key in listed if key.startswith(start)]
        return found[0][len(start) :].removesuffix(".safetensors") if len(found) == 1 else None

    def _own_table(self, version: int, listed: list[str]) -> BatchSet | None:
        """What was closed by the table of a version itself, if one file alone may be it."""
        found = [key for key in listed if key.startswith(f"{self._name}/applied/")]
        found = [key for key in found if (self._keys.parse_versioned(key) or (-1,))[0] == version]
        return self._closed_in(found[0]) if len(found) == 1 else None

    def _closed_in(self, key: str) -> BatchSet | None:
        """What was closed by the table at a key, if it is whole."""
        with suppress(CorruptedError, FormatError):
            data = self._store.blobs.get(key)
            if data is not None:
                return Table.from_json(read_json(data, key)).closed
        return None

    def _next_table(self, version: int, records: dict[int, Commit], newest: int) -> BatchSet | None:
        """What was closed by the first table after a version, if there is one."""
        for later in range(version, newest + 1):
            record = records.get(later)
            if record is None or "applied" not in record.files:
                continue
            closed = self._closed_in(self._keys.versioned("applied", later, record.nonce))
            if closed is not None:
                return closed
        return None

    # -------------------------------------------------------------------------------- what follows

    def _tables(self, newest: int) -> None:
        """Write the table that the newest version needs, if it isn't there."""
        records = read_records(self._store, self._keys, newest)
        base = records[newest].base
        record = records[base]
        key = self._keys.versioned("applied", base, record.nonce)
        if self._store.blobs.raw.get(key) is not None:
            return
        table = Table()
        for version in range(base + 1):
            table = table.adding(records[version].verdict)
        parts = table.to_file()
        if record.files.get("applied") not in ("", None, sha256(parts)):
            self._said(f"{key}: the records don't add up to the table that was there")
        if self._store.blobs.create(key, parts):
            self._said(f"{key}: written again, from {base} records")

    def _hint(self, newest: int) -> None:
        if read_hint(self._store.blobs, self._keys)[0] == newest:
            return
        record = read_records(self._store, self._keys, newest)[newest]
        self._store.blobs.put(self._keys.head, [hint_at(record)])
        self._said(f"{self._keys.head}: written again, version {newest}")

    def _newest(self, newest: int) -> None:
        """Go back to the newest version that is whole, if the newest isn't."""
        lineage = Lineage(self._store.blobs, self._name)
        if self._is_whole(lineage, newest):
            return
        for version in range(newest - 1, -1, -1):
            if self._is_whole(lineage, version):
                _, lost = lineage.rollback(version)
                self._done.lost += lost
                self._said(
                    f"{self._name}: the files of version {newest} are lost, so version "
                    f"{newest + 1} is version {version} once more"
                )
                return
        if newest == 0:
            # Nothing was learned yet: who comes next begins it.
            for key in self._store.blobs.list(self._name):
                if self._keys.parse_gradient(key) is None:
                    _set_aside(self._store, key, self._done)
            self._said(f"{self._name}: its first weights are lost; it is begun anew by the next")
        else:
            self._said(f"{self._name}: no version is whole: restore the weights of one from a copy")

    def _is_whole(self, lineage: Lineage, version: int) -> bool:
        try:
            lineage.checked_state(version)
            lineage.optimizer(version)
        except SplitFedError:
            return False
        return True

    # --------------------------------------------------------------------------- batches and calls

    def _batch_or_call(self, damage: Damage) -> None:
        batch = self._keys.parse_gradient(damage.key)
        if batch is not None:
            closing = GradientRecord("rejected", 0, 1.0, 1.0, "", "", {}, [])
            self._store.blobs.create(damage.key, pack(closing))
            self._done.lost.append(str(batch))
            self._said(f"{damage.key}: its gradient is lost; the next commit closes it as rejected")
        elif damage.kind != "missing":
            self._said(f"{damage.key}: set aside")


def _filled(known: BatchSet) -> BatchSet:
    """All numbers of each process up to the last known one."""
    return BatchSet(_each(known))


def _each(known: BatchSet) -> Iterator[BatchId]:
    for client_id, incarnations in known.to_json().items():
        for incarnation, runs in incarnations.items():
            for seq in range(runs[-1][1] + 1):
                yield BatchId(client_id, int(incarnation), seq)
