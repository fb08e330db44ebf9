"""One request and its answer on a connection: urllib3's pool, and neither urllib3's nor http.client's ceremony.

For a tiny body the library costs more than the network: headers are checked and sent one by one, the answer's go
through the parser of e-mails. Here a request leaves in one send where it is small. An answer as our server writes it is
recognized by its first bytes, and goes into the memory that its tensors will be views of. Any other answer, such as
an error, or one that a gateway has rewritten, is left as it is for http.client, which reads all that HTTP allows.

The trap is to decide before anything is taken: so the first bytes are looked at without consuming them, which TLS
can't. There every answer is http.client's.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Mapping
from http.client import HTTPException, HTTPResponse, IncompleteRead
from typing import Any

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.response import BaseHTTPResponse

from splitfed.protocol.safetensors import aligned
from splitfed.service.http.contract import BINARY

Body = list[memoryview | bytes]

_SMALL = 64 << 10  # below, one send of joined bytes is cheaper than one for each tensor
_SLICE = 512 << 10  # the time for a send is for all of it: so a line may be as slow as a server takes it
_PEEK = 1024
_OURS = re.compile(
    rb"HTTP/1\.1 200 OK\r\n((date|server): [^\r\n]*\r\n)*"
    rb"content-type: %s\r\ncontent-length: (?P<size>\d{1,15})\r\n\r\n" % re.escape(BINARY.encode())
)


class Answer(BaseHTTPResponse):
    """An answer that has arrived as a whole, so it has nothing of what urllib3 needs to read on.

    Args:
        status: Its status.
        headers: Its headers, under names of any case; none where nobody looks at them.
        memory: Its body.
    """

    version, version_string = 11, "HTTP/1.1"  # urllib3 2.1 and 2.2 log the first, later ones the second
    length_remaining = 0

    def __init__(self, status: int, headers: Any, memory: memoryview) -> None:
        self.status = status
        self.headers = headers
        self.memory = memory

    def close(self) -> None:
        """Nothing is open; but Python 3.13 calls this at the end of what derives from io, and prints what is raised."""


class _Exchange(HTTPConnection):
    """What both kinds of connection do otherwise than urllib3's."""

    def request(  # type: ignore[override] # as urllib3 itself does
        self, method: str, url: str, body: Any = None, headers: Mapping[str, str] | None = None, **options: Any
    ) -> None:
        """Send a request.

        Args:
            method: Its verb.
            url: Its path.
            body: Its buffers, one after another.
            headers: All of its headers.
            options: What urllib3's own answers need.
        """
        if self.sock is None:
            self.connect()
        self.sock.settimeout(self.timeout)
        self._verb = method
        lines = [f"{method} {url} HTTP/1.1", *[f"{name}: {value}" for name, value in (headers or {}).items()]]
        parts: Body = ["\r\n".join([*lines, "\r\n"]).encode("latin-1"), *(body or ())]
        if sum(map(len, parts)) < _SMALL:
            parts = [b"".join(parts)]
        for part in parts:
            for begin in range(0, len(part), _SLICE):
                self.sock.sendall(part[begin : begin + _SLICE])

    def getresponse(self) -> Answer:  # type: ignore[override]
        """Receive the answer, all of it.

        Raises:
            OSError: the connection failed.
            http.client.HTTPException: what came isn't HTTP, or not all of it came.
        """
        self.sock.settimeout(self.timeout)
        try:
            return self._ours() or self._any()
        except (MemoryError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise HTTPException(f"a part of the answer has no length that memory can have: {error}") from error

    def _ours(self) -> Answer | None:
        if type(self.sock) is not socket.socket:
            return None
        found = _OURS.match(self.sock.recv(_PEEK, socket.MSG_PEEK))
        if found is None:
            return None
        self.sock.recv(found.end())
        return Answer(200, {}, _filled(int(found["size"]), self.sock.recv_into))

    def _any(self) -> Answer:
        response = HTTPResponse(self.sock, method=self._verb)
        try:
            response.begin()
            size = response.length
            body = memoryview(response.read()) if size is None else _filled(size, response.readinto)
            if response.will_close:
                self.close()
        finally:
            response.close()
        return Answer(response.status, response.headers, body)


class PlainExchange(_Exchange):
    """A connection over HTTP."""


class SecureExchange(_Exchange, HTTPSConnection):
    """A connection over HTTPS."""


def _filled(size: int, read_into: Callable[[memoryview], int]) -> memoryview:
    """So many bytes, in memory that is aligned as tensors need it."""
    memory, end = aligned(size), 0
    while end < size:
        count = read_into(memory[end:])
        if not count:
            raise IncompleteRead(b"", size - end)
        end += count
    return memory
