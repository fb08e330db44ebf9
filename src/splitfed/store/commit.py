"""The record of a commit: what was folded, and which files hold the version that came of it.

Commit records are the fence of the protocol and the schedule of the run: they are never deleted and
never rewritten. What is in them is all that a replay needs besides the gradients. Each names the
SHA-256 of the one before, so they are a chain: with the newest known, none of them can be another.

They are also the log of which batches are closed. The table of all of them (`batchset`) is written
only now and then: a record says which version wrote the last one, and the records since then say
what came after. So a commit writes what it closes, however many clients there are.

The trap: the names of the record's keys and their order are the format (`_KEYS`), whatever the
fields of the class are called. A record with a key that is unknown here is of a later format, and
is refused rather than half understood. One that has its default is left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from splitfed.errors import FormatError
from splitfed.protocol import checksum
from splitfed.protocol.flows import Flows, from_plain, to_plain
from splitfed.protocol.ids import BatchId, check_client_id, check_number
from splitfed.store.batchset import BatchSet, Outcome, Verdict

_KEYS = (
    "version kind nonce parent table files frozen restored abandoned source turn num_samples "
    "staleness folded older stale rejected skipped num_duplicates num_expired num_foreign time "
    "part was settings weights durability groups halves body flows"
).split()
_ALWAYS = ("version", "kind", "nonce", "files", "num_samples", "time")
"""What is in each record, whatever its value."""
_DEFAULTS = {
    "parent": "",
    "table": None,
    "frozen": None,
    "restored": None,
    "abandoned": (),
    "source": None,
    "turn": 0,
    "num_duplicates": 0,
    "num_expired": 0,
    "num_foreign": 0,
    "part": None,
    "was": None,
    "settings": "",
    "durability": "gradient",
    "groups": (),
    "halves": None,
    "body": None,
}


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Commit:
    """One version of a lineage and how it came about."""

    version: int
    kind: str
    """'initial', 'fold' or 'rollback'; on a line of one client also 'end' and 'begin', around an
    average.
    """
    nonce: str
    """A random name of this attempt: tells one's own commit from another's."""
    files: Mapping[str, str]
    """SHA-256 of the weights, optimizer and applied files that belong to it, by kind."""
    frozen: str | None = None
    """SHA-256 of the parameters that never train."""
    restored: int | None = None
    """The version whose state a rollback brought back."""
    source: int | None = None
    """The version of `body` that a line of one client began from."""
    turn: int = 0
    """How many of that line's changes were averaged before."""
    num_samples: float = 0.0
    """Σ nᵢ of the folded batches, in examples; of an 'end', those since the line began."""
    staleness: Mapping[int, int] = field(default_factory=dict)
    """How many batches were folded at each staleness."""
    verdict: Verdict = field(default_factory=Verdict)
    """What became of the batches that it closed."""
    older: Mapping[int, BatchSet] = field(default_factory=dict)
    """Closed batches that were computed at another version than the last, by that version."""
    num_duplicates: int = 0
    """Gradients found pending that an earlier commit had counted."""
    num_expired: int = 0
    """Forwards and parts that left the retention window and were deleted."""
    num_foreign: int = 0
    """Folded batches computed in another numerics class than version 0's."""
    time: float = 0.0
    """When, in seconds since 1970."""
    part: str | None = None
    """Of version 0: which part of which model the body was cut out of, as `split` has marked it."""
    parent: str = ""
    """SHA-256 of the record before; '' of version 0."""
    table: tuple[int, int] | None = None
    """The version whose `applied` file is the newest, and the bytes of that file."""
    abandoned: tuple[tuple[int, int], ...] = ()
    """Versions that rollbacks have undone, as first and last of each run: the state of this one
    doesn't come from them."""
    was: str | None = None
    """Of one that `repair` has made in place of a lost record: the hash of that one, as the record
    after it names it."""
    settings: str = ""
    """The hash of the settings that it was made with, which are on file; '' where nothing
    stepped."""
    weights: Mapping[int, float] = field(default_factory=dict)
    """s(τ) of each staleness τ at which batches were folded, where it isn't 1."""
    durability: str = "gradient"
    """Of version 0: what is on file when a batch of the lineage is acknowledged, its 'gradient' or
    the recipes that it follows from ('log')."""
    groups: tuple[tuple[BatchId, ...], ...] = ()
    """The folded batches that servers had added up, each sum in the order in which it was made: the
    rest was added in canonical order."""
    halves: int | None = None
    """Of `body`, where both are committed together: the version of `client` that belongs to it."""
    body: Verdict | None = None
    """Of `client`, where both are committed together: what was decided on the body's batches. The
    version of `body` that carries it out names this one."""
    flows: Flows = field(default_factory=dict)
    """What the folded updates' clients told of their compression, together."""
    digest: str = ""
    """SHA-256 of the record itself, once it was read."""

    def __repr__(self) -> str:
        """One line: what was folded, not what a replay needs."""
        counts = {
            "num_batches": self.num_batches,
            "num_stale": self.num_stale,
            "num_rejected": self.num_rejected,
            "num_skipped": self.num_skipped,
        }
        told = "".join(f", {name}={count}" for name, count in counts.items() if count)
        if self.num_samples:
            told += f", num_samples={self.num_samples:g}"
        if self.staleness:
            told += f", staleness={dict(self.staleness)}"
        return f"Commit(version={self.version}, kind={self.kind!r}{told})"

    @property
    def folded(self) -> BatchSet:
        """The batches whose gradients are in the mean."""
        return self.verdict.folded

    @property
    def stale(self) -> BatchSet:
        """Batches too old by the policy: not folded, closed."""
        return self.verdict.stale

    @property
    def rejected(self) -> BatchSet:
        """Batches not finite, unreadable or refused: not folded, closed."""
        return self.verdict.rejected

    @property
    def skipped(self) -> BatchSet:
        """Batches given up by their client: nothing to fold, closed."""
        return self.verdict.skipped

    @property
    def num_batches(self) -> int:
        """The number of folded batches."""
        return len(self.folded)

    @property
    def num_stale(self) -> int:
        """The number of batches that were too old."""
        return len(self.stale)

    @property
    def num_rejected(self) -> int:
        """The number of batches that weren't finite, readable or admitted."""
        return len(self.rejected)

    @property
    def num_skipped(self) -> int:
        """The number of batches that their clients gave up."""
        return len(self.skipped)

    @property
    def base(self) -> int:
        """The version that wrote the newest table of closed batches."""
        return self.version if self.table is None else self.table[0]

    def is_abandoned(self, version: int) -> bool:
        """Whether a rollback has undone a version, so that this one doesn't come from it."""
        return any(first <= version <= last for first, last in self.abandoned)

    def base_of(self, batch: BatchId) -> int:
        """The version that a batch of this commit was computed at."""
        for version, batches in self.older.items():
            if batch in batches:
                return version
        return self.version - 1

    def to_json(self) -> bytes:
        """The record's bytes."""
        record: dict[str, Any] = {}
        for name in _KEYS:
            value = getattr(self, name)
            if name == "older":
                value = {version: batches.to_json() for version, batches in value.items()}
            elif isinstance(value, BatchSet | Verdict):
                value = value.to_json()
            elif name == "flows":
                value = to_plain(value)
            if name in _ALWAYS or value != _DEFAULTS.get(name, {}):
                record[name] = value
        return json.dumps(record, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes | memoryview) -> Commit:
        """The record in `data`.

        Raises:
            FormatError: it isn't one.
        """
        try:
            record = json.loads(checksum.text_of(data))
            sets = {
                outcome.value: BatchSet.from_json(record.pop(outcome.value, {}))
                for outcome in Outcome
            }
            older = record.pop("older", {})
            staleness = record.pop("staleness", {})
            weights = record.pop("weights", {})
            table = record.pop("table", None)
            halves, body = record.pop("halves", None), record.pop("body", None)
            found = cls(
                verdict=Verdict(**sets),
                older={int(version): BatchSet.from_json(ids) for version, ids in older.items()},
                staleness={int(age): int(count) for age, count in staleness.items()},
                weights={int(age): float(weight) for age, weight in weights.items()},
                table=None if table is None else (int(table[0]), int(table[1])),
                abandoned=tuple(
                    (check_number("version", first), check_number("version", last))
                    for first, last in record.pop("abandoned", ())
                ),
                groups=tuple(
                    tuple(_batch(*batch) for batch in group) for group in record.pop("groups", ())
                ),
                halves=None if halves is None else check_number("halves", halves),
                body=None if body is None else Verdict.from_json(body),
                flows=from_plain(record.pop("flows", {})),
                digest=hashlib.sha256(data).hexdigest(),
                **record,
            )
            # What a reader relies on without a further look: its files, and names that are text.
            texts = [found.kind, found.nonce, found.part or "", found.parent, found.settings]
            texts.append(found.durability)
            texts += found.files.values()
            needed = {"weights", "applied"} if found.base == found.version else {"weights"}
            is_whole = needed <= set(found.files) and found.base <= found.version
            if not is_whole or not all(type(text) is str for text in texts):
                raise FormatError(
                    f"this commit record names no whole version: {str(found.files)[:80]}"
                )
            return found
        except FormatError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FormatError(f"this isn't a commit record: {error}") from error


def _batch(client_id: object, incarnation: object, seq: object) -> BatchId:
    return BatchId(
        check_client_id(client_id),
        check_number("incarnation", incarnation),
        check_number("seq", seq),
    )
