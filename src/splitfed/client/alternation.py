"""Two threads of one client, of which one computes at a time: they change over at requests.

A request leaves this process idle for as long as the server and the way there take. In that time
the other thread may compute. At no other: torch's generator, the half's buffers and the numbers of
the client belong to the process, and whatever draws or counts in two threads at once isn't the same
twice. So the order is fixed, and not a matter of timing: whoever sends a request hands the turn on,
and goes on once it has the answer and the turn has come back.

The trap: a server may be in this process too, and a body that runs there seeds the generator. Who
has the turn therefore holds `compute_lock`, as such a body does, and gives it up with the turn. On
an accelerator autograd runs a backward in threads of its own, which can't give up another one's
lock: there the backward holds none.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from splitfed.model.rng import compute_lock, has_compute_lock
from splitfed.protocol.transport import Middleware, Transport


class Alternation:
    """The turns of some threads, the first of which begins.

    Args:
        number: How many there are.
    """

    def __init__(self, number: int) -> None:
        self._condition = threading.Condition()
        self._here = [*range(number)]
        """Those that have still to compute."""
        self._turn = 0

    def take(self, number: int) -> None:
        """Wait for the turn of a thread."""
        with self._condition:
            self._condition.wait_for(lambda: self._turn == number)

    def give(self, number: int) -> None:
        """Hand the turn on, if there is another."""
        with self._condition:
            self._pass_on(number)

    def leave(self, number: int) -> None:
        """Have no further turn; to be called whether it is this thread's or not."""
        with self._condition:
            self._pass_on(number)
            self._here.remove(number)

    def _pass_on(self, number: int) -> None:
        if self._turn == number:
            later = [other for other in self._here if other > number]
            self._turn = (later or self._here)[0]
            self._condition.notify_all()


class Line:
    """What one of the threads computes.

    Args:
        turns: Those of all.
        number: Its place among them.
        locks: Whether it holds `compute_lock` while it computes.
    """

    def __init__(self, turns: Alternation, number: int, *, locks: bool) -> None:
        self.thread = 0
        """Which one it is, once it has begun."""
        self._turns = turns
        self._number = number
        self._locks = locks

    @contextmanager
    def computing(self) -> Iterator[None]:
        """A block that has the turn but while it waits for answers."""
        self.thread = threading.get_ident()
        try:
            self._enter()
            yield
        finally:
            self._unlock()
            self._turns.leave(self._number)

    @contextmanager
    def away(self) -> Iterator[None]:
        """A block that waits for an answer."""
        self._unlock()
        self._turns.give(self._number)
        try:
            yield
        finally:
            self._enter()

    def _enter(self) -> None:
        self._turns.take(self._number)
        if self._locks:
            compute_lock.acquire()

    def _unlock(self) -> None:
        # After an interrupt it may not hold it.
        if self._locks and has_compute_lock():
            compute_lock.release()


class HandsOver(Middleware):
    """A transport at whose requests the thread that makes them hands its turn on.

    Args:
        inner: The transport that requests go on to.
        forward: The line of a forward, ...
        backward: ... and that of a backward beside it.
    """

    def __init__(self, inner: Transport, forward: Line, backward: Line) -> None:
        super().__init__(inner)
        self._forward = forward
        self._backward = backward

    def send(self, verb: str, request: Any, /) -> Any:
        """The answer, once it is there and the turn has come back."""
        line = self._line()
        if line is None:
            return super().send(verb, request)
        with line.away():
            return super().send(verb, request)

    def _line(self) -> Line | None:
        """Whose request this is; `None` for that of a thread which has no part in it."""
        here = threading.get_ident()
        for line in (self._forward, self._backward):
            if line.thread == here:
                return line
        # One of autograd's own threads, which run a backward on an accelerator.
        return self._backward if torch._C._current_graph_task_id() != -1 else None
