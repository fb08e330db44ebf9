"""Limits that uvicorn lacks: on the time of a request, on its headers, and on connections.

An ASGI app first hears of a request when its headers are complete. So whoever sends a byte a minute
would hold a connection for ever, and a header could grow until the memory is full. This protocol
watches the bytes themselves. A request has `receive_seconds`, and a second more for each
`bytes_per_second` that have come: a large body over a slow line arrives, a trickle doesn't.
An answer that the client doesn't read is cut off likewise.

Idle connections cost their owner nothing, and a server has a limit of them. So one on which nobody
has shown a token is closed after `idle_seconds`, and gives way to a new one where there are as many
as the server takes.

The trap is that headers don't stop where the body begins: a chunked body may have trailers, which
uvicorn adds to the headers, and extensions of each chunk. So the limit is on the number of bytes in
a row that aren't body.

Only callbacks of asyncio and of the parser are overridden, and refusals are written as uvicorn
writes its own to a request that it can't read. If a release of uvicorn renames these, the tests of
this module fail.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from splitfed.errors import BusyError, InputError, SplitFedError, TooLargeError
from splitfed.service.http.contract import JSON, encode_error
from splitfed.service.http.endpoints import TRUSTED
from splitfed.service.http.limits import Limits

_SILENT_SECONDS = 1.0
"""A connection that gives way to a new one has been silent for so long."""
_PHRASES = {
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


class GuardedConfig(uvicorn.Config):
    """uvicorn's settings, and the limits that its connections keep.

    Args:
        app: The ASGI app.
        limits: Limits of the server.
        settings: uvicorn's own.
    """

    def __init__(self, app: Any, limits: Limits, **settings: Any) -> None:
        super().__init__(app, http=Guarded, ws="none", **settings)
        self.limits = limits


class Guarded(HttpToolsProtocol):
    """A connection that is watched.

    Two timers run: one while a request arrives, one while the client reads nothing of an answer.
    """

    config: GuardedConfig
    _arrival: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None
    _begun = 0.0
    _num_bytes = 0
    _num_loose = 0
    """Bytes since the last one that was body."""
    _in_headers = True
    _is_trusted = False
    _touched = 0.0
    """When bytes came last, or an answer was complete."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Watch a new connection, or refuse it if there are too many."""
        super().connection_made(transport)
        self._touched = self.loop.time()
        limits = self.config.limits
        if len(self.connections) > limits.connections and not self._replace_silent():
            error = BusyError(
                f"this server has {limits.connections} connections open, as many as it takes"
            )
            self._refuse(503, error)
        else:
            # From here on, not from the first byte: a client may connect and send nothing.
            self._watch_arrival()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop both timers."""
        self._end_arrival()
        self._end_stall()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what comes; bytes that aren't part of a request yet begin one."""
        if self._arrival is None:
            self._watch_arrival()
        self._touched = self.loop.time()
        self._num_bytes += len(data)
        self._num_loose += len(data)
        # The parser first: where it finds body in these bytes, it resets the count.
        super().data_received(data)
        most = self.config.limits.http_header
        if self._num_loose > most and not self.transport.is_closing():
            error = TooLargeError(
                f"the headers have more than {most} bytes, which is what this server takes"
            )
            self._end_request(431, error)

    def on_message_begin(self) -> None:
        """Watch a request that begins, maybe behind another one in the same bytes."""
        if self._arrival is None:
            self._watch_arrival()
        self._in_headers = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Reset the count: the headers are over."""
        self._in_headers = False
        self._num_loose = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Reset the count: this was body."""
        self._num_loose = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Stop the timer of the request, which has arrived."""
        self._end_arrival()
        self._num_loose = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Let the connection be idle: for long only if its client was let in."""
        self._touched = self.loop.time()
        self._is_trusted = self._is_trusted or TRUSTED in self.scope
        if not self._is_trusted:
            shorter = min(self.config.limits.idle_seconds, self.config.timeout_keep_alive)
            self.timeout_keep_alive = shorter  # type: ignore[assignment]
        else:
            self.timeout_keep_alive = self.config.timeout_keep_alive
        super().on_response_complete()

    @property
    def is_silent(self) -> bool:
        """Whether nobody is served here, has shown a token, or has sent anything for a moment."""
        if self._is_trusted or (self.scope is not None and TRUSTED in self.scope):
            return False
        if self._arrival is None and self.timeout_keep_alive_task is None:
            return False
        return self.loop.time() - self._touched >= _SILENT_SECONDS

    def _replace_silent(self) -> bool:
        """Close the connection that has been silent for longest; false if there is none."""
        silent = [
            other
            for other in self.connections
            if isinstance(other, Guarded) and other.is_silent and not other.transport.is_closing()
        ]
        if not silent:
            return False
        min(silent, key=lambda other: other._touched).transport.close()
        return True

    def pause_writing(self) -> None:
        """Start the timer of the answer: the client doesn't read it as fast as it is written."""
        super().pause_writing()
        seconds = self.config.limits.receive_seconds
        self._stall = self.loop.call_later(seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the timer of the answer: the client has read some."""
        self._end_stall()
        super().resume_writing()

    def _watch_arrival(self) -> None:
        self._begun = self.loop.time()
        self._num_bytes = 0
        self._num_loose = 0
        self._in_headers = True
        due = self._begun + self.config.limits.receive_seconds
        self._arrival = self.loop.call_at(due, self._check_arrival)

    def _end_arrival(self) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None

    def _end_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _check_arrival(self) -> None:
        """End a request that is late; the bytes that have come since buy it time."""
        limits = self.config.limits
        due = self._begun + limits.receive_seconds + self._num_bytes / limits.bytes_per_second
        if self.loop.time() < due:
            self._arrival = self.loop.call_at(due, self._check_arrival)
        else:
            error = InputError("the request didn't arrive in time: is the connection very slow?")
            self._end_request(408, error)

    def _end_request(self, status: int, error: SplitFedError) -> None:
        """Refuse the request that is arriving."""
        # One that was answered already, and still sends, gets no second answer. While headers
        # arrive, `cycle` is still the request before.
        if self.cycle is not None and not self._in_headers and self.cycle.response_started:
            self._end_arrival()
            self.transport.abort()
        else:
            self._refuse(status, error)

    def _refuse(self, status: int, error: SplitFedError) -> None:
        """Write an error as the answer, and close the connection."""
        self._end_arrival()
        body = encode_error(error)
        lines = [
            f"HTTP/1.1 {status} {_PHRASES[status]}",
            f"content-type: {JSON}",
            f"content-length: {len(body)}",
        ]
        if status == 503:
            lines.append(f"retry-after: {self.config.limits.retry_seconds}")
        lines.append("connection: close")
        head = "\r\n".join([*lines, "\r\n"]).encode()
        self.transport.write(head + body)
        self.transport.close()
