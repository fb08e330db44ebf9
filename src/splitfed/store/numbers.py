"""The numbers of one client's processes, as one server knows them: which are taken, and how dense.

A client takes its batch numbers one after another, so what is known of them is one run, or a few
while passes are under way or were lost. Whoever leaves holes on purpose makes the applied table
large, which is rewritten with each commit. So before a number is taken it is asked here whether it
makes one hole more; pending batches count like closed ones.

A view, not the truth: other servers take numbers too, which shows here as holes that aren't any. So
nobody is refused before the store was looked at again, and with n servers a process may have n
times as many holes until a commit.

A number that its client gives up costs the store a file and the client nothing, so these are
counted apart: so many may be pending, and so many come in a second.
"""

from __future__ import annotations

import time
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable

from splitfed.protocol.ids import BatchId
from splitfed.store.batchset import BatchSet, merge_runs

MAX_SKIPS = 1024
"""Numbers that a client has given up and no commit has closed."""
SKIPS_PER_SECOND = 64.0
"""How fast a client may give up more, once it has given up `MAX_SKIPS` at once."""


class Numbers:
    """The numbers of one process that are known.

    Args:
        runs: [first, last] of each run; they may touch and overlap.
    """

    __slots__ = ("_runs",)

    def __init__(self, runs: Iterable[list[int]] = ()) -> None:
        self._runs = merge_runs(runs)

    @property
    def holes(self) -> int:
        """The number of holes between its runs."""
        return max(0, len(self._runs) - 1)

    def __contains__(self, seq: int) -> bool:
        place = self._place(seq)
        return place >= 0 and seq <= self._runs[place][1]

    def splits(self, seq: int) -> bool:
        """Whether there would be one hole more with this number."""
        runs = self._runs
        if not runs or runs[-1][1] + 1 == seq:
            return False
        place = self._place(seq)
        if place >= 0 and seq <= runs[place][1] + 1:
            return False
        return place + 1 == len(runs) or runs[place + 1][0] != seq + 1

    def has_room(self, seq: int, most: int) -> bool:
        """Whether a number may be taken: with too many holes, only one that lies in a hole.

        Args:
            seq: The number.
            most: How many holes there may be.
        """
        if len(self._runs) - 1 <= most or seq in self:
            return True
        return seq < self._runs[-1][1] and not self.splits(seq)

    def add(self, seq: int) -> None:
        """Take a number."""
        runs = self._runs
        if runs and runs[-1][1] + 1 == seq:  # the ordinary case
            runs[-1][1] = seq
        elif seq not in self:
            insort(runs, [seq, seq])
            place = self._place(seq)
            if place + 1 < len(runs) and runs[place + 1][0] == seq + 1:
                runs[place][1] = runs.pop(place + 1)[1]
            if place > 0 and runs[place - 1][1] + 1 == seq:
                runs[place - 1][1] = runs.pop(place)[1]

    def _place(self, seq: int) -> int:
        """The last run that begins at or before a number; -1 if none does."""
        return bisect_right(self._runs, seq, key=lambda run: run[0]) - 1


class Skips:
    """The numbers that a client has given up here.

    Args:
        clock: Seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pending: set[BatchId] = set()
        self._left = float(MAX_SKIPS)
        self._since = clock()

    def __contains__(self, batch: BatchId) -> bool:
        return batch in self._pending

    def may_add(self, applied: BatchSet) -> bool:
        """Whether the client may give up another number now.

        Args:
            applied: The batches that are closed.
        """
        now = self._clock()
        gained = (now - self._since) * SKIPS_PER_SECOND
        self._left = min(float(MAX_SKIPS), self._left + gained)
        self._since = now
        if len(self._pending) >= MAX_SKIPS:
            self._pending = {batch for batch in self._pending if batch not in applied}
        return self._left >= 1 and len(self._pending) < MAX_SKIPS

    def add(self, batch: BatchId) -> None:
        """Take note of a number that was given up."""
        self._pending.add(batch)
        self._left -= 1
