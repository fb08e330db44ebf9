"""Workers of a simulation within the test's own process, which die where a test wants it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
import toy
from torch import Tensor
from torch.nn.functional import cross_entropy

from splitfed.simulation.engines.host import Host
from splitfed.simulation.engines.pool import Death, WorkerPool
from splitfed.simulation.run import Simulation
from splitfed.store.store import GradientStore

moments: deque[int] = deque()
"""After how many more moments of its life each next worker dies. A batch has two: before its backward, and after."""


def live() -> None:
    """One moment passes: the worker that lives it may die."""
    if not moments:
        return
    moments[0] -= 1
    if moments[0] < 0:
        moments.popleft()
        raise toy.Killed


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of a worker that may die before its backward."""
    live()
    return cross_entropy(outputs, targets)


class SGD(torch.optim.SGD):
    """The optimizer of a worker that may die after its backward."""

    def step(self, closure: Any = None) -> Any:
        """One step, or the end."""
        live()
        return super().step(closure)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Like `toy.sgd`, of a mortal."""
    return SGD(parameters, lr=0.5)


class Here:
    """A crew whose workers take turns in this process: what one holds in memory is gone when it dies."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._hosts: dict[int, Host] = {}
        self._given: deque[tuple[int, bytes | None]] = deque()
        self.started: list[int] = []

    def open(self, setup: bytes) -> int:
        """Keep the setup."""
        self._setup = setup
        return self._size

    def start(self, number: int) -> None:
        """A worker, that will say that it is there."""
        self.started.append(number)
        self._hosts[number] = Host(self._setup)
        self._given.append((number, None))

    def give(self, number: int, task: bytes) -> None:
        """Executed by the next `take`."""
        self._given.append((number, task))

    def take(self) -> list[tuple[int, bytes | Death]]:
        """The oldest answer that is owed, or the death in place of it."""
        number, task = self._given.popleft()
        host = self._hosts[number]
        try:
            return [(number, host.begin() if task is None else host.execute(task))]
        except toy.Killed:
            return [(number, Death("it had to be"))]

    def stop(self) -> None:
        """Nobody is left."""
        self._hosts.clear()


def simulation(store: GradientStore, deaths: Iterable[int] = (), workers: int = 2, **settings: Any) -> Simulation:
    """A simulation whose workers are in this process, and die at these moments."""
    moments.clear()
    moments.extend(deaths)
    made = toy.run(**{"loss_fn": loss, "optimizer": sgd, **settings}, workers=workers, store=store)
    assert isinstance(made._driver, WorkerPool)
    made._driver._crew = Here(workers)
    return made
