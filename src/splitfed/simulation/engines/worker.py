"""The inside of a worker process: its own view of the federation, and the clients that it is given.

It builds servers and accumulators of its own on the shared store, then carries out one order after another until its
pipe is closed. What comes and goes by the pipe is pickled: between two processes of one run, of which the one started
the other, and never from or to a file.
"""

from __future__ import annotations

import contextlib
import pickle
import traceback
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from splitfed.errors import InputError, WorkerError
from splitfed.simulation.assembly import Assembly, Plans
from splitfed.simulation.client import Belongings, Next, Outcome, Recipe, Trainee
from splitfed.simulation.data import Data
from splitfed.simulation.traffic import Traffic
from splitfed.store.store import GradientStore


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
        return replace(answer, traffic=self._assembly.meter.take(), arrivals=self._assembly.arrivals.take())

    def _activation(self, order: Order) -> Generator[None, None, Answer]:
        own, data = order.belongings or Belongings(), self._job.clients[order.client_id]
        trainee = Trainee(self._job.recipe, self._assembly.meter, order.client_id, data, own, order.occasion)
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
