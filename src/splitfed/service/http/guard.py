"""What uvicorn lacks: an end to requests that never arrive and to headers that never end, a limit to connections.

An ASGI app first hears of a request when its headers are complete, so whoever sends a byte a minute holds a connection
for ever, and a header can grow until the memory is full. This protocol watches the bytes themselves. A request has
`receive_seconds`, and a second more for each `bytes_per_second` that have come: a large body over a slow line arrives,
a trickle doesn't. An answer that nobody takes is cut off likewise.

The trap is that headers don't stop where the body begins: a chunked one may have trailers, which uvicorn adds to the
headers, and extensions of each chunk. So what is limited is the number of bytes in a row that aren't body.

It overrides only callbacks of asyncio and of the parser, and answers by the method that uvicorn itself uses for a
request that it can't read; where a release of uvicorn names these otherwise, the tests of this module fail.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from splitfed.errors import BusyError, InputError, SplitFedError, TooLargeError
from splitfed.service.http.contract import encode_error
from splitfed.service.http.limits import Limits

_PHRASES = {408: b"Request Timeout", 431: b"Request Header Fields Too Large", 503: b"Service Unavailable"}


class GuardedConfig(uvicorn.Config):
    """uvicorn's settings, and the limits that its connections keep.

    Args:
        app: What is served.
        limits: How much it takes.
        settings: uvicorn's own.
    """

    def __init__(self, app: Any, limits: Limits, **settings: Any) -> None:
        super().__init__(app, http=Guarded, ws="none", **settings)
        self.limits = limits


class Guarded(HttpToolsProtocol):
    """A connection that is watched."""

    config: GuardedConfig
    _deadline: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _begun = 0.0
    _num_bytes = 0
    _loose = 0  # bytes since the last that were body
    _in_headers = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or refuse it when there are too many."""
        super().connection_made(transport)
        limits = self.config.limits
        if len(self.connections) > limits.connections:
            self._refuse(503, BusyError(f"this server has {limits.connections} connections open, as many as it takes"))
        else:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching."""
        self._unwatch()
        self._taken()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what comes; bytes that aren't part of a request yet begin one."""
        if self._deadline is None:
            self._watch()
        self._num_bytes += len(data)
        self._loose += len(data)
        super().data_received(data)
        most = self.config.limits.http_header
        if self._loose > most and not self.transport.is_closing():
            self._end(431, TooLargeError(f"the headers have more than {most} bytes, which is what this server takes"))

    def on_message_begin(self) -> None:
        """A request begins, maybe behind another one in the same bytes."""
        if self._deadline is None:
            self._watch()
        self._in_headers = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """From here on it is the body that comes."""
        self._in_headers, self._loose = False, 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """It does."""
        self._loose = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is there."""
        self._unwatch()
        self._loose = 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The client doesn't take its answer as fast as it comes."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self.config.limits.receive_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It took some."""
        self._taken()
        super().resume_writing()

    def _watch(self) -> None:
        self._begun, self._num_bytes, self._loose, self._in_headers = self.loop.time(), 0, 0, True
        self._deadline = self.loop.call_at(self._begun + self.config.limits.receive_seconds, self._look)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _taken(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _look(self) -> None:
        limits = self.config.limits
        due = self._begun + limits.receive_seconds + self._num_bytes / limits.bytes_per_second
        if self.loop.time() < due:
            self._deadline = self.loop.call_at(due, self._look)
        else:
            self._end(408, InputError("the request didn't arrive in time: is the connection very slow?"))

    def _end(self, status: int, error: SplitFedError) -> None:
        """Refuse the request that is arriving; one that was answered, and still sends, gets no second answer."""
        if self.cycle is not None and not self._in_headers and self.cycle.response_started:
            self._unwatch()
            self.transport.abort()
        else:
            self._refuse(status, error)

    def _refuse(self, status: int, error: SplitFedError) -> None:
        self._unwatch()
        body = encode_error(error)
        again = b"retry-after: %d\r\n" % self.config.limits.retry_seconds if status == 503 else b""
        head = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%sconnection: close\r\n\r\n"
        self.transport.write(head % (status, _PHRASES[status], len(body), again) + body)
        self.transport.close()
