"""Which batches have been counted: the table on which exactly-once rests.

Per client process the applied sequence numbers, as sorted disjoint intervals: one interval in the ordinary case.
Batches that wait aren't in it, so their number has no limit. Intervals grow over applied numbers only, never by age:
a window that slides loses acknowledged gradients. The same form, run-length, lists the batches of one commit.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
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
        runs = self._intervals.get(batch.client_id, {}).get(batch.incarnation, [])
        place = bisect_right(runs, batch.seq, key=lambda run: run[0]) - 1
        return place >= 0 and batch.seq <= runs[place][1]

    def __iter__(self) -> Iterator[BatchId]:
        for client_id, incarnations in sorted(self._intervals.items()):
            for incarnation, runs in sorted(incarnations.items()):
                for low, high in runs:
                    yield from (BatchId(client_id, incarnation, seq) for seq in range(low, high + 1))

    def __repr__(self) -> str:
        return f"BatchSet({self.to_json()})"

    def __len__(self) -> int:
        runs = (run for incarnations in self._intervals.values() for runs in incarnations.values() for run in runs)
        return sum(high - low + 1 for low, high in runs)

    def union(self, ids: Iterable[BatchId]) -> BatchSet:
        """This set and `ids`."""
        added = BatchSet(batch for batch in ids if batch not in self)
        merged = BatchSet()
        merged._intervals = {c: dict(i) for c, i in self._intervals.items()}
        for client_id, incarnations in added._intervals.items():
            held = merged._intervals.setdefault(client_id, {})
            for incarnation, runs in incarnations.items():
                held[incarnation] = _merge([*held.get(incarnation, []), *runs])
        return merged

    def gaps(self, client_id: str) -> int:
        """How many holes the numbers of a client's processes have."""
        return sum(len(runs) - 1 for runs in self._intervals.get(client_id, {}).values())

    def fills_gap(self, batch: BatchId) -> bool:
        """Whether a batch lies in one of the holes of its process."""
        runs = self._intervals.get(batch.client_id, {}).get(batch.incarnation, [])
        return bool(runs) and batch.seq < runs[-1][1] and batch not in self

    def to_json(self) -> dict[str, dict[str, Intervals]]:
        """As plain JSON: client id, incarnation, [first, last] of each run."""
        return {c: {str(i): runs for i, runs in sorted(held.items())} for c, held in sorted(self._intervals.items())}

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
                    numbers = [[check_number("seq", low), check_number("seq", high)] for low, high in runs]
                    if any(low > high for low, high in numbers) or _merge(numbers) != numbers:
                        raise FormatError(f"the runs of {client_id}/{incarnation} aren't sorted and apart")
                    held[check_number("incarnation", int(incarnation))] = numbers
        except (AttributeError, TypeError, ValueError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(f"this isn't a set of batch ids: {error}") from error
        return found

    def _append(self, batch: BatchId) -> None:
        runs = self._intervals.setdefault(batch.client_id, {}).setdefault(batch.incarnation, [])
        if runs and runs[-1][1] + 1 == batch.seq:
            runs[-1][1] = batch.seq
        else:
            runs.append([batch.seq, batch.seq])


def _merge(runs: Intervals) -> Intervals:
    merged: Intervals = []
    for low, high in sorted(runs):
        if merged and low <= merged[-1][1] + 1:
            merged[-1][1] = max(merged[-1][1], high)
        else:
            merged.append([low, high])
    return merged
