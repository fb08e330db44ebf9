"""One request and its answer on a connection: every way in which HTTP may say the same, and which failures may pass."""

from __future__ import annotations

import socket
import threading

import pytest
from harness_http import listener, read_request, scripted
from urllib3.exceptions import NewConnectionError, ProtocolError, SSLError

from splitfed.errors import UnreachableError
from splitfed.protocol.messages import PullAnswer, PullRequest
from splitfed.protocol.packing import pack
from splitfed.service.http import connection as exchange
from splitfed.service.http.client import HttpTransport
from splitfed.service.http.connection import is_transient, reason, retry_after

PULLED = b"".join(pack(PullAnswer(5, None, {})))
OURS = b"HTTP/1.1 200 OK\r\ndate: now\r\ncontent-type: application/octet-stream\r\ncontent-length: %d\r\n\r\n"
KIND = b"Content-Type: application/octet-stream\r\n"


@pytest.mark.parametrize(
    "said",
    [
        OURS % len(PULLED) + PULLED,
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nVia: a gateway\r\n%s\r\n" % (len(PULLED), KIND) + PULLED,
        b"HTTP/1.1 100 Continue\r\n\r\n" + OURS % len(PULLED) + PULLED,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (KIND, len(PULLED), PULLED),
        b"HTTP/1.0 200 OK\r\n%s\r\n" % KIND + PULLED,
        b"HTTP/1.1 200 OK\r\nx: %s\r\ncontent-length: %d\r\n\r\n" % (b"y" * 2000, len(PULLED)) + PULLED,
    ],
    ids="ours gateway continue chunked close long".split(),
)
def test_an_answer_is_read_however_http_says_it(said: bytes) -> None:
    """As our server writes it, and as what stands in front of it may."""
    with scripted(said) as (url, _):
        assert HttpTransport(url).pull(PullRequest("a")).version == 5


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"SSH-2.0-server\r\n",
        OURS % 9 + b"half",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\nhalf",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-9\r\nhalf",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffff\r\nhalf",
        OURS % (10**15 - 1) + b"half",
        b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\nhalf" % 10**24,
    ],
    ids="nothing another half chunk negative_chunk huge_chunk huge endless".split(),
)
def test_an_answer_that_isn_t_whole_is_a_failed_connection(said: bytes) -> None:
    """It may pass, so it is tried again while there is patience."""
    with scripted(said) as (url, _), pytest.raises(UnreachableError, match="can't be reached"):
        HttpTransport(url, patience=0.0).pull(PullRequest("a"))


def test_answers_in_pieces_of_any_size_and_on_one_connection() -> None:
    """Ours byte by byte, then at once, then another's: each request is one send, and none opens a second connection."""
    said = OURS % len(PULLED) + PULLED
    seen: list[bytes] = []

    def serve() -> None:
        stream, _ = bound.accept()
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with stream:
            for parts in ([said[i : i + 1] for i in range(len(said))], [said], [said.replace(b"date", b"Via")]):
                seen.append(read_request(stream))
                for part in parts:
                    stream.sendall(part)

    with listener() as bound:
        thread = threading.Thread(target=serve)
        thread.start()
        transport = HttpTransport(f"http://127.0.0.1:{bound.getsockname()[1]}")
        assert [transport.pull(PullRequest("a")).version for _ in range(3)] == [5, 5, 5]
        thread.join()
    assert len(set(seen)) == 1
    assert f"host: 127.0.0.1:{transport.url.rpartition(':')[2]}\r\n".encode() in seen[0]


@pytest.mark.parametrize(
    ("url", "host"),
    [("http://h:80/x", "h:80"), ("http://[::1]:81", "[::1]:81"), ("http://[fe80::1%25eth0]:81", "[fe80::1]:81")],
)
def test_a_host_is_named_as_http_has_it(url: str, host: str) -> None:
    """The zone of an address names an interface of this machine (RFC 6874); gateways refuse it as a host."""
    assert HttpTransport(url)._headers["host"] == host


def test_a_large_tensor_is_sent_in_slices() -> None:
    """A socket's timeout is for all of one send: on a slow line a large one would never be over in time."""
    sent: list[int] = []

    class Line:
        def settimeout(self, seconds: float) -> None:
            pass

        def sendall(self, data: memoryview) -> None:
            sent.append(len(data))

    connection = exchange.PlainExchange("host")
    connection.sock = Line()  # type: ignore[assignment]
    connection.request("POST", "/", [b"header", memoryview(bytes(1_000_000))], {})
    assert sum(sent) == len(b"POST / HTTP/1.1\r\n\r\n") + len(b"header") + 1_000_000
    assert max(sent) <= 1 << 19


def test_an_answer_has_what_each_urllib3_logs_of_it() -> None:
    """2.1 and 2.2 its version as a number, later ones as text; the first failed otherwise."""
    answer = exchange.Answer(200, {}, memoryview(b""))
    assert (answer.version, answer.version_string, answer.length_remaining) == (11, "HTTP/1.1", 0)


def test_only_what_our_server_writes_is_read_without_http_client() -> None:
    """Another coding, a second length or another status may mean another end of the body."""
    ours = OURS % 4
    assert exchange._OURS.match(ours)
    for change in (
        ours.replace(b"200 OK", b"206 Partial Content"),
        ours.replace(b"date", b"transfer-encoding"),
        ours.replace(b"date: now", b"content-length: 5"),
        ours.replace(b"length: 4", b"length: 4\r\ncontent-length: 5"),
        ours.replace(b"length: 4", b"length: +4"),
        ours.replace(b"\r\n", b"\n"),
        ours.replace(b"octet-stream", b"json"),
        ours.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"),
        ours.replace(b"\r\n\r\n", b"\r\nsplitfed-affinity: a\r\ncontent-length: 5\r\n\r\n"),
    ):
        assert not exchange._OURS.match(change)


def test_what_nginx_makes_of_it_is_read_likewise() -> None:
    """Other letters, its own headers, and the replica that it names."""
    head = b"HTTP/1.1 200 OK\r\nServer: nginx\r\nDate: now\r\nContent-Type: application/octet-stream\r\n"
    head += b"Content-Length: 4\r\nConnection: keep-alive\r\n"
    for name, named in ((None, b""), (b"10.0.0.1:8000", b"splitfed-affinity: 10.0.0.1:8000\r\n")):
        found = exchange._OURS.match(head + named + b"\r\nbody")
        assert found is not None
        assert (found["size"], found["name"]) == (b"4", name)


NOBODY = NewConnectionError(None, "refused")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "first", "later"),
    [
        (NOBODY, False, True),
        (SSLError("expired"), False, False),
        (ProtocolError("broken"), True, True),
        (ConnectionResetError(), True, True),
    ],
)
def test_what_may_pass(error: Exception, first: bool, later: bool) -> None:
    """A server that nobody has met may be a wrong URL; no pause mends a certificate."""
    assert is_transient(error, met=False) == first
    assert is_transient(error, met=True) == later


def test_a_retry_after_that_can_t_be_read_asks_for_nothing() -> None:
    """A number, a date that is over, nonsense, nothing."""
    assert retry_after("7") == 7.0
    assert retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0.0
    assert retry_after("soon") is None
    assert retry_after("Thu, 01 Jan 99999 00:00:00 GMT") is None
    assert retry_after("9" * 5000) is None
    assert retry_after(None) is None


def test_a_reason_has_its_class_and_what_urllib3_wraps() -> None:
    """One line for a message."""
    assert reason(ProtocolError("broken")) == "ProtocolError: broken"
    wrapped = ProtocolError("outer")
    wrapped.reason = OSError("inner")  # type: ignore[attr-defined]
    assert reason(wrapped) == "ProtocolError: inner"
