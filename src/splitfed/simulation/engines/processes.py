"""The engine of worker processes: virtual clients train in parallel, on a store that all share.

A worker has servers and accumulators of its own on the shared store, and executes one task at a
time until its pipe is closed. It is started afresh (spawn) and not forked: a fork copies torch's
thread pools in whatever state they are. It gets its setup as one pickle at its start; all else goes
by the pipe or through the store. Pickles travel between two processes of one run, of which one
started the other, and never from or to a file.

Modes that commit nothing while clients train, or in global steps, fix the schedule, so they end in
the same bits as in one process. In the others timing decides which batches are folded together, and
the commit records say which.

The trap: a script that starts worker processes is imported by each of them, so its own work must
stand below `if __name__ == "__main__":`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from splitfed.errors import InputError, WorkerError
from splitfed.simulation.assembly import Assembly, Plans
from splitfed.simulation.client import ClientConfig, ClientState, LocalMetrics, LocalRun, Verb
from splitfed.simulation.data import Data
from splitfed.simulation.traffic import Traffic
from splitfed.store.rounds import Plan
from splitfed.store.rows import Row
from splitfed.store.store import GradientStore

SHUTDOWN_SECONDS = 10.0
"""How long a worker process may take to end by itself."""


@dataclass(frozen=True, slots=True, eq=False)
class Setup:
    """What a worker process gets at its start."""

    url: str
    sync: Any
    shared: bool
    storage_options: Mapping[str, Any]
    plans: Plans
    config: ClientConfig
    clients: Mapping[str, Data]
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
    """The client's state at the beginning of a run; `None` for a run that is suspended."""


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


class WorkerPool:
    """The `Driver` of clients in worker processes.

    Args:
        assembly: The federation, as this process sees it.
        config: The settings that the clients share.
        clients: Their data, by id.
        plans: How the workers build their own view of the federation.
        workers: How many processes.

    Raises:
        InputError: something can't be pickled, or the store is in this process's memory.
    """

    def __init__(
        self,
        assembly: Assembly,
        config: ClientConfig,
        clients: Mapping[str, Data],
        plans: Plans,
        workers: int,
    ) -> None:
        store = assembly.store
        if store.url.startswith("memory:"):
            raise InputError(
                f"{store.url} is in this process's memory: "
                "expected a folder that worker processes share"
            )
        self._assembly = assembly
        self._config = config
        self._setup = pickled_setup(store, plans, config, clients)
        self._workers = [_WorkerHandle(number) for number in range(workers)]
        self._states: dict[str, ClientState] = {}
        self._ended: list[LocalMetrics] = []

    def run_round(self, plan: Plan) -> Row:
        """Let clients train until the round is over; returns the coordinator's report.

        Raises:
            WorkerError: a worker process died.
        """
        for worker in self._workers:
            worker.start(self._setup)
        run_id = (plan.number, 0)
        tasks = [
            Task(client_id, run_id, self._states.get(client_id, ClientState()))
            for client_id in self._assembly.remaining_clients(plan)
        ]
        while tasks:
            results = self._execute(tasks)
            if self._config.gradients and not self._assembly.mode.streams:
                # No client trains now: each has pushed its gradient of this step, or has ended.
                self._assembly.global_step()
            tasks = [Task(result.client_id, run_id) for result in results if result.metrics is None]
        return self._assembly.federation.poll() or self._assembly.federation.close()

    def take_metrics(self) -> list[LocalMetrics]:
        """The metrics of the local runs that have ended since the last call."""
        taken = self._ended
        self._ended = []
        return taken

    def close(self) -> None:
        """End the worker processes."""
        for worker in self._workers:
            worker.stop()

    def _execute(self, tasks: Iterable[Task]) -> list[TaskResult]:
        """Execute tasks; returns their results in the order of client ids, not that of arrival."""
        queue = deque[Task]()
        # A suspended run exists in the memory of one worker, and can go on nowhere else.
        pinned = {
            client_id: worker.pinned for worker in self._workers for client_id in worker.suspended
        }
        for task in tasks:
            pinned.get(task.client_id, queue).append(task)
        results = list[TaskResult]()
        while True:
            for worker in self._workers:
                worker.assign(queue)
            busy = {worker.pipe: worker for worker in self._workers if worker.current is not None}
            if not busy:
                return sorted(results, key=lambda result: result.client_id)
            for pipe in wait(list(busy)):
                result = busy[pipe].collect()  # type: ignore[index]
                self._take_over(result)
                results.append(result)

    def _take_over(self, result: TaskResult) -> None:
        self._assembly.meter.add(result.traffic)
        self._assembly.arrivals.add(result.arrivals)
        if result.metrics is not None:
            self._ended.append(result.metrics)
            self._states[result.client_id] = result.state


class _WorkerHandle:
    """One worker process, seen from the process that started it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.pinned: deque[Task] = deque()
        """Tasks that only this worker can execute."""
        self.suspended: set[str] = set()
        """The clients whose run it holds until the next global step."""
        self.current: Task | None = None
        """The task that it executes."""
        self._pipe: Connection | None = None
        self._process: BaseProcess | None = None

    @property
    def pipe(self) -> Connection:
        if self._pipe is None:
            raise WorkerError(f"worker {self.number} isn't running: begin another run")
        return self._pipe

    def start(self, setup: bytes) -> None:
        """Start the process, unless it runs."""
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self._pipe, far_end = context.Pipe()
        self._process = context.Process(
            target=worker_main,
            args=(far_end,),
            daemon=True,
            name=f"splitfed-worker-{self.number}",
        )
        self._process.start()
        # Were it left open here, this process would never read the end of a worker that dies.
        far_end.close()
        try:
            self._pipe.send_bytes(setup)
        except OSError:
            raise self._death() from None

    def stop(self) -> None:
        """End the process: first by closing its pipe, then by a signal."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.join(SHUTDOWN_SECONDS)
            self._process.terminate()
            self._process.join()
        self._pipe = None
        self._process = None
        self.current = None

    def assign(self, queue: deque[Task]) -> None:
        """Send the next task, unless one is being executed: one of its own first."""
        if self.current is not None:
            return
        tasks = self.pinned or queue
        if not tasks:
            return
        self.current = tasks.popleft()
        try:
            send(self.pipe, self.current)
        except OSError:
            raise self._death() from None

    def collect(self) -> TaskResult:
        """The result of the current task.

        Raises:
            WorkerError: the process died.
            Exception: the error that the task raised, with the worker's traceback as its cause.
        """
        try:
            result: TaskResult = receive(self.pipe)
        except (EOFError, OSError):
            raise self._death() from None
        self.current = None
        if result.error is not None:
            raise result.error from WorkerError(f"in worker {self.number}:\n{result.trace}")
        if result.metrics is None:
            self.suspended.add(result.client_id)
        else:
            self.suspended.discard(result.client_id)
        return result

    def _death(self) -> WorkerError:
        """The error that says where the process died, and how."""
        exit_code = None
        if self._process is not None:
            # Its pipe closes a moment before there is an exit code.
            self._process.join(SHUTDOWN_SECONDS)
            exit_code = self._process.exitcode
        if self.current is None:
            moment = "at its start"
        else:
            moment = f"with client {self.current.client_id!r}"
        return WorkerError(
            f"worker {self.number} died {moment} (exit code {exit_code}): "
            "if that was at its start, the script's own work must stand below "
            '`if __name__ == "__main__":`. '
            "What is in the store stays: simulate on it again to go on"
        )


# ------------------------------------------------------------------------------- inside of a worker


def worker_main(pipe: Connection) -> None:
    """The loop of a worker process: receive the setup, then execute tasks until the pipe closes."""
    host: _ClientHost | None = None
    with contextlib.suppress(EOFError, OSError):
        setup: Setup = receive(pipe)
        while True:
            task: Task = receive(pipe)
            try:
                # Built with the first task, so that an error of the store is the result of a task
                # and not the death of the process.
                host = host or _ClientHost(setup)
                result = host.execute(task)
            except Exception as error:  # noqa: BLE001 -- raised again in the process that asked
                result = _error_result(task.client_id, error)
            send(pipe, result)


class _ClientHost:
    """A worker's own view of the federation, and the local runs that are suspended in it."""

    def __init__(self, setup: Setup) -> None:
        # Bits depend on all four, and a spawned process begins with torch's defaults.
        torch.set_num_threads(setup.threads)
        torch.set_default_dtype(setup.dtype)
        torch.set_float32_matmul_precision(setup.matmul)
        torch.use_deterministic_algorithms(setup.deterministic)
        self._setup = setup
        store = GradientStore(
            setup.url, sync=setup.sync, shared=setup.shared, **setup.storage_options
        )
        self._assembly = Assembly(setup.plans, store, sorted(setup.clients), None)
        self._suspended: dict[str, Generator[None, None, TaskResult]] = {}
        mode = setup.plans.mode
        self._commits_after = Verb.PUSH if mode.gradients and mode.streams else Verb.BACKWARD
        """The request after which there may be enough for a commit."""

    def execute(self, task: Task) -> TaskResult:
        """Let a client train to its next global step, or to its end."""
        steps = self._suspended.pop(task.client_id, None) or self._global_steps(task)
        try:
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


def pickled_setup(
    store: GradientStore, plans: Plans, config: ClientConfig, clients: Mapping[str, Data]
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
        return pickle.dumps(setup)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(
            f"worker processes can't get their setup ({error}): "
            "give functions that can be pickled, "
            "such as functools.partial(torch.optim.SGD, lr=0.1) and not lambdas, "
            "or leave engine=Processes(...) out"
        ) from error


def _error_result(client_id: str, error: Exception) -> TaskResult:
    trace = traceback.format_exc()
    try:
        # An error may be pickled and still not be loaded, if its class takes other arguments: the
        # asking process would die of it.
        pickle.loads(pickle.dumps(error))  # noqa: S301 -- bytes of this very line
    except Exception:  # noqa: BLE001 -- whatever a user's own error raises when it is pickled
        error = WorkerError(f"client {client_id!r}: {type(error).__name__}: {error}")
    return TaskResult(client_id, error=error, trace=trace)


def send(pipe: Connection, value: object) -> None:
    """Send a value.

    Not by `Connection.send`: once torch is imported, that passes tensors in shared memory, of which
    a container may have little.
    """
    pipe.send_bytes(pickle.dumps(value))


def receive(pipe: Connection) -> Any:
    """Receive what the other end has sent; EOFError if it is gone."""
    return pickle.loads(pipe.recv_bytes())  # noqa: S301 -- the other end is this run's own process
