"""The app around the endpoints: what its threads compute with, and what it answers about itself."""

from __future__ import annotations

import re
import uuid

import pytest
import torch
from harness_http import serving
from harness_requests import X, ahead
from torch import Tensor

from splitfed.errors import StoreError
from splitfed.messages import LossRequest


def test_the_threads_of_the_app_compute_with_the_threads_of_torch() -> None:
    """OpenMP has a count for each thread; the bits depend on it, so that of this thread holds in all."""
    found: list[str] = []

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        found.extend(re.findall(r"omp_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info()))
        return (outputs - target).sum()

    torch.set_num_threads(3)
    with serving(f"memory://{uuid.uuid4()}", loss_fn=loss) as (_, service):
        assert service.send("loss", LossRequest(ahead(), 0, X, 2.0))[0] == 200
    assert found == ["3"]


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
