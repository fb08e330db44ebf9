"""Threads, locks, clocks and pauses of what servers hold of a log, as turns of the scheduler.

A holder takes locks across blob operations and looks for questions from a thread of its own, and an accumulator waits
for its answer: the real ones would stop the one thread that runs, or come from no seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.faults.simulator.process import Process
from tests.faults.simulator.scheduler import Killed, current

if TYPE_CHECKING:
    from tests.faults.simulator.world import World


class Lock:
    """A lock for which others run while one waits."""

    def __init__(self) -> None:
        self._is_taken = False

    def __enter__(self) -> None:
        while self._is_taken:
            _process().pause(1)
        self._is_taken = True

    def __exit__(self, *exception: object) -> None:
        self._is_taken = False


class Thread:
    """A thread of the process that starts it."""

    def __init__(self, target: Callable[..., Any], args: tuple[Any, ...], *, daemon: bool) -> None:
        self._target, self._args = target, args

    def start(self) -> None:
        """Run it beside the others; who looks on from outside needs none."""
        if current() is not None:
            _process().start(lambda: self._target(*self._args), "thread")


class Threads:
    """In place of the module `threading`."""

    Lock = Lock
    Thread = Thread


class Clock:
    """In place of the module `time`.

    Args:
        world: Its steps are milliseconds.
    """

    def __init__(self, world: World) -> None:
        self._world = world

    def monotonic(self) -> float:
        """Seconds."""
        return self._world.scheduler.steps / 100

    def sleep(self, seconds: float) -> None:
        """Let others run; nobody looks for questions any more once the faults are over."""
        if not self._world.is_stormy:
            raise Killed
        process = _process()
        process.pause(2 + int(process.choose.random() * 25))


class Patience:
    """In place of the pauses of who waits for an answer: for a while, as others take their turns."""

    elapsed = 0.0

    def __init__(self, *pauses: object, **limits: object) -> None:
        fiber = current()
        self._left = 0 if fiber is None else int(fiber.process.choose.random() * 8)

    def wait(self) -> bool:
        """Whether to look once more."""
        self._left -= 1
        if self._left < 0:
            return False
        _process().pause(10)
        return True


def _process() -> Process:
    fiber = current()
    assert fiber is not None, "nobody but processes of the run waits"
    found: Process = fiber.process
    return found
