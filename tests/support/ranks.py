"""Ranks of a data-parallel run, each a process with a client of its own under `DistributedDataParallel`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, distributed, nn

import splitfed
from splitfed.accumulator.accumulator import Accumulator
from splitfed.client.client import SplitClient
from splitfed.model.cut import split
from splitfed.server.server import SplitServer
from splitfed.store.store import GradientStore

STEPS = 2


def model() -> nn.Module:
    """8 to 2, the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))


def examples() -> tuple[Tensor, Tensor]:
    """Inputs (2, 4, 8) and targets (2, 4, 2): a batch for each rank."""
    drawn = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 8, generator=drawn), torch.randn(2, 4, 2, generator=drawn)


def rank(number: int, place: Path) -> None:
    """Two steps of one rank of two; the first commits after each, and both leave their half's weights."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{place}/group", rank=number, world_size=2)
    half, body = split(model(), "2")
    store = GradientStore(place / "store", sync="process")
    client = SplitClient(half, SplitServer(body, store), client_id=f"rank-{number}")
    parallel = nn.parallel.DistributedDataParallel(client)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    inputs, targets = examples()
    counted = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.mse_loss(parallel(inputs[number]), targets[number]).backward()
        optimizer.step()
        distributed.barrier()
        if number == 0:
            commit = Accumulator(body, store, lambda params: torch.optim.SGD(params, lr=0.1)).step()
            assert commit is not None
            counted.append((commit.num_batches, commit.num_samples))
        distributed.barrier()
    whole = splitfed.join(client, store.load_weights())
    torch.save({"weights": whole.state_dict(), "counted": counted}, place / f"{number}.pt")
    distributed.destroy_process_group()
