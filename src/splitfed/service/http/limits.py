"""Limits of a service: the size of one request, and of all that are under way at once.

A service that reads whatever comes runs out of memory. So every size is known or bounded before
memory is taken, and a request that is too much at the moment gets an answer that says when to come
back.

The trap is a tensor that is small on the wire and large in memory: an expanded one has few bytes
and many elements, so the expanded size is limited too. Numbers that cost work are counted as well:
each call that a request names as abandoned is an object to delete.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from splitfed.errors import BusyError, InputError, TooLargeError
from splitfed.protocol.fields import Request
from splitfed.protocol.header import MAX_HEADER, MAX_TENSORS


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one server process.

    Raises:
        InputError: one isn't above 0, or a request of the largest size wouldn't fit into the bytes
            in flight.
    """

    body: int = 256 << 20
    """Bytes of a request's body; also of its tensors once they are expanded."""
    in_flight: int = 1 << 30
    """Bytes of all bodies that are being received or answered."""
    requests: int = 32
    """Requests that are being received or answered."""
    connections: int = 1024
    """Open connections."""
    http_header: int = 32 << 10
    """Bytes of a request's line and headers."""
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
    receive_seconds: float = 20.0
    """Time for a request to arrive, in addition to the time of its bytes ..."""
    bytes_per_second: int = 64 << 10
    """... at this rate. An answer that isn't read for `receive_seconds` is cut off likewise."""
    retry_seconds: int = 1
    """Seconds after which a refused client may try again."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value) or value <= 0:
                raise InputError(f"the limit {field.name} is {value!r}: expected a number above 0")
        if self.in_flight < self.body:
            raise InputError(
                f"in_flight={self.in_flight} bytes are less than one body may have ({self.body}): "
                "no such request could ever be served; raise it, or lower the limit of the body"
            )


class Budget:
    """The requests and bytes under way in this process.

    The event loop alone changes it, so there is no lock.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.requests = 0
        self.num_bytes = 0

    def enter(self) -> None:
        """Count a request in.

        Raises:
            BusyError: there are as many as the limit allows.
        """
        if self.requests >= self._limits.requests:
            raise BusyError(
                f"this server has {self.requests} requests under way, as many as it takes: "
                f"try again in {self._limits.retry_seconds} s"
            )
        self.requests += 1

    def leave(self, num_bytes: int) -> None:
        """Count a request out, with the bytes that were reserved for it."""
        self.requests -= 1
        self.num_bytes -= num_bytes

    def reserve(self, num_bytes: int) -> int:
        """Reserve bytes for a body, and return their number.

        Raises:
            BusyError: they don't fit into the limit now.
        """
        allowed = self._limits.in_flight
        if self.num_bytes + num_bytes > allowed:
            raise BusyError(
                f"this server has {self.num_bytes} bytes under way and takes {allowed}: "
                f"{num_bytes} more don't fit now; try again in {self._limits.retry_seconds} s"
            )
        self.num_bytes += num_bytes
        return num_bytes


def check_body(num_bytes: int, limits: Limits) -> None:
    """Refuse a body by its size.

    Raises:
        TooLargeError: it is over the limit.
    """
    if num_bytes > limits.body:
        raise TooLargeError(
            f"the request has {num_bytes} bytes or more: this server takes {limits.body}; "
            "send smaller batches, or raise the limit of the body"
        )


def check_message(message: Request, limits: Limits) -> None:
    """Refuse a request by the size of its tensors, the weight of its batch and its other counts.

    Raises:
        TooLargeError: it is over a limit.
    """
    # numel() counts the elements of an expanded tensor, not those that were sent.
    size = sum([tensor.numel() * tensor.itemsize for tensor in message.tensors()])
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
