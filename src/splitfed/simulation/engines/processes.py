"""Worker processes: virtual clients that train in parallel, on a store that all of them share.

A process with its own servers and accumulators is given one client at a time, from whoever waits next. It is started
anew (spawn) and not forked: a fork copies torch's thread pools in whatever state they are. What it needs comes to it
as one pickle at its start, made by this process for it alone; what is exchanged besides goes through the store.

Round, SFLV1 and synchronous mode fix the schedule, so they end in the same bits as in one process. In modes that
commit while clients train, timing decides what is folded together, and the commit records say what it was.

A worker builds servers and accumulators of its own on the shared store, then carries out one order after another until
its pipe is closed. What comes and goes by the pipe is pickled: between two processes of one run, of which the one
started the other, and never from or to a file.

The trap: a script that starts worker processes is imported by each of them, so its own work must stand below
`if __name__ == "__main__":`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from splitfed.errors import InputError, WorkerError
from splitfed.simulation.assembly import Assembly, Plans
from splitfed.simulation.client import Belongings, Next, Outcome, Recipe, Trainee
from splitfed.simulation.data import Data
from splitfed.simulation.traffic import Traffic
from splitfed.store.rounds import Plan
from splitfed.store.rows import Row
from splitfed.store.store import GradientStore

PATIENCE = 10.0
"""Seconds for a worker to end by itself."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """All that a worker process is told at its start."""

    url: str
    sync: Any
    storage_options: Mapping[str, Any]
    plans: Plans
    recipe: Recipe
    clients: Mapping[str, Data]
    threads: int
    dtype: torch.dtype
    matmul: str
    deterministic: bool


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """A client to begin with, or, without belongings, to go on with."""

    client_id: str
    occasion: tuple[int, ...]
    belongings: Belongings | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """How far a client has come."""

    client_id: str
    outcome: Outcome | None = None
    """Once its activation has ended; before, it waits for a global step."""
    belongings: Belongings = field(default_factory=Belongings)
    traffic: Traffic = field(default_factory=dict)
    arrivals: dict[Any, float] = field(default_factory=dict)
    error: BaseException | None = None
    trace: str = ""


class WorkerPool:
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
        self,
        assembly: Assembly,
        recipe: Recipe,
        clients: Mapping[str, Data],
        plans: Plans,
        workers: int,
    ) -> None:
        store = assembly.store
        if store.url.startswith("memory:"):
            raise InputError(
                f"{store.url} is in this process's memory: expected a folder that worker processes share"
            )
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
        orders = [
            Order(name, (plan.number, 0), self._belongings.get(name, Belongings()))
            for name in asked
        ]
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
        self._process = context.Process(
            target=work, args=(theirs,), daemon=True, name=f"splitfed-worker-{self.number}"
        )
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
        process, what = (
            self._process,
            "at its start" if self.at is None else f"with client {self.at.client_id!r}",
        )
        if process is not None:
            process.join(PATIENCE)
        return WorkerError(
            f"worker {self.number} died {what} (exit code {process.exitcode if process else None}): if that was at its "
            'start, the script\'s own work must stand below `if __name__ == "__main__":`. What is in the store stays: '
            "simulate on it again to go on"
        )


# --------------------------------------------------------------------------------- inside of a worker


def work(pipe: Connection) -> None:
    """What a worker process does: learn its job, then carry out orders until the pipe is closed."""
    site: _Site | None = None
    with contextlib.suppress(EOFError, OSError):
        told: Job = receive(pipe)
        while True:
            order: Order = receive(pipe)
            try:
                site = site or _Site(told)
                answer = site.carry_out(order)
            except Exception as error:  # noqa: BLE001 -- raised again in the process that asked
                answer = _failure(order.client_id, error)
            send(pipe, answer)


class _Site:
    """A worker process's own view of the federation, and the clients in it that are in the middle of something."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        torch.set_default_dtype(job.dtype)
        torch.set_float32_matmul_precision(job.matmul)
        torch.use_deterministic_algorithms(job.deterministic)
        self._job = job
        store = GradientStore(job.url, sync=job.sync, **job.storage_options)
        self._assembly = Assembly(job.plans, store, sorted(job.clients), None)
        self._under_way: dict[str, Generator[None, None, Answer]] = {}

    def carry_out(self, order: Order) -> Answer:
        """Let a client train to its next global step, or to its end."""
        steps = self._under_way.pop(order.client_id, None) or self._activation(order)
        try:
            next(steps)
            answer = Answer(order.client_id)
            self._under_way[order.client_id] = steps
        except StopIteration as ended:
            answer = ended.value
        return replace(
            answer, traffic=self._assembly.meter.take(), arrivals=self._assembly.arrivals.take()
        )

    def _activation(self, order: Order) -> Generator[None, None, Answer]:
        own, data = order.belongings or Belongings(), self._job.clients[order.client_id]
        trainee = Trainee(
            self._job.recipe, self._assembly.meter, order.client_id, data, own, order.occasion
        )
        made: Next | None = None
        for ahead in trainee.run():
            if made is Next.BACKWARD:
                self._assembly.commit(order.client_id)
            elif made is Next.PUSH:
                yield
            made = ahead
        return Answer(order.client_id, trainee.outcome, own)


def job(store: GradientStore, plans: Plans, recipe: Recipe, clients: Mapping[str, Data]) -> bytes:
    """What a worker is told at its start: how to build its parts, and how this process computes.

    Raises:
        InputError: something can't be pickled.
    """
    told = Job(
        url=store.url,
        sync=store.sync,
        storage_options=dict(store.storage_options),
        plans=plans,
        recipe=recipe,
        clients=dict(clients),
        threads=torch.get_num_threads(),
        dtype=torch.get_default_dtype(),
        matmul=torch.get_float32_matmul_precision(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    try:
        return pickle.dumps(told)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(
            f"worker processes can't be told what to do ({error}): give functions that can be pickled, such as "
            "functools.partial(torch.optim.SGD, lr=0.1) in a lambda's place, or workers=0"
        ) from error


def _failure(client_id: str, error: Exception) -> Answer:
    trace = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 -- one's own bytes
    except Exception:  # noqa: BLE001 -- whatever a user's own error does when it is pickled
        error = WorkerError(f"client {client_id!r}: {type(error).__name__}: {error}")
    return Answer(client_id, error=error, trace=trace)


def send(pipe: Connection, value: object) -> None:
    """Send a value; tensors as bytes, not by shared memory, of which a container may have little."""
    pipe.send_bytes(pickle.dumps(value))


def receive(pipe: Connection) -> Any:
    """Receive what the other end has sent; EOFError if it is gone."""
    return pickle.loads(pipe.recv_bytes())  # noqa: S301 -- the other end is this run's own process
