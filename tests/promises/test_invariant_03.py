"""Invariant 3, Stateless: between two requests a server, between two commits an accumulator need only the store."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bodies import twice
from harness import Split, Wire, assert_same
from torch import nn

import splitfed

STEPS = 6


def model() -> nn.Module:
    """A body that is called twice in a step, with BatchNorm and dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return twice(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU()))


def optimizer(params: Any) -> torch.optim.Optimizer:
    """Adam: its state must survive, too."""
    return torch.optim.Adam(params, lr=1e-2)


def scheduler(opt: torch.optim.Optimizer) -> Any:
    """A rate that drops in mid-run."""
    return torch.optim.lr_scheduler.MultiStepLR(opt, milestones=[2, 4])


class Rebuilt(Wire):
    """Every request meets a server that was just made, on a store just opened, from a body with weights of its own."""

    url = ""
    made = 0

    def route(self, request: object) -> Any:
        """A new one."""
        self.made += 1
        _, body = splitfed.split(other_weights(), "body")
        return splitfed.SplitServer(body, splitfed.GradientStore(self.url, sync="process"))


def other_weights() -> nn.Module:
    """The same architecture with other weights: the store's must be used."""
    net = model()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(3)
    return net


def train(url: str, *, rebuilt: bool) -> tuple[dict[str, torch.Tensor], Any]:
    """Two clients, six rounds with a commit each; everything at the server's side made anew for each use, or not."""
    Rebuilt.url = url
    torch.manual_seed(5)
    settings: dict[str, Any] = {"optimizer": optimizer, "lr_scheduler": scheduler, "min_batches": 2}
    split = Split(model(), "body", url, wire=Rebuilt if rebuilt else Wire, **settings)
    halves = [splitfed.split(model(), "body")[0] for _ in range(2)]
    clients = [splitfed.SplitClient(half, split.wire, name) for half, name in zip(halves, "ab", strict=True)]
    locals_ = [optimizer(client.parameters()) for client in clients]
    for _ in range(STEPS):
        for client, local in zip(clients, locals_, strict=True):
            local.zero_grad()
            client(torch.randn(4, 6)).pow(2).mean().backward()
            local.step()
        accumulator = split.accumulator
        if rebuilt:
            body = splitfed.split(other_weights(), "body")[1]
            accumulator = splitfed.Accumulator(body, splitfed.GradientStore(url, sync="process"), **settings)
        commit = accumulator.step()
        assert commit is not None
        assert commit.num_batches == 2
    halves_state = {f"{i}.{n}": t for i, half in enumerate(halves) for n, t in half.state_dict().items()}
    return split.store.load_weights() | halves_state, split.wire


@pytest.mark.filterwarnings("ignore:the weights of this body:UserWarning")
def test_servers_and_accumulators_can_be_thrown_away_at_any_time(store_url: str, tmp_path: Path) -> None:
    """Objects rebuilt from the store before every request and every commit end in the bits of those that live on."""
    expected, _ = train(f"memory://{tmp_path.name}-long", rebuilt=False)
    got, wire = train(store_url, rebuilt=True)
    assert wire.made == 2 * STEPS * 4
    assert_same(got, expected)
    assert not torch.equal(expected["0.weight"], model().body[0].weight)


def test_a_replica_that_was_asleep_answers_at_the_newest_version(store_url: str) -> None:
    """A replica that last looked at version 0 serves the next request at version 2, since it asks the store."""
    split = Split(model(), "body", store_url)
    asleep = splitfed.SplitServer(split.body, splitfed.GradientStore(store_url, sync="process"))
    x = torch.randn(4, 6)
    split.client.eval()
    with torch.no_grad():
        split.wire.servers = (asleep,)
        first = split.client(x)
        split.wire.servers = tuple(split.servers)
        split.client.train()
        for _ in range(2):
            with torch.enable_grad():
                split.client(x).sum().backward()
            split.accumulator.step()
        split.client.eval()
        split.wire.servers = (asleep,)
        second = split.client(x)
        whole = splitfed.join(split.half, split.store.load_weights(2)).eval()
        assert torch.equal(second, whole(x))
        assert not torch.equal(first, second)


def test_no_replica_answers_at_a_version_older_than_the_client_has_seen(tmp_path: Path) -> None:
    """A replica on a store that lags behind (a stale copy) refuses, instead of answering with old weights."""
    split = Split(model(), "body", tmp_path / "now")
    split.client(torch.randn(4, 6)).sum().backward()
    shutil.copytree(tmp_path / "now", tmp_path / "old")
    split.accumulator.step()
    split.client(torch.randn(4, 6)).sum().backward()
    behind = splitfed.SplitServer(split.body, splitfed.GradientStore(str(tmp_path / "old"), sync="process"))
    split.wire.servers = (behind,)
    with pytest.raises(splitfed.StoreError, match="seen 1"):
        split.client(torch.randn(4, 6))
    with torch.no_grad(), pytest.raises(splitfed.StoreError, match="seen 1"):
        split.client(torch.randn(4, 6))
