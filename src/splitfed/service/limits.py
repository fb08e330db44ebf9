"""Limits that every way to a server shares: size and memory of a request, and whose turn it is.

The HTTP service and the worker of the mailbox both keep them. So every size is known or bounded
before memory is taken, and a request that is too much gets an answer that says what to do.

The trap is a tensor that is small on the wire and large in memory: an expanded one has few bytes
and many elements, so the expanded size is limited too. Numbers that cost work are counted as well:
each call that a request names as abandoned is an object to delete.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from splitfed.errors import InputError, TooLargeError
from splitfed.protocol.fields import Request
from splitfed.protocol.header import MAX_HEADER, MAX_TENSORS

REST = 2.0
_ABOUT_SECONDS = 1.0
"""So long after its last request a client counts as being about."""


@dataclass(frozen=True, slots=True)
class MessageLimits:
    """The limits of one server process on messages, however they come.

    Raises:
        InputError: one isn't above 0.
    """

    body: int = 256 << 20
    """Bytes of a request's body; also of its tensors once they are expanded."""
    header: int = min(1 << 20, MAX_HEADER)
    """Bytes of a body's safetensors header."""
    tensors: int = min(10_000, MAX_TENSORS)
    """Tensors in a body."""
    samples: int = 1_000_000
    """Leading dimension of a call's first tensor, and weight of a batch."""
    push_samples: int = 1_000_000_000
    """Weight of a push, which counts all batches since the pull."""
    notes: int = 4096
    """Numbers of one kind in a request: calls released, abandoned or answered, parts of a batch."""
    memory: int = 4 << 30
    """Bytes that the calls under way and the kept graphs of all clients may hold ..."""
    client_memory: int = 256 << 20
    """... and of one client; one call of it alone always runs."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value) or value <= 0:
                raise InputError(f"the limit {field.name} is {value!r}: expected a number above 0")

    def govern(self, server: Any) -> None:
        """Have a server keep the limits on memory, where it has none of its own.

        Args:
            server: A `SplitServer`; another transport is left as it is.
        """
        memory = getattr(server, "memory", None)
        if memory is not None:
            memory.adopt(self.memory, self.client_memory)


def check_body(num_bytes: int, limits: MessageLimits) -> None:
    """Refuse a body by its size.

    Raises:
        TooLargeError: it is over the limit.
    """
    if num_bytes > limits.body:
        raise TooLargeError(
            f"the request has {num_bytes} bytes or more: this server takes {limits.body}; "
            "send smaller batches, or raise the limit of the body"
        )


def check_message(message: Request, limits: MessageLimits) -> None:
    """Refuse a request by the size of its tensors, the weight of its batch and its other counts.

    Raises:
        TooLargeError: it is over a limit.
    """
    size = message.num_bytes()
    if size > limits.body:
        raise TooLargeError(
            f"the tensors take {size} bytes when they are expanded: this server takes {limits.body}"
        )
    most = getattr(limits, message.samples_limit)
    for samples in message.samples():
        if samples > most:
            raise TooLargeError(
                f"the batch has {samples:g} samples: this server takes {most} at a time"
            )
    for name, count in message.counts():
        if count > limits.notes:
            raise TooLargeError(
                f"the request names {count} {name}: this server takes {limits.notes} at a time"
            )


class Lanes:
    """Serves the requests of a client one at a time while other clients are about.

    A client alone may use all threads. With others, many requests at once would share out the
    interpreter by requests and not by clients. And a client that has always another one waiting
    would keep it busy all the time: so before that one is begun, it rests for `REST` times the time
    of computing that the last one took. Who asks one after another never waits for it.

    Args:
        clock: Seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._served: Counter[str] = Counter()
        """Requests that are being served, by client."""
        self._waiting: dict[str, deque[threading.Lock]] = {}
        """A gate for each that waits; whoever opens it hands on a place among the served."""
        self._rests: dict[str, float] = {}
        """For how long the next one of a client has to rest."""
        self._seen: OrderedDict[str, float] = OrderedDict()
        """When each client that is about was last seen."""

    @contextmanager
    def of(self, client_id: str) -> Iterator[None]:
        """Wait until a request of a client may be served, and serve it within the block."""
        self._begin(client_id)
        begun = time.thread_time()
        try:
            yield
        finally:
            self._end(client_id, time.thread_time() - begun)

    def _begin(self, client_id: str) -> None:
        with self._lock:
            self._note(client_id)
            if not self._served[client_id] or not self._has_others():
                self._served[client_id] += 1
                return
            gate = threading.Lock()
            gate.acquire()
            self._waiting.setdefault(client_id, deque()).append(gate)
        gate.acquire()
        with self._lock:
            rest = self._rests.pop(client_id, 0.0)
        if rest:
            time.sleep(rest)

    def _end(self, client_id: str, seconds: float) -> None:
        with self._lock:
            self._note(client_id)
            queue = self._waiting.pop(client_id, None)
            if queue is None:
                self._served[client_id] -= 1
                if not self._served[client_id]:
                    del self._served[client_id]
                return
            if self._has_others():
                self._rests[client_id] = min(REST * seconds, _ABOUT_SECONDS)
                opened = [queue.popleft()]
            else:
                opened = [*queue]
                queue.clear()
            if queue:
                self._waiting[client_id] = queue
            self._served[client_id] += len(opened) - 1
        for gate in opened:
            gate.release()

    def _note(self, client_id: str) -> None:
        self._seen[client_id] = self._clock()
        self._seen.move_to_end(client_id)

    def _has_others(self) -> bool:
        """Whether several clients are about."""
        oldest = self._clock() - _ABOUT_SECONDS
        while self._seen:
            client_id, seen = next(iter(self._seen.items()))
            if seen > oldest:
                break
            del self._seen[client_id]
        return len(self._seen) > 1
