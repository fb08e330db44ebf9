"""What a run looks like from outside: versions, waiting gradients, clients, staleness, bytes, and what is wrong.

Reading the status writes nothing, so an operator may look at a live store as often as he likes. It takes one listing of
all keys and a few small reads. The trap is that the store moves meanwhile: what is listed may be gone when it is read,
and versions may be added in between. So nothing here compares two reads of things that a commit changes, but for what
can only be wrong: a newest version whose files aren't there, after its record was read again.

How old the waiting gradients are stands in their files only, so these are read, up to a budget of bytes.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from splitfed.errors import CorruptedError, ExpiredError, FormatError, MissingError
from splitfed.model.numerics import class_id
from splitfed.protocol.ids import BatchId
from splitfed.protocol.packing import read_json
from splitfed.store import layout
from splitfed.store.batches import Pile
from splitfed.store.commit import Commit
from splitfed.store.store import GradientStore
from splitfed.store.versions import Versions

RECENT = 8
BUDGET = 64 * 2**20
_LINEAGE = re.compile(r"(?:body|client|body@[^/]+)/fingerprint\.json")
_CLIENT = re.compile(r"clients/([^/]+)/(\d{8,12})")


@dataclass(frozen=True, slots=True)
class CommitStatus:
    """One of the last commits."""

    version: int
    kind: str
    time: float
    """In seconds since 1970."""
    num_batches: int
    num_samples: float
    num_stale: int
    num_rejected: int
    staleness: Mapping[int, int]
    """Folded batches by staleness."""


@dataclass(frozen=True, slots=True)
class LineageStatus:
    """One line of versions and its pile."""

    name: str
    version: int
    """The newest; -1 if it is being begun."""
    oldest: int
    """The oldest version whose weights are kept."""
    waiting: Mapping[str, int]
    """Batches that wait for a commit, by client."""
    staleness: Mapping[int, int]
    """Waiting batches by the staleness that they have now, as far as they were read."""
    num_unread: int
    """Waiting batches that were beyond the budget, or unreadable."""
    closed: Mapping[str, int]
    """Batches that commits have closed (folded, stale, rejected or skipped), by client."""
    commits: tuple[CommitStatus, ...]
    """The last few, newest first."""

    @property
    def num_waiting(self) -> int:
        """How many batches wait."""
        return sum(self.waiting.values())


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """A run as its store shows it."""

    url: str
    """Without credentials."""
    format: int
    numerics: str
    """The short name of version 0's numerics class."""
    clients: Mapping[str, int]
    """The newest incarnation of each client."""
    lineages: tuple[LineageStatus, ...]
    bytes: Mapping[str, int]
    """Stored bytes by kind: 'weights', 'optimizer', 'grad', 'forward' ..."""
    num_objects: int
    num_requests: int
    """Requests that clients have posted as files and nobody has answered yet."""
    problems: tuple[str, ...]
    """What is wrong, in words; empty in a healthy store."""
    seconds: float
    """How long it took to find all this out."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON; ages and other numbers become text where they are keys."""
        fields: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return fields


def read_status(store: GradientStore, *, budget: int = BUDGET) -> StoreStatus:
    """Look at a store; nothing is written.

    Args:
        store: Which.
        budget: How many bytes of waiting gradients may be read to learn their staleness.

    Raises:
        MissingError: there is no run in it.
        FormatError: its format record isn't one.
        StoreError: the storage failed.
    """
    began = time.perf_counter()
    sizes = store.blobs.sizes("")
    header = store.blobs.get(layout.FORMAT)
    if header is None:
        raise MissingError(f"no run was begun in {_address(store)}: expected {layout.FORMAT} there; is the URL right?")
    found = read_json(header, layout.FORMAT)
    if not isinstance(found.get("format"), int) or not isinstance(found.get("numerics"), dict):
        raise FormatError(f"{layout.FORMAT} of {_address(store)} isn't a format record: {str(found)[:80]}")
    problems: list[str] = []
    names = _lineages(sizes)
    lineages = tuple(_read_lineage(store, name, sizes, budget, problems) for name in names)
    return StoreStatus(
        url=_address(store),
        format=found["format"],
        numerics=class_id(found["numerics"]),
        clients=_clients(sizes),
        lineages=lineages,
        bytes=_bytes(sizes, names),
        num_objects=len(sizes),
        num_requests=_requests(sizes),
        problems=tuple(problems),
        seconds=time.perf_counter() - began,
    )


def _read_lineage(
    store: GradientStore, name: str, sizes: Mapping[str, int], budget: int, problems: list[str]
) -> LineageStatus:
    versions = store.lineage(name)
    piled = [batch for key in sizes if (batch := versions.keys.parse_gradient(key)) is not None]
    try:
        head = versions.head()
        commits = tuple(_commit(versions.commit(version)) for version in range(head, max(-1, head - RECENT), -1))
    except FormatError as error:
        problems.append(f"a commit record of lineage {name!r} was changed from outside: {error}")
        return LineageStatus(name, -1, 0, _by_client(piled), {}, len(piled), {}, ())
    if head < 0:
        problems.append(f"lineage {name!r} has an architecture and no version 0: start a server or accumulator on it")
        return LineageStatus(name, head, 0, _by_client(piled), {}, len(piled), {}, ())
    closed: dict[str, int] = {}
    try:
        counted = versions.counted()
        closed = _by_client(counted)
        piled = sorted(batch for batch in piled if batch not in counted)
    except (CorruptedError, ExpiredError, FormatError) as error:
        problems.append(f"the applied table of lineage {name!r} can't be used: {error}")
    kept = {found[0] for key in sizes if "/weights/" in key and (found := versions.keys.parse_versioned(key))}
    for kind in _gone(versions, head, sizes):
        problems.append(
            f"the {kind} of version {head} of lineage {name!r} are gone: restore them from a copy, or go back to an "
            f"older version with GradientStore.rollback(); weights are there of {sorted(kept)}"
        )
    ages, num_unread = _ages(store.pile(name), piled, sizes, head, budget)
    return LineageStatus(name, head, min(kept, default=head), _by_client(piled), ages, num_unread, closed, commits)


def _gone(versions: Versions, head: int, sizes: Mapping[str, int]) -> list[str]:
    """Which files of the newest version aren't there; what the listing lacks may have been added since."""
    record = versions.commit(head)
    files = {kind: versions.keys.versioned(kind, head, record.nonce) for kind in sorted(record.files)}
    missing = [kind for kind, key in files.items() if key not in sizes]
    now = {kind: versions.blobs.sizes(f"{versions.name}/{kind}") for kind in missing}
    return [kind for kind in missing if files[kind] not in now[kind] and versions.head() == head]


def _ages(
    pile: Pile, piled: Iterable[BatchId], sizes: Mapping[str, int], head: int, budget: int
) -> tuple[dict[int, int], int]:
    """Waiting batches by staleness, and how many weren't read."""
    ages, unread = Counter[int](), 0
    for batch in piled:
        size = sizes[pile.keys.gradient(batch)]
        found = None
        if size <= budget:
            budget -= size
            try:
                found = pile.peek(batch)
            except FormatError:  # a commit will reject it
                unread += 1
                continue
            if found is None:  # folded meanwhile
                continue
        version = found and found["base_version"]
        if isinstance(version, int):
            ages[max(0, head - version)] += 1
        else:
            unread += 1
    return dict(sorted(ages.items())), unread


def _commit(commit: Commit) -> CommitStatus:
    return CommitStatus(**{name: getattr(commit, name) for name in CommitStatus.__dataclass_fields__})


def _lineages(sizes: Iterable[str]) -> list[str]:
    return [key.partition("/")[0] for key in sizes if _LINEAGE.fullmatch(key)]


def _clients(sizes: Iterable[str]) -> dict[str, int]:
    newest: dict[str, int] = {}
    for key in sizes:
        if found := _CLIENT.fullmatch(key):
            newest[found[1]] = max(int(found[2]), newest.get(found[1], 0))
    return newest


def _requests(sizes: Iterable[str]) -> int:
    posts = [found for key in sizes if (found := layout.parse_post(key))]
    return len({one for _, one, end in posts if end == "request"} - {one for _, one, end in posts if end == "answer"})


def _bytes(sizes: Mapping[str, int], lineages: Iterable[str]) -> dict[str, int]:
    """Bytes by kind: the folder within a lineage, else the folder in the store; single files are 'other'."""
    found: defaultdict[str, int] = defaultdict(int)
    for key, size in sizes.items():
        folders = key.split("/")[:-1]
        if folders and folders[0] in lineages:
            folders.pop(0)
        found[folders[0] if folders else "frozen" if "/frozen-" in key else "other"] += size
    return dict(sorted(found.items()))


def _by_client(batches: Iterable[BatchId]) -> dict[str, int]:
    return dict(sorted(Counter(batch.client_id for batch in batches).items()))


def _address(store: GradientStore) -> str:
    """The store's URL without credentials."""
    return str(getattr(store.blobs, "url", store.url))
