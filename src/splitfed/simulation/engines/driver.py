"""The contract between a simulation and its engines: a driver lets the clients of a round train.

An engine is two things. The user gives a frozen setting, such as `Processes(workers=2)`; `simulate`
makes a driver from it. `Simulation` opens a round, hands its plan to the driver, and makes a row of
the report and the metrics that come back.

A driver keeps these rules; transport, store and clients stay those of production:

- It starts nothing when it is made: a simulation is lazy.
- It trains the clients of `Assembly.remaining_clients(plan)` and no others: the updates of the rest
  are in the store already, and their batches would count twice.
- It hands each client's `ClientState` from one local run to the next.
- After a backward it calls `Assembly.commit`, in grouped mode after the push of a gradient; in
  synchronous mode it calls `Assembly.global_step` when every client that still trains has pushed.
- A local run draws from its run id alone, so where it runs changes no bits.
"""

from __future__ import annotations

from typing import Protocol

from splitfed.simulation.client import LocalMetrics
from splitfed.store.rounds import Plan
from splitfed.store.rows import Row


class Driver(Protocol):
    """Lets the virtual clients of each round train."""

    def run_round(self, plan: Plan) -> Row:
        """Let clients train until the round is over; returns the coordinator's report."""
        ...

    def take_metrics(self) -> list[LocalMetrics]:
        """The metrics of the local runs that have ended since the last call."""
        ...

    def close(self) -> None:
        """Stop every client where it is; a second call does nothing."""
        ...
