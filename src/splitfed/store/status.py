"""The status of a run: versions, pending gradients, clients, staleness, bytes, and what is wrong.

Reading the status writes nothing, so an operator may look at a live store as often as he likes. It
takes one listing of all keys and a few small reads. The trap is that the store moves meanwhile:
what is listed may be gone when it is read, and versions may be added in between. So nothing here
compares two reads of things that a commit changes, but for what can only be wrong: a newest version
whose files aren't there, after its record was read again.

How old the pending gradients are stands in their files only, so these are read, up to a budget of
bytes.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from splitfed.errors import CorruptedError, ExpiredError, FormatError, MissingError, SplitFedError
from splitfed.model.numerics import class_id
from splitfed.protocol.flows import Flows
from splitfed.protocol.ids import BatchId
from splitfed.store import layout
from splitfed.store.batches import Pile
from splitfed.store.commit import Commit
from splitfed.store.lineage import Lineage
from splitfed.store.store import GradientStore

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
    flows: Flows = field(default_factory=dict)
    """What clients told of their compression with the updates that it folded."""


@dataclass(frozen=True, slots=True)
class LineageStatus:
    """One line of versions and its batches."""

    name: str
    version: int
    """The newest; -1 if it is being begun."""
    oldest: int
    """The oldest version whose weights are kept."""
    waiting: Mapping[str, int]
    """Pending batches, by client."""
    staleness: Mapping[int, int]
    """Pending batches by the staleness that they have now, as far as they were read."""
    num_unread: int
    """Pending batches that were beyond the budget, or unreadable."""
    closed: Mapping[str, int]
    """Batches that commits have closed (folded, stale, rejected or skipped), by client."""
    commits: tuple[CommitStatus, ...]
    """The last few, newest first."""
    durability: str = "gradient"
    """What is on file when a batch is acknowledged: its 'gradient', or what that follows from
    ('log')."""

    @property
    def num_waiting(self) -> int:
        """The number of pending batches."""
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
    """How long reading it took."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON; ages and other numbers become text where they are keys.

        What came later is left out where it says nothing, so that programs of before read on.
        """
        fields: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        for lineage in fields["lineages"]:
            for commit in lineage["commits"]:
                if not commit["flows"]:
                    del commit["flows"]
        return fields


def read_status(store: GradientStore, *, budget: int = BUDGET) -> StoreStatus:
    """Read the status of a store; nothing is written.

    Args:
        store: Which.
        budget: How many bytes of pending gradients may be read to learn their staleness.

    Raises:
        MissingError: there is no run in it.
        FormatError: its format record isn't one.
        StoreError: the storage failed.
    """
    began = time.perf_counter()
    sizes = store.blobs.sizes("")
    found = store.header()
    if found is None:
        raise MissingError(
            f"no run was begun in {store.shown}: expected {layout.FORMAT} there; is the URL right?"
        )
    problems: list[str] = []
    names = _lineages(sizes)
    lineages = [_read_lineage(store, name, sizes, budget, problems) for name in names]
    return StoreStatus(
        url=store.shown,
        format=found["format"],
        numerics=class_id(found["numerics"]),
        clients=_clients(sizes),
        lineages=tuple(lineages),
        bytes=_bytes(sizes, names),
        num_objects=len(sizes),
        num_requests=_requests(sizes),
        problems=tuple(problems),
        seconds=time.perf_counter() - began,
    )


def _read_lineage(
    store: GradientStore, name: str, sizes: Mapping[str, int], budget: int, problems: list[str]
) -> LineageStatus:
    lineage = store.lineage(name)
    piled = [batch for batch in map(lineage.keys.parse_gradient, sizes) if batch is not None]
    unread = LineageStatus(name, -1, 0, _by_client(piled), {}, len(piled), {}, ())
    try:
        head = lineage.head()
        recent = range(head, max(-1, head - RECENT), -1)
        commits = tuple(_commit(lineage.commit(version)) for version in recent)
    except FormatError as error:
        problems.append(f"a commit record of lineage {name!r} was changed from outside: {error}")
        return unread
    if head < 0:
        problems.append(
            f"lineage {name!r} has an architecture and no version 0: "
            "start a server or accumulator on it"
        )
        return unread
    # Without its table the lineage is still described: which batches are closed isn't known then.
    closed: dict[str, int] = {}
    try:
        counted = lineage.counted()
        closed = _by_client(counted)
        piled = sorted(batch for batch in piled if batch not in counted)
    except (CorruptedError, ExpiredError, FormatError) as error:
        problems.append(f"the applied table of lineage {name!r} can't be used: {error}")
    kept = _kept_versions(lineage, sizes)
    for kind in _missing_files(lineage, head, sizes):
        problems.append(
            f"the {kind} of version {head} of lineage {name!r} are gone: restore them from a copy, "
            "or go back to an older version with GradientStore.rollback(); "
            f"weights are there of {sorted(kept)}"
        )
    ages, num_unread = _ages(store.pile(name), piled, sizes, head, budget)
    return LineageStatus(
        name=name,
        version=head,
        oldest=min(kept, default=head),
        waiting=_by_client(piled),
        staleness=ages,
        num_unread=num_unread,
        closed=closed,
        commits=commits,
        durability=_durability(lineage),
    )


def _durability(lineage: Lineage) -> str:
    with contextlib.suppress(SplitFedError):  # the record of version 0 may be what is wrong
        return lineage.durability
    return "unknown"


def _kept_versions(lineage: Lineage, sizes: Iterable[str]) -> set[int]:
    """The versions whose weights are on file."""
    found = [lineage.keys.parse_versioned(key) for key in sizes if "/weights/" in key]
    return {file[0] for file in found if file is not None}


def _missing_files(lineage: Lineage, head: int, sizes: Mapping[str, int]) -> list[str]:
    """The kinds of the newest version's files that aren't there."""
    record = lineage.commit(head)
    files = {
        kind: lineage.keys.versioned(kind, head, record.nonce) for kind in sorted(record.files)
    }
    missing = [kind for kind, key in files.items() if key not in sizes]
    # What the first listing lacks may have been added since, so it is listed again; and if the head
    # has moved, its files may rightly have expired.
    now = {kind: lineage.blobs.sizes(f"{lineage.name}/{kind}") for kind in missing}
    return [kind for kind in missing if files[kind] not in now[kind] and lineage.head() == head]


def _ages(
    pile: Pile, piled: Iterable[BatchId], sizes: Mapping[str, int], head: int, budget: int
) -> tuple[dict[int, int], int]:
    """Pending batches by staleness, and how many weren't read."""
    ages = Counter[int]()
    num_unread = 0
    for batch in piled:
        size = sizes[pile.keys.gradient(batch)]
        if size > budget:
            num_unread += 1
            continue
        budget -= size
        try:
            found = pile.peek(batch)
        except FormatError:  # a commit will reject it
            num_unread += 1
            continue
        if found is None:  # folded meanwhile
            continue
        version = found["base_version"]
        if isinstance(version, int):
            ages[max(0, head - version)] += 1
        else:
            num_unread += 1
    return dict(sorted(ages.items())), num_unread


def _commit(commit: Commit) -> CommitStatus:
    return CommitStatus(
        **{name: getattr(commit, name) for name in CommitStatus.__dataclass_fields__}
    )


def _lineages(sizes: Iterable[str]) -> list[str]:
    return [key.partition("/")[0] for key in sizes if _LINEAGE.fullmatch(key)]


def _clients(sizes: Iterable[str]) -> dict[str, int]:
    """The newest incarnation of each client."""
    newest: dict[str, int] = {}
    for key in sizes:
        found = _CLIENT.fullmatch(key)
        if found is not None:
            newest[found[1]] = max(int(found[2]), newest.get(found[1], 0))
    return newest


def _requests(sizes: Iterable[str]) -> int:
    """The number of posted requests without an answer."""
    posts = [post for post in map(layout.parse_post, sizes) if post is not None]
    asked = {request for _, request, end in posts if end == "request"}
    answered = {request for _, request, end in posts if end == "answer"}
    return len(asked - answered)


def _bytes(sizes: Mapping[str, int], lineages: Iterable[str]) -> dict[str, int]:
    """Bytes by kind: the folder in a lineage, else in the store; single files are 'other'."""
    found: defaultdict[str, int] = defaultdict(int)
    for key, size in sizes.items():
        folders = key.split("/")[:-1]
        if folders and folders[0] in lineages:
            folders.pop(0)
        if folders:
            kind = folders[0]
        else:
            kind = "frozen" if "/frozen-" in key else "other"
        found[kind] += size
    return dict(sorted(found.items()))


def _by_client(batches: Iterable[BatchId]) -> dict[str, int]:
    return dict(sorted(Counter(batch.client_id for batch in batches).items()))
