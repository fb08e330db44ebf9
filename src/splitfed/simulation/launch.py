"""A whole federation in one process: real clients, servers, accumulators and rounds, in turns or in virtual time.

What differs from production is who drives the clients, and nothing else: each trains with a `SplitClient` against a
`SplitServer`, each update goes through the store, each round is a `Federation`'s. A client's model and optimizer exist
only while it is active, so a thousand clients of which ten train at once need the memory of ten.

The same arguments give the same bits: a client draws from a stream of its own, and who makes which request when is
fixed by the schedule.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from splitfed.accumulator.policies import Mode
from splitfed.accumulator.policies import mode as mode_of
from splitfed.accumulator.settings import OptimizerFactory, SchedulerFactory
from splitfed.blobs.contract import Blobs
from splitfed.checks import at_least
from splitfed.errors import InputError
from splitfed.federation.admission import check_sample_size, sample_size
from splitfed.model.cut import split
from splitfed.simulation import data as localdata
from splitfed.simulation.assembly import Assembly, Plans
from splitfed.simulation.client import LossFunction, Optimizers, Recipe
from splitfed.simulation.data import Data
from splitfed.simulation.engines.processes import Crew
from splitfed.simulation.evaluation import Evaluation
from splitfed.simulation.run import Simulation
from splitfed.simulation.schedule import Schedule
from splitfed.simulation.timeline import Timeline
from splitfed.simulation.virtual_time import VirtualTime
from splitfed.store.rows import Row
from splitfed.store.store import GradientStore
from splitfed.tracking.callbacks import AnyCallback
from splitfed.tracking.history import History
from splitfed.tracking.progress import Progress

AVERAGING = functools.partial(torch.optim.SGD, lr=1.0)
"""The optimizer of the client lineage that makes it FedAvg."""


def simulate(
    model: nn.Module,
    at: str | Sequence[str],
    clients: Mapping[str, Data],
    *,
    loss_fn: LossFunction,
    optimizer: Optimizers,
    server_optimizer: OptimizerFactory,
    rounds: int,
    mode: str | Mode = "round",
    clients_per_round: int | float | None = None,
    min_clients: int = 1,
    deadline: float | None = None,
    late: Literal["count", "refuse"] = "count",
    local_passes: int = 1,
    batch_size: int = 64,
    half_optimizer: OptimizerFactory = AVERAGING,
    scheduler: SchedulerFactory | None = None,
    server_scheduler: SchedulerFactory | None = None,
    evaluate: Evaluation | None = None,
    store: GradientStore | None = None,
    personal: Iterable[str] = (),
    keep_optimizers: bool = False,
    virtual: VirtualTime | None = None,
    workers: int = 0,
    replicas: int = 1,
    barrier: bool | None = None,
    min_updates: int | None = None,
    seed: int = 0,
    name: str = "simulation",
    history: History | None = None,
    callbacks: Iterable[AnyCallback] = (),
    progress: bool | None = False,
) -> Simulation:
    """Train a split model over virtual clients; iterate over the result for a row per round.

    Args:
        model: The whole model, with its initial weights. It isn't changed.
        at: Where to cut it; as for `split`.
        clients: The data of each client, by id: a pair of tensors, a `Dataset`, or what `deal` makes of one data set.
        loss_fn: `loss_fn(outputs, targets)`: the mean over a batch.
        optimizer: Makes a client's own optimizer from its half's parameters. Synchronous mode takes no local steps.
        server_optimizer: Makes the body's, as of `Accumulator`.
        rounds: The number of the last round; a store with rounds in it goes on from there.
        mode: How body and halves are updated: a name, or a `Mode` of `splitfed.policies`.
        clients_per_round: How many are sampled for a round: a number, a share such as 0.1, or `None` for all.
        min_clients: Below so many clients with an update nothing is averaged.
        deadline: How many virtual seconds a round lasts at most.
        late: Updates of earlier rounds `"count"`, or are closed as stale (`"refuse"`).
        local_passes: How often a client goes through its data in a round.
        batch_size: Examples of a batch.
        half_optimizer: Makes the optimizer of the client lineage: SGD with rate 1 is FedAvg, others are FedOpt.
        scheduler: Makes a scheduler for a client's optimizer; it steps once per batch, and is kept with the optimizer.
        server_scheduler: Makes a scheduler for the body's optimizer; it steps once per commit.
        evaluate: Held-out data, or a function of the model that returns figures by name; asked once per round.
        store: Where the run is kept; a store in memory that goes when nobody holds it, if it isn't given.
        personal: Patterns of names in the half that stay with each client.
        keep_optimizers: Whether the state of a client's optimizer outlives its activation.
        virtual: What clients cost in virtual time; without it they come to their turns, and no time passes.
        workers: So many processes train clients in parallel, on a store in a folder; 0 for none beside this one. Modes
            `round` and `synchronous`, and a body for each client, end in the same bits; otherwise timing decides what
            is folded together.
        replicas: How many servers share the requests, in turn.
        barrier: Whether clients wait for each other at the end of a round. By default they do, except in virtual time
            and a mode with `max_staleness`, such as `buffered`: there each goes on as soon as it has pushed, and a
            round is as many updates as there are sampled clients. Synchronous mode always has one.
        min_updates: Without a barrier: halves are committed when so many updates wait; by default a tenth of the
            sampled clients.
        seed: Of everything that is drawn: samples of clients, orders of examples, dropout.
        name: What the run is called in its history.
        history: Where rows are kept; in memory if it isn't given.
        callbacks: Are told of each row.
        progress: Whether to draw a bar: `None` where standard error is a terminal.

    Raises:
        InputError: a setting out of its range.
        IdError: a client id that may not become a key.
        CutError: the model can't be cut there.
    """
    ids = localdata.check(clients)
    check_sample_size(clients_per_round, min_clients)
    if virtual is not None and not isinstance(virtual, VirtualTime):
        raise InputError(f"virtual is {virtual!r}: expected a VirtualTime, such as VirtualTime(compute=1.0)")
    if deadline is not None and virtual is None:
        raise InputError(f"deadline={deadline!r} needs a clock: give virtual=VirtualTime(...) too, or no deadline")
    if workers and (virtual is not None or barrier is False):
        raise InputError(
            f"workers={workers} train in real time and in rounds: leave virtual and barrier out, or workers"
        )
    half, body = split(model, at)
    policy, active = mode_of(mode), sample_size(clients_per_round, len(ids), min_clients)
    if policy.gradients and barrier is False:
        raise InputError(f"mode {policy.name!r} has a barrier in its global steps: leave barrier=False out")
    waits = virtual is None or policy.max_staleness is None or policy.gradients if barrier is None else barrier
    plans = Plans(
        half=half,
        body=body,
        mode=policy,
        server_optimizer=server_optimizer,
        half_optimizer=half_optimizer,
        server_scheduler=server_scheduler,
        personal=tuple(personal),
        active=active,
        barrier=waits,
        min_updates=max(1, active // 10) if min_updates is None else at_least("min_updates", min_updates, 1),
        replicas=at_least("replicas", replicas, 1),
        settings={
            "clients_per_round": clients_per_round,
            "min_clients": min_clients,
            "deadline": deadline,
            "late": late,
            "seed": seed,
        },
    )
    recipe = Recipe(
        half=half,
        loss_fn=loss_fn,
        optimizer=optimizer,
        batch_size=at_least("batch_size", batch_size, 1),
        local_passes=at_least("local_passes", local_passes, 1),
        gradients=policy.gradients,
        personal=plans.personal,
        keep_optimizers=keep_optimizers,
        scheduler=scheduler,
        seed=seed,
    )
    where = temporary_store(shared=workers > 0) if store is None else store
    timeline = Timeline()
    assembly = Assembly(plans, where, ids, None if virtual is None else lambda: timeline.now)
    driver = (
        Crew(assembly, recipe, clients, plans, workers)
        if at_least("workers", workers, 0)
        else Schedule(assembly, recipe, clients, timeline, virtual)
    )
    return Simulation(
        assembly,
        driver,
        None if virtual is None else timeline,
        recipe,
        _head(name, at_least("rounds", rounds, 1), clients, plans, recipe, virtual),
        evaluate=evaluate,
        history=History() if history is None else history,
        callbacks=[Progress(progress), *callbacks],
    )


def _head(
    name: str,
    rounds: int,
    clients: Mapping[str, Data],
    plans: Plans,
    recipe: Recipe,
    virtual: VirtualTime | None,
) -> Row:
    """The row that says who takes part, and with which settings."""
    parties: dict[str, Row] = {}
    for client_id, data in sorted(clients.items()):
        counts = localdata.classes(data)
        known = {} if counts is None else {"classes": counts}
        parties[client_id] = {"num_samples": localdata.size(data), **known}
    settings = {
        "rounds": rounds,
        "batch_size": recipe.batch_size,
        "local_passes": recipe.local_passes,
        "personal": list(recipe.personal),
        "virtual_time": virtual is not None,
        "barrier": plans.barrier,
        "policy": plans.mode.describe(),
        **plans.settings,
    }
    return {
        "kind": "run",
        "name": name,
        "seed": recipe.seed,
        "mode": plans.mode.name,
        "clients": parties,
        "settings": settings,
    }


def temporary_store(*, shared: bool) -> GradientStore:
    """A store that goes when nobody holds it any more.

    Args:
        shared: In a temporary folder, for several processes; else in this one's memory.
    """
    if shared:
        folder = tempfile.mkdtemp(prefix="splitfed-")
        store = GradientStore(folder, sync="process")
        weakref.finalize(store, shutil.rmtree, folder, ignore_errors=True)
        return store
    store = GradientStore(f"memory://splitfed-simulation-{uuid.uuid4().hex}")
    weakref.finalize(store, _empty, store.blobs)
    return store


def _empty(blobs: Blobs) -> None:
    for key in blobs.list(""):
        blobs.delete(key)
