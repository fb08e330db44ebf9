"""Verbs that run until they are told: signals, and a storage that fails now and then."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest

from splitfed.cli.signals import Stopping, keep_going
from splitfed.errors import CorruptedError, StoreCapabilityError, StoreError


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_event(number: signal.Signals) -> None:
    """What runs sees it between two pieces of work."""
    with Stopping() as stopping:
        os.kill(os.getpid(), number)
        assert stopping.event.wait(60)


def test_a_second_interrupt_ends_at_once() -> None:
    """Ctrl-C twice is for those who can't wait."""

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(60)

    with Stopping() as stopping:
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping.event.wait(60)
        with pytest.raises(KeyboardInterrupt):
            interrupt()


def test_handlers_are_put_back() -> None:
    """Whoever calls `main()` in a process of their own keeps their signals."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Stopping():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_another_thread_has_no_signals() -> None:
    """Python lets only the main thread handle them: elsewhere the event is set by hand."""
    found: list[bool] = []

    def elsewhere() -> None:
        with Stopping() as stopping:
            found.append(stopping.event.is_set())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(60)
    assert found == [False]


class Flaky:
    """Fails as often as it is told, each time after so many seconds."""

    def __init__(self, failures: int, seconds: float = 0.0, error: Exception | None = None) -> None:
        self.failures = failures
        self.seconds = seconds
        self.error = error or StoreError("the storage is away")
        self.calls = 0
        self.now = 0.0

    def __call__(self) -> None:
        """One run."""
        self.calls += 1
        self.now += self.seconds
        if self.calls <= self.failures:
            raise self.error

    def clock(self) -> float:
        """The time that its runs take."""
        return self.now


def test_a_failure_of_the_storage_is_waited_out(capsys: pytest.CaptureFixture[str]) -> None:
    """Two failures, two pauses, and then it runs; each is told."""
    run = Flaky(2)
    keep_going(run, threading.Event(), pauses=(0.001, 0.002))
    assert run.calls == 3
    assert capsys.readouterr().err.splitlines() == [
        "splitfed: the storage is away; trying again in 0.001 seconds",
        "splitfed: the storage is away; trying again in 0.002 seconds",
    ]


def test_a_failure_that_stays_is_raised() -> None:
    """A supervisor should see that it doesn't work."""
    run = Flaky(9)
    with pytest.raises(StoreError, match="away"):
        keep_going(run, threading.Event(), pauses=(0.001, 0.001))
    assert run.calls == 3


def test_after_a_calm_the_pauses_begin_anew() -> None:
    """A failure a day for a year is no reason to give up."""
    run = Flaky(9, seconds=61.0)
    keep_going(run, threading.Event(), pauses=(0.001,), clock=run.clock)
    assert run.calls == 10


@pytest.mark.parametrize("error", [StoreCapabilityError("two winners"), CorruptedError("version 3")])
def test_what_no_pause_mends_is_raised_at_once(error: StoreError) -> None:
    """An unfit or corrupted store needs a person."""
    run = Flaky(1, error=error)
    with pytest.raises(type(error)):
        keep_going(run, threading.Event())
    assert run.calls == 1


def test_a_stop_ends_a_pause() -> None:
    """A signal during a long pause is obeyed."""
    stop = threading.Event()

    def fail() -> None:
        stop.set()
        raise StoreError("the storage is away")

    failing: Callable[[], None] = fail
    keep_going(failing, stop, pauses=(600.0,))
    assert stop.is_set()
