"""Clients: what users do with the half, from batch to batch, and what becomes of their processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from tests.faults.simulator import model
from tests.faults.simulator.network import Network
from tests.faults.simulator.process import Process
from torch import Tensor

from splitfed.client.client import SplitClient
from splitfed.errors import (
    AlreadyAppliedError,
    DigestError,
    ExpiredError,
    FormatError,
    SplitFedError,
    StoreError,
    SupersededError,
    UnreachableError,
)

_PATIENCE = 40
"""How often clients look whether an accumulator has got through before they go on."""


def train(role: str, process: Process) -> None:
    """Train as a user does, until the run ends; a process that is refused makes room for a new one."""
    world = process.world
    network = Network(process, process.choose.choice((1, 3, 4)))
    scale = process.choose.choice((1.0, 1.0, 3.0)) if world.plan.is_log else 1.0
    client = SplitClient(model.half_of(world.plan), network, role, loss_scale=scale)
    _train(role, process, client)


def _train(role: str, process: Process, client: SplitClient) -> None:
    world = process.world
    while world.is_stormy:
        for _ in range(_PATIENCE):
            if world.ledger.num_open >= world.plan.most_pending:
                process.pause(20)
        try:
            _batch(client, process)
        except (SupersededError, DigestError):
            process.kill()
            return
        except (_InterruptedError, StoreError, FormatError, UnreachableError, ExpiredError, AlreadyAppliedError):
            pass
        except SplitFedError as error:
            if not client._connection.transport.is_forked:
                world.ledger.fail(f"{process.name} ended with {error!r}", error)
        _step(client)
        if world.plan.has_fork and process.choose.random() < 0.15:
            _fork(role, process, client)
        elif process.choose.random() < 0.03 and world.is_alone(role, process):
            world.start(role)  # an operator takes it for dead


def _step(client: SplitClient) -> None:
    """Step the half's optimizer; what isn't finite is left out, as GradScaler does."""
    for parameter in client.client_half.parameters():
        if parameter.grad is not None:
            parameter.data -= 0.05 * parameter.grad.nan_to_num(0.0, 0.0, 0.0)
            parameter.grad = None


def _fork(role: str, process: Process, client: SplitClient) -> None:
    """Have a second process that is what this one is, as a restored snapshot of a machine would be."""
    world = process.world
    network: Any = client._connection.transport
    if client._connection.incarnation is None or not world.is_alone(role, process):
        return
    half = copy.deepcopy(client.client_half)
    numbers = {
        name: copy.deepcopy(value)
        for name, value in vars(client._connection).items()
        if name in ("process", "incarnation", "seen") or (isinstance(value, dict | list) and name != "_live")
    }

    def go_on(other: Process) -> None:
        # Made in its own process: what it draws from the system is not what its twin draws.
        twin = SplitClient(half, Network(other, network._tries), role)
        own: Any = twin._connection
        own.transport.is_forked = True
        own.transport.calls = dict(network.calls)
        vars(own).update(numbers)
        _train(role, other, twin)

    network.is_forked = True
    world.fork(role, go_on)
    world.faults.append(f"fork:{process.name}")


class _InterruptedError(RuntimeError):
    """The user's own code failed in the middle of a backward pass."""


def _batch(client: SplitClient, process: Process) -> None:
    """One of the things that users do."""
    choose = process.choose
    kind = choose.choices(tuple(_KINDS), [weight for weight, _ in _KINDS.values()])[0]
    _KINDS[kind][1](client, process)


def _data(process: Process) -> tuple[Tensor, Tensor]:
    number = 2 + int(process.choose.random() * 3)
    values = [process.choose.uniform(-2.0, 2.0) for _ in range(number * (model.INPUTS + model.OUTPUTS))]
    rows = torch.tensor(values, dtype=model.DTYPE).view(number, -1)
    return rows[:, : model.INPUTS], rows[:, model.INPUTS :]


def _plain(client: SplitClient, process: Process) -> None:
    x, y = _data(process)
    model.loss_fn(client(x), y).backward()


def _two_calls(client: SplitClient, process: Process) -> None:
    (x, y), (more, others) = _data(process), _data(process)
    (model.loss_fn(client(x), y) + model.loss_fn(client(more), others)).backward()


def _summed(client: SplitClient, process: Process) -> None:
    with client.batch():
        for _ in range(2):
            _plain(client, process)


def _one_trip(client: SplitClient, process: Process) -> None:
    x, y = _data(process)
    client.loss(x, y).backward()


def _infinite(client: SplitClient, process: Process) -> None:
    x, y = _data(process)
    (model.loss_fn(client(x), y) * torch.inf).backward()


def _twice(client: SplitClient, process: Process) -> None:
    x, y = _data(process)
    loss = model.loss_fn(client(x), y)
    loss.backward(retain_graph=True)
    loss.backward()


def _unused(client: SplitClient, process: Process) -> None:
    client(_data(process)[0])


def _evaluated(client: SplitClient, process: Process) -> None:
    with torch.no_grad():
        client(_data(process)[0])


def _interrupted(client: SplitClient, process: Process) -> None:
    def fail(gradient: Tensor) -> Tensor:
        if made:
            raise _InterruptedError
        made.append(gradient)
        return gradient

    made: list[Tensor] = []
    outputs = [client(_data(process)[0]) for _ in range(2)]
    for output in outputs:
        output.register_hook(fail)
    (outputs[0].sum() + outputs[1].sum()).backward()


_KINDS: dict[str, tuple[int, Callable[[SplitClient, Process], None]]] = {
    "plain": (42, _plain),
    "two calls": (14, _two_calls),
    "summed": (14, _summed),
    "one trip": (14, _one_trip),
    "infinite": (3, _infinite),
    "twice": (5, _twice),
    "unused": (5, _unused),
    "evaluated": (4, _evaluated),
    "interrupted": (5, _interrupted),
}
