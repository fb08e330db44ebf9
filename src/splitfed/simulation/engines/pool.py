"""The engine of workers: virtual clients train in parallel, on a store that all share.

A `Crew` says where workers run, and moves bytes: processes of this machine, or actors of a cluster.
All the rest is here, once: which client trains where, results in the order of ids and not of
arrival, and what follows from a death. A worker that dies is replaced, and the local runs that it
had are begun again from the states that their clients had; what such a run sent before counts, and
is repeated under its numbers (`LocalRun`). So a kill costs time and changes no count.

Modes that commit nothing while clients train, or in global steps, fix the schedule, so they end in
the same bits as in one process. In the others timing decides which batches are folded together, and
the commit records say which.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from splitfed.errors import InputError, WorkerError
from splitfed.simulation.assembly import Assembly
from splitfed.simulation.client import ClientConfig, ClientState, LocalMetrics
from splitfed.simulation.engines.tasks import Task, TaskResult, dumps, loads
from splitfed.store.rounds import Plan
from splitfed.store.rows import Row

MOST_DEATHS = 3
"""So often a worker is replaced in a run; its next death ends the run."""


@dataclass(frozen=True, slots=True)
class Death:
    """How a worker has died."""

    reason: str
    is_final: bool = False
    """Whether another one in its place would die of the same."""


class Crew(Protocol):
    """Workers, known by numbers from 0 on.

    A worker answers once when it has read the setup, and then once to each task; so it owes one
    answer at a time. `host.Host` is what runs inside.
    """

    def open(self, setup: bytes) -> int:
        """Get ready to start workers with this setup; returns how many there may be.

        Raises:
            InputError: there is nowhere to start one.
        """
        ...

    def start(self, number: int) -> None:
        """Start a worker, of a new number or in place of one that has died; don't wait for it."""
        ...

    def give(self, number: int, task: bytes) -> None:
        """Give a worker a task; if it is dead, `take` will say so."""
        ...

    def take(self) -> Sequence[tuple[int, bytes | Death]]:
        """Wait for answers and deaths; returns some, with their workers' numbers."""
        ...

    def stop(self) -> None:
        """End all workers; a second call does nothing."""
        ...


@dataclass(slots=True, eq=False)
class _Place:
    """One worker, and whoever takes its place."""

    number: int
    is_ready: bool = False
    """Whether it has answered that it can begin."""
    current: Task | None = None
    """The task that it executes."""
    pinned: deque[Task] = field(default_factory=deque)
    """Tasks whose runs it holds."""
    suspended: set[str] = field(default_factory=set)
    """The clients whose run it holds until the next global step."""
    deaths: int = 0

    def given(self, task: Task) -> Task:
        """The task as it is sent here: a run that is held needs no state."""
        self.current = task
        return replace(task, state=None) if task.client_id in self.suspended else task

    def moment(self) -> str:
        """What it is doing now."""
        if not self.is_ready:
            return "at its start"
        return f"with client {self.current.client_id!r}" if self.current else "between two tasks"

    def lost(self) -> list[Task]:
        """It has died: the tasks that another one has to execute, in their order."""
        tasks = [*([] if self.current is None else [self.current]), *self.pinned]
        self.is_ready, self.current = False, None
        self.pinned.clear()
        self.suspended.clear()
        return tasks


class WorkerPool:
    """The `Driver` of clients in workers.

    Args:
        assembly: The federation, as this process sees it.
        config: The settings that the clients share.
        crew: The workers.
        setup: What each of them gets (`tasks.setup_of`).
        most: More workers than this would have nothing to do.

    Raises:
        InputError: the store is in this process's memory.
    """

    def __init__(
        self, assembly: Assembly, config: ClientConfig, crew: Crew, setup: bytes, most: int
    ) -> None:
        store = assembly.store
        if store.url.startswith("memory:"):
            raise InputError(
                f"{store.url} is in this process's memory: "
                "expected a folder or an object store that workers share"
            )
        self._assembly = assembly
        self._config = config
        self._crew = crew
        self._setup = setup
        self._most = most
        self._places: list[_Place] = []
        self._states: dict[str, ClientState] = {}
        self._ended: list[LocalMetrics] = []

    def run_round(self, plan: Plan) -> Row:
        """Let clients train until the round is over; returns the coordinator's report.

        Raises:
            WorkerError: a worker died too often.
        """
        if not self._places:
            self._places = [
                _Place(number) for number in range(min(self._crew.open(self._setup), self._most))
            ]
            for place in self._places:
                self._crew.start(place.number)
        run_id = (plan.number, 0)
        waiting = list(self._assembly.remaining_clients(plan))
        step = self._assembly.steps_taken(plan)
        while waiting:
            results = self._execute(
                Task(client_id, run_id, self._states.get(client_id, ClientState()), step)
                for client_id in waiting
            )
            if self._config.gradients and not self._assembly.mode.streams:
                # No client trains now: each has pushed its gradient of this step, or has ended.
                self._assembly.global_step()
            waiting = [result.client_id for result in results if result.metrics is None]
            step += 1
        return self._assembly.federation.poll() or self._assembly.federation.close()

    def take_metrics(self) -> list[LocalMetrics]:
        """The metrics of the local runs that have ended since the last call."""
        taken = self._ended
        self._ended = []
        return taken

    def close(self) -> None:
        """End the workers."""
        self._places = []
        self._crew.stop()

    def _execute(self, tasks: Iterable[Task]) -> list[TaskResult]:
        """Execute tasks; returns their results in the order of client ids, not that of arrival."""
        queue = deque[Task]()
        # A suspended run is in the memory of one worker; elsewhere it would begin again.
        pinned = {name: place.pinned for place in self._places for name in place.suspended}
        wanted = 0
        for task in tasks:
            pinned.get(task.client_id, queue).append(task)
            wanted += 1
        results = list[TaskResult]()
        while len(results) < wanted:
            self._assign(queue)
            for number, answer in self._crew.take():
                place = self._places[number]
                if isinstance(answer, Death):
                    queue.extendleft(reversed(self._replace(place, answer)))
                elif not place.is_ready:
                    place.is_ready = True
                    if answer:
                        self._raise(place, loads(answer))
                else:
                    results.append(self._collect(place, loads(answer)))
        return sorted(results, key=lambda result: result.client_id)

    def _assign(self, queue: deque[Task]) -> None:
        """Give each worker that is free its next task: one of a run that it holds first."""
        for place in self._places:
            tasks = place.pinned or queue
            if place.is_ready and place.current is None and tasks:
                self._crew.give(place.number, dumps(place.given(tasks.popleft())))

    def _replace(self, place: _Place, death: Death) -> list[Task]:
        """Start another worker in the place of one that has died; returns the tasks that it had.

        Raises:
            WorkerError: that is of no use any more.
        """
        place.deaths += 1
        said = f"worker {place.number} died {place.moment()} ({death.reason})"
        tasks = place.lost()
        if death.is_final or place.deaths > MOST_DEATHS:
            often = f", {place.deaths} times in this run" if place.deaths > 1 else ""
            raise WorkerError(
                f"{said}{often}. What is in the store stays: simulate on it again to go on"
            )
        warnings.warn(
            f"{said}: another one takes its place, and the local runs that it had are begun again. "
            "What they have sent counts once",
            stacklevel=4,
        )
        self._crew.start(place.number)
        return tasks

    def _collect(self, place: _Place, result: TaskResult) -> TaskResult:
        """Take note of the result of a task.

        Raises:
            Exception: the error that the task raised, with the worker's traceback as its cause.
        """
        place.current = None
        if result.error is not None:
            self._raise(place, result)
        if result.metrics is None:
            place.suspended.add(result.client_id)
        else:
            place.suspended.discard(result.client_id)
            self._ended.append(result.metrics)
            self._states[result.client_id] = result.state
        self._assembly.meter.add(result.traffic)
        self._assembly.arrivals.add(result.arrivals)
        return result

    def _raise(self, place: _Place, result: TaskResult) -> None:
        if result.error is not None:
            cause = WorkerError(f"in worker {place.number}:\n{result.trace}")
            raise result.error from cause
