"""The endpoints of the protocol: admit a request, receive its body, serve it, answer.

The order is from cheap to expensive: wrong headers (a token, a size, a type) are refused before any
of the body is read, and nothing is reserved for it. The body goes straight into the memory that its
tensors will be views of; the answer's tensors are written from where they are. In between, a thread
computes: the event loop never does. Whatever was reserved is given back, however a request ends.

A request may be refused while its body is still arriving. uvicorn then discards the rest as it
comes, and `guard` ends one that never ends. A client that leaves in the middle is no error: its
request is idempotent, so nobody needs to know. If the replica is stopped in the middle, the client
receives a 503 and repeats the request elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from splitfed.errors import (
    BusyError,
    CorruptedError,
    FormatError,
    InputError,
    SplitFedError,
    TokenError,
    TooLargeError,
)
from splitfed.protocol import checksum
from splitfed.protocol.packing import pack, unpack
from splitfed.protocol.safetensors import aligned
from splitfed.protocol.transport import VERBS, Transport
from splitfed.service.http.auth import Tokens, check_owner
from splitfed.service.http.contract import BINARY, JSON, PREFIX, encode_error
from splitfed.service.http.limits import Budget, Limits
from splitfed.service.http.threads import Threads
from splitfed.service.limits import Lanes, check_body, check_message
from splitfed.service.observer import Observer

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Buffers = list[memoryview | bytes]

TRUSTED = "splitfed.trusted"
"""Set in the scope of a request whose client is let in: `guard` lets its connection be idle."""
# Bytes that are written at once: of more, the transport would make a copy in a buffer of its own.
_SLICE = 256 << 10
_log = logging.getLogger("splitfed.http")


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """An answer that is ready to be sent."""

    status: int
    kind: str
    """Content type."""
    parts: Buffers
    """The body, in pieces."""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    """Further headers."""

    @property
    def num_bytes(self) -> int:
        """Length of the body."""
        return sum(map(len, self.parts))


class GoneError(Exception):
    """The client left before its body had arrived."""


class RefusedError(Exception):
    """An error that is answered with another status than that of its class."""

    def __init__(self, error: SplitFedError, status: int) -> None:
        super().__init__(str(error))
        self.error = error
        self.status = status


class Desk:
    """What the endpoints of one process share.

    Args:
        server: Serves the requests.
        limits: What is accepted.
        tokens: The clients that are served; `None` for all.
        threads: Where requests are served, one thread for each that may be under way.
        observer: Counts the answers.
    """

    def __init__(
        self,
        server: Transport,
        limits: Limits,
        tokens: Tokens | None,
        threads: Threads,
        observer: Observer,
    ) -> None:
        self.server = server
        self.limits = limits
        self.tokens = tokens
        self.threads = threads
        self.observer = observer
        self.budget = Budget(limits)
        self.lanes = Lanes()

    def admit(self, scope: Scope) -> tuple[dict[bytes, bytes], str | None]:
        """Return the headers of a request, and the client that its token belongs to.

        Raises:
            RefusedError: the headers are over the limit.
            TokenError: it has no valid token, or several.
        """
        headers = dict(scope["headers"])
        size = len(scope.get("raw_path") or b"")
        # The scope's list, not the dict: a header that occurs twice counts twice. 4 is for ": " and
        # the end of the line.
        size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size > self.limits.http_header:
            error = TooLargeError(
                f"the headers have {size} bytes: this server takes {self.limits.http_header}"
            )
            raise RefusedError(error, 431)
        owner = None
        if self.tokens is not None:
            # A proxy in front may have looked at another one of them than we would.
            if sum(name == b"authorization" for name, _ in scope["headers"]) > 1:
                raise TokenError("the request has several Authorization headers: expected one")
            owner = self.tokens.owner(headers.get(b"authorization"))
        scope[TRUSTED] = True
        return headers, owner


class Arrival:
    """The body of one request as it arrives, and its place in the budget.

    Where the length is declared, the memory is taken once and filled; without one the parts are
    gathered first. Either way, reading stops at the first byte over the limit.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._entered = False
        self._reserved = 0
        self._owner: str | None = None
        self.num_bytes = 0

    def close(self) -> None:
        """Give back what was reserved."""
        if self._entered:
            self._budget.leave(self._reserved)
            self._entered = False
        if self._owner is not None:
            self._budget.leave_client(self._owner, self._reserved)
            self._owner = None

    def hold(self, num_bytes: int) -> None:
        """Count the bytes of the answer until it is sent."""
        if self._entered:
            self._budget.hold(self._owner, num_bytes)
            self._reserved += num_bytes

    def _reserve(self, num_bytes: int) -> None:
        if self._owner is not None:
            self._budget.check_client(self._owner, num_bytes)
        self._reserved += self._budget.reserve(num_bytes, self._owner)

    async def body(
        self,
        headers: Mapping[bytes, bytes],
        receive: Receive,
        limits: Limits,
        owner: str | None = None,
    ) -> memoryview:
        """Receive the body, into memory of its own that is aligned as tensors need it.

        Args:
            headers: Those of the request.
            receive: Its parts.
            limits: What is accepted.
            owner: The client that its token belongs to.

        Raises:
            TooLargeError: it is over the limit.
            BusyError: too many bytes are under way, or too many requests of the client.
            RefusedError: too many requests are under way.
            FormatError: its length isn't a number, or isn't the declared one.
            GoneError: the client left.
        """
        if owner is not None:
            try:
                self._budget.enter_client(owner)
            except BusyError:
                # A client that asks again at once would keep the event loop busy with refusals.
                await self._budget.pause(owner)
                raise
            self._owner = owner
        try:
            self._budget.enter()
        except BusyError as error:
            raise RefusedError(error, 503) from None
        self._entered = True
        text = headers.get(b"content-length")
        if text is None:
            return await self._gather(receive, limits)
        # No sign, space or underscore, all of which int() would accept.
        if not text.isdigit():
            raise FormatError(f"the content length is {text[:40]!r}: expected a number of bytes")
        declared = int(text)
        check_body(declared, limits)
        self._reserve(declared)
        return await self._fill(aligned(declared), receive, limits)

    async def _fill(self, memory: memoryview, receive: Receive, limits: Limits) -> memoryview:
        more = True
        while more:
            part, more = await self._part(receive, limits)
            if self.num_bytes > len(memory):
                break
            memory[self.num_bytes - len(part) : self.num_bytes] = part
        if self.num_bytes != len(memory):
            raise FormatError(
                f"the body has another length: expected {len(memory)} bytes, got {self.num_bytes}"
            )
        return memory

    async def _gather(self, receive: Receive, limits: Limits) -> memoryview:
        parts: list[bytes] = []
        more = True
        while more:
            part, more = await self._part(receive, limits)
            self._reserve(len(part))
            parts.append(part)
        return _joined(parts, self.num_bytes)

    async def _part(self, receive: Receive, limits: Limits) -> tuple[bytes, bool]:
        """The next part, and whether another follows."""
        message = await receive()
        if message["type"] == "http.disconnect":
            raise GoneError
        part: bytes = message.get("body", b"")
        self.num_bytes += len(part)
        check_body(self.num_bytes, limits)
        return part, message.get("more_body", False)


class Endpoint(ABC):
    """An ASGI app for one path: counts its requests, and answers whatever is raised as an error.

    Args:
        desk: What the process shares.
        path: The route, as the metrics name it.
    """

    def __init__(self, desk: Desk, path: str) -> None:
        self.desk = desk
        self.path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        begun = time.perf_counter()
        arrival = Arrival(self.desk.budget)
        try:
            try:
                reply = await self.answer(scope, receive, arrival)
            except GoneError:
                return
            except asyncio.CancelledError:
                # The time to drain is over. uvicorn would answer a 500, which no client repeats.
                stopped = BusyError("this replica is being stopped: try again")
                reply = self._error_reply(RefusedError(stopped, 503))
            except Exception as error:  # noqa: BLE001 -- the last border: no traceback may leave
                reply = self._error_reply(error)
            try:
                await _send(send, reply)
            finally:
                seconds = time.perf_counter() - begun
                self.desk.observer.count(
                    self.path, reply.status, seconds, arrival.num_bytes, reply.num_bytes
                )
        finally:
            arrival.close()

    @abstractmethod
    async def answer(self, scope: Scope, receive: Receive, arrival: Arrival) -> Reply:
        """Return the answer to a request."""

    def _error_reply(self, error: Exception) -> Reply:
        status = getattr(error, "status", 500)
        if isinstance(error, RefusedError):
            error = error.error
        name = "SplitFedError"  # an unforeseen error travels as this; its class is for the log
        if not isinstance(error, SplitFedError):
            _log.error("%s failed: %s", self.path, type(error).__name__, exc_info=error)
        else:
            name = type(error).__name__
            if status >= 500:
                _log.warning("%s: %s: %s", self.path, name, error)
        self.desk.observer.error(name)
        headers: list[tuple[bytes, bytes]] = []
        if status in (429, 503):
            headers.append((b"retry-after", b"%d" % self.desk.limits.retry_seconds))
        if isinstance(error, TokenError):
            headers.append((b"www-authenticate", b"Bearer"))
        return Reply(status, JSON, [encode_error(error)], tuple(headers))


class Method(Endpoint):
    """The endpoint of one verb of `Transport`."""

    def __init__(self, desk: Desk, verb: str) -> None:
        super().__init__(desk, f"{PREFIX}/{verb}")
        self._request = VERBS[verb][0]
        self._serve = getattr(desk.server, verb)

    async def answer(self, scope: Scope, receive: Receive, arrival: Arrival) -> Reply:
        """Serve a message."""
        headers, owner = self.desk.admit(scope)
        _check_type(headers)
        body = await arrival.body(headers, receive, self.desk.limits, owner)
        reply = Reply(200, BINARY, await self.desk.threads.run(self._run, body, owner))
        arrival.hold(reply.num_bytes)
        return reply

    def _run(self, body: memoryview, owner: str | None) -> Buffers:
        if owner is None:  # anybody may call itself anything: there is no one to take turns with
            return self._answered(self._unpacked(body), owner)
        with self.desk.lanes.of(owner):
            return self._answered(self._unpacked(body), owner)

    def _unpacked(self, body: memoryview) -> Any:
        limits = self.desk.limits
        try:
            checksum.check(body, required=False)
        except CorruptedError as error:  # on the way here, so it isn't our store that is damaged
            raise FormatError(
                f"the request has another checksum than it says ({error}): send it again, or leave "
                "the checksum out"
            ) from error
        return unpack(self._request, body, max_tensors=limits.tensors, max_header=limits.header)

    def _answered(self, request: Any, owner: str | None) -> Buffers:
        # Ownership first: another client's ids are refused before anything else is said of them.
        check_owner(owner, request.client_id)
        check_message(request, self.desk.limits)
        return pack(self._serve(request))


class Report(Endpoint):
    """An endpoint that answers something to read: a status, a document, metrics.

    Args:
        desk: What the process shares.
        path: The route.
        kind: The content type.
        read: Makes the body.
        threads: Where it is made, if that asks the store. Not those that serve requests, which may
            all be busy.
        private: Whether a token is needed.
    """

    def __init__(
        self,
        desk: Desk,
        path: str,
        kind: str,
        read: Callable[[], bytes],
        threads: Threads | None = None,
        *,
        private: bool = False,
    ) -> None:
        super().__init__(desk, path)
        self._kind = kind
        self._read = read
        self._threads = threads
        self._private = private

    async def answer(self, scope: Scope, receive: Receive, arrival: Arrival) -> Reply:
        """Make the body."""
        if self._private:
            self.desk.admit(scope)
        if self._threads is None:
            return Reply(200, self._kind, [self._read()])
        return Reply(200, self._kind, [await self._threads.run(self._read)])


def _check_type(headers: Mapping[bytes, bytes]) -> None:
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != BINARY.encode():
        got = kind.decode("latin-1")[:80]
        raise RefusedError(InputError(f"the content type is {got!r}: expected {BINARY!r}"), 415)
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise RefusedError(
            InputError("the body is encoded: expected it as it is, without a content-encoding"), 415
        )


def _joined(parts: Iterable[bytes], num_bytes: int) -> memoryview:
    memory = aligned(num_bytes)
    end = 0
    for part in parts:
        memory[end : end + len(part)] = part
        end += len(part)
    return memory


async def _send(send: Send, reply: Reply) -> None:
    size = reply.num_bytes
    headers = [
        # In this order: the client knows our answers by their first bytes (`connection`).
        (b"content-type", reply.kind.encode()),
        (b"content-length", b"%d" % size),
        *reply.headers,
    ]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    if size <= _SLICE:
        await send({"type": "http.response.body", "body": b"".join(reply.parts)})
        return
    for part in reply.parts:
        for begin in range(0, len(part), _SLICE):
            piece = part[begin : begin + _SLICE]
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body"})
