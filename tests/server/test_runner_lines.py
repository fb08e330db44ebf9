"""Which line of versions answers a client: the shared body, or one of its own that begins at its first call."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import torch
from harness import Apart
from torch import nn

import splitfed
from splitfed.errors import InputError, MissingError, SupersededError
from splitfed.protocol.messages import BackwardRequest, Housekeeping


def sgd(params: Any) -> torch.optim.Optimizer:
    """Rate one half."""
    return torch.optim.SGD(params, lr=0.5)


def body() -> nn.Module:
    """The number 1, and half of what comes out dropped."""
    made = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Dropout(0.5))
    nn.init.ones_(made[0].weight)
    return made


def square(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean squared error."""
    return (outputs - target).pow(2).mean()


class Site:
    """A store, servers with a body per client, and clients of them."""

    def __init__(self, **settings: Any) -> None:
        self.store = splitfed.GradientStore(f"memory://{uuid.uuid4()}")
        self.servers = [
            splitfed.SplitServer(body(), self.store, per_client=True, loss_fn=square, **settings) for _ in range(2)
        ]

    def client(self, name: str, server: Any = None) -> splitfed.SplitClient:
        """A client; of the first server if no other is given."""
        half = nn.Sequential(nn.Linear(1, 1, bias=False), splitfed.CutPoint())
        return splitfed.SplitClient(half, server or self.servers[0], name)

    def waiting(self, lineage: str) -> list[str]:
        """The batches that wait on a lineage."""
        return [str(batch) for batch in self.store.waiting(lineage)]


def test_each_client_has_a_pile_and_versions_of_its_own() -> None:
    """Batches of a and b wait apart, and on `body` nothing does."""
    site = Site()
    a, b = site.client("a"), site.client("b")
    for client in (a, b, a):
        client(torch.ones(2, 1)).sum().backward()
    assert [site.waiting(name) for name in ("body", "body@a", "body@b")] == [[], ["a/1/0", "a/1/1"], ["b/1/0"]]
    assert site.store.load_weights(lineage="body@a").keys() == body().state_dict().keys()


def test_any_replica_answers_any_call_of_any_line() -> None:
    """A forward here and its backward there: recomputed with the same bits on the client's own line."""
    site = Site(keep_graphs=0)
    client = site.client("a", Apart(*site.servers))
    x = torch.ones(8, 1, requires_grad=True)
    client(x).sum().backward()
    assert x.grad is not None
    assert site.waiting("body@a") == ["a/1/0"]
    assert site.store.blobs.list("body/grad") == []


def test_several_cut_calls_make_one_batch_of_the_line() -> None:
    """Parts and seal of one pass go to one pile."""
    site = Site()
    client = site.client("a")
    (client(torch.ones(2, 1)).sum() + client(torch.ones(3, 1)).sum()).backward()
    (batch,) = site.store.waiting("body@a")
    record = site.store.pile("body@a").read(batch)
    assert record is not None
    assert record.num_samples == 5


def test_a_loss_in_one_trip_runs_on_the_clients_line() -> None:
    """Its batch waits there."""
    site = Site()
    site.client("a").loss(torch.ones(2, 1), torch.zeros(2, 1)).backward()
    assert (site.waiting("body"), site.waiting("body@a")) == ([], ["a/1/0"])


def test_a_line_begins_from_the_newest_body() -> None:
    """A client that comes after a commit of `body` starts there, and stays while `body` goes on."""
    site = Site()
    shared = splitfed.SplitServer(body(), site.store)
    for expected in (1, 2):
        splitfed.SplitClient(nn.Sequential(splitfed.CutPoint()), shared, "z")(torch.ones(2, 1)).sum().backward()
        splitfed.Accumulator(body(), site.store, sgd).step()
        with torch.no_grad():
            site.client("a").eval()(torch.ones(1, 1))
        assert site.store.latest_version() == expected
    line = site.store.lineage("body@a")
    assert (line.head(), line.commit(0).source) == (0, 1)
    assert torch.equal(line.state(0)["0.weight"], site.store.load_weights(1)["0.weight"])


def test_more_clients_than_lines_are_kept() -> None:
    """A line that was dropped from memory is opened anew: the same batches, exactly."""
    site = Site()
    clients = [site.client(f"c{number:02}") for number in range(40)]
    outputs = [client(torch.ones(2, 1)) for client in clients]
    for output in outputs:
        output.sum().backward()
    assert len(site.servers[0]._lines._own._entries) == 16
    assert all(site.waiting(f"body@{client.client_id}") for client in clients)


def test_a_backward_before_any_forward_is_refused() -> None:
    """By a client that never came, and by one that only pushes."""
    site = Site()

    def request() -> BackwardRequest:
        return BackwardRequest("a", 1, 0, 0, 0, 0, (torch.ones(1),), None, Housekeeping())

    with pytest.raises(SupersededError):
        site.servers[0].backward(request())
    site.store.open_client("a", "one")
    with pytest.raises(MissingError, match="client 'a' has no body of its own yet: its first forward begins it"):
        site.servers[0].backward(request())


def test_lines_of_their_own_begin_from_body_only() -> None:
    """Another lineage can't be the source of them."""
    store = splitfed.GradientStore(f"memory://{uuid.uuid4()}")
    with pytest.raises(InputError, match="per_client=True with lineage='body@a': each client's line begins from"):
        splitfed.SplitServer(body(), store, lineage="body@a", per_client=True)


def test_the_store_lists_its_clients() -> None:
    """All that ever opened a process, in order; what isn't a client's key is none."""
    site = Site()
    for name in ("b", "a", "b"):
        site.client(name)(torch.ones(1, 1)).sum().backward()
    site.store.blobs.create("clients/a=b/00000001", [b"{}"])
    assert site.store.clients() == ["a", "b"]
