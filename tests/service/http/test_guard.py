"""Half-open and slow connections, endless headers, too many connections, answers that nobody takes: each ends."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
from harness_http import Service, read_all, running, serving
from harness_requests import ahead

from splitfed.protocol.messages import PullRequest
from splitfed.protocol.packing import pack
from splitfed.service.http.contract import decode_error
from splitfed.service.http.limits import Limits

LIMITS = Limits(receive_seconds=1.0, bytes_per_second=2 << 20, http_header=4096, connections=20)
HEAD = b"POST /v1/forward HTTP/1.1\r\nhost: x\r\ncontent-type: application/octet-stream\r\n"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """A service without patience."""
    with serving(f"memory://{uuid.uuid4()}", LIMITS) as (_, found):
        yield found


def test_a_half_open_request_ends_with_a_408(service: Service) -> None:
    """Nothing, a byte, half a line, header or body: each is told so and closed; healthy ones are served meanwhile."""
    whole = HEAD + b"content-length: 100\r\n\r\n" + bytes(50)
    streams = [service.raw(whole[:size]) for size in (0, 1, 20, len(HEAD), len(whole))]
    for _ in range(20):
        assert service.ask("/healthz")[0] == 200
    for found in map(read_all, streams):
        assert found.startswith(b"HTTP/1.1 408 Request Timeout")
        assert "in time" in str(decode_error(found.partition(b"\r\n\r\n")[2]))


def test_a_trickle_ends_as_well(service: Service) -> None:
    """A byte now and then buys no time to speak of."""
    begun = time.monotonic()
    with service.raw(HEAD) as stream:
        stream.settimeout(0.1)
        found = b""
        while not found:
            try:
                found = stream.recv(100)
            except TimeoutError:
                stream.sendall(b"a")
    assert found.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - begun < 30


def test_a_large_body_over_a_slow_line_arrives(service: Service) -> None:
    """Bytes that come buy time: 2 MiB a second here, so that 3 MiB may take more than the one second."""
    data = b"".join(pack(ahead(client_id="slow")))
    pad = b"x" * (1 << 20)
    with service.raw(HEAD + b"content-length: %d\r\n\r\n" % (len(data) + 3 * len(pad)) + data) as stream:
        for _ in range(3):
            stream.sendall(pad)
            time.sleep(0.45)  # the slow line itself
        assert stream.recv(1 << 16).startswith(b"HTTP/1.1 400")  # trailing bytes: it was read to its end


def test_headers_that_never_end_are_a_431(service: Service) -> None:
    """Long before they fill the memory."""
    with service.raw(HEAD + b"x: " + b"a" * 5000) as stream:
        assert stream.recv(1 << 16).startswith(b"HTTP/1.1 431 Request Header Fields Too Large")


def test_pipelined_requests_are_served_and_watched(service: Service) -> None:
    """A second one behind the first in the same bytes is answered; half of a third one ends."""
    get = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
    with service.raw(get + get + b"GET /hea") as stream:
        found = read_all(stream)
    assert found.count(b"HTTP/1.1 200") == 2
    assert b"HTTP/1.1 408" in found


def test_connections_beyond_the_limit_are_a_503_until_others_go(service: Service) -> None:
    """With when to come back."""
    open_streams = [service.raw(b"G") for _ in range(20)]
    try:
        with service.raw(b"") as stream:
            found = read_all(stream)
        assert found.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 1\r\n" in found
    finally:
        for each in open_streams:
            each.close()
    while service_refuses(service):
        pass


def service_refuses(service: Service) -> bool:
    """Whether a new connection is refused."""
    with service.raw(b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n") as stream:
        return read_all(stream).startswith(b"HTTP/1.1 503")


def test_an_answer_that_nobody_takes_is_cut_off() -> None:
    """The connection is aborted, and what it held is free again."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000000000")]})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": bytes(1_000_000), "more_body": True})
        await send({"type": "http.response.body"})
        ended.set()

    ended = threading.Event()
    with running(app, LIMITS) as service, socket.socket() as stream:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stream.settimeout(60)
        stream.connect(service.address)
        stream.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert ended.wait(60)  # nothing is sent to a connection that is gone
        taken = 0
        with suppress(ConnectionError):
            while part := stream.recv(1 << 16):
                taken += len(part)
        assert taken < 1_000_000_000


def test_who_was_answered_and_still_sends_is_cut_off(service: Service) -> None:
    """A refused body that never ends doesn't hold the connection."""
    with service.raw(HEAD.replace(b"octet-stream", b"json") + b"content-length: 1000\r\n\r\nabc") as stream:
        assert stream.recv(1 << 16).startswith(b"HTTP/1.1 415")
        with suppress(ConnectionError):
            while stream.recv(1 << 16):
                pass


CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
LINES = b"x: aaaaaaa\r\n" * 500  # more than the limit, in many lines that each are short


def begun(service: Service, chunks: bytes = b"") -> socket.socket:
    """A connection whose headers, and first chunks, the server has read: what is counted begins anew behind them.

    It says so by "100 Continue". After a mere pause a busy server might read them together with what follows.
    """
    stream = service.raw(CHUNKED.replace(b"\r\n\r\n", b"\r\nexpect: 100-continue\r\n\r\n") + chunks)
    assert stream.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
    return stream


def test_trailers_that_never_end_are_cut_off(service: Service) -> None:
    """They would pile up among the headers: told as a 431, also to who sends a body that isn't refused yet."""
    with begun(service, b"1\r\na\r\n0\r\n") as stream, suppress(ConnectionError):
        stream.sendall(LINES)
        assert stream.recv(1 << 16).startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))


def test_trailers_behind_an_answer_end_the_connection(service: Service) -> None:
    """A refused request whose trailers go on: no second answer, and no memory."""
    with service.raw(CHUNKED.replace(b"octet-stream", b"json") + b"0\r\n") as stream:
        assert stream.recv(1 << 16).startswith(b"HTTP/1.1 415")
        sent = 0
        with suppress(ConnectionError):
            while sent < 50_000_000:
                stream.sendall(LINES)
                sent += len(LINES)
        assert sent < 50_000_000


def test_a_chunk_s_head_that_never_ends_is_a_431(service: Service) -> None:
    """Its extensions are neither headers nor body."""
    with begun(service) as stream:
        stream.sendall(b"1;x=" + b"a" * 5000)
        assert stream.recv(1 << 16).startswith(b"HTTP/1.1 431")


def test_body_in_small_chunks_is_no_header(service: Service) -> None:
    """More than the limit of heads of chunks, with a byte of body behind each."""
    with service.raw(CHUNKED) as stream:
        stream.sendall(b"1\r\na\r\n" * 5000 + b"0\r\n\r\n")
        assert stream.recv(1 << 16).startswith(b"HTTP/1.1 400")


GET = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"


def is_answered(stream: socket.socket, request: bytes = b"") -> bool:
    """Whether one request is answered with a 200; the whole answer is read."""
    stream.sendall(request)
    found = stream.recv(1 << 16)
    while b"\r\n\r\n" not in found:
        found += stream.recv(1 << 16)
    size = int(found.partition(b"content-length: ")[2].partition(b"\r")[0])
    while len(found.partition(b"\r\n\r\n")[2]) < size:
        found += stream.recv(1 << 16)
    return found.startswith(b"HTTP/1.1 200")


def test_a_connection_without_a_token_may_not_be_idle_for_long() -> None:
    """After an answer it is closed half a second later; one whose client was let in stays."""
    limits = Limits(idle_seconds=0.5)
    with serving(f"memory://{uuid.uuid4()}", limits) as (_, service):
        body = b"".join(pack(PullRequest("a")))
        post = b"POST /v1/pull HTTP/1.1\r\nhost: x\r\ncontent-type: application/octet-stream\r\n"
        with service.raw(post + b"content-length: %d\r\n\r\n" % len(body) + body) as known:
            assert is_answered(known)
            assert read_all(service.raw(GET)).startswith(b"HTTP/1.1 200")  # until the other side closes
            assert is_answered(known, GET)


def test_a_silent_connection_gives_way_to_a_new_one() -> None:
    """At the limit of three: the one that has been silent for longest is closed, and nobody is refused."""
    limits = Limits(connections=3, idle_seconds=60.0)
    with serving(f"memory://{uuid.uuid4()}", limits) as (_, service), ExitStack() as stack:
        streams = [stack.enter_context(service.raw(GET)) for _ in range(3)]
        assert all(map(is_answered, streams))
        time.sleep(1.1)  # the silence itself
        assert is_answered(streams[0], GET)
        with service.raw(GET) as new:
            assert is_answered(new)
            assert streams[1].recv(100) == b""
            assert is_answered(streams[2], GET)
