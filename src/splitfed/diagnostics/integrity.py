"""`verify`: whether every file of a store is what was written, and whether they fit together.

Each file is read and compared with its checksum. Of each lineage the commit records are read from
the first to the newest: they follow each other without a gap, each names the hash of the one
before, the files of the newest version are those that its record names, and the table of closed
batches is the sum of the records.

Nothing is written, and the run may go on meanwhile. So a file that is listed and gone when it is
read was deleted by somebody who may, and what the newest version lacks is looked at again if there
is a newer one by then.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain

from splitfed.errors import CorruptedError, FormatError, MissingError, SplitFedError
from splitfed.protocol import checksum
from splitfed.protocol.packing import read_json
from splitfed.store import layout
from splitfed.store.commit import Commit
from splitfed.store.layout import Keys
from splitfed.store.lineage import Lineage, read_hint, sha256
from splitfed.store.store import GradientStore
from splitfed.store.table import Table

ASIDE = "aside"
"""Where `repair` puts what is damaged."""
_OURS = re.compile(
    r"format\.json|clients/.+|rounds/.+|history/.+|post/.+|(?:body|client|body@[^/]+)/"
    r"(?:fingerprint(?:-copy)?\.json|beside\.json|window\.json|together\.json|head|frozen-.+|settings-.+|(?:forward|part|pin|grad|sum|ask|kept|weights|optimizer"
    r"|applied|commit)/.+)"
)
_LOOKS = 5


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong."""

    key: str
    """The file."""
    kind: str
    """'damaged' (other bytes than were written), 'missing', or 'other' (not what a record names).
    """
    what: str
    """In words, and what it means."""


@dataclass(slots=True)
class Verification:
    """What `verify` has found."""

    url: str
    """Without credentials."""
    num_files: int = 0
    damages: list[Damage] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.damages


def verify(store: GradientStore) -> Verification:
    """Look through a store for damage; nothing is written.

    Raises:
        MissingError: there is no run in it.
        FormatError: it is of another format version.
        StoreError: it can't be listed or read.
    """
    began = time.perf_counter()
    found = Verification(store.shown)
    keys = store.blobs.list("")
    header: Damage | None = None
    try:
        if store.header() is None:
            if not layout.lineages(keys):
                raise MissingError(
                    f"no run was begun in {found.url}: expected {layout.FORMAT} there; "
                    "is the URL right?"
                )
            header = Damage(layout.FORMAT, "missing", "the format of the store isn't on record")
    except (CorruptedError, FormatError) as error:
        damage = _damage(store, layout.FORMAT)
        if damage is None:
            raise  # it is whole, and of another format
        header = Damage(layout.FORMAT, "damaged", str(error))
    if header is not None:
        found.damages.append(header)
    damaged: set[str] = {layout.FORMAT} if header else set()
    for key in keys:
        if not _OURS.fullmatch(key) or key in damaged:
            continue
        damage = _damage(store, key)
        if damage is not None:
            found.damages.append(damage)
            damaged.add(key)
        found.num_files += 1
    processes: dict[str, int] = {}
    for name in layout.lineages(keys):
        found.damages += _of_lineage(store, name, keys, damaged, processes)
    found.damages += _processes(store, processes, damaged)
    found.seconds = time.perf_counter() - began
    return found


def _damage(store: GradientStore, key: str) -> Damage | None:
    """What is wrong with a file by itself; `None` if nothing is, or it is gone."""
    data = store.blobs.raw.get(key)
    if data is None:
        return None
    try:
        checksum.check(data)
    except (CorruptedError, FormatError) as error:
        if isinstance(error, FormatError) and not store.blobs.required:
            return None  # of format 1
        return Damage(key, "damaged", f"{_role(key)}: {error}")
    return None


def _role(key: str) -> str:
    kind = key.split("/")[1] if key.count("/") > 1 else key.rpartition("/")[2]
    known = {
        "grad": "a pending gradient",
        "sum": "what pending gradients add up to, which can be computed again",
        "commit": "a commit record",
        "applied": "a table of closed batches",
        "weights": "the weights of a version",
        "optimizer": "the optimizer's state at a version",
        "forward": "the record of a forward",
        "head": "the hint at the newest version",
    }
    return known.get(kind, key)


# ------------------------------------------------------------------------------------- one lineage


def read_records(store: GradientStore, keys: Keys, newest: int) -> dict[int, Commit]:
    """The commit records of a lineage up to a version, as far as they are there and whole."""
    found: dict[int, Commit] = {}
    for version in range(newest + 1):
        with suppress(CorruptedError, FormatError):
            data = store.blobs.get(keys.commit(version))
            if data is not None:
                found[version] = Commit.from_json(data)
    return found


def newest_of(store: GradientStore, keys: Keys, listed: Iterable[str]) -> int:
    """The newest version that a lineage is known to have had: by its records and by the hint."""
    start = f"{keys.root}/commit/"
    numbers = [key[len(start) :].removesuffix(".json") for key in listed if key.startswith(start)]
    newest = max((int(number) for number in numbers if number.isdecimal()), default=-1)
    return max(newest, read_hint(store.blobs, keys)[0])


def _of_lineage(
    store: GradientStore,
    name: str,
    listed: list[str],
    damaged: set[str],
    processes: dict[str, int],
) -> Iterator[Damage]:
    """What is wrong in one lineage; the newest process of each client is noted in `processes`."""
    keys = Keys(name, by_version=not store.blobs.required)
    newest = newest_of(store, keys, listed)
    if keys.fingerprint not in listed:
        yield Damage(keys.fingerprint, "missing", f"the architecture of lineage {name!r}")
    if newest < 0:
        return
    records = read_records(store, keys, newest)
    for version in range(newest + 1):
        key = keys.commit(version)
        if version not in records and key not in damaged:
            yield Damage(key, "missing", f"the commit record of version {version}")
    yield from _chain(keys, records)
    for frozen in {record.frozen for record in records.values() if record.frozen is not None}:
        key = keys.frozen(frozen)
        if key not in listed:
            yield Damage(key, "missing", "parameters that never train")
    yield from _of_replay(store, keys, records, set(listed))
    yield from _files(store, keys, newest, records, damaged)
    yield from _tables(store, keys, records, damaged, newest)
    pending = [batch for batch in map(keys.parse_gradient, listed) if batch is not None]
    for batch in chain(pending, *(record.verdict for record in records.values())):
        number = max(processes.get(batch.client_id, 0), batch.incarnation)
        processes[batch.client_id] = number


def _chain(keys: Keys, records: Mapping[int, Commit]) -> Iterator[Damage]:
    """Records that aren't the ones that their successors name."""
    for version, record in records.items():
        before = records.get(version - 1)
        if before is None or not record.parent:  # of format 1
            continue
        if record.parent not in (before.digest, before.was):
            what = f"version {version} was made from another record of version {version - 1}"
            yield Damage(keys.commit(version - 1), "other", what)


def _of_replay(
    store: GradientStore, keys: Keys, records: Mapping[int, Commit], listed: set[str]
) -> Iterator[Damage]:
    """What is gone that only a replay needs: settings, and what gradients follow from."""
    needed = {
        keys.settings(record.settings): f"how commits stepped, as version {version}"
        for version, record in records.items()
        if record.settings
    }
    if _keeps_forwards(store, keys, listed):
        forgotten = store.registry().forgotten()
        for version, record in records.items():
            if version == 0:
                key = keys.versioned("weights", 0, record.nonce)
                needed[key] = "the weights of version 0, which a replay begins with"
            for batch in record.folded:
                if batch.client_id not in forgotten:
                    what = f"what batch {batch} of version {version} follows from, for a replay"
                    needed[keys.kept(batch)] = what
    for key, what in needed.items():
        # It may have come since the listing.
        if key not in listed and store.blobs.raw.get(key) is None:
            yield Damage(key, "missing", what)


def _keeps_forwards(store: GradientStore, keys: Keys, listed: Iterable[str]) -> bool:
    with suppress(CorruptedError, FormatError):  # the header may be what is damaged
        if store.keeps_forwards:
            return True
    return any(key.startswith(f"{keys.root}/kept/") for key in listed)


def _files(
    store: GradientStore,
    keys: Keys,
    newest: int,
    records: Mapping[int, Commit],
    damaged: set[str],
) -> Iterator[Damage]:
    """Files that aren't those that records name; and those of the newest version that are gone."""
    for version, record in records.items():
        for kind, digest in record.files.items():
            key = keys.versioned(kind, version, record.nonce)
            data = None if key in damaged else store.blobs.raw.get(key)
            if data is not None and digest and sha256([data]) != digest:
                yield Damage(key, "other", f"the {kind} of version {version} aren't the committed")
    for _ in range(_LOOKS):
        missing = _missing(store, keys, newest, records)
        later = _later(store, keys, newest) if missing else {}
        if not later:
            yield from missing
            return
        # It is the newest no more: its files may rightly be gone.
        records = {**records, **later}
        newest = max(later)


def _missing(
    store: GradientStore, keys: Keys, newest: int, records: Mapping[int, Commit]
) -> list[Damage]:
    """Files that aren't there and that a run needs to go on from a version."""
    head = records.get(newest)
    found = []
    for kind, version in () if head is None else _needed(head):
        if version not in records:
            continue
        key = keys.versioned(kind, version, records[version].nonce)
        if store.blobs.raw.get(key) is None:
            what = f"the {kind} of version {version}, which the newest version {newest} needs"
            found.append(Damage(key, "missing", what))
    return found


def _later(store: GradientStore, keys: Keys, newest: int) -> dict[int, Commit]:
    """The records after a version; none if they can't be read."""
    with suppress(SplitFedError):
        lineage = Lineage(store.blobs, keys.root)
        later = range(newest + 1, lineage.head() + 1)
        return {version: lineage.commit(version) for version in later}
    return {}


def _needed(head: Commit) -> list[tuple[str, int]]:
    """The files that a run needs to go on from its newest version, by kind and version."""
    return [(kind, head.version) for kind in head.files if kind != "applied"] + [
        ("applied", head.base)
    ]


def _tables(
    store: GradientStore,
    keys: Keys,
    records: Mapping[int, Commit],
    damaged: set[str],
    newest: int,
) -> Iterator[Damage]:
    """Tables on file that aren't the sum of the records."""
    total = Table()
    for version in range(newest + 1):
        record = records.get(version)
        if record is None:
            return
        total = total.adding(record.verdict)
        if "applied" not in record.files or (not record.parent and version):
            continue
        key = keys.versioned("applied", version, record.nonce)
        data = None if key in damaged else store.blobs.raw.get(key)
        if data is None:
            continue
        with suppress(CorruptedError, FormatError):
            table = Table.from_json(read_json(data, key))
            if table.closed.to_json() != total.closed.to_json():
                yield Damage(key, "other", f"the table of version {version} isn't the records' sum")


# ----------------------------------------------------------------------------------------- clients


def _processes(
    store: GradientStore, newest: Mapping[str, int], damaged: set[str]
) -> Iterator[Damage]:
    """Clients of whose newest process nothing is on file.

    The next one would bear its number, and its batches would be taken for those that are counted.

    Args:
        store: The store.
        newest: The newest process of each client that has batches.
        damaged: Keys that are listed already.
    """
    for client_id, number in newest.items():
        key = layout.client(client_id, number)
        if key in damaged or store.blobs.raw.get(key) is not None:
            continue
        names = [key.rpartition("/")[2] for key in store.blobs.list(layout.client(client_id))]
        if not any(name.isdecimal() and int(name) >= number for name in names):
            what = f"process {number} of client {client_id!r}, whose number the next would take"
            yield Damage(key, "missing", what)
