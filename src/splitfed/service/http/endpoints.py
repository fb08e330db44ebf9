"""One request of the protocol: admit, receive, serve, answer.

Cheapest first: what is wrong with the headers (a token, a size, a type) is told before any of the body is read, and
nothing is reserved for it. The body goes straight into the memory that its tensors will be views of, and the answer's
tensors are written from where they lie. In between, a thread does the work: the event loop never computes.

A refused request is answered while its body may still be arriving. uvicorn then throws the rest away as it comes, and
`protocol` ends one that never ends. A client that leaves in the middle is no error: what it asked for is idempotent,
so nobody needs to know. Nor is an end of the replica in the middle: it is told as a 503, and repeated elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from splitfed.errors import BusyError, InputError, SplitFedError, TokenError, TooLargeError
from splitfed.protocol.packing import pack, unpack
from splitfed.protocol.transport import VERBS, Transport
from splitfed.service.http.arrival import GoneError, Receive, Received, RefusedError
from splitfed.service.http.auth import Tokens, check_owner
from splitfed.service.http.contract import BINARY, PREFIX, encode_error
from splitfed.service.http.limits import Budget, Limits, check_message
from splitfed.service.http.metrics import Metrics
from splitfed.service.http.threads import Threads

Scope = Mapping[str, Any]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Buffers = list[memoryview | bytes]

_SLICE = 256 << 10  # what is written at once: more would be copied into the transport's own buffer
_log = logging.getLogger("splitfed.http")


class Desk:
    """What the endpoints of one process share.

    Args:
        server: Who serves.
        limits: How much it takes.
        tokens: Whom it serves; `None` for everybody.
        threads: Where it computes, one for each request that may be under way.
    """

    def __init__(self, server: Transport, limits: Limits, tokens: Tokens | None, threads: Threads) -> None:
        self.server = server
        self.limits = limits
        self.tokens = tokens
        self.threads = threads
        self.budget = Budget(limits)
        self.metrics = Metrics()

    def admit(self, scope: Scope) -> tuple[dict[bytes, bytes], str | None]:
        """The headers of a request and whose it is.

        Raises:
            TokenError: it has no token that counts.
        """
        headers = dict(scope["headers"])
        size = len(scope.get("raw_path") or b"") + sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size > self.limits.http_header:
            error = TooLargeError(f"the headers have {size} bytes: this server takes {self.limits.http_header}")
            raise RefusedError(error, 431)
        owner = None if self.tokens is None else self.tokens.owner(headers.get(b"authorization"))
        return headers, owner


class Endpoint(ABC):
    """An ASGI app for one path: counts, and turns whatever is raised into an answer.

    Args:
        desk: What the process shares.
        path: The route, for the metrics.
    """

    def __init__(self, desk: Desk, path: str) -> None:
        self.desk = desk
        self.path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        begun, received = time.perf_counter(), Received(self.desk.budget)
        kind, parts, headers = b"application/json", list[memoryview | bytes](), list[tuple[bytes, bytes]]()
        try:
            try:
                status, kind, parts = await self.answer(scope, receive, received)
            except GoneError:
                return
            except asyncio.CancelledError:  # the time to drain is over: uvicorn would answer a 500 that nobody repeats
                stopped = BusyError("this replica is being stopped: try again")
                status, headers, parts = self._told(RefusedError(stopped, 503))
            except Exception as error:  # noqa: BLE001 -- the last border: nothing may leave as a traceback
                status, headers, parts = self._told(error)
            try:
                await _send(send, status, kind, parts, headers)
            finally:
                sent = sum(map(len, parts))
                self.desk.metrics.count(self.path, status, time.perf_counter() - begun, received.num_bytes, sent)
        finally:
            received.close()

    @abstractmethod
    async def answer(self, scope: Scope, receive: Receive, received: Received) -> tuple[int, bytes, Buffers]:
        """Status, content type and body of the answer."""

    def _told(self, error: Exception) -> tuple[int, list[tuple[bytes, bytes]], Buffers]:
        status = getattr(error, "status", 500)
        if isinstance(error, RefusedError):
            error = error.error
        if not isinstance(error, SplitFedError):
            _log.error("%s failed: %s", self.path, type(error).__name__, exc_info=error)
        elif status >= 500:
            _log.warning("%s: %s: %s", self.path, type(error).__name__, error)
        self.desk.metrics.error(type(error).__name__ if isinstance(error, SplitFedError) else "SplitFedError")
        headers = []
        if status in (429, 503):
            headers.append((b"retry-after", b"%d" % self.desk.limits.retry_seconds))
        if isinstance(error, TokenError):
            headers.append((b"www-authenticate", b"Bearer"))
        return status, headers, [encode_error(error)]


class Method(Endpoint):
    """The endpoint of one method of `Transport`."""

    def __init__(self, desk: Desk, name: str) -> None:
        super().__init__(desk, f"{PREFIX}/{name}")
        self._request = VERBS[name][0]
        self._serve = getattr(desk.server, name)

    async def answer(self, scope: Scope, receive: Receive, received: Received) -> tuple[int, bytes, Buffers]:
        """Serve a message."""
        headers, owner = self.desk.admit(scope)
        _check_type(headers)
        body = await received.body(headers, receive, self.desk.limits)
        return 200, BINARY.encode(), await self.desk.threads.run(self._run, body, owner)

    def _run(self, body: memoryview, owner: str | None) -> Buffers:
        limits = self.desk.limits
        request: Any = unpack(self._request, body, max_tensors=limits.tensors, max_header=limits.header)
        check_owner(owner, request.client_id)
        check_message(request, limits)
        return pack(self._serve(request))


class Report(Endpoint):
    """An endpoint that answers something to read.

    Args:
        desk: What the process shares.
        path: The route.
        kind: The content type.
        read: Makes status and body.
        threads: Where, if it asks the store: others than those that compute, which may all be busy.
        private: Whether a token is needed.
    """

    def __init__(
        self,
        desk: Desk,
        path: str,
        kind: bytes,
        read: Callable[[], tuple[int, bytes]],
        threads: Threads | None = None,
        *,
        private: bool = False,
    ) -> None:
        super().__init__(desk, path)
        self._kind = kind
        self._read = read
        self._threads = threads
        self._private = private

    async def answer(self, scope: Scope, receive: Receive, received: Received) -> tuple[int, bytes, Buffers]:
        """Read it."""
        if self._private:
            self.desk.admit(scope)
        status, body = self._read() if self._threads is None else await self._threads.run(self._read)
        return status, self._kind, [body]


def _check_type(headers: Mapping[bytes, bytes]) -> None:
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != BINARY.encode():
        got = kind.decode("latin-1")[:80]
        raise RefusedError(InputError(f"the content type is {got!r}: expected {BINARY!r}"), 415)
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise RefusedError(InputError("the body is encoded: expected it as it is, without a content-encoding"), 415)


async def _send(send: Send, status: int, kind: bytes, parts: Buffers, headers: list[tuple[bytes, bytes]]) -> None:
    total = sum(map(len, parts))
    told = [(b"content-type", kind), (b"content-length", b"%d" % total), *headers]
    await send({"type": "http.response.start", "status": status, "headers": told})
    if total <= _SLICE:
        await send({"type": "http.response.body", "body": b"".join(parts)})
        return
    for part in parts:
        for begin in range(0, len(part), _SLICE):
            await send({"type": "http.response.body", "body": part[begin : begin + _SLICE], "more_body": True})
    await send({"type": "http.response.body"})
