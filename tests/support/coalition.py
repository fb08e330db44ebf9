"""A small federation whose averages can be worked out by hand: halves of one number, and a clock that is told the time.

The model is y = h · b · x with the half's weight h = 1 and the body's b = 1. A client's training is what the test says:
`train("a", to=3)` sets its half's weight, so a client that goes from 1 to 3 publishes -2.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from typing import Any

import torch
from harness_store import hooked, sgd
from torch import nn

from splitfed import Accumulator, CutPoint, Federation, GradientStore, SplitClient, SplitServer
from splitfed.federation.per_client import PerClient
from splitfed.store.rows import Row, plain


class Clock:
    """Tells the time that it was told."""

    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """The time, in seconds."""
        return self.now


def halves() -> tuple[nn.Sequential, nn.Linear]:
    """A half with the weight 1 and a body with the weight 1."""
    bottom, body = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.ones_(bottom.weight)
    nn.init.ones_(body.weight)
    return nn.Sequential(bottom, CutPoint()), body


def coordinator(
    store: GradientStore,
    clock: Any,
    *,
    body: Mapping[str, Any] | None = None,
    half: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Federation:
    """A coordinator with accumulators of its own. With SGD of rate 1 the mean of start - end becomes that of the ends.

    Args:
        store: The store.
        clock: Tells the time.
        body: Settings of the body's accumulator.
        half: Of the halves'.
        settings: Of the federation.
    """
    kind = PerClient if settings.get("mode") == "sflv1" else Accumulator
    bodies: Any = kind(halves()[1], store, sgd(), lock_seconds=0.0, **(body or {}))
    averaging = Accumulator(halves()[0], store, sgd(), lineage="client", lock_seconds=0.0, **(half or {}))
    return Federation(bodies, averaging, **{"deadline": 60.0, "clock": clock, **settings})


class Coalition:
    """A store, its server, accumulators and a coordinator; the clients come when they are asked for."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.clock: Any = settings.pop("clock", None) or Clock()
        self.url, self.settings = url, settings
        self.store = GradientStore(url, sync="process")
        self.server = SplitServer(halves()[1], self.store, per_client=settings.get("mode") == "sflv1")
        self.federation = self.another(self.store)
        self.clients: dict[str, SplitClient] = {}

    @classmethod
    def begun(cls, url: str, *names: str, **settings: Any) -> Coalition:
        """One whose clients are known beforehand, and have pulled within round 1."""
        found = cls(url, clients=names, **settings)
        assert found.federation.open() is not None
        found.pull(*names)
        return found

    def another(self, store: GradientStore | None = None) -> Federation:
        """Another coordinator of the same federation, as a new process would have it."""
        return coordinator(store or GradientStore(self.url, sync="process"), self.clock, **self.settings)

    def another_in(self, mode: Any, **body: Any) -> Federation:
        """A coordinator in some mode, with settings of the body's accumulator."""
        return coordinator(self.store, self.clock, mode=mode, body=body)

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
        self.client(name)(torch.tensor([[x]])).sum().backward()

    def weight(self, lineage: str = "client") -> float:
        """The newest weight of a lineage."""
        (tensor,) = self.store.load_weights(lineage=lineage).values()
        return float(tensor)

    def poll(self) -> Row:
        """The report of a round that is over."""
        report = self.federation.poll()
        assert report is not None, "the round isn't over"
        assert plain(report) == report, "a report is JSON"
        return report


def set_weight(client: nn.Module, value: float) -> None:
    """What local training does."""
    with torch.no_grad():
        for parameter in client.parameters():
            parameter.fill_(value)


def coordinate(url: str, key: str, after: bool, settings: dict[str, Any]) -> None:
    """A process: poll once at second 1,000, and be killed at the creation of a key that begins so."""

    def hook(operation: str, name: str, perform: Any) -> Any:
        if operation != "create" or not name.startswith(key):
            return perform()
        answer = perform() if after else None
        os.kill(os.getpid(), signal.SIGKILL)
        return answer

    coordinator(hooked(url, hook), Clock(1_000.0), **settings).poll()
