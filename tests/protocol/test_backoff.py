"""Backoff: pauses that grow, and when no further try follows."""

from __future__ import annotations

import itertools
import random
import threading
import time

import pytest

from splitfed.protocol import backoff
from splitfed.protocol.backoff import Backoff, growing


class Clock:
    """Seconds that pass only in `sleep`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        """The time."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let the time pass."""
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that a Backoff waits by."""
    found = Clock()
    monkeypatch.setattr(backoff, "time", found)
    return found


def test_pauses_grow_by_their_factor_up_to_the_most(clock: Clock) -> None:
    """1, 2, 4, and then 5 for ever."""
    waits = Backoff(growing(1.0, 2.0), most=5.0)
    assert all(waits.wait() for _ in range(5))
    assert clock.slept == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_as_many_tries_follow_as_there_are_pauses(clock: Clock) -> None:
    """Two pauses, two tries; then it says at once that none follows."""
    waits = Backoff((0.5, 3.0))
    seen = [waits.pause]
    while waits.wait():
        seen.append(waits.pause)
    assert seen == [0.5, 3.0, None]
    assert clock.slept == [0.5, 3.0]
    assert not waits.wait(1.0)
    assert not Backoff(()).wait()


def test_a_server_may_ask_for_longer_but_not_for_ever(clock: Clock) -> None:
    """What is asked for counts where it is longer, up to the most; meanwhile the pauses grow on."""
    waits = Backoff(growing(1.0, 2.0), most=30.0)
    for asked in (None, 0.0, 10.0, 86_400.0, 1.0):
        assert waits.wait(asked)
    assert clock.slept == [1.0, 2.0, 10.0, 30.0, 16.0]


def test_a_retry_that_would_come_too_late_is_not_waited_for(clock: Clock) -> None:
    """1 + 2 of 5 seconds: the third pause, of 4, would end after them."""
    waits = Backoff(growing(1.0, 2.0), within=5.0)
    while waits.wait():
        pass
    assert clock.slept == [1.0, 2.0]
    assert not waits.expired
    assert not Backoff((1.0,), within=0.0).wait()


def test_a_poll_looks_once_more_at_its_deadline(clock: Clock) -> None:
    """1 + 2 of 5 seconds leave 2 for the last pause."""
    looks = Backoff(growing(1.0, 2.0), within=5.0, last_look=True)
    while looks.wait():
        assert looks.expired == (clock.now == 5.0)
    assert clock.slept == [1.0, 2.0, 2.0]
    assert looks.elapsed == 5.0


def test_jitter_is_half_to_one_and_a_half_times_a_pause(clock: Clock) -> None:
    """And draws nothing from the user's generator."""
    state = random.getstate()
    waits = Backoff(itertools.repeat(2.0), jitter=True)
    assert all(waits.wait() for _ in range(50))
    assert all(1.0 <= pause <= 3.0 for pause in clock.slept)
    assert len(set(clock.slept)) > 1
    assert random.getstate() == state


def test_an_event_ends_a_pause_and_the_tries() -> None:
    """A pause of ten minutes is over as soon as the event is set."""
    stop = threading.Event()
    assert Backoff((0.001,), stop=stop).wait()
    waits = Backoff((600.0, 600.0), stop=stop)
    timer = threading.Timer(0.01, stop.set)
    timer.start()
    assert not waits.wait()
    timer.join()
    assert not waits.wait()


def test_pauses_double_until_the_patience_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.05, 0.1, 0.2 ..., each times 0.5 to 1.5; what is asked for counts if it is longer, up to five seconds."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    tries = Backoff(growing(0.05, 2.0), most=5.0, within=60.0, jitter=True)
    for asked in (None, 0.0, 2.0, 86_400.0):
        assert tries.wait(asked)
    for wait, expected in zip(slept, (0.05, 0.1, 2.0, 5.0), strict=True):
        assert expected / 2 <= wait <= expected * 1.5
    assert not Backoff(growing(0.05, 2.0), most=5.0, within=0.0, jitter=True).wait(None)
