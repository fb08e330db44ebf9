"""Threads that compute while the event loop goes on.

`loop.run_in_executor` is the ordinary way, and takes a tenth of a millisecond more for each
request: between the loop and the thread are two futures with locks of their own, and a thread that
has finished still does its pool's bookkeeping while the loop waits for the interpreter. Here a
thread takes a job from a queue, tells the loop, and waits again.

The trap is the end. These threads are daemons: otherwise a process whose app was never shut down
could not end. But one that computes while the interpreter is torn down may crash it. So `close`
makes Python wait for what still runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

Outcome = tuple[Any, BaseException | None]
Job = tuple[asyncio.AbstractEventLoop, "asyncio.Future[Outcome]", Callable[..., Any], Any]


class Threads:
    """A pool of threads that is used from one event loop.

    A thread is started when there are more jobs than threads.

    Args:
        most: Largest number of threads; further jobs wait.
        name: Beginning of their names.
        begin: Called in each thread as it starts.
    """

    def __init__(self, most: int, name: str, begin: Callable[[], object] = lambda: None) -> None:
        self._most = most
        self._name = name
        self._begin = begin
        self._threads: list[threading.Thread] = []
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._under_way = 0

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return what the function returns, or raise what it raises; it is called in a thread."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Outcome] = loop.create_future()
        if len(self._threads) < min(self._under_way + 1, self._most):
            name = f"{self._name}-{len(self._threads)}"
            thread = threading.Thread(target=self._work, args=(self._jobs,), name=name, daemon=True)
            thread.start()  # first: if it fails, nothing has changed
            self._threads.append(thread)
        self._under_way += 1
        self._jobs.put((loop, done, function, args))
        result, error = await done
        try:
            if error is not None:
                raise error
            return result
        finally:
            # Both lead back to this frame, and so to the arguments: a cycle that only the garbage
            # collector would free.
            del done, error

    def close(self) -> None:
        """End the threads that wait.

        Those that still compute go on; Python waits for them at its own end, since threads that
        aren't daemons join them.
        """
        for thread in self._threads:
            self._jobs.put(None)
            threading.Thread(target=thread.join, name="waiting").start()
        # An app that is started once more gets new ones.
        self._threads = []
        self._jobs = SimpleQueue()

    def _work(self, jobs: SimpleQueue[Job | None]) -> None:
        self._begin()
        while (job := jobs.get()) is not None:
            self._call(*job)
            del job  # so that nothing is kept alive while the thread waits

    def _call(
        self,
        loop: asyncio.AbstractEventLoop,
        done: asyncio.Future[Outcome],
        function: Callable[..., Any],
        args: Any,
    ) -> None:
        result: Any = None
        error: BaseException | None = None
        try:
            if not done.cancelled():
                result = function(*args)
        except BaseException as raised:  # noqa: BLE001 -- raised again where it is awaited
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            loop.call_soon_threadsafe(self._settle, done, result, error)
        del done, error  # as in `run`

    def _settle(
        self, done: asyncio.Future[Outcome], result: Any, error: BaseException | None
    ) -> None:
        self._under_way -= 1
        if not done.cancelled():
            done.set_result((result, error))
