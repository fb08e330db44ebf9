"""The inside of a worker: its own view of the federation, in which it lets clients train.

A worker has servers and accumulators of its own on the store that all share, and executes one task
at a time. All that it knows came with its setup and its tasks, or is in the store: so a worker that
is killed is replaced by another, whose tasks are the same.

A run that begins again repeats its batches under their numbers, so each counts once, as those of an
owner that was killed. In synchronous mode it takes again the steps that it had taken: with the
newest weights in place of the old, which changes nothing that it pushes from then on, since
each step begins with a pull. (A personal part has its own steps, and those are other ones then.)
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

import torch

from splitfed.errors import InputError
from splitfed.simulation.assembly import Assembly
from splitfed.simulation.client import ClientState, LocalRun, Verb
from splitfed.simulation.engines.tasks import (
    Setup,
    Task,
    TaskResult,
    dumps,
    error_result,
    loads,
    read_setup,
)
from splitfed.store.store import GradientStore


class Host:
    """A worker, as bytes come and go.

    Args:
        setup: What `tasks.setup_of` made.
    """

    def __init__(self, setup: bytes) -> None:
        self._data = setup
        self._setup: Setup | None = None
        self._clients: ClientHost | None = None

    def begin(self) -> bytes:
        """Read the setup: empty, or the result that says what is wrong with it."""
        try:
            self._setup = read_setup(self._data)
        except Exception as error:  # noqa: BLE001 -- raised again in the process that asked
            return dumps(error_result("", error))
        return b""

    def execute(self, data: bytes) -> bytes:
        """Execute a task; what it raises is its result."""
        task: Task = loads(data)
        try:
            # Built with the first task, so that an error of the store is the result of a task and
            # not the death of the worker.
            if self._clients is None:
                self._clients = ClientHost(self._setup or read_setup(self._data))
            result = self._clients.execute(task)
        except Exception as error:  # noqa: BLE001 -- raised again in the process that asked
            result = error_result(task.client_id, error)
        return dumps(result)


class ClientHost:
    """A worker's own view of the federation, and the local runs that are suspended in it.

    Args:
        setup: How to build it.

    Raises:
        InputError: there is no run in what the worker finds at the store's URL.
    """

    def __init__(self, setup: Setup) -> None:
        # Bits depend on all four, and a new process begins with torch's defaults.
        torch.set_num_threads(setup.threads)
        torch.set_default_dtype(setup.dtype)
        torch.set_float32_matmul_precision(setup.matmul)
        torch.use_deterministic_algorithms(setup.deterministic)
        self._setup = setup
        store = GradientStore(
            setup.url, sync=setup.sync, shared=setup.shared, **setup.storage_options
        )
        if store.rounds().current() is None:
            # It would begin a run of its own there, and nobody would ever see what it trains.
            raise InputError(
                f"a worker finds no run in {store.shown}: expected a store that all machines "
                "reach, such as store=GradientStore('s3://bucket/run') or a folder that they share"
            )
        self._assembly = Assembly(setup.plans, store, sorted(setup.clients), None)
        self._suspended: dict[str, Generator[None, None, TaskResult]] = {}
        mode = setup.plans.mode
        self._commits_after = Verb.PUSH if mode.gradients and mode.streams else Verb.BACKWARD
        """The request after which there may be enough for a commit."""

    def execute(self, task: Task) -> TaskResult:
        """Let a client train to its next global step, or to its end."""
        steps = self._suspended.pop(task.client_id, None)
        try:
            if steps is None or task.state is not None:
                steps = self._global_steps(task)
                for _ in range(task.step):  # what another worker held, and died
                    next(steps)
            next(steps)
            self._suspended[task.client_id] = steps
            result = TaskResult(task.client_id)
        except StopIteration as ended:
            result = ended.value
        return replace(
            result, traffic=self._assembly.meter.take(), arrivals=self._assembly.arrivals.take()
        )

    def _global_steps(self, task: Task) -> Generator[None, None, TaskResult]:
        """One local run; the generator stops where the client waits for a global step."""
        state = task.state or ClientState()
        run = LocalRun(
            self._setup.config,
            self._assembly.meter,
            task.client_id,
            self._setup.clients[task.client_id],
            state,
            task.run_id,
            repeats=True,
        )
        answered: Verb | None = None
        for upcoming in run.requests():
            if answered is self._commits_after:
                self._assembly.commit(task.client_id)
            elif answered is Verb.PUSH:
                # With a request to come it was the push of a gradient: the run waits here for the
                # global step. Its last push, of a gradient or an update, ends it instead.
                yield
            answered = upcoming
        if answered is self._commits_after:
            self._assembly.commit(task.client_id)
        return TaskResult(task.client_id, run.metrics, state)
