"""The federation of a simulation: the parts of a real one, on one store.

Nothing in here is made for simulation but the meter. Servers, accumulators and the coordinator are
those of production; all the difference is that they share a process with their clients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from splitfed.accumulator.accumulator import Accumulator
from splitfed.accumulator.policies import Mode
from splitfed.accumulator.settings import OptimizerFactory, SchedulerFactory
from splitfed.errors import InputError
from splitfed.federation import as_body, make_body
from splitfed.federation.admission import Judge
from splitfed.federation.federation import Federation, steady_clock
from splitfed.protocol.transport import RoundRobin, Transport
from splitfed.server.server import SplitServer
from splitfed.simulation.traffic import Arrivals, Meter
from splitfed.store.records import commit_rows
from splitfed.store.rounds import Plan
from splitfed.store.rows import Row
from splitfed.store.store import GradientStore

LINEAGES = ("body", "client")


@dataclass(frozen=True, slots=True, eq=False)
class Plans:
    """The settings from which a simulated federation is built."""

    half: nn.Module
    body: nn.Module
    mode: Mode
    server_optimizer: OptimizerFactory
    half_optimizer: OptimizerFactory
    server_scheduler: SchedulerFactory | None
    half_scheduler: SchedulerFactory | None
    personal: tuple[str, ...]
    active: int
    """How many clients train at once, at most."""
    barrier: bool
    """Whether clients wait for each other at the end of a round."""
    min_updates: int
    """Without a barrier: how many pending updates make a commit of the halves."""
    replicas: int
    """How many servers share the requests."""
    settings: dict[str, Any]
    """Further arguments of `Federation`."""
    sizes: Mapping[str, int] | None = None
    """How many examples each client has, if they are sampled by it."""
    device: torch.device | None = None
    """Where servers and accumulators compute; `None` for where half and body are."""


class Assembly:
    """Servers, accumulators and coordinator on one store.

    Args:
        plans: How to build them.
        store: The store that they share.
        clients: The ids of all clients.
        clock: Virtual seconds; `None` for real ones, since 1970.

    Raises:
        InputError: the store knows other clients too, for which rounds would wait.
    """

    def __init__(
        self,
        plans: Plans,
        store: GradientStore,
        clients: Sequence[str],
        clock: Callable[[], float] | None,
    ) -> None:
        strangers = sorted(set(store.clients()).difference(clients))
        if strangers:
            raise InputError(
                f"{store!r} has clients that weren't given, {strangers[0]!r} for one: "
                "expected data for each that a store has, or another store"
            )
        self.store = store
        self.mode = plans.mode
        scheduler = plans.server_scheduler
        self.body = make_body(
            plans.mode,
            plans.body,
            store,
            plans.server_optimizer,
            lr_scheduler=scheduler,
            device=plans.device,
        )
        halves: dict[str, Any] = {"staleness_weight": plans.mode.staleness_weight}
        if plans.mode.gradients:
            halves = plans.mode.settings()
        elif not plans.barrier:
            # The most batches of a commit are the body's: updates of halves are others, and fewer.
            numbers = {"min_batches": plans.min_updates, "max_batches": None}
            halves = {**plans.mode.settings(), **numbers}
        self.half = Accumulator(
            plans.half,
            store,
            plans.half_optimizer,
            lineage="client",
            personal=plans.personal,
            lr_scheduler=plans.half_scheduler,
            device=plans.device,
            **halves,
        )
        self._commits = as_body(self.body, plans.mode, self.half)
        self.server = serve(plans, store)
        now = steady_clock() if clock is None else clock
        self.arrivals = Arrivals(now, plans.mode.shared_lineages)
        self.meter = Meter(self.server, self.arrivals)
        self.federation = Federation(
            self.body,
            self.half,
            mode=plans.mode,
            clients=clients if plans.sizes is None else plans.sizes,
            barrier=plans.barrier,
            clock=now,
            **plans.settings,
        )
        self._clock = clock
        self._reported = {lineage: store.latest_version(lineage) for lineage in LINEAGES}
        self._noted = dict(self._reported)
        self._times: dict[tuple[str, int], float] = {}

    def remaining_clients(self, plan: Plan) -> tuple[str, ...]:
        """The sampled clients that have yet to train: not those whose update is in the store.

        It may be there from a run that was killed, or from a round below quorum; were its client to
        train again, the body would count its batches twice.
        """
        if self.mode.gradients or not plan.barrier:
            return plan.sampled
        heard = Judge(self.store, plan).heard()
        return tuple(client_id for client_id in plan.sampled if client_id not in heard)

    def steps_taken(self, plan: Plan) -> int:
        """How many global steps this round has taken already, in a run that was killed.

        Whoever begins its local runs again repeats these, and no step is taken for them.
        """
        if self.mode.streams or not self.mode.gradients:
            return 0
        return self.store.latest_version("client") - plan.client_version

    def commit(self, client_id: str) -> None:
        """Commit what is pending, unless the mode waits for more, or for the end of the round."""
        if self._commits.stream([client_id]):
            self.note()

    def global_step(self) -> None:
        """Commit the pending gradients of both lineages: one step of synchronous mode."""
        self._commits.global_step()
        self.note()

    def note(self) -> None:
        """Note the virtual time of the versions that are new since the last call.

        A commit's record has real time only; so whoever may have committed calls this at once.
        """
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
            started: The beginning of the run, by its clock; times in the rows count from there.
        """
        self.note()
        rows = []
        for lineage in LINEAGES:
            after, upto = self._reported[lineage], self.store.latest_version(lineage)
            self._reported[lineage] = upto
            for row in commit_rows(self.store, lineage, after, upto, round_number):
                commit = self.store.lineage(lineage).commit(row["version"])
                # In real time nothing was noted: the commit's own record has the time.
                now = self._times.pop((lineage, commit.version), commit.time)
                delay = self.arrivals.delay(lineage, commit, now)
                rows.append({**row, "time": now - started, "delay": delay})
        return sorted(rows, key=lambda row: row["time"])


def serve(plans: Plans, store: GradientStore) -> Transport:
    """The servers, as one transport.

    Each client that trains may have a graph open, so that many are kept; but at most 128, as each
    holds the activations of a call.
    """
    settings = {
        **plans.mode.server_settings(),
        "keep_graphs": min(max(8, plans.active), 128),
        "keep_models": 4,
    }
    return RoundRobin(
        [
            SplitServer(plans.body, store, device=plans.device, **settings)
            for _ in range(plans.replicas)
        ]
    )
