"""An event queue: many processes in one thread, each run at its own instants of a virtual clock.

A process is a generator. What it yields says how many seconds pass before it is resumed, or `None` to be parked until
all that are parked are released; between two yields no time passes. Processes that are due at one instant are resumed
in the order in which they came to wait, so a run is a function of what it was given. Nothing sleeps: ten years of
waiting take as long as the work in them.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
from collections.abc import Generator

Process = Generator[float | None, None, None]


class Timeline:
    """The queue and its clock."""

    def __init__(self) -> None:
        self.now = 0.0
        """The virtual time, in seconds; it never goes back."""
        self._queue: list[tuple[float, int, Process]] = []
        self._order = itertools.count()
        self._parked: list[Process] = []

    def __len__(self) -> int:
        return len(self._queue)

    def start(self, process: Process) -> None:
        """Let a process begin: it is first resumed now, after those that are due already."""
        self._wait(process, 0.0)

    def advance(self, until: float | None = None) -> bool:
        """Resume the process that is due next, and set the clock to its instant.

        Args:
            until: Don't go beyond this time; the clock then stands there, and no process is resumed.

        Returns:
            Whether a process was resumed.
        """
        if until is not None and (not self._queue or self._queue[0][0] > until):
            self.now = max(self.now, until)
            return False
        if not self._queue:
            return False
        self.now, _, process = heapq.heappop(self._queue)
        with contextlib.suppress(StopIteration):
            seconds = next(process)
            if seconds is None:
                self._parked.append(process)
            else:
                self._wait(process, seconds)
        return True

    def release(self) -> int:
        """Let the parked processes go on now, in the order in which they were parked; returns how many there were."""
        released, self._parked = self._parked, []
        for process in released:
            self._wait(process, 0.0)
        return len(released)

    def close(self) -> None:
        """End every process where it stands."""
        for process in (*(process for _, _, process in self._queue), *self._parked):
            process.close()
        self._queue.clear()
        self._parked.clear()

    def _wait(self, process: Process, seconds: float) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), process))
