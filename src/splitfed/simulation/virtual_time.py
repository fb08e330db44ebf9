"""Virtual time: what clients cost, and the event queue that gives each request its instant.

A batch costs a client `compute` seconds: a third before its forward is requested, a third between
the answer and the backward, a third after. Each of its two requests costs one `latency` there and
one back. So a batch takes `compute` + 4 · `latency`, and its forward and backward reach the server
at instants of their own: the commits between them are the staleness of a real schedule. The server
itself takes no time.

The clock is that of a discrete-event simulation: many processes in one thread, each resumed at its
own instants. A process is a generator. It yields the seconds until it is resumed, or `None` to be
parked until all parked processes are released; between two yields no time passes. Processes that
are due at one instant are resumed in the order in which they were scheduled, so a run is a function
of its arguments. Nothing sleeps: ten years of waiting take as long as the work in them.
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
    """The costs of one client, each as in `VirtualTime`."""

    compute: float = 0.0
    latency: float = 0.0
    dropout: float = 0.0


@dataclass(frozen=True, slots=True)
class VirtualTime:
    """The engine that runs clients in this process, by a virtual clock; and what they cost.

    Each cost is a number, a mapping by client id, or a function of the id.
    """

    compute: Setting = 1.0
    """Seconds that a batch takes at the client."""
    latency: Setting = 0.0
    """Seconds that a request or an answer travels."""
    dropout: Setting = 0.0
    """The chance, from 0 to below 1, that a client vanishes in the middle of a local run.

    It comes back in a later round.
    """

    def pace(self, client_id: str) -> Pace:
        """The costs of one client.

        Raises:
            InputError: a cost is missing or out of its range.
        """
        compute = _number(self.compute, "compute", client_id)
        latency = _number(self.latency, "latency", client_id)
        dropout = _number(self.dropout, "dropout", client_id)
        if dropout >= 1:
            raise InputError(
                f"dropout of {client_id!r} is {dropout}: expected a chance from 0 to below 1"
            )
        return Pace(compute, latency, dropout)


def stragglers(
    share: float = 0.1, factor: float = 10.0, base: float = 1.0, seed: int = 0
) -> Callable[[str], float]:
    """A function of the id for `VirtualTime`: some clients are slow.

    Args:
        share: The chance of a client to be slow.
        factor: How many times longer a slow one takes.
        base: Seconds that the others take.
        seed: Which clients are slow follows from it and their ids.
    """

    def seconds(client_id: str) -> float:
        is_slow = uniform("stragglers", seed, client_id) < share
        return base * (factor if is_slow else 1.0)

    return seconds


def lognormal(median: float, sigma: float, seed: int = 0) -> Callable[[str], float]:
    """A function of the id for `VirtualTime`: speeds as devices have them, a few very slow.

    Args:
        median: Of the seconds.
        sigma: Standard deviation of their logarithm; at 1, one client in twenty takes more than
            five times the median.
        seed: A client's seconds follow from it and the client's id.
    """
    normal = NormalDist(0.0, 1.0)

    def seconds(client_id: str) -> float:
        # A draw may be 0, which has no quantile: half a step of the draw moves it off.
        draw = uniform("lognormal", seed, client_id)
        quantile = normal.inv_cdf((draw + 2**-54) / (1 + 2**-53))
        return median * math.exp(sigma * quantile)

    return seconds


def _number(setting: Setting, name: str, client_id: str) -> float:
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
    """The event queue and its clock."""

    def __init__(self) -> None:
        self.now = 0.0
        """The virtual time, in seconds; it never goes back."""
        self._queue: list[tuple[float, int, Process]] = []
        # Breaks ties of one instant by age; also, generators can't be compared.
        self._order = itertools.count()
        self._parked: list[Process] = []

    def __len__(self) -> int:
        return len(self._queue)

    def start(self, process: Process) -> None:
        """Let a process begin: it is first resumed now, after those that are due already."""
        self._schedule(process, 0.0)

    def advance(self, until: float | None = None) -> bool:
        """Resume the process that is due next, and set the clock to its instant.

        Args:
            until: Don't go beyond this time; the clock then stands there, and no process is
                resumed.

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
                self._schedule(process, seconds)
        return True

    def release(self) -> int:
        """Resume the parked processes now, in the order in which they were parked.

        Returns:
            How many there were.
        """
        released = self._parked
        self._parked = []
        for process in released:
            self._schedule(process, 0.0)
        return len(released)

    def close(self) -> None:
        """End every process where it stands."""
        for process in (*(process for _, _, process in self._queue), *self._parked):
            process.close()
        self._queue.clear()
        self._parked.clear()

    def _schedule(self, process: Process, seconds: float) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), process))
