"""The actors: what each process of a run does, until it is killed or the run ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from tests.faults.simulator import account, model, training
from tests.faults.simulator.plan import Plan
from tests.faults.simulator.process import Process

from splitfed.errors import (
    CorruptedError,
    ExpiredError,
    FormatError,
    InputError,
    StoreError,
)
from splitfed.server.server import SplitServer
from splitfed.store.batchset import BatchSet, Verdict
from splitfed.store.store import GradientStore

if TYPE_CHECKING:
    from tests.faults.simulator.world import World

RESTARTED = ("server", "accumulator", "client", "reader", "sweeper", "asker", account.NAME)
"""Roles whose processes are started again when they die."""


def cast(plan: Plan) -> Iterator[str]:
    """The roles of a run."""
    for role, number in (("server", plan.servers), ("accumulator", plan.accumulators), ("client", plan.clients)):
        yield from (f"{role}-{place}" for place in range(number))
    yield "reader"
    if plan.rollbacks:
        yield "operator"
    if plan.has_sweeper:
        yield "sweeper"
    if plan.is_log:
        yield "asker"
    if plan.has_hostile:
        yield account.NAME


def act(role: str, process: Process) -> None:
    """Be a process of a role."""
    acts: dict[str, Callable[[str, Process], None]] = {
        "server": serve,
        "accumulator": accumulate,
        "client": training.train,
        "reader": read,
        "operator": roll_back,
        "sweeper": sweep,
        "asker": ask,
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
        settings = {"loss_fn": model.loss_fn, "keep_graphs": plan.keep_graphs, "durability": plan.durability}
        return SplitServer(model.body_of(plan), store, **settings)

    app = opened(process, make)
    process.world.servers.append(Server(process, app))
    if plan.is_attended and role == "server-0":
        process.start(lambda: accumulate(role, process, app.store), "accumulator")


def accumulate(role: str, process: Process, shared: GradientStore | None = None) -> None:
    """Commit, now and then only what was decided on, as the end of a round does; on a server's store, if given."""
    world = process.world
    least = min(process.choose.choice((1, 1, 2, 3)), world.plan.most_pending)
    accumulator = opened(process, lambda store: world.accumulator(shared or store, least))
    while world.is_stormy:
        if world.ledger.num_open < least and process.choose.random() < 0.9:
            process.pause(8)  # it would look in vain, which takes most of the time of a run
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
        process.pause(1 + int(process.choose.random() * (8 if made else 30)))


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
    store = world.open(process)
    while world.is_stormy:
        with contextlib.suppress(StoreError):
            store.lineage().sweep(world.plan.keep_versions)
        process.pause(50 + int(process.choose.random() * 200))


def ask(role: str, process: Process) -> None:
    """Ask servers for their sums and commit nothing, as an accumulator that dies in between."""
    world = process.world
    store = world.open(process)
    while world.is_stormy:
        with contextlib.suppress(StoreError, FormatError):
            headers = (store.pile().peek(batch) for batch in store.waiting())
            holders = {str(header["holder"]) for header in headers if header is not None and header["holder"]}
            for holder in sorted(holders):
                store.blobs.put(store.lineage().keys.ask(holder), [b"{}"])
        process.pause(30 + int(process.choose.random() * 90))


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
