"""The settings of a simulation that belong together: how a client trains, how rounds run, where clients run.

Each is a frozen value that `simulate` takes under one keyword. Where clients run is the engine: one after the other in
this process if there is none, in this process by a virtual clock (`VirtualTime`), or in worker processes (`Processes`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from splitfed.accumulator.optimizer import SchedulerFactory
from splitfed.checks import at_least
from splitfed.errors import InputError
from splitfed.simulation.virtual_time import VirtualTime


@dataclass(frozen=True, slots=True)
class LocalTraining:
    """What a client does with its own data while it is active.

    Raises:
        InputError: a number below 1.
    """

    batch_size: int = 64
    """Examples of a batch."""
    local_passes: int = 1
    """How often a client goes through its data in a round."""
    scheduler: SchedulerFactory | None = None
    """Makes a scheduler for a client's optimizer; it steps once per batch, and is kept with the optimizer."""
    keep_optimizers: bool = False
    """Whether the state of a client's optimizer outlives its activation."""

    def __post_init__(self) -> None:
        at_least("batch_size", self.batch_size, 1)
        at_least("local_passes", self.local_passes, 1)


@dataclass(frozen=True, slots=True)
class RoundSchedule:
    """Who trains in a round, how long it lasts, and when halves are averaged."""

    clients_per_round: int | float | None = None
    """How many are sampled for a round: a number, a share such as 0.1, or `None` for all."""
    min_clients: int = 1
    """Below so many clients with an update nothing is averaged."""
    deadline: float | None = None
    """How many virtual seconds a round lasts at most."""
    late: Literal["count", "refuse"] = "count"
    """Updates of earlier rounds `"count"`, or are closed as stale (`"refuse"`)."""
    barrier: bool | None = None
    """Whether clients wait for each other at the end of a round.

    By default they do, except in virtual time and a mode with `max_staleness`, such as `buffered`: there each goes on
    as soon as it has pushed, and a round is as many updates as there are sampled clients. Synchronous mode always has
    a barrier.
    """
    min_updates: int | None = None
    """Without a barrier: halves are committed when so many updates wait; by default a tenth of the sampled clients."""


@dataclass(frozen=True, slots=True)
class Processes:
    """Worker processes that train clients in parallel, on a store in a folder.

    Modes that commit nothing while clients train, or in global steps, end in the same bits as in one process; in the
    others timing decides what is folded together.

    Raises:
        InputError: a number of workers below 1.
    """

    workers: int
    """How many processes."""

    def __post_init__(self) -> None:
        at_least("workers", self.workers, 1)


Engine = VirtualTime | Processes


def check_engine(engine: object, schedule: RoundSchedule) -> None:
    """Refuse an engine that isn't one, or that the schedule of rounds doesn't go with.

    Raises:
        InputError: it doesn't.
    """
    if engine is not None and not isinstance(engine, VirtualTime | Processes):
        raise InputError(
            f"engine is {engine!r}: expected a VirtualTime, such as VirtualTime(compute=1.0), Processes(workers=2), "
            "or None for clients in turns"
        )
    if schedule.deadline is not None and not isinstance(engine, VirtualTime):
        raise InputError(
            f"deadline={schedule.deadline!r} needs a clock: give engine=VirtualTime(...) too, or no deadline"
        )
    if isinstance(engine, Processes) and schedule.barrier is False:
        raise InputError("worker processes train in rounds: leave barrier=False out, or the engine")
