"""The app around the endpoints: what its threads compute with, and what it answers about itself."""

from __future__ import annotations

import ctypes
import re
import threading
import uuid
from pathlib import Path

import pytest
import torch
from harness_http import serving

from splitfed.errors import StoreError
from splitfed.messages import PullAnswer, PullRequest


def openmp() -> ctypes.CDLL:
    """The OpenMP that torch has loaded: torch itself can't be asked, since asking sets it."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if re.search(r"lib(g|i)omp[^/]*\.so", line):
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
    with serving(f"memory://{uuid.uuid4()}") as (site, service):
        assert service.ask("/readyz")[1]["version"] == 0
        assert b"splitfed_version 0" in service.ask("/metrics")[1]

        def fail(self: object) -> int:
            raise StoreError("the bucket is gone")

        monkeypatch.setattr(type(site.store.lineage()), "head", fail)
        status, body, headers = service.ask("/readyz")
        assert (status, body["error"], headers["retry-after"]) == (503, "StoreError", "1")
        assert service.ask("/healthz")[0] == 200
        assert b"splitfed_version" not in service.ask("/metrics")[1]


def test_the_status_is_read_once_for_many_that_ask() -> None:
    """The store isn't listed for each."""
    with serving(f"memory://{uuid.uuid4()}") as (_, service):
        first, second = (service.ask("/v1/status")[1] for _ in range(2))
    assert first == second
    assert first["lineages"][0]["version"] == 0
