"""A problem so small that a whole federation of it runs in a test, and what its clients own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from splitfed.simulation.data import deal
from splitfed.simulation.launch import simulate
from splitfed.simulation.run import Simulation
from splitfed.simulation.settings import LocalTraining, Processes, RoundSchedule

AT = "1:3"
LOCAL = {field.name for field in fields(LocalTraining)}
SCHEDULE = {field.name for field in fields(RoundSchedule)}
sgd = functools.partial(torch.optim.SGD, lr=0.5)
adam = functools.partial(torch.optim.Adam, lr=0.05)


def model(dropout: float = 0.0) -> nn.Module:
    """4–6 | 6–6 | 6–3, the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Dropout(dropout), nn.Linear(6, 3))


def examples(number: int = 24) -> tuple[Tensor, Tensor]:
    """Inputs (N, 4), and as labels (N,) which of the first three is the largest."""
    inputs = torch.randn(number, 4, generator=torch.Generator().manual_seed(1))
    return inputs, inputs[:, :3].argmax(1)


def clients(number: int = 3, each: int = 8) -> dict[str, Any]:
    """So many clients with so many examples each."""
    return dict(deal(examples(number * each), list(torch.arange(number * each).split(each))))


def run(**settings: Any) -> Simulation:
    """A simulation of these, with some settings of one's own."""
    usual: dict[str, Any] = {
        "model": model(),
        "at": AT,
        "clients": clients(),
        "loss_fn": cross_entropy,
        "optimizer": sgd,
        "server_optimizer": adam,
        "rounds": 2,
        "batch_size": 4,
    }
    return simulate(**grouped({**usual, **settings}))


def grouped(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by their own names, in the groups in which `simulate` takes them."""
    local = {name: settings.pop(name) for name in LOCAL & settings.keys()}
    schedule = {name: settings.pop(name) for name in SCHEDULE & settings.keys()}
    workers, virtual = settings.pop("workers", 0), settings.pop("virtual", None)
    history = settings.pop("history", None)
    callbacks = settings.pop("callbacks", ())
    if history is not None:
        callbacks = [history, *callbacks]
    return {
        **settings,
        "local": LocalTraining(**local),
        "schedule": RoundSchedule(**schedule),
        "engine": Processes(workers) if workers else virtual,
        "callbacks": callbacks,
    }


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same bits."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


class Killed(BaseException):
    """The process that would have died here."""


def dying(batches: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss in whose computation the process dies after so many batches."""
    done = iter(range(batches))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if next(done, None) is None:
            raise Killed
        return cross_entropy(outputs, targets)

    return loss
