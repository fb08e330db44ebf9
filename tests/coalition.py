"""A small federation whose averages can be worked out by hand: halves of one number, and a clock that is told the time.

The model is y = h · b · x with the half's weight h = 1 and the body's b = 1. A client's training is what the test says:
`train(to)` sets its half's weight, so a client that goes from 1 to 3 publishes -2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from splitfed import Accumulator, Federation, GradientStore, SplitClient, SplitServer
from splitfed.rows import Row


class Clock:
    """Tells the time that it was told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """The time, in seconds."""
        return self.now


def halves() -> tuple[nn.Sequential, nn.Linear]:
    """A half with the weight 1 and a body with the weight 1."""
    from splitfed import CutPoint

    bottom, body = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.ones_(bottom.weight)
    nn.init.ones_(body.weight)
    return nn.Sequential(bottom, CutPoint()), body


def sgd(params: Any) -> torch.optim.Optimizer:
    """SGD with rate 1: a mean of start - end becomes the mean of the ends; a mean gradient is subtracted as it is."""
    return torch.optim.SGD(params, lr=1.0)


class Coalition:
    """A store, its server, accumulators and a coordinator."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.url = url
        self.store = GradientStore(url, sync="process")
        half, body = halves()
        self.server = SplitServer(body, self.store)
        self.accumulators = (
            Accumulator(body, self.store, sgd),
            Accumulator(half, self.store, sgd, lineage="client"),
        )
        self.clock = Clock()
        self.settings: dict[str, Any] = {"deadline": 60.0, "clock": self.clock, **settings}
        self.federation = Federation(*self.accumulators, **self.settings)
        self.clients: dict[str, SplitClient] = {}

    def client(self, name: str) -> SplitClient:
        """A client of that name; the one that was asked for before, if any."""
        if name not in self.clients:
            self.clients[name] = SplitClient(halves()[0], self.server, name)
        return self.clients[name]

    def restart(self, name: str) -> SplitClient:
        """The same client in a new process."""
        self.clients.pop(name, None)
        return self.client(name)

    def pull(self, *names: str) -> None:
        """Let clients pull."""
        for name in names:
            self.client(name).pull()

    def train(self, name: str, to: float, num_samples: float = 1) -> None:
        """Let a client's half learn the weight `to`, and push."""
        set_weight(self.client(name), to)
        self.client(name).push(num_samples)

    def batch(self, name: str, x: float) -> None:
        """One batch of a client: the loss is the output, so the body's gradient is h · x."""
        client = self.client(name)
        client(torch.tensor([[x]])).sum().backward()

    def weight(self, lineage: str = "client") -> float:
        """The newest weight of a lineage."""
        (tensor,) = self.store.load_weights(lineage=lineage).values()
        return float(tensor)

    def poll(self) -> Row | None:
        """Poll the coordinator."""
        return self.federation.poll()


def set_weight(client: SplitClient, value: float) -> None:
    """What local training does."""
    with torch.no_grad():
        for parameter in client.parameters():
            parameter.fill_(value)
