"""The app around the endpoints: what its threads compute with, what it answers about itself, and its metrics."""

from __future__ import annotations

import ctypes
import re
import threading
import types
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_http import running, serving
from harness_requests import Site

from splitfed.errors import StoreError
from splitfed.protocol.messages import PullAnswer, PullRequest
from splitfed.protocol.packing import pack
from splitfed.service import metrics
from splitfed.service.http import app
from splitfed.store.store import GradientStore


def openmp() -> ctypes.CDLL:
    """The OpenMP that came with torch (others have theirs): torch itself can't be asked, since asking sets it."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if re.search(r"/torch[^ ]*/lib(g|i)omp[^/]*\.so", line):
            return ctypes.CDLL(line.split(maxsplit=5)[5])
    pytest.skip("torch was built without OpenMP, or this isn't Linux")


def test_the_threads_of_the_app_compute_with_the_threads_of_torch() -> None:
    """OpenMP has a count for each thread; the bits depend on it, so that of this thread holds in all."""
    library, found = openmp(), list[int]()

    class Pulling:
        def pull(self, request: PullRequest) -> PullAnswer:
            found.append(library.omp_get_max_threads())
            return PullAnswer(-1, None, {})

    torch.set_num_threads(3)
    bare = threading.Thread(target=lambda: found.append(library.omp_get_max_threads()))
    bare.start()
    bare.join()
    with serving(f"memory://{uuid.uuid4()}") as (site, service):
        site.server._halves = Pulling()  # type: ignore[assignment]
        assert service.send("pull", PullRequest("a"))[0] == 200
    assert found[0] != 3  # so the trap is there
    assert found[1] == 3


def test_a_store_that_fails_is_not_ready_but_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load balancer sends nothing there; nobody restarts it; its metrics still come."""
    seconds = [0.0]
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=lambda: seconds[0]))
    with serving(f"memory://{uuid.uuid4()}") as (site, service):
        assert service.ask("/readyz")[1]["version"] == 0
        assert b"splitfed_version 0.0" in service.ask("/metrics")[1]

        def fail(self: object) -> int:
            raise StoreError("the bucket is gone")

        monkeypatch.setattr(type(site.store.lineage()), "head", fail)
        assert service.ask("/readyz")[0] == 200  # what was found a moment ago
        seconds[0] = 1.1
        status, body, headers = service.ask("/readyz")
        assert (status, body["error"], headers["retry-after"]) == (503, "StoreError", "1")
        assert service.ask("/healthz")[0] == 200
        assert b"splitfed_version" not in service.ask("/metrics")[1]


def test_readiness_reads_the_store_once_a_second_for_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty ask at once, of a store that answers and of one that fails: one of them reads it."""
    seconds, reads, failing = [0.0], list[int](), [False]
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=lambda: seconds[0]))
    with serving(f"memory://{uuid.uuid4()}") as (site, service):
        head = type(site.store.lineage()).checked_head

        def counted(self: Any) -> int:
            reads.append(1)
            if failing[0]:
                raise StoreError("the bucket is gone")
            return int(head(self))

        monkeypatch.setattr(type(site.store.lineage()), "checked_head", counted)
        with ThreadPoolExecutor(10) as pool:
            for expected in (200, 503):
                failing[0] = expected == 503
                assert {found[0] for found in pool.map(service.ask, ["/readyz"] * 50)} == {expected}
                seconds[0] += 1.1
    assert len(reads) == 2


def test_the_status_is_read_once_for_many_that_ask() -> None:
    """The store isn't listed for each."""
    with serving(f"memory://{uuid.uuid4()}") as (_, service):
        first, second = (service.ask("/v1/status")[1] for _ in range(2))
    assert first == second
    assert first["lineages"][0]["version"] == 0


def test_a_long_listing_holds_up_neither_readiness_nor_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ask for the status of a store that takes long: it is listed once, and all get what is found."""
    listing, go, seconds, read = threading.Event(), threading.Event(), [0.0], app.read_status
    listed: list[float] = []

    def slow(store: GradientStore) -> Any:
        listed.append(seconds[0])
        listing.set()
        assert go.wait(60)
        seconds[0] += 100.0
        return read(store)

    clock = types.SimpleNamespace(monotonic=lambda: seconds[0])
    monkeypatch.setattr(app, "read_status", slow)
    monkeypatch.setattr(metrics, "time", clock)
    with serving(f"memory://{uuid.uuid4()}") as (_, service), ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(service.ask, "/v1/status") for _ in range(4)]
        try:
            assert listing.wait(60)
            assert service.ask("/readyz")[0] == 200
            assert service.ask("/metrics")[0] == 200
        finally:
            go.set()
        assert [found.result()[0] for found in asked] == [200] * 4
    assert listed == [0.0]


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_middleware_is_in_front_of_everything(method: str) -> None:
    """Of what is a request of the protocol, and of what isn't."""
    seen: list[str] = []

    class Watching:
        def __init__(self, app: Any) -> None:
            self._inner = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            seen.append(scope.get("path", ""))
            await self._inner(scope, receive, send)

    service = app.make_app(Site(f"memory://{uuid.uuid4()}").server)
    service.add_middleware(Watching)
    with running(service) as served:
        assert served.ask("/v1/pull", b"".join(pack(PullRequest("a"))), method)[0] == (200 if method == "POST" else 405)
    assert "/v1/pull" in seen
