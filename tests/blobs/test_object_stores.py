"""Real object stores: each takes the conformance suite, carries a run under crashes and races, and keeps its bits."""

from __future__ import annotations

import http.client
import os
import threading
import time
import uuid
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import restarts
import torch
from harness_store import Crash, Hook, Nth, check_counted_once, commits, crash, deny, drain, hooked, lose_reply
from killed import check
from processes import AT, Owner, model, new_accumulator, train
from servers import Place, free_ports

from splitfed.blobs.contract import Blobs
from splitfed.blobs.testing import BlobsSuite
from splitfed.blobs.url import open_blobs
from splitfed.errors import StoreCapabilityError, StoreError
from splitfed.model.cut import split
from splitfed.server.server import SplitServer
from splitfed.store.store import GradientStore

CPU = torch.device("cpu")


class ObjectStoreSuite(BlobsSuite):
    """The public suite over one of the fixtures."""

    num_keys = 3

    def open(self, place: str) -> Blobs:
        """A prefix of the bucket."""
        return open_blobs(f"{self.server.root}/{place}", **self.server.options)


class TestSeaweedFS(ObjectStoreSuite):
    """A real S3 server."""

    @pytest.fixture(autouse=True)
    def where(self, seaweed: Place) -> None:
        """Its bucket."""
        self.server = seaweed


class TestMoto(ObjectStoreSuite):
    """An emulator of S3."""

    @pytest.fixture(autouse=True)
    def where(self, moto: Place) -> None:
        """Its bucket."""
        self.server = moto


@pytest.mark.soak
class TestAzurite(ObjectStoreSuite):
    """Azure's emulator."""

    @pytest.fixture(autouse=True)
    def where(self, azurite: Place) -> None:
        """Its container."""
        self.server = azurite


@pytest.fixture
def s3(seaweed: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """SeaweedFS, with what a store's URL needs besides in the environment."""
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    return seaweed


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_store_that_ignores_the_condition_is_refused_within_two_seconds(ignoring: Place) -> None:
    """An emulator that takes a conditional write for an ordinary one is found out before anything is stored."""
    store = ignoring.store()
    store.blobs.get("format.json")  # connected: loading the client library isn't what is timed
    began = time.perf_counter()
    with pytest.raises(StoreCapabilityError, match=r"s3://.*second create.*expected exactly one winner"):
        store.begin(CPU)
    assert time.perf_counter() - began < 2
    assert store.blobs.list("") == []


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody at the endpoint is an error with the store's URL and the reason, without the credentials."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    (port,) = free_ports(1)
    options = {"key": "the-key", "secret": "the-secret", "endpoint_url": f"http://127.0.0.1:{port}"}
    with pytest.raises(StoreError, match=rf"s3://nowhere/run.*127.0.0.1:{port}") as caught:
        GradientStore("s3://nowhere/run", **options).begin(CPU)
    assert "the-" not in str(caught.value)


# --- a run on it ----------------------------------------------------------------------------------------------------


def train_two(url: str, accidents: Sequence[tuple[int, Hook]], **options: Any) -> tuple[GradientStore, list[Any]]:
    """Two owners, a commit after each step of both; before each, one accumulator meets with an accident."""
    server = SplitServer(split(model(), AT)[1], GradientStore(url, sync="process", **options))
    owners = [Owner(name, server) for name in ("a", "b")]
    last = GradientStore(url, sync="process", **options)
    for at, accident in accidents:
        for owner in owners:
            owner.step()
        hook = Nth(at, accident)
        first = hooked(url, hook, **options)
        with suppress(Crash, StoreError), hook.armed():
            new_accumulator(first).step()
        last = GradientStore(url, sync="process", **options)
        drain(new_accumulator(last))
    return last, [owner.bits() for owner in owners]


def outcome(trained: tuple[GradientStore, list[Any]]) -> Any:
    """What two runs are compared by: hashes and batches of all versions, and the owners' halves."""
    store, halves = trained
    check_counted_once(store, [batch for commit in commits(store) for batch in commit.folded])
    return [({**c.files}, c.folded.to_json()) for c in commits(store)], halves


ACCIDENTS: list[tuple[int, Hook]] = [(2, crash), (9, crash), (10, lose_reply), (11, crash), (12, deny), (16, crash)]


def test_accumulators_that_die_on_s3_leave_the_bits_of_memory(s3: Place) -> None:
    """Crashes, lost replies and wrong answers during commits, and a new accumulator each time: as if nothing was."""
    calm = [(-1, crash)] * len(ACCIDENTS)
    assert outcome(train_two(s3.url(), ACCIDENTS)) == outcome(train_two(f"memory://{uuid.uuid4()}", calm))


def test_replies_that_are_lost_between_client_library_and_server_change_nothing(s3: Place) -> None:
    """The first reply to each conditional write is cut off: the library's retry meets its own object, and we know."""
    calm: list[tuple[int, Hook]] = [(-1, crash)]
    url = s3.url()
    SplitServer(split(model(), AT)[1], GradientStore(url))  # begun without the proxy: the probe trusts what it is told
    with Proxy(s3.endpoint) as proxy:
        got = outcome(train_two(url, calm, endpoint_url=proxy.url))
        assert len(proxy.cut) >= 2 + 4, "two gradients and the four files of a commit"
    assert got == outcome(train_two(f"memory://{uuid.uuid4()}", calm))


@pytest.mark.soak
def test_batches_and_kills_on_s3(s3: Place) -> None:
    """Real processes, SIGKILL at random moments: every acknowledged batch counts once, in the bits of its schedule."""
    url = s3.url()
    killed = train(url, owners=2, steps=5, kills=2, seed=1, limit=120, environment=s3.environment)
    check(url, killed, 10)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_batches_and_kills_on_s3(s3: Place) -> None:
    """The same for longer."""
    url = s3.url()
    killed = train(url, owners=3, steps=340, kills=50, seed=2, limit=3_000, environment=s3.environment)
    check(url, killed, 1_020)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_owners_that_are_killed_on_s3(s3: Place, tmp_path: Path) -> None:
    """They too, and each goes on from its checkpoint: every example counts once, in the same bits."""
    url = s3.url()
    settings: dict[str, Any] = {"seed": 3, "limit": 3_000, "environment": s3.environment}
    killed = restarts.train(url, tmp_path, owners=3, steps=340, kills=60, **settings)
    check(url, killed, 1_020)
    restarts.check_samples(url, 1_020)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_uses_s3_too(s3: Place) -> None:
    """A store that was used before a fork works after it, in the child and in the parent."""
    blobs = s3.store().blobs.raw
    blobs.create("a", [b"1"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads: that is what we test
        pid = os.fork()
    if pid == 0:
        os._exit(0 if blobs.get("a") == b"1" and blobs.create("b", [b"2"]) and not blobs.create("a", [b"2"]) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert blobs.list("") == ["a", "b"]


@pytest.mark.soak
def test_an_object_of_many_parts_is_created_once(s3: Place) -> None:
    """Beyond 100 MB the client library uploads in parts: the condition holds for their completion too."""
    blobs = s3.store().blobs.raw
    bodies = [bytes([number]) * (105 * 2**20) for number in range(2)]
    with ThreadPoolExecutor(2) as pool:
        won = [*pool.map(lambda body: blobs.create("large", [body]), bodies)]
    assert sorted(won) == [False, True]
    assert blobs.get("large") == bodies[won.index(True)]


# --- a proxy that cuts replies --------------------------------------------------------------------------------------


class Proxy:
    """Passes requests on, and hangs up instead of the first reply to each conditional write of a key."""

    def __init__(self, endpoint: str) -> None:
        self.cut: set[str] = set()
        address = endpoint.removeprefix("http://")
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                """Any method."""
                self.raw_requestline = self.rfile.readline()
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                upstream = http.client.HTTPConnection(address)
                upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():  # the host as it was signed
                    upstream.putheader(name, value)
                upstream.endheaders(body)
                reply = upstream.getresponse()
                content = reply.read()
                upstream.close()
                if self.headers.get("If-None-Match") and self.path not in proxy.cut:
                    proxy.cut.add(self.path)
                    self.close_connection = True
                    return
                self.wfile.write(f"HTTP/1.1 {reply.status} {reply.reason}\r\n".encode())
                framing = ("content-length", "transfer-encoding")  # the content is whole by now
                kept = [f"{name}: {value}" for name, value in reply.getheaders() if name.lower() not in framing]
                headers = "\r\n".join([*kept, f"Content-Length: {len(content)}"])
                self.wfile.write(f"{headers}\r\n\r\n".encode() + content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
