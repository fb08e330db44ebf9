"""A federation on one machine: real servers, accumulators and rounds, over virtual clients.

It differs from production in who drives the clients, and in nothing else: each trains with a
`SplitClient` against a `SplitServer`, each update goes through the store, each round is that of a
`Federation`. A client's model and optimizer exist only while it trains, so a thousand clients of
which ten train at once need the memory of ten.

The same arguments give the same bits: a client draws from a stream of its own, and the schedule
fixes the order of requests (except in workers, in modes that commit while clients train).
"""

from __future__ import annotations

import functools
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from splitfed.accumulator.policies import Mode
from splitfed.accumulator.policies import mode as mode_of
from splitfed.accumulator.settings import OptimizerFactory, SchedulerFactory
from splitfed.blobs.contract import Blobs
from splitfed.checks import at_least
from splitfed.errors import InputError
from splitfed.federation.admission import check_group, sample_size
from splitfed.model.cut import split
from splitfed.simulation import data as localdata
from splitfed.simulation.assembly import Assembly, Plans
from splitfed.simulation.client import ClientConfig, LossFunction, Optimizers
from splitfed.simulation.data import Evaluation, Source
from splitfed.simulation.engines.driver import Driver
from splitfed.simulation.engines.pool import Crew, WorkerPool
from splitfed.simulation.engines.tasks import setup_of
from splitfed.simulation.engines.turns import Turns
from splitfed.simulation.rates import Falling, num_commits
from splitfed.simulation.run import Simulation
from splitfed.simulation.settings import (
    Engine,
    LocalTraining,
    Named,
    Processes,
    RayEngine,
    RoundSchedule,
    as_engine,
    check_settings,
    two_schedules,
)
from splitfed.simulation.virtual_time import Timeline, VirtualTime
from splitfed.store.rows import Row
from splitfed.store.store import GradientStore
from splitfed.tracking.callbacks import AnyCallback, several
from splitfed.tracking.history import History

AVERAGING = functools.partial(torch.optim.SGD, lr=1.0)
"""The optimizer of the client lineage that makes its commits FedAvg."""


def simulate(
    model: nn.Module,
    at: str | Sequence[str],
    clients: Mapping[str, Source],
    *,
    loss_fn: LossFunction,
    optimizer: Optimizers,
    server_optimizer: OptimizerFactory,
    rounds: int,
    mode: str | Mode = "round",
    local: LocalTraining = LocalTraining(),  # noqa: B008 -- frozen
    schedule: RoundSchedule = RoundSchedule(),  # noqa: B008 -- frozen
    engine: Named | None = None,
    half_optimizer: OptimizerFactory | None = None,
    server_scheduler: SchedulerFactory | None = None,
    evaluate: Evaluation | None = None,
    store: GradientStore | None = None,
    fresh: bool = False,
    personal: Iterable[str] = (),
    replicas: int = 1,
    device: torch.device | str | None = None,
    seed: int = 0,
    name: str = "simulation",
    callbacks: AnyCallback | Iterable[AnyCallback] = (),
) -> Simulation:
    """Train a split model over virtual clients; iterate over the result for a row per round.

    Args:
        model: The whole model, with its initial weights. It isn't changed.
        at: Where to cut it; as for `split`.
        clients: The data of each client, by id: tensors (inputs, targets) or more of them, a dict
            of tensors, a `Dataset`, an `IterableDataset`, or what `deal` makes of one data set. Or
            its loader, a function that returns one of these, called where the client trains.
        loss_fn: `loss_fn(outputs, targets)`: the mean over a batch. The target is the last part of
            a sample; of a dict, what `local.target` names.
        optimizer: Makes a client's own optimizer from its half's parameters. Modes `synchronous`
            and `grouped` take no local steps but of personal parts.
        server_optimizer: Makes the body's optimizer, as for `Accumulator`.
        rounds: The number of the last round; a store with rounds in it goes on from there.
        mode: How body and halves are updated: a name, or a `Mode` of `splitfed.policies`.
        local: How a client trains: batch size, passes, scheduler.
        schedule: How rounds run: sampling, turns, deadline, barrier, and how rates fall.
        engine: Where clients run: in turns in this process, if `None`; by a virtual clock,
            `VirtualTime(...)`; or in parallel, `Processes(workers)` or `"ray"`, `RayEngine(...)`.
        half_optimizer: Makes the optimizer of the client lineage: SGD with rate 1 is FedAvg, others
            are FedOpt. By default that of FedAvg; where clients publish gradients
            (`synchronous`, `grouped`), `server_optimizer`.
        server_scheduler: Makes a scheduler for the body's optimizer; it steps once per commit. To
            let all rates fall alike, set `schedule.final_rate` instead.
        evaluate: Held-out data, or a function of the model that returns metrics by name; evaluated
            once per round.
        store: The store of the run; by default one in memory that goes when nobody holds it.
        fresh: Whether a run in `store` in which something was trained is set aside first, as by
            `GradientStore(..., fresh=True)`; else it goes on, which is said.
        personal: Patterns of names in the half that stay with each client.
        replicas: How many servers share the requests, in turn.
        device: Where clients, servers and accumulators compute, such as "cuda"; by default where
            the model is. Held-out data is evaluated where the model is.
        seed: Seeds all that is drawn: samples of clients, orders of examples, dropout.
        name: The run's name in its history.
        callbacks: Receive each row; one alone, such as `print`, needn't be in a list. The first
            `History` among them keeps the rows of the run; they are kept in memory if there is
            none.

    Raises:
        InputError: a setting out of its range.
        IdError: a client id that may not become a key.
        CutError: the model can't be cut there.
    """
    engine = as_engine(engine)
    check_settings(local, schedule, engine)
    ids = localdata.check_clients(clients, local)
    half, body = split(model, at)
    policy = mode_of(mode)
    _check_enough(schedule, len(ids))
    _check_pacing(policy, schedule)
    active = sample_size(schedule.clients_per_round, len(ids), schedule.min_clients)
    check_group(policy, active)
    barrier = _has_barrier(policy, schedule, engine)
    falling = None
    if schedule.final_rate is not None:
        if server_scheduler is not None:
            raise two_schedules("server_scheduler")
        falling = Falling(schedule.final_rate, at_least("rounds", rounds, 1))
        batches = _num_batches(clients, local, "RoundSchedule(final_rate=...)")
        share = active / len(ids)
        commits = num_commits(policy, batches, rounds, share, barrier=barrier)
        server_scheduler = falling.scheduler(commits)
    _check_local_steps(local, policy, barrier)
    plans = Plans(
        half=half,
        body=body,
        mode=policy,
        server_optimizer=server_optimizer,
        half_optimizer=half_optimizer or (server_optimizer if policy.gradients else AVERAGING),
        server_scheduler=server_scheduler,
        half_scheduler=(
            server_scheduler if falling and policy.gradients else schedule.half_scheduler
        ),
        personal=tuple(personal),
        active=active,
        barrier=barrier,
        min_updates=_min_updates(schedule, active),
        replicas=at_least("replicas", replicas, 1),
        device=None if device is None else torch.device(device),
        settings={
            "clients_per_round": schedule.clients_per_round,
            "min_clients": schedule.min_clients,
            "deadline": schedule.deadline,
            "late": schedule.late,
            "sampling": schedule.sampling,
            "seed": seed,
        },
        sizes=(
            localdata.sizes(clients, "RoundSchedule(sampling='data')")
            if schedule.sampling == "data"
            else None
        ),
    )
    virtual = engine if isinstance(engine, VirtualTime) else None
    if virtual is not None and any(virtual.pace(client_id).dropout for client_id in ids):
        localdata.sizes(clients, "VirtualTime(dropout=...)")
    config = ClientConfig(
        half=half,
        loss_fn=loss_fn,
        optimizer=optimizer,
        local=local,
        gradients=policy.gradients,
        personal=plans.personal,
        seed=seed,
        falling=falling,
        device=plans.device,
    )
    timeline = Timeline()
    crew = _crew(engine)
    if store is None:
        store = temporary_store(shared=crew is not None)
    elif fresh:
        store.begin_anew()
    now = None if virtual is None else lambda: timeline.now
    assembly = Assembly(_here(plans, engine), store, ids, now)
    driver: Driver
    if crew is not None:
        driver = WorkerPool(assembly, config, crew, setup_of(store, plans, config, clients), active)
    else:
        paced = None
        if schedule.pacing == "data":
            paced = _num_batches(clients, local, "RoundSchedule(pacing='data')")
        driver = Turns(assembly, config, clients, timeline, virtual, paced)
    history, others = _history_and_others(callbacks)
    return Simulation(
        assembly,
        driver,
        None if virtual is None else timeline,
        config,
        _head(name, at_least("rounds", rounds, 1), clients, plans, config, schedule, virtual),
        evaluate=evaluate,
        history=history,
        callbacks=others,
    )


def _crew(engine: Engine | None) -> Crew | None:
    """The workers of an engine that has some."""
    if isinstance(engine, Processes):
        from splitfed.simulation.engines.processes import ProcessCrew

        return ProcessCrew(engine.workers)
    if isinstance(engine, RayEngine):
        from splitfed.simulation.engines.actors import RayCrew

        return RayCrew(engine)
    return None


def _here(plans: Plans, engine: Engine | None) -> Plans:
    """The plans of this process's own parts: a cluster's device may not be on this machine."""
    kind = None if plans.device is None else plans.device.type
    if kind == "cuda" and isinstance(engine, RayEngine) and not torch.cuda.is_available():
        return replace(plans, device=None)
    return plans


def _check_enough(schedule: RoundSchedule, known: int) -> None:
    """Refuse a number of sampled clients that no round can have: none joins a simulation later."""
    wanted = schedule.clients_per_round
    if isinstance(wanted, int) and wanted > known:
        raise InputError(
            f"clients_per_round is {wanted}, but there are {known} clients: "
            f"expected at most {known}, a share such as 0.1, or None for all"
        )


def _check_pacing(mode: Mode, schedule: RoundSchedule) -> None:
    """Refuse an order of turns where it makes no difference."""
    if schedule.pacing == "data" and (mode.per_client or not mode.streams):
        raise InputError(
            f"pacing='data' orders the turns of clients that train on each other's commits, and in "
            f"mode {mode.name!r} there are none: leave it out, or take such as 'buffered'"
        )


def _check_local_steps(local: LocalTraining, mode: Mode, barrier: bool) -> None:
    """Refuse updates within a pass where they would count as a client's second in one round."""
    if local.local_steps is None:
        return
    if mode.gradients:
        raise InputError(
            f"local_steps is {local.local_steps}, but in mode {mode.name!r} clients push the "
            "gradient of each batch: leave it out"
        )
    if barrier:
        raise InputError(
            f"local_steps is {local.local_steps}, but clients wait for each other at the end of a "
            "round, in which one update of each counts: give RoundSchedule(barrier=False)"
        )


def _num_batches(
    clients: Mapping[str, Source], local: LocalTraining, purpose: str
) -> dict[str, int]:
    """How many batches each client has in a round."""
    return {
        client_id: local.local_passes * localdata.num_batches(total, local.of(client_id))
        for client_id, total in localdata.sizes(clients, purpose).items()
    }


def _has_barrier(mode: Mode, schedule: RoundSchedule, engine: Engine | None) -> bool:
    """Whether clients wait for each other at the end of a round."""
    if mode.gradients and not mode.streams and schedule.barrier is False:
        raise InputError(
            f"mode {mode.name!r} has a barrier in its global steps: leave barrier=False out"
        )
    if schedule.barrier is not None:
        return schedule.barrier
    if mode.gradients:
        return True  # a round is a pass of each client
    # Without virtual time nobody is late, so waiting costs nothing. With it, a mode that sets no
    # bound to staleness expects clients to wait.
    return not isinstance(engine, VirtualTime) or mode.max_staleness is None


def _min_updates(schedule: RoundSchedule, active: int) -> int:
    """How many updates make a commit of the halves where there is no barrier."""
    return max(1, active // 10) if schedule.min_updates is None else schedule.min_updates


def _history_and_others(
    callbacks: AnyCallback | Iterable[AnyCallback],
) -> tuple[History, list[AnyCallback]]:
    """The first history among the callbacks, or one in memory; and the other callbacks."""
    receivers = several(callbacks)
    for callback in receivers:
        if isinstance(callback, History):
            return callback, [other for other in receivers if other is not callback]
    return History(), receivers


def _head(
    name: str,
    rounds: int,
    clients: Mapping[str, Source],
    plans: Plans,
    config: ClientConfig,
    schedule: RoundSchedule,
    virtual: VirtualTime | None,
) -> Row:
    """The row that a run begins with: its clients and its settings."""
    parties: dict[str, Row] = {}
    for client_id, data in sorted(clients.items()):
        total = localdata.known_size(data)
        parties[client_id] = {} if total is None else {"num_samples": total}
        counts = localdata.classes(data, config.local.target)
        if counts is not None:
            parties[client_id]["classes"] = counts
    settings = {
        "rounds": rounds,
        "batch_size": config.local.batch_size,
        "drop_last": config.local.drop_last,
        "local_passes": config.local.local_passes,
        "local_steps": config.local.local_steps,
        "personal": list(config.personal),
        "virtual_time": virtual is not None,
        "barrier": plans.barrier,
        "final_rate": schedule.final_rate,
        "pacing": schedule.pacing,
        "policy": plans.mode.describe(),
        **plans.settings,
    }
    return {
        "kind": "run",
        "name": name,
        "seed": config.seed,
        "mode": plans.mode.name,
        "clients": parties,
        "settings": settings,
    }


def temporary_store(*, shared: bool) -> GradientStore:
    """A store whose contents go when nobody holds it any more.

    Args:
        shared: In a temporary folder, for several processes; else in this one's memory.
    """
    # The finalizers hold the folder's name or the blobs, never the store: they would keep it alive.
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
