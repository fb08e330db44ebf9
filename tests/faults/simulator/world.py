"""A run: all processes of a plan on one storage, until enough has happened; then calm, and what waits is committed."""

from __future__ import annotations

import gc
import hashlib
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from types import FrameType
from typing import Any
from unittest import mock

import torch
from tests.faults.simulator import actors, model, oracle
from tests.faults.simulator.ledger import CLOSER, Ledger
from tests.faults.simulator.plan import Plan
from tests.faults.simulator.process import Fault, Process
from tests.faults.simulator.scheduler import Fiber, Scheduler, current
from tests.faults.simulator.storage import ProcessBlobs, Storage
from tests.faults.simulator.threads import Clock, Patience, Threads

from splitfed.accumulator.accumulator import Accumulator
from splitfed.blobs.contract import Blobs
from splitfed.errors import SplitFedError
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import GradientRecord
from splitfed.server.server import SplitServer
from splitfed.store.store import GradientStore

MOST_STEPS = 15_000
_RESTART = 150


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    plan: Plan
    wrong: list[str]
    """What was promised and isn't so."""
    faults: list[str]
    """The faults that happened, by their labels."""
    commits: int
    batches: int
    """Acknowledged ones."""
    steps: int
    trace: list[str]

    @property
    def digest(self) -> str:
        """Tells one trace from another."""
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()[:16]


class Observer(Process):
    """Whoever looks at the storage from outside: nothing goes wrong for it, and no time passes."""

    def step(self, operation: str, what: str) -> Fault | None:
        """Nothing happens."""
        return None


class World:
    """One run.

    Args:
        plan: Its settings.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.is_stormy = True
        """Whether faults happen and clients go on."""
        self.is_landing = False
        """Whether a late write lands now, in nobody's turn: nobody may pause in it."""
        self.faults: list[str] = []
        self.servers: list[actors.Server] = []
        self.batches = 0
        self.clock = 1.7e9
        self.trace: list[str] = []
        self.scheduler = Scheduler(Random(f"{plan.seed}/schedule"), plan.restlessness, self._failed)
        self.storage = Storage(self)
        self.processes: dict[str, list[Process]] = {}
        self._names: dict[str, Process] = {}
        self.observer = Observer(self, "observer")
        self._names["observer"] = self.observer
        self.ledger = Ledger(self)

    def run(self) -> Outcome:
        """Let it happen, and compare it with what was promised."""
        with self._replaced():
            self.ledger.watch(self.open(self.observer))
            self._begin()
            for role in actors.cast(self.plan):
                self.start(role)
            jumps = Random(f"{self.plan.seed}/clock")
            for _ in range(self.plan.clock_jumps):
                self.scheduler.after(jumps.randrange(1, 2_000), lambda: self._jump(jumps.uniform(-1e7, 1e7)))
            self.scheduler.run()
            self.is_stormy = False
            if not self.ledger.wrong:
                self._drain()
            if not self.ledger.wrong:
                oracle.check(self.ledger)
        acknowledged = len(self.ledger.acknowledged)
        wrong, head, steps = self.ledger.wrong, self.ledger.head, self.scheduler.steps
        self.storage.clear()
        return Outcome(self.plan, wrong, self.faults, head, acknowledged, steps, self.trace)

    def open(self, process: Process) -> GradientStore:
        """The store, as a process has it."""
        return GradientStore(f"memory://{process.name}", sync="process")

    def start(self, role: str) -> Process:
        """Start a process of a role: the first, or the next one."""
        process = self._process(role)
        process.start(lambda: actors.act(role, process))
        return process

    def fork(self, role: str, act: Callable[[Process], None]) -> None:
        """Start a process of a role that goes on where another one is."""
        process = self._process(role)
        process.start(lambda: act(process))

    def _process(self, role: str) -> Process:
        held = self.processes.setdefault(role, [])
        process = Process(self, f"{role}.{len(held)}")
        held.append(process)
        self._names[process.name] = process
        process.at_death = lambda: self._died(role, process)
        return process

    def is_alone(self, role: str, process: Process) -> bool:
        """Whether no other process of its role is alive."""
        return all(other.is_dead or other is process for other in self.processes[role])

    def note(self, process: Process, operation: str, what: str, fault: str | None) -> None:
        """An operation of a process."""
        self.trace.append(f"{self.scheduler.steps} {process.name} {operation} {what}{f'  <- {fault}' * bool(fault)}")
        plan = self.plan
        is_enough = (
            self.ledger.head >= plan.commits and self.batches >= plan.batches and len(self.faults) >= plan.faults
        )
        if self.is_stormy and (is_enough or self.scheduler.steps > MOST_STEPS):
            self.is_stormy = False
            self.trace.append(f"{self.scheduler.steps} the faults end")
            self.ledger.wake_all()

    def land(self, operation: str, key: str, write: Callable[[], Any]) -> None:
        """A write that was under way when its caller gave it up arrives."""
        self.trace.append(f"{self.scheduler.steps} {operation} {key} lands late")
        self.is_landing = True
        write()
        self.is_landing = False

    def _died(self, role: str, process: Process) -> None:
        self.servers = [server for server in self.servers if server.process is not process]
        if role.split("-")[0] in actors.RESTARTED and self.is_alone(role, process):
            self.scheduler.after(1 + int(process.choose.random() * _RESTART), lambda: self._restart(role))

    def _restart(self, role: str) -> None:
        is_needed = self.is_stormy or role.startswith("server")
        if is_needed and not self.ledger.wrong and all(process.is_dead for process in self.processes[role]):
            self.start(role)

    def stop(self) -> None:
        """Something is wrong already: nobody goes on."""
        self.is_stormy = False
        for held in self.processes.values():
            for process in held:
                process.kill()

    def _begin(self) -> None:
        """Version 0."""
        store = self.open(self.observer)
        SplitServer(model.body_of(self.plan), store, loss_fn=model.loss_fn, durability=self.plan.durability)

    def _drain(self) -> None:
        """Commit what waits, when all is calm."""
        try:
            accumulator = self.accumulator(self.open(self.observer), 1)
            for _ in range(100):
                if accumulator.step() is None:
                    break
            if self.ledger.store.waiting():
                self._close()
                accumulator.step()
        except SplitFedError as error:
            self.ledger.fail(f"what waits can't be committed: {error!r}", error)

    def _close(self) -> None:
        gradients = {name: torch.zeros_like(p) for name, p in model.body_of(self.plan).named_parameters()}
        record = GradientRecord("gradient", self.ledger.head, 1.0, 1.0, "", self.ledger.store.numerics(), gradients, [])
        self.ledger.store.pile().create(BatchId(CLOSER, 1, 0), record)

    def accumulator(self, store: GradientStore, min_batches: int) -> Accumulator:
        """An accumulator of this run: all have the same settings but for when they commit."""
        plan = self.plan
        return Accumulator(
            model.body_of(plan),
            store,
            model.optimizer_of(plan),
            lr_scheduler=model.schedule_of(plan),
            min_batches=min_batches,
            max_staleness=plan.max_staleness,
            keep_versions=plan.keep_versions,
        )

    def _failed(self, fiber: Fiber, error: BaseException) -> None:
        self.ledger.fail(f"{fiber.name} ended with {error!r}", error)

    def _jump(self, seconds: float) -> None:
        self.clock += seconds
        if self.is_stormy:
            self.faults.append(f"clock:{seconds:.0f}")

    @contextmanager
    def _replaced(self) -> Iterator[None]:
        """Put the simulation in place of storage, clock and randomness."""

        def open_blobs(url: Any, **options: Any) -> Blobs:
            return ProcessBlobs(self._names[str(url).removeprefix("memory://")], self.storage)

        main = threading.current_thread()

        def urandom(size: int, real: Callable[[int], bytes] = os.urandom) -> bytes:
            fiber = current()
            is_other = fiber is None and threading.current_thread() is not main
            if is_other or not _is_asked_by_splitfed(sys._getframe(1)):
                return real(size)
            return (self.observer if fiber is None else fiber.process).entropy.randbytes(size)

        def now(real: Callable[[], float] = time.time) -> float:
            is_other = current() is None and threading.current_thread() is not main
            return real() if is_other else self.clock + self.scheduler.steps / 1_000

        before = torch.get_rng_state()
        torch.manual_seed(self.plan.seed)
        # When garbage is collected is no function of the seed, and clients ask which graphs are alive.
        gc.collect(1)
        gc.disable()
        try:
            with (
                mock.patch("splitfed.store.store.open_blobs", open_blobs),
                mock.patch("os.urandom", urandom),
                mock.patch("time.time", now),
                mock.patch.multiple("splitfed.store.holder", threading=Threads(), time=Clock(self), LEAST=1, BYTES=0),
                mock.patch("splitfed.accumulator.gather.Backoff", Patience),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                yield
        finally:
            gc.enable()
            torch.set_rng_state(before)


def _is_asked_by_splitfed(frame: FrameType | None) -> bool:
    """Whether randomness is asked for by the code under test: others do so when they are first imported."""
    if frame is not None and frame.f_globals.get("__name__") == "uuid":
        frame = frame.f_back
    return frame is not None and str(frame.f_globals.get("__name__")).startswith("splitfed.")


def run(plan: Plan | int) -> Outcome:
    """Run a plan, or that of a seed."""
    return World(Plan.of(plan) if isinstance(plan, int) else plan).run()
