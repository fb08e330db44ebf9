"""The settings of a simulation in groups: local training, the schedule of rounds, the engine.

Each group is a frozen value that `simulate` takes under one keyword, so that a further setting
extends a group and not the signature. A group checks itself when it is made; `check_settings`
checks what shows only when they come together.

The engine says where virtual clients run: in turns in this process if there is none, in this
process by a virtual clock (`VirtualTime`), in worker processes (`Processes`), or in actors of a
cluster (`RayEngine`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from splitfed.accumulator.settings import SchedulerFactory
from splitfed.checks import at_least, positive
from splitfed.errors import InputError
from splitfed.federation.admission import check_sample_size
from splitfed.protocol.compression import Codecs
from splitfed.protocol.ids import check_client_id
from splitfed.simulation.virtual_time import VirtualTime


@dataclass(frozen=True, slots=True)
class LocalTraining:
    """How a client trains on its own data in a round.

    Raises:
        InputError: a number below 1, a scheduler that can't be called, or an unknown codec.
    """

    batch_size: int | Mapping[str, int] = 64
    """Examples of a batch, of all clients or by client id; the last one of a pass may be smaller.

    A slow client with small batches answers as often as the others.
    """
    drop_last: bool = False
    """Whether a last batch that is smaller is left out."""
    collate_fn: Callable[[list[Any]], Any] | None = None
    """Puts samples together in a batch: (inputs, targets), a longer tuple, or a dict.

    By default torch's `default_collate`. It is used for held-out data too.
    """
    target: str = "labels"
    """Where samples are dicts: the key of what `loss_fn` gets.

    The model gets the other keys as keywords.
    """
    local_passes: int = 1
    """How often a client goes through its data in a round (elsewhere: local epochs)."""
    local_steps: int | None = None
    """After so many batches a client pushes its half's update and pulls; `None`: after its passes.

    It needs rounds without a barrier: there the halves are committed as updates come.
    """
    scheduler: SchedulerFactory | None = None
    """Makes a scheduler for a client's optimizer.

    It steps once per batch, and is kept with the optimizer.
    """
    keep_optimizers: bool = False
    """Whether a client goes on with its optimizer's state in its next round."""
    compression: Codecs | str | None = None
    """Codecs for what crosses the cuts, as in `SplitClient`; exact if there is none."""

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, Mapping):
            for client_id, number in self.batch_size.items():
                check_client_id(client_id)
                at_least(f"batch_size of {client_id!r}", number, 1)
            # A copy: the caller's may change while a simulation runs.
            object.__setattr__(self, "batch_size", dict(self.batch_size))
        elif isinstance(self.batch_size, int):
            at_least("batch_size", self.batch_size, 1)
        else:
            raise InputError(
                f"batch_size is {self.batch_size!r}: expected an integer of at least 1, or a "
                "mapping of client ids to such numbers"
            )
        at_least("local_passes", self.local_passes, 1)
        if self.local_steps is not None:
            at_least("local_steps", self.local_steps, 1)
        if not isinstance(self.drop_last, bool):
            raise InputError(f"drop_last is {self.drop_last!r}: expected True or False")
        if self.collate_fn is not None:
            check_function(
                "collate_fn", self.collate_fn, "torch.utils.data.default_collate: it gets a list"
            )
        if not isinstance(self.target, str):
            raise InputError(f"target is {self.target!r}: expected a key, such as 'labels'")
        if self.compression is not None and "delta" in Codecs.of(self.compression).activations:
            raise InputError(
                f"compression is {self.compression!r}: a delta is the change since a client's last "
                "epoch, and a simulated client begins anew in each round, so use what follows it; "
                "deltas are of a SplitClient, with client.compression.examples(...)"
            )
        if self.scheduler is not None:
            check_function(
                "scheduler",
                self.scheduler,
                "functools.partial(torch.optim.lr_scheduler.StepLR, step_size=10): "
                "each client makes its own",
            )

    def of(self, client_id: str) -> LocalTraining:
        """The same with the batch size of one client.

        Raises:
            InputError: there are batch sizes by client, and none of this one.
        """
        if not isinstance(self.batch_size, Mapping):
            return self
        if client_id not in self.batch_size:
            raise InputError(
                f"batch_size has no number for client {client_id!r}: expected one for each client"
            )
        return replace(self, batch_size=self.batch_size[client_id])

    @property
    def num_examples(self) -> int:
        """Examples of a batch of one client.

        Raises:
            InputError: there are batch sizes by client, and nobody has said whose are meant.
        """
        if isinstance(self.batch_size, Mapping):
            raise InputError(
                "batch_size is a mapping of client ids to numbers: expected one number here, "
                "such as that of local.of('client-1')"
            )
        return self.batch_size


@dataclass(frozen=True, slots=True)
class RoundSchedule:
    """Who trains in a round, how long it lasts, and when halves are averaged.

    Raises:
        InputError: a setting out of its range.
    """

    clients_per_round: int | float | None = None
    """How many are sampled for a round: a number, a share such as 0.1, or `None` for all."""
    min_clients: int = 1
    """With updates of fewer clients than this nothing is averaged."""
    deadline: float | None = None
    """How many virtual seconds a round lasts at most; needs `engine=VirtualTime(...)`."""
    late: Literal["count", "refuse"] = "count"
    """Updates of earlier rounds `"count"`, or are closed as stale (`"refuse"`)."""
    barrier: bool | None = None
    """Whether clients wait for each other at the end of a round.

    By default they do, except in virtual time and a mode with `max_staleness`, such as `buffered`:
    there each goes on as soon as it has pushed, and a round is as many updates as there are sampled
    clients. Synchronous mode always has a barrier; `grouped` has one unless it is set to `False`,
    and then a round is as many batches as there are sampled clients.
    """
    min_updates: int | None = None
    """Without a barrier: how many pending updates make a commit of the halves.

    By default a tenth of the sampled clients; with a barrier it has no effect.
    """
    half_scheduler: SchedulerFactory | None = None
    """Makes a scheduler for `half_optimizer`; it steps once per commit of the halves."""
    final_rate: float | None = None
    """The share of their rates to which all optimizers fall, linearly over the run, such as 0.05.

    It holds for the body, for clients, and for halves whose gradients are pushed. What averages
    halves stays at its rate: it has no training of its own.
    """
    sampling: Literal["uniform", "data"] = "uniform"
    """Whether each client is as likely to be sampled as another, or in proportion to its examples.

    In proportion is meant for rounds in which each trains on as many batches: means weigh clients
    by their examples already.
    """
    pacing: Literal["even", "data"] = "even"
    """Whether clients take turns one batch each, or in proportion to their numbers of batches.

    In turns of one batch each, those with much data are alone at the end of a round. In proportion,
    all end their passes together. It needs a mode that commits while clients train, on one body.
    """

    def __post_init__(self) -> None:
        at_least("min_clients", self.min_clients, 1)
        check_sample_size(self.clients_per_round, self.min_clients)
        if self.deadline is not None:
            positive("deadline", self.deadline)
        if self.late not in ("count", "refuse"):
            raise InputError(f"late is {self.late!r}: expected 'count' or 'refuse'")
        # 0 and 1 equal False and True, but `barrier is False` decides further on.
        if self.barrier is not None and not isinstance(self.barrier, bool):
            raise InputError(
                f"barrier is {self.barrier!r}: expected True, False, "
                "or None to let mode and engine decide"
            )
        if self.min_updates is not None:
            at_least("min_updates", self.min_updates, 1)
        if self.sampling not in ("uniform", "data"):
            raise InputError(f"sampling is {self.sampling!r}: expected 'uniform' or 'data'")
        if self.pacing not in ("even", "data"):
            raise InputError(f"pacing is {self.pacing!r}: expected 'even' or 'data'")
        self._check_rates()

    def _check_rates(self) -> None:
        if self.half_scheduler is not None:
            check_function(
                "half_scheduler",
                self.half_scheduler,
                "functools.partial(torch.optim.lr_scheduler.StepLR, step_size=10)",
            )
        if self.final_rate is None:
            return
        if positive("final_rate", self.final_rate) > 1:
            raise InputError(
                f"final_rate is {self.final_rate!r}: expected a share of the rates, "
                "above 0 and at most 1, such as 0.05"
            )
        if self.half_scheduler is not None:
            raise two_schedules("half_scheduler")


@dataclass(frozen=True, slots=True)
class Processes:
    """Worker processes that train clients in parallel, on a store in a folder.

    Modes that commit nothing while clients train, or in global steps, end in the same bits as in
    one process. In the others timing decides which batches are folded together.

    Raises:
        InputError: a number of workers below 1.
    """

    workers: int
    """How many processes."""

    def __post_init__(self) -> None:
        at_least("workers", self.workers, 1)


@dataclass(frozen=True, slots=True)
class RayEngine:
    """Actors of a Ray cluster that train clients in parallel, on a store that all machines reach.

    Bits are as with `Processes`. It joins the cluster that this process is connected to, or that of
    `address`, or else starts Ray on this machine and stops it when the run ends. `engine="ray"` is
    `RayEngine()`.

    Raises:
        InputError: a number out of its range.
    """

    workers: int | None = None
    """How many actors; `None` for as many as the cluster has room for."""
    num_cpus: float = 1
    """The CPUs of each."""
    num_gpus: float = 0
    """Its GPUs, or its share of one, such as 0.25; with them, give `simulate(device="cuda")`."""
    address: str | None = None
    """Of a cluster, such as "auto" or "10.0.0.1:6379"; by default that of RAY_ADDRESS."""

    def __post_init__(self) -> None:
        if self.workers is not None:
            at_least("workers", self.workers, 1)
        for name in ("num_cpus", "num_gpus"):
            value = getattr(self, name)
            if value != 0 or isinstance(value, bool):
                positive(name, value)
        if not self.num_cpus and not self.num_gpus:
            raise InputError(
                "num_cpus and num_gpus are 0: a worker needs some of one, such as num_cpus=0.5"
            )


Engine = VirtualTime | Processes | RayEngine
Named = Engine | Literal["ray"]
"""An engine as `simulate` takes it."""


def as_engine(engine: Named | None) -> Engine | None:
    """The engine that is meant.

    Raises:
        InputError: it isn't one.
    """
    if engine == "ray":
        return RayEngine()
    if engine is not None and not isinstance(engine, Engine):
        raise InputError(
            f"engine is {engine!r}: expected a VirtualTime, such as VirtualTime(compute=1.0), "
            "Processes(workers=2), 'ray' or RayEngine(num_cpus=1), or None for clients in turns"
        )
    return engine


def check_settings(local: object, schedule: object, engine: object) -> None:
    """Refuse groups of another type, and a schedule that the engine can't keep.

    Raises:
        InputError: a group has another type, or two of them contradict each other.
    """
    if not isinstance(local, LocalTraining):
        raise InputError(f"local is {local!r}: expected LocalTraining(batch_size=..., ...)")
    if not isinstance(schedule, RoundSchedule):
        raise InputError(
            f"schedule is {schedule!r}: expected RoundSchedule(clients_per_round=..., ...)"
        )
    if schedule.deadline is not None and not isinstance(engine, VirtualTime):
        raise InputError(
            f"deadline={schedule.deadline!r} needs a clock: "
            "give engine=VirtualTime(...) too, or no deadline"
        )
    if schedule.pacing == "data" and engine is not None:
        raise InputError(
            "pacing='data' orders the turns of clients in this process: leave engine out, "
            "or let VirtualTime(compute=...) give each client its own speed"
        )
    if schedule.final_rate is not None and local.scheduler is not None:
        raise two_schedules("LocalTraining.scheduler")
    if isinstance(engine, Processes | RayEngine) and schedule.barrier is False:
        raise InputError(f"workers train in rounds: leave barrier=False out, or engine={engine!r}")


def two_schedules(name: str) -> InputError:
    """The error of a scheduler beside `final_rate`."""
    return InputError(
        f"final_rate lets all rates fall, and {name} is given too: leave one of them out"
    )


def check_function(name: str, value: object, example: str) -> None:
    """Refuse what should compute or make something, but can't be called.

    Raises:
        InputError: it can't be called; the message names the example.
    """
    if not callable(value):
        raise InputError(
            f"{name} is {type(value).__name__}: expected a function, such as {example}"
        )
