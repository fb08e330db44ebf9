"""The scheduler: actors are threads, of which exactly one runs, the one that holds the baton.

An actor hands the baton on only where it says so: at a blob operation or a request. Who is next is drawn from the seed.
So a run is a function of its seed, though the code under test is ordinary code that knows nothing of it.

The trap: the code under test has locks of its own. It takes none across a blob operation or a request but the store's
`lock`, which may not be relied on, and which the simulated storage gives to everybody.
"""

from __future__ import annotations

import faulthandler
import heapq
import sys
import threading
from collections.abc import Callable
from random import Random
from typing import Any

STUCK_SECONDS = 60.0


class Killed(BaseException):
    """The process of this actor is dead: nothing that it does has an effect any more."""


class Fiber:
    """One thread of control of a process."""

    __slots__ = ("act", "is_parked", "name", "process", "thread")

    def __init__(self, name: str, process: Any, act: Callable[[], Any]) -> None:
        self.name = name
        self.process = process
        self.act = act
        self.thread: _Thread | None = None
        self.is_parked = False


class _Thread(threading.Thread):
    """A thread that runs one fiber after the other; it waits for the baton in between."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="actor")
        self.baton = threading.Lock()
        self.baton.acquire()
        self.fiber: Fiber | None = None
        self.scheduler: Scheduler | None = None
        self.start()

    def run(self) -> None:
        while True:
            self.baton.acquire()
            fiber, scheduler = self.fiber, self.scheduler
            assert fiber is not None
            assert scheduler is not None
            try:
                fiber.act()
            except Killed:
                pass
            except BaseException as error:  # noqa: BLE001 -- reported by the main thread
                scheduler.failed(fiber, error)
            self.fiber = self.scheduler = None
            _IDLE.append(self)
            scheduler.leave(fiber)
            del fiber, scheduler


_IDLE: list[_Thread] = []
"""Threads are kept for the next run: starting one costs more than a switch."""


def current() -> Fiber | None:
    """The fiber that runs in this thread, if it is one of a simulation."""
    return getattr(threading.current_thread(), "fiber", None)


class Scheduler:
    """Lets fibers run one after the other.

    Args:
        random: Draws who is next.
        restlessness: How probable it is that an operation hands the baton on.
        failed: Called with a fiber and the error that ended it.
    """

    def __init__(self, random: Random, restlessness: float, failed: Callable[[Fiber, BaseException], None]) -> None:
        self.steps = 0
        self.failed = failed
        self._random = random
        self._restlessness = restlessness
        self._ready: list[Fiber] = []
        self._due: list[tuple[int, int, Callable[[], Any]]] = []
        self._number = 0
        self._end = threading.Lock()
        self._end.acquire()

    def spawn(self, name: str, process: Any, act: Callable[[], Any]) -> Fiber:
        """A new fiber, ready to run."""
        fiber = Fiber(name, process, act)
        thread = _IDLE.pop() if _IDLE else _Thread()
        thread.fiber, thread.scheduler, fiber.thread = fiber, self, thread
        self._ready.append(fiber)
        return fiber

    def after(self, steps: int, act: Callable[[], Any]) -> None:
        """Have something happen in so many steps, or when nobody else can run."""
        self._number += 1
        heapq.heappush(self._due, (self.steps + max(1, steps), self._number, act))

    def run(self) -> None:
        """Run until no fiber is left and nothing is due."""
        self._hand_on()
        if not self._end.acquire(timeout=STUCK_SECONDS):
            faulthandler.dump_traceback(sys.stderr)
            raise RuntimeError("the simulation hangs: an actor waits for a real lock, or for ever")

    def step(self) -> None:
        """Let time pass by one step: what is due happens, and another fiber may be next."""
        self.steps += 1
        while self._due and self._due[0][0] <= self.steps:
            heapq.heappop(self._due)[2]()
        if self._random.random() < self._restlessness:
            self._switch()

    def park(self, steps: int | None = None) -> None:
        """Leave the fiber that runs until it is unparked, or for so many steps."""
        fiber = current()
        assert fiber is not None
        fiber.is_parked = True
        self._ready.remove(fiber)
        if steps is not None:
            self.after(steps, lambda: self.unpark(fiber))
        self._switch()

    def unpark(self, fiber: Fiber) -> None:
        """Let a parked fiber go on."""
        if fiber.is_parked:
            fiber.is_parked = False
            self._ready.append(fiber)

    def leave(self, fiber: Fiber) -> None:
        """A fiber has ended."""
        self._ready.remove(fiber)
        fiber.thread = None
        self._hand_on()

    def _switch(self) -> None:
        fiber = current()
        chosen = self._choose()
        if chosen is fiber:
            return
        assert fiber is not None
        thread = fiber.thread
        assert thread is not None
        self._give(chosen)
        thread.baton.acquire()

    def _hand_on(self) -> None:
        self._give(self._choose())

    def _give(self, fiber: Fiber | None) -> None:
        if fiber is None:
            self._end.release()
        else:
            assert fiber.thread is not None
            fiber.thread.baton.release()

    def _choose(self) -> Fiber | None:
        while not self._ready:
            if not self._due:
                return None
            due, _, act = heapq.heappop(self._due)
            self.steps = max(self.steps, due)
            act()
        return self._ready[int(self._random.random() * len(self._ready))]
