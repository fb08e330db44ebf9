"""Sets of batches, and what becomes of batches: the values on which exactly-once rests.

The applied table is a `BatchSet`: per client process the sequence numbers that commits have closed,
as sorted disjoint intervals; one interval in the ordinary case. Pending batches aren't in it, so
their number has no limit. Intervals grow over closed numbers only, never by age: a window that
slides loses acknowledged gradients. The same form, run-length, lists the batches of one commit.

A `Verdict` names the batches that a commit closes, by `Outcome`. It is decided before anything is
written, by whoever commits or by whoever ends a round; the latter puts it on record first. A commit
that is given a verdict folds exactly its ids, whoever makes it and whatever has arrived since: that
is how a round ends once, in the same bits, though the coordinator that ended it was killed and two
others finish it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from splitfed.errors import FormatError
from splitfed.protocol.ids import BatchId, check_client_id, check_number

MAX_GAPS = 1024
Intervals = list[list[int]]


class BatchSet:
    """An immutable set of batch ids, small where their numbers are dense."""

    __slots__ = ("_intervals",)

    def __init__(self, ids: Iterable[BatchId] = ()) -> None:
        self._intervals: dict[str, dict[int, Intervals]] = {}
        for batch in sorted(set(ids)):
            self._append(batch)

    def __contains__(self, batch: BatchId) -> bool:
        runs = self.runs(batch)
        place = bisect_right(runs, batch.seq, key=lambda run: run[0]) - 1
        return place >= 0 and batch.seq <= runs[place][1]

    def __iter__(self) -> Iterator[BatchId]:
        for client_id, incarnations in sorted(self._intervals.items()):
            for incarnation, runs in sorted(incarnations.items()):
                for low, high in runs:
                    for seq in range(low, high + 1):
                        yield BatchId(client_id, incarnation, seq)

    def __repr__(self) -> str:
        return f"BatchSet({self.to_json()})"

    def __len__(self) -> int:
        processes = [runs for held in self._intervals.values() for runs in held.values()]
        return sum(high - low + 1 for runs in processes for low, high in runs)

    def union(self, ids: Iterable[BatchId]) -> BatchSet:
        """This set and `ids`."""
        added = ids if isinstance(ids, BatchSet) else BatchSet(ids)
        merged = BatchSet()
        # What is in here is shared with this set and never changed in place: a client that grows
        # gets a new table, and its process a new list.
        merged._intervals = dict(self._intervals)
        for client_id, incarnations in added._intervals.items():
            held = merged._intervals[client_id] = dict(merged._intervals.get(client_id, {}))
            for incarnation, runs in incarnations.items():
                held[incarnation] = merge_runs([*held.get(incarnation, []), *runs])
        return merged

    def newest_runs(self, clients: Iterable[str], most: int) -> BatchSet:
        """This set with at most so many runs, the newest, of each process of some clients."""
        found = BatchSet()
        found._intervals = dict(self._intervals)
        for client_id in clients:
            found._intervals[client_id] = {
                incarnation: runs[-most:]
                for incarnation, runs in self._intervals.get(client_id, {}).items()
            }
        return found

    def runs(self, batch: BatchId) -> Intervals:
        """The runs of the process that a batch is of."""
        return self._intervals.get(batch.client_id, {}).get(batch.incarnation, [])

    def clients(self) -> list[str]:
        """The clients that have batches in here."""
        return list(self._intervals)

    def gaps(self, client_id: str) -> int:
        """How many holes the numbers of a client's processes have."""
        return sum(len(runs) - 1 for runs in self._intervals.get(client_id, {}).values())

    def to_json(self) -> dict[str, dict[str, Intervals]]:
        """As plain JSON: client id, incarnation, [first, last] of each run."""
        plain = {}
        for client_id, incarnations in sorted(self._intervals.items()):
            plain[client_id] = {str(number): runs for number, runs in sorted(incarnations.items())}
        return plain

    @classmethod
    def from_json(cls, data: Any) -> BatchSet:
        """The set that `to_json` wrote.

        Raises:
            FormatError: it isn't one.
        """
        found = cls()
        try:
            for client_id, incarnations in data.items():
                held = found._intervals.setdefault(check_client_id(client_id), {})
                for incarnation, runs in incarnations.items():
                    number = check_number("incarnation", int(incarnation))
                    held[number] = _read_runs(runs, f"{client_id}/{incarnation}")
        except FormatError:
            raise
        except (AttributeError, TypeError, ValueError) as error:
            raise FormatError(f"this isn't a set of batch ids: {error}") from error
        return found

    def _append(self, batch: BatchId) -> None:
        runs = self._intervals.setdefault(batch.client_id, {}).setdefault(batch.incarnation, [])
        if runs and runs[-1][1] + 1 == batch.seq:
            runs[-1][1] = batch.seq
        else:
            runs.append([batch.seq, batch.seq])


def merge_runs(runs: Iterable[list[int]]) -> Intervals:
    """The same numbers as sorted runs that neither overlap nor touch."""
    merged: Intervals = []
    for low, high in sorted(runs):
        if merged and low <= merged[-1][1] + 1:
            merged[-1][1] = max(merged[-1][1], high)
        else:
            merged.append([low, high])
    return merged


def _read_runs(data: Any, process: str) -> Intervals:
    # Membership is a bisection, so runs that overlap or are out of order would lose batches
    # silently.
    runs = [[check_number("seq", low), check_number("seq", high)] for low, high in data]
    if any(low > high for low, high in runs) or merge_runs(runs) != runs:
        raise FormatError(f"the runs of {process} aren't sorted and apart")
    return runs


class Outcome(Enum):
    """What becomes of a batch that a commit closes; the values name the sets of a verdict."""

    FOLDED = "folded"
    """Its gradient is in the mean."""
    STALE = "stale"
    """Too old by the policy: not folded, closed."""
    REJECTED = "rejected"
    """Not finite, unreadable or refused: not folded, closed."""
    SKIPPED = "skipped"
    """Given up by its client: nothing to fold, closed."""

    @property
    def status(self) -> str:
        """What a client is answered that sends the batch once more: 'stored' or 'rejected'."""
        return "rejected" if self in (Outcome.REJECTED, Outcome.SKIPPED) else "stored"


# The sets of a verdict in the record of a round. It has no skipped batches: their clients decided,
# no coordinator does.
_RECORDED = {"fold": Outcome.FOLDED, "stale": Outcome.STALE, "rejected": Outcome.REJECTED}


# A batch that a record from outside puts into several sets isn't folded.
_PRECEDENCE = (Outcome.REJECTED, Outcome.STALE, Outcome.SKIPPED, Outcome.FOLDED)


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """What becomes of batches in a commit; one that is in none of the sets stays pending."""

    folded: BatchSet = field(default_factory=BatchSet)
    stale: BatchSet = field(default_factory=BatchSet)
    rejected: BatchSet = field(default_factory=BatchSet)
    skipped: BatchSet = field(default_factory=BatchSet)

    @classmethod
    def of(cls, outcomes: Mapping[BatchId, Outcome]) -> Verdict:
        """The verdict that says of each batch what `outcomes` does."""
        ids: dict[str, list[BatchId]] = {outcome.value: [] for outcome in Outcome}
        for batch, outcome in outcomes.items():
            ids[outcome.value].append(batch)
        return cls(**{name: BatchSet(batches) for name, batches in ids.items()})

    def __contains__(self, batch: BatchId) -> bool:
        return self.outcome(batch) is not None

    def __iter__(self) -> Iterator[BatchId]:
        return (batch for batch, _ in self.items())

    def batches(self, outcome: Outcome) -> BatchSet:
        """The batches of one outcome."""
        found: BatchSet = getattr(self, outcome.value)
        return found

    def items(self) -> Iterator[tuple[BatchId, Outcome]]:
        """Every batch with its outcome: by outcome, and in canonical order within one."""
        for outcome in Outcome:
            for batch in self.batches(outcome):
                yield batch, outcome

    def outcome(self, batch: BatchId) -> Outcome | None:
        """What becomes of a batch; `None` if it stays pending."""
        return next((outcome for outcome in _PRECEDENCE if batch in self.batches(outcome)), None)

    def closes(self, batch: BatchId) -> bool:
        """Whether a batch is closed without being folded."""
        return self.outcome(batch) not in (None, Outcome.FOLDED)

    def without(self, batches: Container[BatchId]) -> Verdict:
        """The same but for some batches, which stay pending."""
        return Verdict.of({batch: found for batch, found in self.items() if batch not in batches})

    def to_json(self) -> dict[str, Any]:
        """As plain JSON, for the record of a round."""
        return {name: self.batches(outcome).to_json() for name, outcome in _RECORDED.items()}

    @classmethod
    def from_json(cls, data: Any) -> Verdict:
        """The verdict that `to_json` wrote.

        Raises:
            FormatError: it isn't one.
        """
        if not isinstance(data, dict) or set(data) != set(_RECORDED):
            raise FormatError(f"this isn't a verdict on batches: {str(data)[:80]}")
        sets = {_RECORDED[name].value: BatchSet.from_json(ids) for name, ids in data.items()}
        return cls(**sets)
