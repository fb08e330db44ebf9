"""Invariant 1, Transparent: the split model has the reference's bits, whichever replica serves which request."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from bodies import twice
from harness import Split, Wire, adam, assert_same, assert_step, pair
from torch import nn

import splitfed


class Anywhere(Wire):
    """Each request goes to a replica chosen by lot."""

    def __init__(self, *servers: Any) -> None:
        super().__init__(*servers)
        self.lots = random.Random(3)
        self.paths: set[tuple[str, int]] = set()

    def route(self, request: object) -> Any:
        """By lot."""
        number = self.lots.randrange(len(self.servers))
        self.paths.add((type(request).__name__, number))
        return self.servers[number]


@pytest.mark.parametrize("keep_graphs", [0, 1, 8])
def test_requests_may_go_to_any_replica(keep_graphs: int, tmp_path: Path) -> None:
    """Two calls a step of a body with BatchNorm and dropout, four replicas: each step has the reference's bits."""
    model = twice(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU()))
    split, reference = pair(model, tmp_path, wire=Anywhere, replicas=4, keep_graphs=keep_graphs)
    local, plain = adam(split.client.parameters()), adam(reference.parameters())
    for _ in range(8):
        assert_step(split, reference, ((torch.randn(5, 6),), {}))
        local.step()
        plain.step()
        split.accumulator.step()
        assert_same(split.state(), reference.state_dict())
    assert len(split.wire.paths) == 8  # forwards and backwards, at each of the four


def test_replicas_on_a_store_of_another_run_are_refused(tmp_path: Path) -> None:
    """A replica with another store can't serve the backward: it says so, and nothing is counted there."""
    model = twice(nn.Linear(8, 8))
    split, other = (Split(model, "body", tmp_path / name) for name in "ab")
    outputs = split.client(torch.randn(5, 6))
    split.wire.servers = (other.servers[0],)
    with pytest.raises(splitfed.SupersededError, match="never opened"):
        outputs.sum().backward()
    assert other.waiting() == []
