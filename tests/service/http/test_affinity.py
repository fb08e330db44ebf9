"""The affinity of a client's requests: a balancer finds the replica with the graph, and nothing depends on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.balancer import balancing, hashed, in_turn, missing, named
from harness_http import listener, running, serving
from harness_requests import X, ahead, back
from pages import ROOT
from servers import free_ports
from torch import nn

import splitfed
from splitfed.errors import BusyError
from splitfed.protocol.messages import LossRequest, PullRequest
from splitfed.server.server import SplitServer
from splitfed.service.http.affinity import CALLS, Affinity
from splitfed.service.http.app import make_app
from splitfed.service.http.client import HttpTransport
from splitfed.service.http.contract import AFFINITY, BINARY, encode_error

NGINX = pytest.mark.skipif(missing() is not None, reason=str(missing()))
Write = Callable[[str, Sequence[str]], str]


def test_a_call_and_its_backward_have_one_key() -> None:
    """Each batch has its own, so the balancer may place the client again; so has the same call of another client."""
    affinity = Affinity()
    keys = [affinity.key("forward", ahead(call=number)) for number in range(50)]
    assert keys == [affinity.key("backward", back(call=number)) for number in range(50)]
    assert keys == [affinity.key("loss", LossRequest(ahead(call=n), 0, X, 2.0)) for n in range(50)]
    assert len(set(keys)) == 50
    assert affinity.key("forward", ahead(client_id="b")) != keys[0]


def test_calls_that_go_on_from_one_another_share_a_key() -> None:
    """For their buffers; but not for ever, or a client would never be placed again."""
    affinity = Affinity()
    keys = [affinity.key("forward", ahead())]
    keys += [affinity.key("forward", ahead(call=number, previous=number - 1)) for number in range(1, 2 * CALLS)]
    assert keys == [affinity.key("backward", back(call=number)) for number in range(2 * CALLS)]
    assert [keys.index(key) for key in keys] == [0] * CALLS + [CALLS] * CALLS


def test_what_needs_no_graph_has_no_key() -> None:
    """A client half, and the close of a batch whose calls were answered before."""
    affinity = Affinity()
    assert affinity.key("pull", PullRequest("a")) is None
    assert affinity.key("backward", back(call=None)) is None


def test_a_replica_that_is_named_is_asked_again() -> None:
    """For the calls of one key, until another one is named; names that could change a request are left alone."""
    affinity = Affinity()
    drawn = affinity.key("forward", ahead())
    for name in (None, "", "a\r\nb: c", "a\nb", "ä", "a" * 257):
        affinity.note("forward", ahead(), name)
        assert affinity.key("backward", back()) == drawn
    affinity.note("forward", ahead(), "10.0.0.1:8000")
    affinity.note("pull", PullRequest("a"), "10.0.0.3:8000")
    assert affinity.key("backward", back()) == "10.0.0.1:8000"
    assert affinity.key("forward", ahead(call=1, previous=0)) == "10.0.0.1:8000"
    assert affinity.key("forward", ahead(call=2)) != "10.0.0.1:8000"
    affinity.note("backward", back(), "10.0.0.2:8000")
    assert affinity.key("backward", back(call=1)) == "10.0.0.2:8000"


def test_keys_are_few_however_long_a_client_trains() -> None:
    """The oldest are forgotten: a backward that comes so late is a recompute."""
    affinity = Affinity()
    for number in range(3000):
        affinity.key("forward", ahead(call=number))
        affinity.note("forward", ahead(call=number), "here")
    assert affinity.key("backward", back()) != "here"
    assert affinity.key("backward", back(call=2999)) == "here"
    assert len(affinity._keys) == 1024


def test_requests_carry_it_and_a_repeated_one_does_not(tmp_path: Path) -> None:
    """Where the first try failed, its replica may be the reason. What an answer names is what the next one carries."""
    seen: list[bytes | None] = []
    with serving(str(tmp_path / "run")) as (site, _):
        app = make_app(site.cached)

        async def door(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                seen.append(dict(scope["headers"]).get(AFFINITY.encode()))
                if len(seen) == 3:
                    await refuse(send)
                    return

            async def naming(message: Any) -> None:
                if message["type"] == "http.response.start":
                    message = {**message, "headers": [*message["headers"], (AFFINITY.encode(), b"this one")]}
                await send(message)

            await app(scope, receive, naming)

        with running(door) as service:
            transport = HttpTransport(service.url)
            transport.forward(ahead())
            transport.backward(back())
            transport.forward(ahead(call=1, incarnation=1, previous=0))
            transport.pull(PullRequest("a"))
    drawn = Affinity().key("forward", ahead())
    assert drawn is not None
    assert seen == [drawn.encode(), b"this one", b"this one", None, None]


async def refuse(send: Any) -> None:
    """Answer as a replica that is busy."""
    headers = [(b"content-type", BINARY.encode()), (b"retry-after", b"0")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": encode_error(BusyError("full"))})


def test_how_often_a_graph_was_at_hand_is_a_metric(tmp_path: Path) -> None:
    """One backward where its forward ran, one elsewhere."""
    with serving(str(tmp_path / "run")) as (site, _), running(make_app(site.cached)) as service:
        site.forward(site.cached)
        site.cached.backward(back())
        site.forward(site.server, call=1, incarnation=1)
        site.cached.backward(back(call=1, seq=1))
        lines = service.ask("/metrics")[1].decode().splitlines()
    assert [line for line in lines if line.startswith("splitfed_graphs_total")] == [
        'splitfed_graphs_total{use="kept"} 1.0',
        'splitfed_graphs_total{use="recomputed"} 1.0',
        'splitfed_graphs_total{use="continued"} 0.0',
    ]


# ------------------------------------------------------------------------------- behind a balancer


def test_the_example_is_what_is_tested() -> None:
    """Below its first lines, which say what it is for."""
    text = (ROOT / "examples" / "deploy" / "balancer.conf").read_text("utf-8")
    assert text.endswith("\n\n" + named("8080", [f"127.0.0.1:{port}" for port in (8000, 8001, 8002)]))


class Fleet:
    """Replicas of one store, and a balancer in front.

    Args:
        folder: For the store, and the balancer's files.
        count: How many replicas.
        write: The balancer's configuration.
    """

    def __init__(self, folder: Path, count: int, write: Write) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        self.half, self.body = splitfed.split(model, "1:3")
        self.store = splitfed.GradientStore(folder / "run", sync="process")
        self.servers = [SplitServer(self.body, self.store) for _ in range(count)]
        (port, *ports) = free_ports(1 + count)
        self.running = [ExitStack() for _ in range(count)]
        self._places = list(zip(self.servers, ports, self.running, strict=True))
        self.configuration = write(f"127.0.0.1:{port}", [f"127.0.0.1:{port}" for port in ports])
        self.url = f"http://127.0.0.1:{port}"

    def begin(self) -> None:
        """Start the replicas."""
        for server, port, stack in self._places:
            stack.enter_context(running_at(port, make_app(server)))

    def steps(self, clients: int, steps: int) -> None:
        """Clients that train in turn."""
        found = [splitfed.SplitClient(self.half, self.url, f"c{number}") for number in range(clients)]
        for _ in range(steps):
            for client in found:
                client(torch.randn(4, 6)).sum().backward()

    def uses(self) -> dict[str, int]:
        """How often graphs were at hand, over all replicas."""
        counts = [server.uses.counts() for server in self.servers]
        return {use: sum(count[use] for count in counts) for use in counts[0]}


@contextmanager
def running_at(port: int, app: Any) -> Iterator[None]:
    """Serve an app at a port."""
    with running(app, at=listener(port)):
        yield


@contextmanager
def balanced(folder: Path, count: int, write: Write) -> Iterator[Fleet]:
    """A fleet while the block runs."""
    fleet = Fleet(folder, count, write)
    with ExitStack() as stack:
        for each in fleet.running:
            stack.enter_context(each)
        fleet.begin()
        stack.enter_context(balancing(fleet.configuration, fleet.url, folder / "nginx"))
        yield fleet


@NGINX
@pytest.mark.parametrize("write", [named, hashed])
def test_behind_a_balancer_backwards_find_their_graphs(write: Write, tmp_path: Path) -> None:
    """All of them, of five clients on three replicas; so do forwards that go on from the last one's buffers."""
    with balanced(tmp_path, 3, write) as fleet:
        fleet.steps(clients=5, steps=2 * CALLS)
        uses = fleet.uses()
        served = [server.uses.counts()["kept"] for server in fleet.servers]
    assert uses["recomputed"] == 0
    assert uses["kept"] == 5 * 2 * CALLS
    assert uses["continued"] <= 2 * 5  # where a client was placed again
    assert all(served), served


@NGINX
def test_a_balancer_without_affinity_costs_recomputes_and_nothing_else(tmp_path: Path) -> None:
    """Each request to the next replica."""
    with balanced(tmp_path, 3, in_turn) as fleet:
        fleet.steps(clients=2, steps=6)
        assert fleet.uses()["recomputed"] > 6
        assert len(fleet.store.waiting()) == 12


@NGINX
@pytest.mark.parametrize("write", [named, hashed])
def test_a_replica_that_leaves_is_no_one_s_end(write: Write, tmp_path: Path) -> None:
    """Its clients go on at the others, in the middle of a key."""
    with balanced(tmp_path, 2, write) as fleet:
        half = CALLS // 2
        clients = [splitfed.SplitClient(fleet.half, fleet.url, f"c{number}") for number in range(4)]
        for step in range(CALLS):
            if step == half:
                fleet.running[0].close()
            for client in clients:
                client(torch.randn(4, 6)).sum().backward()
        assert all(server.uses.counts()["kept"] for server in fleet.servers)
        assert len(fleet.store.waiting()) == 4 * CALLS
