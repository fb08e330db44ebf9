"""Limits of the HTTP service: what is under way at once, of all clients and of each.

A service that reads whatever comes runs out of memory. A request that is too much at the moment
gets an answer that says when to come back: 503 if the server has too many under way, and 429 if it
is one client that has, or if the bytes don't fit.

An answer counts until it is sent: a client that doesn't read would else hold as many as it asked
for.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from splitfed.errors import BusyError, InputError
from splitfed.service.limits import MessageLimits
from splitfed.service.limits import check_body as check_body
from splitfed.service.limits import check_message as check_message


@dataclass(frozen=True, slots=True)
class Limits(MessageLimits):
    """The limits of one server process.

    Raises:
        InputError: one isn't above 0, or a request of the largest size wouldn't fit into the bytes
            in flight.
    """

    in_flight: int = 1 << 30
    """Bytes of all bodies that are being received or answered, and of their answers."""
    requests: int = 32
    """Requests that are being received or answered ..."""
    client_requests: int = 8
    """... and of one client, where clients have tokens."""
    connections: int = 1024
    """Open connections."""
    http_header: int = 32 << 10
    """Bytes of a request's line and headers."""
    receive_seconds: float = 20.0
    """Time for a request to arrive, in addition to the time of its bytes ..."""
    bytes_per_second: int = 64 << 10
    """... at this rate. An answer that isn't read for `receive_seconds` is cut off likewise."""
    idle_seconds: float = 5.0
    """Time that a connection on which nobody has shown a token may be idle."""
    retry_seconds: int = 1
    """Seconds after which a refused client may try again."""

    def __post_init__(self) -> None:
        MessageLimits.__post_init__(self)
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
        self._requests: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._watcher: Callable[[int, int], object] | None = None

    def watch(self, watcher: Callable[[int, int], object]) -> None:
        """Tell somebody the number of requests and of bytes under way whenever it changes."""
        self._watcher = watcher
        self._tell()

    def _tell(self) -> None:
        if self._watcher is not None:
            self._watcher(self.requests, self.num_bytes)

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
        self._tell()

    def leave(self, num_bytes: int) -> None:
        """Count a request out, with the bytes that were reserved for it."""
        self.requests -= 1
        self.num_bytes -= num_bytes
        self._tell()

    def reserve(self, num_bytes: int, client_id: str | None = None) -> int:
        """Reserve bytes for a body, and return their number.

        Args:
            num_bytes: How many.
            client_id: Whose body it is, if that is known.

        Raises:
            BusyError: they don't fit into the limit now.
        """
        allowed = self._limits.in_flight
        if self.num_bytes + num_bytes > allowed:
            raise BusyError(
                f"this server has {self.num_bytes} bytes under way and takes {allowed}: "
                f"{num_bytes} more don't fit now; try again in {self._limits.retry_seconds} s"
            )
        self.hold(client_id, num_bytes)
        return num_bytes

    def enter_client(self, client_id: str) -> None:
        """Count a request of a client in.

        Raises:
            BusyError: it has as many as the limit allows.
        """
        most = self._limits.client_requests
        if self._requests[client_id] >= most:
            raise BusyError(
                f"client {client_id!r} has {most} requests under way, as many as this server takes "
                f"of one client: try again in {self._limits.retry_seconds} s"
            )
        self._requests[client_id] += 1

    async def pause(self, client_id: str) -> None:
        """Keep a refused client waiting for its answer, unless many of its requests are."""
        if self._refused[client_id] < self._limits.client_requests:
            self._refused[client_id] += 1
            try:
                await asyncio.sleep(self._limits.retry_seconds / 2)
            finally:
                self._refused[client_id] -= 1
                if not self._refused[client_id]:
                    del self._refused[client_id]

    def leave_client(self, client_id: str, num_bytes: int) -> None:
        """Count a request of a client out, with the bytes that were counted for it."""
        for counts, number in ((self._requests, 1), (self._bytes, num_bytes)):
            counts[client_id] -= number
            if counts[client_id] <= 0:
                del counts[client_id]

    def check_client(self, client_id: str, num_bytes: int) -> None:
        """Refuse bytes of a client's body. One request alone has the room of a body in any case.

        Raises:
            BusyError: they don't fit beside its other requests.
        """
        held = self._bytes[client_id]
        if held and held + num_bytes > self._limits.body:
            raise BusyError(
                f"client {client_id!r} has {held} bytes under way and this server takes "
                f"{self._limits.body} of one client: {num_bytes} more don't fit now; "
                f"try again in {self._limits.retry_seconds} s"
            )

    def hold(self, client_id: str | None, num_bytes: int) -> None:
        """Count bytes that are there already, as those of an answer."""
        self.num_bytes += num_bytes
        self._tell()
        if client_id is not None:
            self._bytes[client_id] += num_bytes
