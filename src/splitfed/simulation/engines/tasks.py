"""What a worker is told and what it answers, as values that travel as bytes.

They are pickled by cloudpickle where it is installed: a class, a function or a lambda that a
notebook or a script has defined in its own main module then travels as it is. Plain pickle writes
such things as names, which another process can't resolve. Pickles travel between the processes of
one run, of which one started the others, and never from or to a file of somebody else.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from splitfed.errors import InputError, WorkerError
from splitfed.simulation.assembly import Plans
from splitfed.simulation.client import ClientConfig, ClientState, LocalMetrics
from splitfed.simulation.data import Source
from splitfed.simulation.traffic import Traffic
from splitfed.store.store import GradientStore


@dataclass(frozen=True, slots=True, eq=False)
class Setup:
    """What a worker gets at its start."""

    url: str
    sync: Any
    shared: bool
    storage_options: Mapping[str, Any]
    plans: Plans
    config: ClientConfig
    clients: Mapping[str, Source]
    threads: int
    """This and the rest: how torch computes in the process that asks."""
    dtype: torch.dtype
    matmul: str
    deterministic: bool


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A client's local run up to its next global step, or to its end."""

    client_id: str
    run_id: tuple[int, ...]
    state: ClientState | None = None
    """The client's state at the beginning of the run; `None` for a run that the worker holds."""
    step: int = 0
    """How many global steps the run has taken. A worker that doesn't hold it takes these again."""


@dataclass(frozen=True, slots=True, eq=False)
class TaskResult:
    """How far a local run has come, and what is new at the worker."""

    client_id: str
    metrics: LocalMetrics | None = None
    """Those of a run that has ended; `None` while it is suspended until the next global step."""
    state: ClientState = field(default_factory=ClientState)
    traffic: Traffic = field(default_factory=dict)
    arrivals: dict[Any, float] = field(default_factory=dict)
    error: BaseException | None = None
    trace: str = ""
    """The traceback of the error as text: a pickled error comes without it."""


def dumps(value: object) -> bytes:
    """A value as bytes for another process of this run."""
    by: ModuleType = pickle
    try:
        import cloudpickle
    except ImportError:
        pass
    else:
        by = cloudpickle
    made: bytes = by.dumps(value)
    return made


def loads(data: bytes) -> Any:
    """The value that another process of this run has sent."""
    return pickle.loads(data)  # noqa: S301 -- of this run's own processes


def setup_of(
    store: GradientStore, plans: Plans, config: ClientConfig, clients: Mapping[str, Source]
) -> bytes:
    """The setup of a worker, pickled: how to build its parts, and how this process computes.

    Raises:
        InputError: something can't be pickled.
    """
    setup = Setup(
        url=store.url,
        sync=store.sync,
        shared=store.shared,
        storage_options=dict(store.storage_options),
        plans=plans,
        config=config,
        clients=dict(clients),
        threads=torch.get_num_threads(),
        dtype=torch.get_default_dtype(),
        matmul=torch.get_float32_matmul_precision(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    try:
        return dumps(setup)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(
            f"workers can't get their setup ({error}): give functions that can be pickled, such as "
            "functools.partial(torch.optim.SGD, lr=0.1), or install cloudpickle, with which "
            "lambdas and what a notebook defines can be; or leave engine=... out"
        ) from error


def read_setup(data: bytes) -> Setup:
    """The setup that `setup_of` made.

    Raises:
        InputError: it names what this process doesn't have.
    """
    try:
        setup: Setup = loads(data)
    except (AttributeError, ImportError, pickle.UnpicklingError) as error:
        raise InputError(
            f"a worker can't load its setup ({error}): what it names must be importable there. "
            "What a notebook defines needs cloudpickle, installed here and where workers run; "
            "a module of your own must be installed where they run too"
        ) from error
    return setup


def error_result(client_id: str, error: Exception) -> TaskResult:
    """The result of a task that raised; called where that is handled."""
    trace = traceback.format_exc()
    try:
        # An error may be pickled and still not be loaded, if its class takes other arguments: the
        # asking process would die of it.
        loads(dumps(error))
    except Exception:  # noqa: BLE001 -- whatever a user's own error raises when it is pickled
        error = WorkerError(f"client {client_id!r}: {type(error).__name__}: {error}")
    return TaskResult(client_id, error=error, trace=trace)
