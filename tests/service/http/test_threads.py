"""Threads beside an event loop: what they return and raise, how many there are, and that they end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import subprocess
import sys
import threading
import weakref

import pytest

from splitfed.service.http.threads import Threads


class Body:
    """Something large."""


def test_a_function_s_value_and_its_error_come_back() -> None:
    """Even an error that a future or a coroutine wouldn't carry."""

    async def main() -> None:
        threads = Threads(2, "splitfed")
        assert await threads.run(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await threads.run(divmod, 7, 0)
        with pytest.raises(SystemExit):
            await threads.run(sys.exit, 3)
        with pytest.raises(RuntimeError, match="StopIteration"):
            await threads.run(next, iter(()))
        threads.close()

    asyncio.run(main())


def test_there_are_as_many_threads_as_jobs_at_a_time_and_no_more_than_allowed() -> None:
    """One after another needs one; each has begun; the fourth of three waits for a place."""
    began: list[str] = []

    async def main() -> None:
        threads = Threads(3, "splitfed-x", lambda: began.append(threading.current_thread().name))
        for _ in range(5):
            await threads.run(int)
        assert began == ["splitfed-x-0"]
        gate, entered = threading.Event(), threading.Semaphore(0)

        def job() -> bool:
            entered.release()
            return gate.wait(60)

        jobs = [asyncio.ensure_future(threads.run(job)) for _ in range(4)]
        for _ in range(3):
            await asyncio.to_thread(entered.acquire)
        assert not entered.acquire(blocking=False)
        gate.set()
        assert await asyncio.gather(*jobs) == [True] * 4
        assert sorted(began) == ["splitfed-x-0", "splitfed-x-1", "splitfed-x-2"]
        threads.close()

    asyncio.run(main())


def test_a_job_that_nobody_waits_for_isn_t_begun() -> None:
    """One that is under way goes on, and its thread takes the next."""

    async def main() -> None:
        threads, gate, ran = Threads(1, "splitfed"), threading.Event(), list[int]()
        first, second = (asyncio.ensure_future(threads.run(f)) for f in (gate.wait, lambda: ran.append(1)))
        await asyncio.sleep(0)
        for job in (first, second):
            job.cancel()
        gate.set()
        await threads.run(ran.append, 2)
        assert ran == [2]
        threads.close()

    asyncio.run(main())


def test_a_pool_that_was_closed_begins_anew() -> None:
    """An app may be begun and ended twice; who still works then takes no job, and no end, of the new ones."""

    async def main() -> None:
        threads, gate = Threads(1, "splitfed"), threading.Event()
        first = asyncio.ensure_future(threads.run(gate.wait))
        await asyncio.sleep(0)
        threads.close()
        try:
            assert await asyncio.wait_for(threads.run(divmod, 7, 2), 10) == (3, 1)
        finally:
            gate.set()
        assert await first
        assert await asyncio.wait_for(threads.run(divmod, 7, 2), 60) == (3, 1)
        threads.close()

    asyncio.run(main())


def test_a_thread_that_can_t_be_started_is_told_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next job doesn't wait for one that never began."""

    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        threads = Threads(1, "splitfed")
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", none_left)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                await threads.run(int)
        assert await asyncio.wait_for(threads.run(divmod, 7, 2), 60) == (3, 1)
        threads.close()

    asyncio.run(main())


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_job_is_kept_alive_after_it(fails: bool) -> None:
    """A thread that waits for hours doesn't hold a body, nor does an error that was dealt with."""

    def work(body: Body) -> None:
        if fails:
            raise ValueError(str(body))

    async def main() -> None:
        threads, body = Threads(1, "splitfed"), Body()
        alive = weakref.ref(body)
        with contextlib.suppress(ValueError):
            await threads.run(work, body)
        del body
        await threads.run(int)  # by now the thread has come back for more
        assert alive() is None
        threads.close()

    gc.disable()
    try:
        asyncio.run(main())
    finally:
        gc.enable()


@pytest.mark.parametrize("close", ["threads.close()", ""], ids="closed forgotten".split())
def test_python_ends_and_waits_only_for_work_that_was_left_on_purpose(close: str) -> None:
    """Forgotten threads that have nothing to do don't hold it up."""
    code = f"""
import asyncio, threading, time
from splitfed.service.http.threads import Threads
async def main():
    threads = Threads(2, "splitfed")
    await threads.run(int)
    if {bool(close)}:
        begun = threading.Event()
        job = asyncio.ensure_future(threads.run(lambda: (begun.set(), time.sleep(0.5), print("done"))))
        await asyncio.to_thread(begun.wait, 60)
    {close or "pass"}
asyncio.run(main())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == ("done\n" if close else "")
    assert run.stderr == ""
