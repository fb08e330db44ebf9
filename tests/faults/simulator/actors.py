"""The actors: what each process of a run does, until it is killed or the run ends."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from tests.faults.simulator import account, model
from tests.faults.simulator.network import Network
from tests.faults.simulator.plan import Plan
from tests.faults.simulator.process import Process
from torch import Tensor

from splitfed.client.client import SplitClient
from splitfed.errors import (
    AlreadyAppliedError,
    CorruptedError,
    DigestError,
    ExpiredError,
    InputError,
    SplitFedError,
    StoreError,
    SupersededError,
    UnreachableError,
)
from splitfed.server.server import SplitServer
from splitfed.store.batchset import BatchSet, Verdict
from splitfed.store.store import GradientStore

if TYPE_CHECKING:
    from tests.faults.simulator.world import World

RESTARTED = ("server", "accumulator", "client", "reader", "sweeper", account.NAME)
"""Roles whose processes are started again when they die."""

_PATIENCE = 40
"""How often clients look whether an accumulator has got through before they go on."""


def cast(plan: Plan) -> Iterator[str]:
    """The roles of a run."""
    for role, number in (("server", plan.servers), ("accumulator", plan.accumulators), ("client", plan.clients)):
        yield from (f"{role}-{place}" for place in range(number))
    yield "reader"
    if plan.rollbacks:
        yield "operator"
    if plan.has_sweeper:
        yield "sweeper"
    if plan.has_hostile:
        yield account.NAME


def act(role: str, process: Process) -> None:
    """Be a process of a role."""
    acts: dict[str, Callable[[str, Process], None]] = {
        "server": serve,
        "accumulator": accumulate,
        "client": train,
        "reader": read,
        "operator": roll_back,
        "sweeper": sweep,
        account.NAME: account.attack,
    }
    acts[role.split("-")[0]](role, process)


def opened(process: Process, make: Callable[[GradientStore], Any]) -> Any:
    """Make something on the store, and again until the storage lets it."""
    while True:
        try:
            return make(process.world.open(process))
        except StoreError:
            process.pause(5)


class Server:
    """A server that is up."""

    def __init__(self, process: Process, app: SplitServer) -> None:
        self.process = process
        self.app = app


def serve(role: str, process: Process) -> None:
    """Come up; requests are served by threads of their own."""
    plan = process.world.plan

    def make(store: GradientStore) -> SplitServer:
        return SplitServer(model.body_of(plan), store, loss_fn=model.loss_fn, keep_graphs=plan.keep_graphs)

    app = opened(process, make)
    process.world.servers.append(Server(process, app))


def accumulate(role: str, process: Process) -> None:
    """Commit, now and then only what was decided on, as the end of a round does."""
    world = process.world
    least = process.choose.choice((1, 1, 2, 3))
    accumulator = opened(process, lambda store: world.accumulator(store, least))
    while world.is_stormy:
        if not world.ledger.num_open and process.choose.random() < 0.8:
            process.pause(20)  # it would look in vain, which takes most of the time of a run
            continue
        try:
            only = None
            if process.choose.random() < 0.15:
                found = accumulator.store.waiting()
                only = Verdict(folded=BatchSet(batch for batch in found if process.choose.random() < 0.5))
            made = accumulator.step(only=only)
        except CorruptedError:
            raise
        except StoreError:
            made = None
        process.pause(1 + int(process.choose.random() * (20 if made else 100)))


def read(role: str, process: Process) -> None:
    """Read the newest version: it must be whole, and never older than the last."""
    world, ledger = process.world, process.world.ledger
    store, newest = world.open(process), -1
    while world.is_stormy:
        with contextlib.suppress(StoreError):
            version = store.latest_version()
            if version < newest:
                ledger.fail(f"a reader is at version {version} after {newest}")
            newest = version
            try:
                found = store.load_weights(version)
            except ExpiredError:
                if version > ledger.head - world.plan.keep_versions:
                    ledger.fail(f"a reader can't read version {version} at {ledger.head}")
                continue
            expected = ledger.weights[version]
            if any(not torch.equal(tensor, expected[name]) for name, tensor in found.items()):
                ledger.fail(f"a reader has read other weights of version {version}")
        process.pause(20 + int(process.choose.random() * 120))


def sweep(role: str, process: Process) -> None:
    """Collect garbage beside the accumulators."""
    world = process.world
    lineage = world.open(process).lineage()
    while world.is_stormy:
        with contextlib.suppress(StoreError):
            lineage.sweep(world.plan.keep_versions)
        process.pause(50 + int(process.choose.random() * 200))


def roll_back(role: str, process: Process) -> None:
    """Go back to an older version now and then."""
    world, ledger = process.world, process.world.ledger
    store = world.open(process)
    for _ in range(world.plan.rollbacks):
        process.pause(150 + int(process.choose.random() * 600))
        if not world.is_stormy or ledger.head < 2:
            continue
        wanted = max(0, ledger.head - 1 - int(process.choose.random() * world.plan.keep_versions))
        try:
            lost = store.rollback(wanted)
        except (StoreError, ExpiredError):
            continue
        except InputError:
            if wanted < ledger.head:
                raise
            continue
        _check_lost(world, wanted, lost)


def _check_lost(world: World, wanted: int, lost: list[str]) -> None:
    ledger = world.ledger
    made = next(commit for commit in reversed(ledger.commits) if commit.restored == wanted)
    undone = ledger.ancestors(made.version - 1) - ledger.ancestors(wanted)
    expected = {str(batch) for version in undone for batch in ledger.commits[version].folded}
    if set(lost) != expected:
        ledger.fail(f"the rollback to {wanted} lists {sorted(lost)} as lost: expected {sorted(expected)}")


def train(role: str, process: Process) -> None:
    """Train as a user does, until the run ends; a process that is refused makes room for a new one."""
    world = process.world
    client = SplitClient(model.half_of(world.plan), Network(process, process.choose.choice((1, 3, 4))), role)
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
        except (_InterruptedError, StoreError, UnreachableError, ExpiredError, AlreadyAppliedError):
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
