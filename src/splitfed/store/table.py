"""The applied table: which batches are closed, and what a late repeat of one is answered.

A commit record says what it has closed. The table is the sum of all records up to a version, and a
function of them: its file is a checkpoint, written once the records since the last one are many
enough to pay for it. So what a commit writes follows from what it closes, and not from how many
clients ever were.

The trap is a client whose batches are refused and stored in turns: the refused ones would be a list
without end. Of those only the newest runs of each process are kept; what became of an older one
isn't known any more, and a repeat of it is told so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from splitfed.errors import AlreadyAppliedError, FormatError
from splitfed.protocol import checksum
from splitfed.protocol.ids import BatchId
from splitfed.store.batchset import BatchSet, Outcome, Verdict

LEAST_RECORDS = 16
MOST_RECORDS = 1024
_BYTES_A_RECORD = 1024
"""A table is written after so many records: at least one for each of so many bytes in it."""
KEPT_REFUSED = 64
_FORMAT = 2
_SETS = ("closed", "rejected", "skipped")


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """The batches that were closed up to a version."""

    closed: BatchSet = field(default_factory=BatchSet)
    rejected: BatchSet = field(default_factory=BatchSet)
    """The newest of those that were rejected ..."""
    skipped: BatchSet = field(default_factory=BatchSet)
    """... and of those that were given up."""

    def adding(self, verdict: Verdict) -> Table:
        """This table and what a commit closes."""
        return Table(
            self.closed.union(verdict),
            _with_newest(self.rejected, verdict.rejected),
            _with_newest(self.skipped, verdict.skipped),
        )

    def outcome(self, batch: BatchId) -> Outcome:
        """What became of a closed batch: rejected, given up, or else folded, be it as stale.

        Raises:
            AlreadyAppliedError: so many were refused since that it isn't known any more.
        """
        for batches, outcome in (
            (self.rejected, Outcome.REJECTED),
            (self.skipped, Outcome.SKIPPED),
        ):
            if batch in batches:
                return outcome
            runs = batches.runs(batch)
            if len(runs) >= KEPT_REFUSED and batch.seq < runs[0][0]:
                raise AlreadyAppliedError(
                    f"batch {batch} is closed already, and so many of its client were refused "
                    "since that its own answer isn't on record any more: go on with the next one"
                )
        return Outcome.FOLDED

    def to_file(self) -> list[checksum.Buffer]:
        """Its file: equal tables have equal ones."""
        return checksum.sealed([json.dumps(self.to_json(), separators=(",", ":")).encode()])

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"table": _FORMAT, **{name: getattr(self, name).to_json() for name in _SETS}}

    @classmethod
    def from_json(cls, data: Any) -> Table:
        """The table that `to_json` wrote, or a store of format 1, where it says less.

        Raises:
            FormatError: it isn't one.
        """
        if not isinstance(data, dict) or not isinstance(data.get("table"), int):
            return cls(BatchSet.from_json(data))
        if data.keys() != {"table", *_SETS} or data["table"] != _FORMAT:
            raise FormatError(f"this isn't a table of closed batches: {str(data)[:80]}")
        return cls(*(BatchSet.from_json(data[name]) for name in _SETS))


def _with_newest(held: BatchSet, more: BatchSet) -> BatchSet:
    clients = more.clients()
    return held.union(more).newest_runs(clients, KEPT_REFUSED) if clients else held


def is_due(version: int, table: tuple[int, int]) -> bool:
    """Whether a version is to write the table.

    Args:
        version: That version.
        table: The version that wrote it last, and its bytes then.
    """
    base, size = table
    wanted = min(max(LEAST_RECORDS, size // _BYTES_A_RECORD), MOST_RECORDS)
    return version - base >= wanted
