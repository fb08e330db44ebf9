"""One request and its answer on a connection: urllib3's pool without the cost of its connections.

For a tiny body the library costs more than the network: it checks and sends headers one by one, and
parses those of the answer as an e-mail's. Here a small request leaves in one send. An answer as our
server writes it, or as nginx passes it on, is recognized by its first bytes, and is received into
the memory that its tensors will be views of. Any other answer, such as an error or one that another
gateway has rewritten, goes to http.client, which reads all that HTTP allows.

The trap is that this must be decided before a byte is consumed. So the first bytes are peeked at,
which TLS can't do: there every answer is http.client's.

A connection that breaks, or a server that is away for a while, may be back at the next try.
A certificate that isn't trusted won't be. Nor will a first contact that finds nobody: that is a
wrong URL, and nobody should wait a minute for that message (`is_transient`).
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Mapping
from http.client import HTTPException, HTTPResponse, IncompleteRead
from typing import Any

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NewConnectionError,
    ProxyError,
    SSLError,
)
from urllib3.response import BaseHTTPResponse
from urllib3.util import Retry

from splitfed.protocol.safetensors import aligned
from splitfed.service.http.contract import AFFINITY, BINARY

Body = list[memoryview | bytes]

# Below this many bytes one send of joined bytes is cheaper than one send for each tensor.
_SMALL = 64 << 10
# A socket's timeout is for the whole of one send. In slices, a line may be as slow as a server
# accepts.
_SLICE = 512 << 10
_PEEK = 1024  # bytes, more than the headers that our server writes
# Exactly what our server writes, in its order, and what nginx makes of it: with any other header, a
# second length for instance, the body may end elsewhere.
_OURS = re.compile(
    rb"HTTP/1\.1 200 OK\r\n((date|server): [^\r\n]*\r\n)*"
    rb"content-type: %s\r\ncontent-length: (?P<size>\d{1,15})\r\n"
    rb"(connection: keep-alive\r\n)?(%s: (?P<name>[\x20-\x7e]*)\r\n)?\r\n"
    % (re.escape(BINARY.encode()), AFFINITY.encode()),
    re.IGNORECASE,
)


class Answer(BaseHTTPResponse):
    """An answer that has arrived as a whole; it has nothing of what urllib3 needs to read on.

    Args:
        status: Its status.
        headers: Its headers, under names of any case; for an answer of our server's, whose headers
            are known, at most that of a balancer.
        memory: Its body.
    """

    version = 11
    version_string = "HTTP/1.1"  # urllib3 2.1 and 2.2 log `version`, later releases this
    length_remaining = 0

    def __init__(self, status: int, headers: Any, memory: memoryview) -> None:
        self.status = status
        self.headers = headers
        self.memory = memory

    def close(self) -> None:
        """Do nothing: nothing is open.

        Python 3.13 calls this at the end of what derives from io, and prints what it raises.
        """


class _Exchange(HTTPConnection):
    """The methods in which both kinds of connection differ from urllib3's."""

    def request(  # type: ignore[override] # as urllib3 itself does
        self,
        method: str,
        url: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        """Send a request.

        Args:
            method: Its HTTP method.
            url: Its path.
            body: Its buffers, one after another.
            headers: All of its headers.
            options: What urllib3's own answers need; unused.
        """
        if self.sock is None:
            self.connect()
        self.sock.settimeout(self.timeout)
        self._sent_method = method
        lines = [f"{method} {url} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        head = "\r\n".join([*lines, "\r\n"]).encode("latin-1")
        parts: Body = [head, *(body or ())]
        if sum(map(len, parts)) < _SMALL:
            parts = [b"".join(parts)]
        for part in parts:
            for begin in range(0, len(part), _SLICE):
                self.sock.sendall(part[begin : begin + _SLICE])

    def getresponse(self) -> Answer:  # type: ignore[override]
        """Receive the whole answer.

        Raises:
            OSError: the connection failed.
            http.client.HTTPException: what came isn't HTTP, or not all of it came.
        """
        self.sock.settimeout(self.timeout)
        try:
            return self._receive_ours() or self._receive_any()
        except (MemoryError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise HTTPException(
                f"a part of the answer has no length that memory can have: {error}"
            ) from error

    def _receive_ours(self) -> Answer | None:
        """Receive an answer as our server writes it; if it isn't one, consume nothing."""
        # Only a plain socket can peek; that of TLS is a subclass.
        if type(self.sock) is not socket.socket:
            return None
        found = _OURS.match(self.sock.recv(_PEEK, socket.MSG_PEEK))
        if found is None:
            return None
        self.sock.recv(found.end())  # in one piece: these bytes are there, they were peeked at
        name = found["name"]
        headers = {} if name is None else {AFFINITY: name.decode("ascii")}
        return Answer(200, headers, _read_exactly(int(found["size"]), self.sock.recv_into))

    def _receive_any(self) -> Answer:
        response = HTTPResponse(self.sock, method=self._sent_method)
        try:
            response.begin()
            if response.length is None:
                body = memoryview(response.read())
            else:
                body = _read_exactly(response.length, response.readinto)
            if response.will_close:
                self.close()
        finally:
            response.close()
        return Answer(response.status, response.headers, body)


class PlainExchange(_Exchange):
    """A connection over HTTP."""


class SecureExchange(_Exchange, HTTPSConnection):
    """A connection over HTTPS."""


def _read_exactly(size: int, read_into: Callable[[memoryview], int]) -> memoryview:
    """Return `size` bytes, in memory that is aligned as tensors need it."""
    memory = aligned(size)
    end = 0
    while end < size:
        count = read_into(memory[end:])
        if not count:
            raise IncompleteRead(b"", size - end)
        end += count
    return memory


# ----------------------------------------------------------------------------------------- failures


def is_transient(error: BaseException, *, met: bool) -> bool:
    """Whether a failure to reach a server may be over at the next try.

    Args:
        error: The failure.
        met: Whether the server has answered before.
    """
    if isinstance(error, ProxyError):
        error = error.original_error
        # What a proxy refuses, it refuses again; that it finds nobody may pass.
        if "Tunnel connection failed: 4" in str(error):
            return False
    if isinstance(error, SSLError):
        return False
    return met or not isinstance(error, NewConnectionError | ConnectTimeoutError)


def reason(error: BaseException) -> str:
    """Return a failure in words, without urllib3's wrapping."""
    inner = getattr(error, "reason", None)
    if not isinstance(inner, Exception):
        inner = error
    return f"{type(error).__name__}: {inner}"


def retry_after(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header, a number or a date; `None` if unreadable."""
    if header is None:
        return None
    try:
        return max(0.0, Retry().parse_retry_after(header))
    except (HTTPError, ValueError, OverflowError):
        # The last two: a year or a number that Python can't represent.
        return None
