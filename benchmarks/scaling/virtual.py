"""Replicas in virtual time: how many batches a second they answer, where there is a core for each.

The parts are those of a run, and their times are measured (`measured.Times`): a client's own work between two requests,
the two requests at a replica, with the graph kept or computed again, a commit, the weights that a replica loads after
it, and the start of a replica in place of a killed one. A replica answers one request at a time, in the order in which
they come. The balancer is `balancer.named`: each forward goes to the next replica that listens, and its backward to the
same one.

Left out are the network, and the disk that all of them share.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.scaling.measured import Times
from splitfed.simulation.virtual_time import Process, Timeline

RETRY = 0.05
"""The client's first pause before it repeats a request."""


@dataclass(eq=False)
class Replica:
    """One replica: when it has answered all that came so far, and what it has in memory."""

    free: float = 0.0
    """From when on it can take another request."""
    version: int = 0
    """The newest that it has loaded."""
    life: int = 0
    """How many times it was killed."""
    kills: list[float] = field(default_factory=list)
    """When it is killed next, and after that."""
    up: float = 0.0
    """From when on it listens."""


class Fleet:
    """Replicas, clients and an accumulator on one clock.

    Args:
        times: What everything takes.
        replicas: How many.
        clients: How many.
        per_commit: Batches of a commit; 0 for none.
        kill_every: Seconds from one kill to the next, in turn; 0 for none.
    """

    def __init__(
        self, times: Times, replicas: int, clients: int, *, per_commit: int = 0, kill_every: float = 0.0
    ) -> None:
        self.times = times
        self.replicas = [Replica() for _ in range(replicas)]
        self.timeline = Timeline()
        self.batches = self.kept = 0
        self.version = 0
        self._pending = 0
        self._per_commit = per_commit
        self._turn = 0
        self._chance = random.Random(0)
        if kill_every:
            for n in range(100_000):
                self.replicas[n % replicas].kills.append((n + 1) * kill_every)
        for _ in range(clients):
            self.timeline.start(self._client())
        if per_commit:
            self.timeline.start(self._accumulator())

    def rate(self, seconds: float, warm: float) -> float:
        """Batches a second, from `warm` on."""
        for until in (warm, warm + seconds):
            before = self.batches
            while self.timeline.advance(until):
                pass
        return (self.batches - before) / seconds

    def close(self) -> None:
        """End the clients."""
        self.timeline.close()

    def _client(self) -> Process:
        times = self.times
        while True:
            yield times.client / 2
            held = yield from self._ask(None, times.forward, loads=True)
            yield times.client / 2
            answered = yield from self._ask(held[0], times.backward, made=held)
            self.kept += answered == held
            self.batches += 1
            self._pending += 1

    def _ask(
        self,
        replica: Replica | None,
        seconds: float,
        *,
        loads: bool = False,
        made: tuple[Replica, int] | None = None,
    ) -> Generator[float | None, None, tuple[Replica, int]]:
        """A request, repeated until it is answered; returns the replica that did, and its life."""
        timeline = self.timeline
        while True:
            if replica is None:
                replica = self._next()
            else:
                self._kill(replica, replica.life)
            now = timeline.now
            if replica is None or replica.up > now:  # refused at once
                replica = None
                yield RETRY
                continue
            need = seconds * self._chance.lognormvariate(0.0, self.times.spread)
            if made is not None and made != (replica, replica.life):
                need += self.times.forward
            if loads and replica.version < self.version:
                replica.version = self.version
                need += self.times.load
            end = max(replica.free, now) + need
            replica.free = end
            life = replica.life
            if replica.kills and replica.kills[0] < end:
                yield max(0.0, replica.kills[0] - now)
                self._kill(replica, life)
                replica = None
                yield RETRY
                continue
            yield end - now
            return replica, life

    def _next(self) -> Replica | None:
        """The next replica that listens."""
        for _ in self.replicas:
            self._turn += 1
            found = self.replicas[self._turn % len(self.replicas)]
            self._kill(found, found.life)
            if found.up <= self.timeline.now:
                return found
        return None

    def _kill(self, replica: Replica, life: int) -> None:
        """Let the kills that are due happen; those that wait at one replica each find it done."""
        while replica.life == life and replica.kills and replica.kills[0] <= self.timeline.now:
            at = replica.kills.pop(0)
            replica.life += 1
            life = replica.life
            replica.up = replica.free = at + self.times.start
            replica.version = self.version

    def _accumulator(self) -> Process:
        """It has a core of its own."""
        while True:
            if self._pending < self._per_commit:
                yield self.times.poll
                continue
            self._pending -= self._per_commit
            yield self.times.commit
            self.version += 1


def rates(times: Times, counts: list[int], seconds: float = 200.0) -> dict[str, list[float]]:
    """Batches a second with as many clients as replicas: alone, during commits, and with kills."""
    ways: dict[str, dict[str, Any]] = {
        "no commits": {},
        "one commit per 8 batches": {"per_commit": 8},
        "one replica killed each 10 s": {"kill_every": 10.0},
    }
    found: dict[str, list[float]] = {}
    for way, settings in ways.items():
        found[way] = []
        for count in counts:
            fleet = Fleet(times, count, count, **settings)
            found[way].append(fleet.rate(seconds, warm=20.0))
            fleet.close()
    return found
