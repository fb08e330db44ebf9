"""The service over HTTP in this process: a real uvicorn on a real port, in a thread; and bytes sent to it by hand."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import urllib3
import uvicorn
from harness_requests import Site

from splitfed.protocol.packing import pack
from splitfed.service.http.app import make_app
from splitfed.service.http.guard import GuardedConfig
from splitfed.service.http.limits import Limits

BINARY = {"content-type": "application/octet-stream"}


class Service:
    """Where an app is served, and how to ask it without our client."""

    def __init__(self, url: str, address: tuple[str, int]) -> None:
        self.url = url
        self.address = address
        self._pool = urllib3.PoolManager(maxsize=80, retries=False, timeout=60.0)

    def ask(
        self, path: str, body: bytes | None = None, method: str | None = None, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON or bytes, and headers of the answer to one request."""
        verb = method or ("GET" if body is None else "POST")
        kind = {} if body is None else BINARY
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = self._pool.request(verb, self.url + path, body=body, headers={**kind, **named}, redirect=False)
        found = {name.lower(): value for name, value in answer.headers.items()}
        data = json.loads(answer.data) if found.get("content-type") == "application/json" and answer.data else None
        return answer.status, answer.data if data is None else data, found

    def send(self, method: str, message: Any, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """The same for a packed message."""
        return self.ask(f"/v1/{method}", b"".join(pack(message)), **headers)

    def raw(self, data: bytes) -> socket.socket:
        """A connection that these bytes were sent on."""
        stream = socket.create_connection(self.address, timeout=60)
        stream.sendall(data)
        return stream

    def close(self) -> None:
        """Close the connections that it keeps."""
        self._pool.clear()


def listener(port: int = 0) -> socket.socket:
    """A socket that listens, at a free port by default; named TCP, or asyncio doesn't turn Nagle's algorithm off."""
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    bound.listen(128)
    return bound


@contextmanager
def running(
    app: Any, limits: Limits | None = None, at: socket.socket | None = None, **settings: Any
) -> Iterator[Service]:
    """Serve an app while the block runs, at a free port or at a socket that listens."""
    usual: dict[str, Any] = {"log_config": None, "timeout_graceful_shutdown": 5}
    with at or listener() as bound:
        server = uvicorn.Server(GuardedConfig(app, limits or Limits(), **usual, **settings))
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        host, port = bound.getsockname()
        service = Service(f"http://{host}:{port}", (host, port))
        try:
            yield service
        finally:
            service.close()
            server.should_exit = True
            thread.join()


@contextmanager
def serving(
    url: str, limits: Limits | None = None, tokens: Any = None, **settings: Any
) -> Iterator[tuple[Site, Service]]:
    """A site (harness_requests) and its service."""
    site = Site(url, **settings)
    with running(make_app(site.server, limits=limits, tokens=tokens), limits) as service:
        yield site, service


def read_all(stream: socket.socket) -> bytes:
    """What comes until the other side closes."""
    with stream:
        return b"".join(iter(lambda: stream.recv(1 << 16), b""))


@contextmanager
def scripted(*answers: bytes | None, port: int = 0) -> Iterator[tuple[str, list[bytes]]]:
    """A server that reads a request per connection and answers these bytes in turn; `None` closes without an answer.

    After the last it hangs up on whoever comes: a client may ask whether TLS is spoken here, and would wait for that.

    Yields:
        Its URL, and the requests that it has read.
    """
    seen: list[bytes] = []
    with listener(port) as bound:
        thread = threading.Thread(target=_play, args=(bound, answers, seen))
        thread.start()
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}", seen
        finally:
            bound.shutdown(socket.SHUT_RDWR)
            thread.join()


def answer(status: int, body: bytes, **headers: Any) -> bytes:
    """The bytes of an answer."""
    lines = [f"HTTP/1.1 {status} Said", f"content-length: {len(body)}", "connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def read_request(stream: socket.socket) -> bytes:
    """One request, headers and body; what there is of one that breaks off."""
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = stream.recv(1 << 16)
        if not chunk:
            return data
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line), 0)
    while len(body) < length:
        body += stream.recv(1 << 16)
    return head + b"\r\n\r\n" + body


def _play(bound: socket.socket, answers: tuple[bytes | None, ...], seen: list[bytes]) -> None:
    left = iter(answers)
    while True:
        try:
            stream, _ = bound.accept()
        except OSError:
            return
        with stream, suppress(StopIteration):
            said = next(left)
            seen.append(read_request(stream))
            if said is not None:
                stream.sendall(said)
