"""Virtual time: how long virtual clients take, so that stragglers and asynchronous updates cost no real waiting.

A batch costs a client `compute` seconds, a third of it before its forward is asked for, a third between the answer and
the backward, a third after; and each of its two requests costs the way there and the way back, one `latency` each. So
a batch takes `compute` + 4 · `latency`, and its forward and backward reach the server at instants of their own: what
is committed between them is the staleness of a real schedule. The server itself takes no time.

The clock is an event queue: many processes in one thread, each run at its own instants. A process is a generator. What
it yields says how many seconds pass before it is resumed, or `None` to be parked until all that are parked are
released; between two yields no time passes. Processes that are due at one instant are resumed in the order in which
they came to wait, so a run is a function of what it was given. Nothing sleeps: ten years of waiting take as long as
the work in them.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from statistics import NormalDist

from splitfed.errors import InputError
from splitfed.simulation.rng import uniform

Setting = float | Mapping[str, float] | Callable[[str], float]
"""One number for all clients, a mapping by client id, or a function of it."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What one client costs: seconds per batch, seconds per way, and its chance to vanish in an activation."""

    compute: float = 0.0
    latency: float = 0.0
    dropout: float = 0.0


@dataclass(frozen=True, slots=True)
class VirtualTime:
    """What clients cost in virtual seconds; each a number, a mapping by client id, or a function of the id."""

    compute: Setting = 1.0
    """Seconds that a batch takes at the client."""
    latency: Setting = 0.0
    """Seconds that a request or an answer travels."""
    dropout: Setting = 0.0
    """The chance, from 0 to below 1, that a client vanishes in the middle of an activation, and comes back later."""

    def pace(self, client_id: str) -> Pace:
        """The figures of one client.

        Raises:
            InputError: a figure is missing or out of its range.
        """
        figures = {
            name: _of(getattr(self, name), name, client_id)
            for name in ("compute", "latency", "dropout")
        }
        if figures["dropout"] >= 1:
            raise InputError(
                f"dropout of {client_id!r} is {figures['dropout']}: expected a chance from 0 to below 1"
            )
        return Pace(**figures)


def stragglers(
    share: float = 0.1, factor: float = 10.0, base: float = 1.0, seed: int = 0
) -> Callable[[str], float]:
    """Some clients are slow: a function of the id for `VirtualTime`.

    Args:
        share: The chance of a client to be slow.
        factor: How many times longer a slow one takes.
        base: What the others take, in seconds.
        seed: Which clients they are follows from it and their ids.
    """
    return lambda client_id: (
        base * (factor if uniform("stragglers", seed, client_id) < share else 1.0)
    )


def lognormal(median: float, sigma: float, seed: int = 0) -> Callable[[str], float]:
    """Speeds as devices have them, a few of them very slow: a function of the id for `VirtualTime`.

    Args:
        median: Of the seconds.
        sigma: Standard deviation of their logarithm; at 1, one in twenty takes more than five times the median.
        seed: Each client's figure follows from it and its id.
    """
    normal = NormalDist(0.0, 1.0)
    return lambda client_id: (
        median
        * math.exp(
            sigma * normal.inv_cdf((uniform("lognormal", seed, client_id) + 2**-54) / (1 + 2**-53))
        )
    )


def _of(setting: Setting, name: str, client_id: str) -> float:
    if isinstance(setting, Mapping):
        if client_id not in setting:
            raise InputError(
                f"{name} has no figure for client {client_id!r}: expected one for each client"
            )
        value = setting[client_id]
    else:
        value = setting(client_id) if callable(setting) else setting
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise InputError(
            f"{name} of client {client_id!r} is {value!r}: expected a finite number of 0 or more"
        )
    return float(value)


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
