"""The service as it is deployed, by real processes: over HTTP or through the store, whoever dies: the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Wire
from harness_store import bits
from processes import Owner
from service import Service, body, check_same, company

from splitfed.client.transports import open_transport
from splitfed.protocol.messages import ForwardRequest
from splitfed.server.server import SplitServer
from splitfed.store.store import GradientStore

ROUNDS = 3


@pytest.fixture(params=["file", pytest.param("seaweed", marks=pytest.mark.soak)])
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    """Nobody yet, around an empty store: files, and a real S3 server."""
    if request.param == "file":
        url = (tmp_path / "run").as_uri()
        place: tuple[dict[str, str], GradientStore] = {}, GradientStore(url, sync="process")
    else:
        seaweed = request.getfixturevalue("seaweed")
        url = seaweed.url()
        place = dict(seaweed.environment), seaweed.store(url)
    with company(url, *place) as found:
        yield found


@pytest.fixture
def reference(tmp_path: Path) -> str:
    """Where the same schedule runs in one process."""
    return (tmp_path / "reference").as_uri()


@pytest.mark.parametrize(
    ("service", "installed"),
    [
        pytest.param("file", False, id="file"),
        pytest.param("file", True, id="file-installed", marks=pytest.mark.soak),
        pytest.param("seaweed", True, id="seaweed-installed", marks=pytest.mark.soak),
    ],
    indirect=["service"],
)
def test_a_driver_commits_every_eighth_batch_by_command(service: Service, reference: str, installed: bool) -> None:
    """Three servers, eight clients, a new `accumulate --once` after each eighth batch: the bits of one process."""
    service.hire(service.serve())
    for version in range(ROUNDS):
        service.step()
        assert (service.store.latest_version(), len(service.store.waiting())) == (version, 8)
        service.commit(installed=installed)
        assert service.store.latest_version() == version + 1
    check_same(service.store, service.halves(), ROUNDS, reference)


@pytest.mark.parametrize("service", ["file"], indirect=True)
def test_all_replicas_replaced_one_by_one(service: Service, reference: str) -> None:
    """In each round another replica is killed under the owners' requests and replaced: they notice latency only."""
    urls = service.serve()
    service.accumulate()
    service.hire(urls)
    for _ in range(2):  # a first contact that finds nobody would be a wrong URL
        service.round()
    for port in service.ports:

        def replace(role: str = f"server {port}") -> bool:
            service.kill(role)
            return True

        service.round(replace)
    check_same(service.store, service.halves(), 5, reference)


@pytest.mark.parametrize("service", ["file"], indirect=True)
def test_backward_on_another_replica_after_the_first_was_killed(service: Service, tmp_path: Path) -> None:
    """Forward on A; A is killed; backward on B: half and stored gradient have the bits of one process."""
    here, there = service.serve()[:2]

    class Killing(Wire):
        killed = False

        def send(self, method: str, request: Any) -> Any:
            if isinstance(request, ForwardRequest):
                return self.servers[0].forward(request)
            if not self.killed:
                service.kill(f"server {service.ports[0]}", anew=False)
                self.killed = True
            return getattr(self.servers[1], method)(request)

    wire = Killing(*(open_transport(url, client_id="a") for url in (here, there)))
    owner = Owner("a", wire)
    owner.step()
    assert wire.killed
    alone = GradientStore(tmp_path / "alone", sync="process")
    direct = Owner("a", SplitServer(body(), alone))
    direct.step()
    assert owner.bits() == direct.bits()
    (batch,) = service.store.waiting()
    got, expected = service.store.pile().read(batch), alone.pile().read(batch)
    assert got is not None
    assert expected is not None
    assert bits(dict(got.gradients)) == bits(dict(expected.gradients))


def test_a_store_as_transport_with_a_worker_killed_at_its_claim(service: Service, reference: str) -> None:
    """Owners that reach only the store, three workers; one is killed between claim and answer: the same bits."""
    service.work(3)
    service.accumulate()
    service.hire([service.url])
    killed: list[bool] = []

    def kill() -> bool:
        if not killed and service.kill_who_has_claimed():
            killed.append(True)
        return bool(killed)

    rounds = 0
    while rounds < ROUNDS or not killed:
        service.round(kill)
        rounds += 1
        assert rounds < 20, "no worker was ever caught with a claim"
    service.round()
    check_same(service.store, service.halves(), rounds + 1, reference)
