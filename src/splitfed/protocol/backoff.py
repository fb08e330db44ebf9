"""Backoff: the pauses between the tries of one thing, for retries and for polling.

A loop that tries again has to know how long the next pause is, how pauses grow, who may prolong
one, and when no further try follows. With a `Backoff` such a loop is a `while` around a try and a
`wait()`; the HTTP client, both ends of the mailbox, a client that waits for its round and the
commands that outlive a storage failure share this one.

A retry and a poll differ at their end. A retry that would come after the deadline isn't waited for:
the failure is known already, and the caller should have it. A poll waits for something that may
come at any time, so its last pause is cut to the deadline, and it looks once more (`last_look`).

The trap is where the jitter comes from: the operating system, never the module `random`. The state
of that one is the user's seed, and a seeded program has to draw the same numbers whether or not a
request was repeated.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Iterable, Iterator

_FIRST_LOOK = 0.005  # seconds


class Backoff:
    """The pauses of one streak of tries: call `wait()` after each try that has to be repeated.

    A streak ends with the first success. The next one needs a new object, whose pauses begin small.

    Args:
        pauses: Seconds before each further try, so as many tries follow as there are pauses. For
            pauses without end there is `growing`.
        most: Longest pause in seconds, also where a server asks for more.
        within: Seconds from now on in which a further try may begin.
        last_look: Whether the last pause is cut to that deadline; else a pause that would end after
            it is left out.
        jitter: Whether each pause is multiplied by a random number from 0.5 to 1.5, so that clients
            that failed together don't return together.
        stop: Ends a pause, and the tries with it, as soon as it is set.
    """

    def __init__(
        self,
        pauses: Iterable[float],
        *,
        most: float = math.inf,
        within: float = math.inf,
        last_look: bool = False,
        jitter: bool = False,
        stop: threading.Event | None = None,
    ) -> None:
        self._pauses = iter(pauses)
        self.pause = next(self._pauses, None)
        """Seconds before the next try, jitter and limits aside; `None` if none follows."""
        self._most = most
        self._began = time.monotonic()
        self._deadline = self._began + within
        self._last_look = last_look
        self._jitter = jitter
        self._stop = stop

    @property
    def elapsed(self) -> float:
        """Seconds since this object was made."""
        return time.monotonic() - self._began

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() >= self._deadline

    def wait(self, asked: float | None = None) -> bool:
        """Sleep until the next try is due.

        Args:
            asked: The pause that a server asks for, in seconds; it counts where it is longer.

        Returns:
            Whether to try again. If no try follows, this returns at once.
        """
        if self.pause is None:
            return False
        pause = min(max(self.pause, asked or 0.0), self._most)
        if self._jitter:
            # Made here, where a pause follows anyway: most objects are never waited on.
            pause *= random.SystemRandom().uniform(0.5, 1.5)
        left = self._deadline - time.monotonic()
        if self._last_look and left > 0.0:  # not once it has passed: this look was the last one
            pause = min(pause, left)
        if pause > left:
            return False
        self.pause = next(self._pauses, None)
        if self._stop is not None:
            return not self._stop.wait(pause)
        time.sleep(pause)
        return True


def growing(first: float, factor: float) -> Iterator[float]:
    """Pauses in seconds without end: `first`, then each `factor` times the one before."""
    pause = first
    while True:
        yield pause
        pause *= factor


def looking(most: float, stop: threading.Event) -> Backoff:
    """The pauses of one who looks for work: short after the last there was, then longer.

    Args:
        most: Longest pause in seconds.
        stop: Ends a pause as soon as it is set.
    """
    return Backoff(growing(_FIRST_LOOK, 1.5), most=most, stop=stop)
