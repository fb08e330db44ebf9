"""One half that several clients train without a copy: a warning, once, and none where it is meant."""

from __future__ import annotations

import copy
import uuid
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import sgd
from torch import nn

import splitfed

X = torch.ones(2, 3)


class Site:
    """A server, and a half for all."""

    def __init__(self) -> None:
        self.half, body = splitfed.split(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)), "1")
        self.server = splitfed.SplitServer(body, splitfed.GradientStore(f"memory://{uuid.uuid4().hex}", sync="process"))
        self.a, self.b = self.client("a", self.half), self.client("b", self.half)

    def client(self, name: str, half: nn.Module) -> splitfed.SplitClient:
        """A client of a half."""
        return splitfed.SplitClient(half, self.server, name)


def train(client: splitfed.SplitClient, optimizer: torch.optim.Optimizer | None = None) -> None:
    """One batch, and a step on it."""
    client.zero_grad()
    client(X).sum().backward()
    (optimizer or sgd(client.parameters())).step()


def turns(ways: list[Any]) -> None:
    """One after another."""
    for way in ways:
        train(*way)


@pytest.mark.parametrize("make", [sgd, lambda p: torch.optim.Adam(list(p)), lambda p: torch.optim.AdamW(list(p))])
def test_a_second_client_that_goes_on_from_the_firsts_step_is_warned_of_once(make: Callable[[Any], Any]) -> None:
    """With an optimizer each, in turns, as a loop over clients does; what to do is said."""
    site = Site()
    ways = [(client, make(client.parameters())) for client in (site.a, site.b)]
    train(*ways[0])
    with pytest.warns(UserWarning, match=r"'a' and 'b' train one client half.*copy.deepcopy\(half\)") as caught:
        turns(ways[::-1] * 3)
    assert len(caught) == 1


def test_the_warning_can_be_an_error() -> None:
    """The loop's own filters hold."""
    site = Site()
    train(site.a)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="one client half"):
            train(site.b)


def pulls(site: Site) -> None:
    """Each client begins with what all have."""
    for client in (site.a, site.b, site.a):
        client.pull()
        train(client)
        client.push()


def loads(site: Site) -> None:
    """Each goes on from weights of its own, loaded by hand."""
    states = {client.client_id: copy.deepcopy(site.half.state_dict()) for client in (site.a, site.b)}
    for client in (site.a, site.b, site.a):
        site.half.load_state_dict(states[client.client_id])
        train(client)
        states[client.client_id] = copy.deepcopy(site.half.state_dict())


def writes(site: Site) -> None:
    """The same past autograd."""
    start = [parameter.detach().clone() for parameter in site.half.parameters()]
    for client in (site.a, site.b, site.a):
        for parameter, value in zip(site.half.parameters(), start, strict=True):
            parameter.data = value.clone()
        train(client)


def joint(site: Site) -> None:
    """One step on the batches of all."""
    optimizer = sgd(site.half.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        for client in (site.a, site.b):
            client(X).sum().backward()
        optimizer.step()


def copies(site: Site) -> None:
    """Each has its own."""
    for client in (site.client("c", copy.deepcopy(site.half)), site.client("d", copy.deepcopy(site.half))) * 2:
        train(client)


def gradients(site: Site) -> None:
    """Synchronous: nobody steps on the half, others step elsewhere."""
    site.a.pull()
    for client in (site.a, site.b, site.a):
        client.pull()
        client.zero_grad()
        client(X).sum().backward()
        client.push(gradient=True)
        sgd(nn.Linear(1, 1).parameters()).step()


def one_client(site: Site) -> None:
    """One that trains, and one that evaluates."""
    for _ in range(3):
        train(site.a)
        with torch.no_grad():
            site.b(X)


def restarted(site: Site) -> None:
    """Two objects of one client."""
    train(site.a)
    train(site.client("a", site.half))


@pytest.mark.parametrize("way", [pulls, loads, writes, joint, copies, gradients, one_client, restarted])
def test_a_half_that_serves_many_clients_on_purpose_is_none(way: Callable[[Site], None]) -> None:
    """Not a word; warnings are errors here."""
    way(Site())


def test_a_half_that_trains_nothing_is_none() -> None:
    """What is shared can't go wrong."""
    site = Site()
    site.half.requires_grad_(False)
    other = nn.Parameter(torch.ones(3))
    for client in (site.a, site.b, site.a):
        client(X * other).sum().backward()
        torch.optim.SGD([other], lr=0.1).step()
