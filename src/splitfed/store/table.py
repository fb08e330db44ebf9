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

from dataclasses import dataclass, field
from typing import Any

from splitfed.errors import AlreadyAppliedError, FormatError
from splitfed.protocol.ids import BatchId
from splitfed.store.batchset import BatchSet, Outcome, Verdict

LEAST_RECORDS = 16
MOST_RECORDS = 1024
_BYTES_A_RECORD = 1024
"""A table is written after so many records: at least one for each of so many bytes in it."""
KEPT_REFUSED = 64
_FORMAT = 2


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """The batches that were closed up to a version."""

    closed: BatchSet = field(default_factory=BatchSet)
    refused: BatchSet = field(default_factory=BatchSet)
    """The newest of those that were answered with 'rejected'."""

    def adding(self, verdict: Verdict) -> Table:
        """This table and what a commit closes."""
        refused = self.refused
        for outcome in (Outcome.REJECTED, Outcome.SKIPPED):
            batches = verdict.batches(outcome)
            if batches.clients():
                refused = refused.union(batches).newest_runs(batches.clients(), KEPT_REFUSED)
        return Table(self.closed.union(verdict), refused)

    def status(self, batch: BatchId) -> str:
        """What a client is answered that sends a closed batch once more: 'stored' or 'rejected'.

        Raises:
            AlreadyAppliedError: so many were refused since that it isn't known any more.
        """
        if batch in self.refused:
            return "rejected"
        runs = self.refused.runs(batch)
        if len(runs) >= KEPT_REFUSED and batch.seq < runs[0][0]:
            raise AlreadyAppliedError(
                f"batch {batch} is closed already, and so many of its client were refused since "
                "that its own answer isn't on record any more: go on with the next one"
            )
        return "stored"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        closed, refused = self.closed.to_json(), self.refused.to_json()
        return {"table": _FORMAT, "closed": closed, "refused": refused}

    @classmethod
    def from_json(cls, data: Any) -> Table:
        """The table that `to_json` wrote, or a store of format 1, where it says less.

        Raises:
            FormatError: it isn't one.
        """
        if not isinstance(data, dict) or not isinstance(data.get("table"), int):
            return cls(BatchSet.from_json(data))
        if data.keys() != {"table", "closed", "refused"} or data["table"] != _FORMAT:
            raise FormatError(f"this isn't a table of closed batches: {str(data)[:80]}")
        return cls(BatchSet.from_json(data["closed"]), BatchSet.from_json(data["refused"]))


def is_due(version: int, table: tuple[int, int]) -> bool:
    """Whether a version is to write the table.

    Args:
        version: That version.
        table: The version that wrote it last, and its bytes then.
    """
    base, size = table
    wanted = min(max(LEAST_RECORDS, size // _BYTES_A_RECORD), MOST_RECORDS)
    return version - base >= wanted
