"""Limits that all ways to a server share: whose turn it is at the threads."""

from __future__ import annotations

import threading
import time

import pytest

from splitfed.errors import InputError
from splitfed.service import limits
from splitfed.service.limits import Lanes, MessageLimits


def test_a_limit_is_a_number_above_0() -> None:
    """The message names it."""
    with pytest.raises(InputError, match="client_memory is 0: expected a number above 0"):
        MessageLimits(client_memory=0)


class Served:
    """Requests in threads of their own, each of which says when it is served, and ends when told."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self.began: list[str] = []
        self.go = threading.Semaphore(0)
        self.threads: list[threading.Thread] = []

    def ask(self, client_id: str) -> None:
        """Begin a request, and wait until it is served or waits."""

        def run() -> None:
            with self.lanes.of(client_id):
                self.began.append(client_id)
                assert self.go.acquire(timeout=60)

        before = len(self.began) + self.waiting()
        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()
        while len(self.began) + self.waiting() == before:
            time.sleep(0.001)  # the thread itself has to run

    def waiting(self) -> int:
        """The requests that wait."""
        return sum(map(len, self.lanes._waiting.values()))

    def end(self) -> None:
        """Let all of them end."""
        for _ in self.threads:
            self.go.release()
        for thread in self.threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self.threads)


def test_a_client_alone_is_served_as_often_as_it_asks() -> None:
    """Four at once."""
    served = Served(Lanes())
    for _ in range(4):
        served.ask("a")
    assert served.began == ["a"] * 4
    served.end()


def test_with_others_about_a_client_is_served_one_at_a_time() -> None:
    """The second waits for the first; another client doesn't wait; in the end nothing is left."""
    served = Served(Lanes())
    served.ask("b")
    for _ in range(3):
        served.ask("a")
    served.ask("c")
    assert served.began == ["b", "a", "c"]
    served.end()
    assert sorted(served.began) == ["a", "a", "a", "b", "c"]
    assert not served.lanes._served
    assert not served.lanes._waiting


def test_once_the_others_have_gone_all_that_wait_are_served() -> None:
    """A second after their last request."""
    seconds = [0.0]
    served = Served(Lanes(lambda: seconds[0]))
    with served.lanes.of("b"):
        pass
    for _ in range(4):
        served.ask("a")
    assert served.began == ["a"]
    seconds[0] = 1.5
    served.go.release()
    while len(served.began) < 4:
        time.sleep(0.001)
    served.end()


def test_a_client_that_always_has_another_waiting_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """For twice the time that its last request has computed, and for a second at most."""
    rested: list[float] = []
    monkeypatch.setattr(limits.time, "sleep", rested.append)
    lanes = Lanes()
    for computed, expected in ((0.1, 0.2), (50.0, 1.0)):
        with lanes.of("b"):
            lanes._begin("a")
            waiting = threading.Thread(target=lanes._begin, args=("a",))
            waiting.start()
            while not lanes._waiting:
                pass
            lanes._end("a", computed)
            waiting.join()
            lanes._end("a", 0.0)
        assert rested.pop() == pytest.approx(expected)
    with lanes.of("b"), lanes.of("a"):
        pass
    assert rested == []
