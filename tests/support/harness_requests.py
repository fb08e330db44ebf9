"""Requests made by hand, and a small site to send them to: for tests of the protocol itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from splitfed.accumulator.accumulator import Accumulator
from splitfed.protocol.messages import BackwardRequest, Chain, ForwardAnswer, ForwardRequest, Seal
from splitfed.server.server import SplitServer
from splitfed.store.commit import Commit
from splitfed.store.store import GradientStore

X = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
ONES = torch.ones(2, 2)
SEAL = Seal((), 2.0, 1.0, (Chain(2.0, 0),))


def body() -> nn.Linear:
    """`x -> 2x` on two features."""
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2) * 2)
    return layer


class Site:
    """A store, two replicas that keep no graph, and one that does."""

    def __init__(self, url: str, *, of_norm: bool = False, **settings: Any) -> None:
        self.store = GradientStore(url, sync="process")
        self.body = nn.Sequential(body(), nn.BatchNorm1d(2)) if of_norm else body()
        self.server = SplitServer(self.body, self.store, keep_graphs=0, **settings)
        self.other = SplitServer(self.body, self.store, keep_graphs=0, **settings)
        self.cached = SplitServer(self.body, self.store, **settings)

    def forward(self, server: SplitServer | None = None, **changes: Any) -> ForwardAnswer:
        """A recorded call number 0 of a client's first process."""
        return (server or self.server).forward(ahead(**changes))

    def commit(self) -> Commit:
        """Fold what waits."""
        commit = Accumulator(
            self.body, self.store, lambda p: torch.optim.SGD(p, lr=1.0), keep_versions=2, keep_bytes=0
        ).step()
        assert commit is not None
        return commit


def ahead(**changes: Any) -> ForwardRequest:
    """A request for a forward."""
    made: dict[str, Any] = {
        "client_id": "a",
        "incarnation": None,
        "process": "first",
        "call": 0,
        "cut": "",
        "inputs": ((X,), {}),
        "requires_grad": (True,),
        "training": True,
        "grad": True,
        "seed": 7,
        "autocast": None,
        "version": None,
        "seen": 0,
        "previous": None,
    }
    return ForwardRequest(**{**made, **changes})


def back(**changes: Any) -> BackwardRequest:
    """The request for its backward, sealed."""
    made: dict[str, Any] = {"client_id": "a", "incarnation": 1, "seq": 0, "part": 0, "version": 0, "call": 0}
    return BackwardRequest(**{**made, "grad_outputs": (ONES,), "seal": SEAL, **changes})
