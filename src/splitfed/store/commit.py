"""The record of a commit: what was folded, and where the version that came of it lies.

Commit records are the fence of the protocol and the schedule of the run: they are never deleted and never rewritten.
What is in them is all that a replay needs besides the gradients.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from splitfed.errors import FormatError
from splitfed.protocol.ids import BatchId
from splitfed.store.batchset import BatchSet


@dataclass(frozen=True, slots=True, eq=False)
class Commit:
    """One version of a lineage and how it came about."""

    version: int
    kind: str
    """'initial', 'fold' or 'rollback'; on a line of one client also 'end' and 'begin', around an average."""
    nonce: str
    """Who made it: tells one's own commit from another's."""
    files: Mapping[str, str]
    """SHA-256 of the weights, optimizer and applied files that belong to it, by kind."""
    frozen: str | None = None
    """SHA-256 of the parameters that never train."""
    restored: int | None = None
    """The version whose state a rollback made anew."""
    source: int | None = None
    """The version of `body` that a line of one client began from."""
    turn: int = 0
    """How many of that line's changes were averaged before."""
    num_samples: float = 0.0
    """Σ nᵢ of the folded batches, in examples; of an 'end', those since the line began."""
    staleness: Mapping[int, int] = field(default_factory=dict)
    """How many batches were folded at each staleness."""
    folded: BatchSet = field(default_factory=BatchSet)
    older: Mapping[int, BatchSet] = field(default_factory=dict)
    """Closed batches that were computed at another version than the last, by that version: the rest of the schedule."""
    stale: BatchSet = field(default_factory=BatchSet)
    """Too old by the policy: not folded, closed."""
    rejected: BatchSet = field(default_factory=BatchSet)
    """Not finite, or unreadable: not folded, closed."""
    skipped: BatchSet = field(default_factory=BatchSet)
    """Given up by their client: nothing to fold, closed."""
    num_duplicates: int = 0
    """Gradients found waiting that an earlier commit had counted."""
    num_expired: int = 0
    """Forwards and parts that left the retention window and were deleted."""
    num_foreign: int = 0
    """Folded batches computed in another numerics class than version 0's."""
    time: float = 0.0
    """When, in seconds since 1970."""

    @property
    def num_batches(self) -> int:
        """How many batches were folded."""
        return len(self.folded)

    @property
    def num_stale(self) -> int:
        """How many were too old."""
        return len(self.stale)

    @property
    def num_rejected(self) -> int:
        """How many weren't finite or readable."""
        return len(self.rejected)

    @property
    def num_skipped(self) -> int:
        """How many their client gave up."""
        return len(self.skipped)

    def base_of(self, batch: BatchId) -> int:
        """The version that a batch of this commit was computed at."""
        return next((version for version, batches in self.older.items() if batch in batches), self.version - 1)

    def to_json(self) -> bytes:
        """The record's bytes."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name, value in fields.items():
            fields[name] = value.to_json() if isinstance(value, BatchSet) else value
        fields["older"] = {version: batches.to_json() for version, batches in self.older.items()}
        return json.dumps(fields, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes | memoryview) -> Commit:
        """The record in `data`.

        Raises:
            FormatError: it isn't one.
        """
        try:
            fields = json.loads(bytes(data))
            for name in ("folded", "stale", "rejected", "skipped"):
                fields[name] = BatchSet.from_json(fields[name])
            fields["older"] = {int(version): BatchSet.from_json(ids) for version, ids in fields["older"].items()}
            fields["staleness"] = {int(age): int(count) for age, count in fields["staleness"].items()}
            found = cls(**fields)
            texts = [found.kind, found.nonce, *found.files.values()]
            if not {"weights", "applied"} <= set(found.files) or not all(type(text) is str for text in texts):
                raise FormatError(f"this commit record names no whole version: {str(found.files)[:80]}")
            return found
        except FormatError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FormatError(f"this isn't a commit record: {error}") from error
