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

import torch
from torch import nn

from splitfed.accumulator.optimizer import OptimizerFactory, SchedulerFactory
from splitfed.accumulator.policies import Mode
from splitfed.accumulator.policies import mode as mode_of
from splitfed.blobs.contract import Blobs
from splitfed.checks import at_least
from splitfed.errors import InputError
from splitfed.federation.sampling import check_sample_size, sample_size
from splitfed.model.cut import split
from splitfed.simulation import data as localdata
from splitfed.simulation.assembly import Assembly, Plans
from splitfed.simulation.client import LossFunction, Optimizers, Recipe
from splitfed.simulation.data import Data, Evaluation
from splitfed.simulation.engines.processes import WorkerPool
from splitfed.simulation.engines.turns import Turns
from splitfed.simulation.run import Driver, Simulation
from splitfed.simulation.settings import (
    Engine,
    LocalTraining,
    Processes,
    RoundSchedule,
    check_engine,
)
from splitfed.simulation.virtual_time import Timeline, VirtualTime
from splitfed.store.rows import Row
from splitfed.store.store import GradientStore
from splitfed.tracking.callbacks import AnyCallback
from splitfed.tracking.history import History

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
    local: LocalTraining = LocalTraining(),  # noqa: B008 -- frozen
    schedule: RoundSchedule = RoundSchedule(),  # noqa: B008 -- frozen
    engine: Engine | None = None,
    half_optimizer: OptimizerFactory = AVERAGING,
    server_scheduler: SchedulerFactory | None = None,
    evaluate: Evaluation | None = None,
    store: GradientStore | None = None,
    personal: Iterable[str] = (),
    replicas: int = 1,
    seed: int = 0,
    name: str = "simulation",
    callbacks: Iterable[AnyCallback] = (),
) -> Simulation:
    """Train a split model over virtual clients; iterate over the result for a row per round.

    Args:
        model: The whole model, with its initial weights. It isn't changed.
        at: Where to cut it; as for `split`.
        clients: The data of each client, by id: a pair of tensors, a `Dataset`, or what `deal`
            makes of one data set.
        loss_fn: `loss_fn(outputs, targets)`: the mean over a batch.
        optimizer: Makes a client's own optimizer from its half's parameters. Synchronous mode takes
            no local steps.
        server_optimizer: Makes the body's, as of `Accumulator`.
        rounds: The number of the last round; a store with rounds in it goes on from there.
        mode: How body and halves are updated: a name, or a `Mode` of `splitfed.policies`.
        local: How a client trains: batch size, passes, scheduler.
        schedule: How rounds run: who is sampled, deadline, barrier.
        engine: Where clients run: in turns, in this process, if `None`; by a virtual clock,
            `VirtualTime(...)`; or in parallel, `Processes(workers)`.
        half_optimizer: Makes the optimizer of the client lineage: SGD with rate 1 is FedAvg, others
            are FedOpt.
        server_scheduler: Makes a scheduler for the body's optimizer; it steps once per commit.
        evaluate: Held-out data, or a function of the model that returns metrics by name; asked once
            per round.
        store: Where the run is kept; a store in memory that goes when nobody holds it, if it isn't
            given.
        personal: Patterns of names in the half that stay with each client.
        replicas: How many servers share the requests, in turn.
        seed: Of everything that is drawn: samples of clients, orders of examples, dropout.
        name: What the run is called in its history.
        callbacks: Receive each row. The first `History` among them keeps the rows of the run; they
            are kept in memory if there is none.

    Raises:
        InputError: a setting out of its range.
        IdError: a client id that may not become a key.
        CutError: the model can't be cut there.
    """
    ids = localdata.check(clients)
    check_sample_size(schedule.clients_per_round, schedule.min_clients)
    check_engine(engine, schedule)
    half, body = split(model, at)
    policy = mode_of(mode)
    active = sample_size(schedule.clients_per_round, len(ids), schedule.min_clients)
    plans = Plans(
        half=half,
        body=body,
        mode=policy,
        server_optimizer=server_optimizer,
        half_optimizer=half_optimizer,
        server_scheduler=server_scheduler,
        personal=tuple(personal),
        active=active,
        barrier=_has_barrier(policy, schedule, engine),
        min_updates=_min_updates(schedule, active),
        replicas=at_least("replicas", replicas, 1),
        settings={
            "clients_per_round": schedule.clients_per_round,
            "min_clients": schedule.min_clients,
            "deadline": schedule.deadline,
            "late": schedule.late,
            "seed": seed,
        },
    )
    recipe = Recipe(
        half=half,
        loss_fn=loss_fn,
        optimizer=optimizer,
        local=local,
        gradients=policy.gradients,
        personal=plans.personal,
        seed=seed,
    )
    virtual = engine if isinstance(engine, VirtualTime) else None
    timeline = Timeline()
    where = temporary_store(shared=isinstance(engine, Processes)) if store is None else store
    assembly = Assembly(plans, where, ids, None if virtual is None else lambda: timeline.now)
    driver: Driver
    if isinstance(engine, Processes):
        driver = WorkerPool(assembly, recipe, clients, plans, engine.workers)
    else:
        driver = Turns(assembly, recipe, clients, timeline, virtual)
    watchers = list(callbacks)
    history = next((found for found in watchers if isinstance(found, History)), None)
    return Simulation(
        assembly,
        driver,
        None if virtual is None else timeline,
        recipe,
        _head(name, at_least("rounds", rounds, 1), clients, plans, recipe, virtual),
        evaluate=evaluate,
        history=History() if history is None else history,
        callbacks=[watcher for watcher in watchers if watcher is not history],
    )


def _has_barrier(mode: Mode, schedule: RoundSchedule, engine: Engine | None) -> bool:
    """Whether clients wait for each other at the end of a round."""
    if mode.gradients:
        if schedule.barrier is False:
            raise InputError(
                f"mode {mode.name!r} has a barrier in its global steps: leave barrier=False out"
            )
        return True
    if schedule.barrier is not None:
        return schedule.barrier
    # In real time nobody is late; and a mode that bounds no staleness is one that waits.
    return not isinstance(engine, VirtualTime) or mode.max_staleness is None


def _min_updates(schedule: RoundSchedule, active: int) -> int:
    if schedule.min_updates is None:
        return max(1, active // 10)
    return at_least("min_updates", schedule.min_updates, 1)


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
        "batch_size": recipe.local.batch_size,
        "local_passes": recipe.local.local_passes,
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
