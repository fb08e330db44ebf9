"""Threads that work while the event loop goes on.

`loop.run_in_executor` is the ordinary way, and takes a tenth of a millisecond more for each request: between the loop
and the thread stand two futures with locks of their own, and a thread that has answered still keeps its pool's books
while the loop waits for the interpreter. Here a thread takes a job from a queue, tells the loop, and waits again.

The trap is the end. These threads are daemons, or a process whose app was never told to end could not end itself; but
one that computes while the interpreter is taken down may crash it. So `close` makes Python wait for what still runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

Job = tuple[asyncio.AbstractEventLoop, "asyncio.Future[tuple[Any, BaseException | None]]", Callable[..., Any], Any]


class Threads:
    """A pool that is used from one event loop. A thread is begun when there are more jobs than threads.

    Args:
        most: How many threads there may be; further jobs wait.
        name: What their names begin with.
        begin: Called in each as it begins.
    """

    def __init__(self, most: int, name: str, begin: Callable[[], object] = lambda: None) -> None:
        self._most = most
        self._name = name
        self._begin = begin
        self._threads: list[threading.Thread] = []
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._under_way = 0

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the function returns or raises, called in a thread."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()
        if len(self._threads) < min(self._under_way + 1, self._most):
            name = f"{self._name}-{len(self._threads)}"
            thread = threading.Thread(target=self._work, args=(self._jobs,), name=name, daemon=True)
            thread.start()  # may fail, and then nothing has changed
            self._threads.append(thread)
        self._under_way += 1
        self._jobs.put((loop, done, function, args))
        found, error = await done
        try:
            if error is not None:
                raise error
            return found
        finally:
            del done, error  # both lead back to this frame, and so to what was worked on

    def close(self) -> None:
        """End the threads that wait; what still runs is left to its end, which Python's own end then waits for."""
        for thread in self._threads:
            self._jobs.put(None)
            threading.Thread(target=thread.join, name="waiting").start()
        self._threads, self._jobs = [], SimpleQueue()  # an app that is begun once more gets new ones

    def _work(self, jobs: SimpleQueue[Job | None]) -> None:
        self._begin()
        while (job := jobs.get()) is not None:
            self._do(*job)
            del job  # while it waits, nothing is kept alive

    def _do(self, loop: asyncio.AbstractEventLoop, done: asyncio.Future[Any], function: Any, args: Any) -> None:
        found: Any = None
        error: BaseException | None = None
        try:
            if not done.cancelled():
                found = function(*args)
        except BaseException as raised:  # noqa: BLE001 -- raised again where it is awaited
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            loop.call_soon_threadsafe(self._settle, done, found, error)
        del done, error

    def _settle(self, done: asyncio.Future[Any], found: Any, error: BaseException | None) -> None:
        self._under_way -= 1
        if not done.cancelled():
            done.set_result((found, error))
