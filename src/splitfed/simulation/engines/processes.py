"""Worker processes: virtual clients that train in parallel, on a store that all of them share.

A process with its own servers and accumulators is given one client at a time, from whoever waits next. It is started
anew (spawn) and not forked: a fork copies torch's thread pools in whatever state they are. What it needs comes to it
as one pickle at its start, made by this process for it alone; what is exchanged besides goes through the store.

Modes in which clients see nothing of each other before a step of all (`round`, `synchronous`, a body for each client)
fix the schedule, so they end in the same bits as in one process. In others timing decides what is folded together, and
the commit records say what it was.

The trap: a script that starts worker processes is imported by each of them, so its own work must stand below
`if __name__ == "__main__":`.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterable, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from splitfed.errors import InputError, WorkerError
from splitfed.simulation.assembly import Assembly, Plans
from splitfed.simulation.client import Belongings, Outcome, Recipe
from splitfed.simulation.data import Data
from splitfed.simulation.engines.worker import Answer, Order, job, receive, send, work
from splitfed.store.rounds import Plan
from splitfed.store.rows import Row

PATIENCE = 10.0
"""Seconds for a worker to end by itself."""


class Crew:
    """Drives clients in worker processes.

    Args:
        assembly: The federation, as this process sees it.
        recipe: What the clients have in common.
        clients: Their data, by id.
        plans: How the workers build their own view of the federation.
        workers: How many processes.

    Raises:
        InputError: something can't be pickled, or the store is in this process's memory.
    """

    def __init__(
        self, assembly: Assembly, recipe: Recipe, clients: Mapping[str, Data], plans: Plans, workers: int
    ) -> None:
        store = assembly.store
        if store.url.startswith("memory:"):
            raise InputError(f"{store.url} is in this process's memory: expected a folder that worker processes share")
        self._assembly = assembly
        self._recipe = recipe
        self._job = job(store, plans, recipe, clients)
        self._workers = [_Worker(number) for number in range(workers)]
        self._belongings: dict[str, Belongings] = {}
        self._outcomes: list[Outcome] = []

    def run(self, plan: Plan) -> Row:
        """Let clients train until the round is over; returns the coordinator's report.

        Raises:
            WorkerError: a worker process died.
        """
        for worker in self._workers:
            worker.start(self._job)
        asked = self._assembly.asked(plan)
        orders = [Order(name, (plan.number, 0), self._belongings.get(name, Belongings())) for name in asked]
        while orders:
            parked = [answer for answer in self._work(orders) if answer.outcome is None]
            if self._recipe.gradients:
                self._assembly.global_step()
            orders = [Order(answer.client_id, (plan.number, 0)) for answer in parked]
        return self._assembly.federation.poll() or self._assembly.federation.close()

    def outcomes(self) -> list[Outcome]:
        """What the activations came to that have ended since the last call."""
        ended, self._outcomes = self._outcomes, []
        return ended

    def close(self) -> None:
        """End the worker processes."""
        for worker in self._workers:
            worker.stop()

    def _work(self, orders: Iterable[Order]) -> list[Answer]:
        """Carry out orders, each by whoever has its client or is free; answers in the order of ids."""
        homes = {name: worker for worker in self._workers for name in worker.clients}
        queue, answers = deque[Order](), list[Answer]()
        for order in orders:
            (homes[order.client_id].orders if order.client_id in homes else queue).append(order)
        while True:
            for worker in self._workers:
                worker.give(queue)
            busy = {worker.pipe: worker for worker in self._workers if worker.at is not None}
            if not busy:
                return sorted(answers, key=lambda answer: answer.client_id)
            for pipe in wait(list(busy)):
                answer = busy[pipe].take()  # type: ignore[index]
                self._note(answer)
                answers.append(answer)

    def _note(self, answer: Answer) -> None:
        self._assembly.meter.add(answer.traffic)
        self._assembly.arrivals.add(answer.arrivals)
        if answer.outcome is not None:
            self._outcomes.append(answer.outcome)
            self._belongings[answer.client_id] = answer.belongings


class _Worker:
    """One worker process, seen from outside."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.orders: deque[Order] = deque()
        """For the clients that it has."""
        self.clients: set[str] = set()
        """Those in the middle of an activation."""
        self.at: Order | None = None
        self._pipe: Connection | None = None
        self._process: BaseProcess | None = None

    @property
    def pipe(self) -> Connection:
        if self._pipe is None:
            raise WorkerError(f"worker {self.number} isn't running: begin another run")
        return self._pipe

    def start(self, job: bytes) -> None:
        """Start the process, unless it runs."""
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs,), daemon=True, name=f"splitfed-worker-{self.number}")
        self._process.start()
        theirs.close()
        try:
            self._pipe.send_bytes(job)
        except OSError:
            raise self._died() from None

    def stop(self) -> None:
        """End the process: ask it first."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.join(PATIENCE)
            self._process.terminate()
            self._process.join()
        self._pipe = self._process = self.at = None

    def give(self, queue: deque[Order]) -> None:
        """Hand out the next order, if there is nothing under way."""
        if self.at is None and (self.orders or queue):
            self.at = (self.orders or queue).popleft()
            try:
                send(self.pipe, self.at)
            except OSError:
                raise self._died() from None

    def take(self) -> Answer:
        """The answer to the order under way.

        Raises:
            WorkerError: the process died.
        """
        try:
            answer: Answer = receive(self.pipe)
        except (EOFError, OSError):
            raise self._died() from None
        self.at = None
        if answer.error is not None:
            raise answer.error from WorkerError(f"in worker {self.number}:\n{answer.trace}")
        (self.clients.add if answer.outcome is None else self.clients.discard)(answer.client_id)
        return answer

    def _died(self) -> WorkerError:
        process, what = self._process, "at its start" if self.at is None else f"with client {self.at.client_id!r}"
        if process is not None:
            process.join(PATIENCE)
        return WorkerError(
            f"worker {self.number} died {what} (exit code {process.exitcode if process else None}): if that was at its "
            'start, the script\'s own work must stand below `if __name__ == "__main__":`. What is in the store stays: '
            "simulate on it again to go on"
        )
