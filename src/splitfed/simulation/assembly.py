"""What a simulated federation is made of: the parts of a real one, on one store.

Nothing in here is made for simulation but the meter. Servers, accumulators and the coordinator are those that
production runs; that they share a process with their clients is all the difference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from splitfed.accumulator.accumulator import Accumulator
from splitfed.accumulator.policies import Mode
from splitfed.accumulator.settings import OptimizerFactory, SchedulerFactory
from splitfed.errors import InputError
from splitfed.federation import as_body, make_body
from splitfed.federation.admission import Judge
from splitfed.federation.federation import Federation
from splitfed.federation.reports import commit_rows
from splitfed.protocol.transport import RoundRobin, Transport
from splitfed.server.server import SplitServer
from splitfed.simulation.traffic import Arrivals, Meter
from splitfed.store.rounds import Plan
from splitfed.store.rows import Row
from splitfed.store.store import GradientStore

LINEAGES = ("body", "client")


@dataclass(frozen=True, slots=True, eq=False)
class Plans:
    """How a simulated federation is to be built."""

    half: nn.Module
    body: nn.Module
    mode: Mode
    server_optimizer: OptimizerFactory
    half_optimizer: OptimizerFactory
    server_scheduler: SchedulerFactory | None
    personal: tuple[str, ...]
    active: int
    """How many clients are active at once, at most."""
    barrier: bool
    """Whether clients wait for each other at the end of a round."""
    min_updates: int
    """Without a barrier: client halves are committed when so many updates wait."""
    replicas: int
    """How many servers share the requests."""
    settings: dict[str, Any]
    """Further arguments of `Federation`."""


class Assembly:
    """Servers, accumulators and coordinator on one store.

    Args:
        plans: How to build them.
        store: Where.
        clients: The ids of all clients.
        clock: Virtual seconds; `None` for real ones, since 1970.

    Raises:
        InputError: the store knows other clients too, whom rounds would wait for.
    """

    def __init__(
        self, plans: Plans, store: GradientStore, clients: Sequence[str], clock: Callable[[], float] | None
    ) -> None:
        strangers = sorted(set(store.clients()).difference(clients))
        if strangers:
            raise InputError(
                f"{store!r} has clients that weren't given, {strangers[0]!r} for one: expected data for each "
                "that a store has, or another store"
            )
        self.store = store
        self.mode = plans.mode
        scheduler = plans.server_scheduler
        self.body = make_body(plans.mode, plans.body, store, plans.server_optimizer, lr_scheduler=scheduler)
        self._commits = as_body(self.body, plans.mode)
        halves: dict[str, Any] = {"staleness_weight": plans.mode.staleness_weight}
        if not plans.barrier:
            halves = {**plans.mode.settings(), "min_batches": plans.min_updates}
        self.half = Accumulator(
            plans.half, store, plans.half_optimizer, lineage="client", personal=plans.personal, **halves
        )
        self.server = serve(plans, store)
        self.arrivals = Arrivals(clock or time.time, plans.mode.shared_lineages)
        self.meter = Meter(self.server, self.arrivals)
        self.federation = Federation(
            self.body,
            self.half,
            mode=plans.mode,
            clients=clients,
            barrier=plans.barrier,
            clock=clock or time.time,
            **plans.settings,
        )
        self._clock = clock
        self._reported = {lineage: store.latest_version(lineage) for lineage in LINEAGES}
        self._noted = dict(self._reported)
        self._times: dict[tuple[str, int], float] = {}

    def asked(self, plan: Plan) -> tuple[str, ...]:
        """The sampled clients that have yet to train: not those whose update is in already.

        An update may be in from a run that was killed, or from a round below quorum; were its client to train again,
        the body would count its batches twice.
        """
        if self.mode.gradients or not plan.barrier:
            return plan.sampled
        heard = Judge(self.store, plan).heard()
        return tuple(name for name in plan.sampled if name not in heard)

    def commit(self, client_id: str) -> None:
        """Commit what waits of the body, if the mode doesn't wait for the end of the round."""
        if self._commits.stream([client_id]):
            self.note()

    def global_step(self) -> None:
        """One step of both lineages over what all active clients have sent."""
        self._commits.global_step()
        self.half.step(min_batches=1)
        self.note()

    def note(self) -> None:
        """Take note of the virtual time at which versions came about that weren't there before."""
        if self._clock is None:
            return
        for lineage in LINEAGES:
            newest = self.store.latest_version(lineage)
            for version in range(self._noted[lineage] + 1, newest + 1):
                self._times[lineage, version] = self._clock()
            self._noted[lineage] = newest

    def commit_rows(self, round_number: int, started: float) -> list[Row]:
        """A row for each commit since the last call.

        Args:
            round_number: The round that has ended.
            started: When the run began, by its clock; rows count their time from there.
        """
        self.note()
        rows = []
        for lineage in LINEAGES:
            after, upto = self._reported[lineage], self.store.latest_version(lineage)
            self._reported[lineage] = upto
            for row in commit_rows(self.store, lineage, after, upto, round_number):
                commit = self.store.lineage(lineage).commit(row["version"])
                now = self._times.pop((lineage, commit.version), commit.time)
                delay = self.arrivals.delay(lineage, commit, now)
                rows.append({**row, "time": now - started, "delay": delay})
        return sorted(rows, key=lambda row: row["time"])


def serve(plans: Plans, store: GradientStore) -> Transport:
    """Servers for so many active clients: each may have a graph open, up to a bound."""
    settings = {**plans.mode.server_settings(), "keep_graphs": min(max(8, plans.active), 128), "keep_models": 4}
    return RoundRobin([SplitServer(plans.body, store, **settings) for _ in range(plans.replicas)])
