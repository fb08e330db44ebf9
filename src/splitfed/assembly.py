"""What a simulated federation is made of: the parts of a real one, on one store.

Nothing in here is made for simulation but the meter. Servers, accumulators and the coordinator are those that
production runs; that they share a process with their clients is all the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from splitfed.accumulator import Accumulator
from splitfed.federation import Federation
from splitfed.metering import Arrivals, Meter
from splitfed.optimizers import OptimizerFactory, SchedulerFactory
from splitfed.perclient import PerClient
from splitfed.policies import Mode
from splitfed.reporting import commit_rows
from splitfed.server import SplitServer
from splitfed.store import GradientStore

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
    settings: dict[str, Any]
    """Further arguments of `Federation`."""


class Assembly:
    """Servers, accumulators and coordinator on one store.

    Args:
        plans: How to build them.
        store: Where.
        clients: The ids of all clients.
        clock: Seconds by the clock of the run.
    """

    def __init__(self, plans: Plans, store: GradientStore, clients: Sequence[str], clock: Callable[[], float]) -> None:
        self.store = store
        self.mode = plans.mode
        self.body: Accumulator | PerClient
        common: dict[str, Any] = {"lr_scheduler": plans.server_scheduler, **plans.mode.settings()}
        if plans.mode.per_client:
            self.body = PerClient(plans.body, store, plans.server_optimizer, **common)
        else:
            self.body = Accumulator(plans.body, store, plans.server_optimizer, **common)
        halves = {} if plans.barrier else {**plans.mode.settings(), "min_batches": plans.min_updates}
        self.half = Accumulator(
            plans.half, store, plans.half_optimizer, lineage="client", personal=plans.personal, **halves
        )
        self.server = serve(plans, store)
        self.arrivals = Arrivals(clock, ("client",) if plans.mode.per_client else LINEAGES)
        self.meter = Meter(self.server, self.arrivals)
        self.federation = Federation(
            self.body, self.half, mode=plans.mode, clients=clients, barrier=plans.barrier, clock=clock, **plans.settings
        )
        self._clock = clock
        self._reported = {lineage: store.latest_version(lineage) for lineage in LINEAGES}
        self._times: dict[tuple[str, int], float] = {}

    def commit(self, client_id: str) -> None:
        """Commit what waits of the body, if the mode doesn't wait for the end of the round."""
        if isinstance(self.body, PerClient):
            self.body.step([client_id])
        elif self.mode.min_batches is not None and self.body.step() is not None:
            self.note()

    def global_step(self) -> None:
        """One step of both lineages over what all active clients have sent."""
        if isinstance(self.body, Accumulator):
            self.body.step(min_batches=1)
        self.half.step(min_batches=1)
        self.note()

    def note(self) -> None:
        """Take note of when versions came about that weren't there before."""
        for lineage in LINEAGES:
            for version in range(self._reported[lineage] + 1, self.store.latest_version(lineage) + 1):
                self._times.setdefault((lineage, version), self._clock())

    def commit_rows(self, round_number: int) -> list[dict[str, Any]]:
        """A row for each commit since the last call, with its time by the clock of the run."""
        self.note()
        rows = []
        for lineage in LINEAGES:
            after, upto = self._reported[lineage], self.store.latest_version(lineage)
            self._reported[lineage] = upto
            for row in commit_rows(self.store, lineage, after, upto, round_number):
                now = self._times.pop((lineage, row["version"]))
                commit = self.store.lineage(lineage).commit(row["version"])
                rows.append({**row, "time": now, "delay": self.arrivals.delay(lineage, commit, now)})
        return sorted(rows, key=lambda row: row["time"])


def serve(plans: Plans, store: GradientStore) -> SplitServer:
    """A server for so many active clients: each may have a graph open, up to a bound."""
    return SplitServer(
        plans.body, store, per_client=plans.mode.per_client, keep_graphs=min(max(8, plans.active), 128), keep_models=4
    )
