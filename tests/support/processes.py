"""Training by real processes: owners, replicas and accumulators, a transport between them, and a hand that kills.

The transport is the smallest that does: one request per connection over a Unix socket, in the package's own packing. A
replica's listening socket belongs to the test's process, so that whoever comes while the replica is dead waits in its
backlog for the next one. An owner whose replica dies under its request asks the next.

Processes are forked from a server that has imported torch once; a SIGKILL is no less real for that.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import socket
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import MappingProxyType
from typing import Any

import stages
import torch
from harness import Wire
from harness_store import adam, bits, commits, drain, halving, hooked
from torch import nn

from splitfed.accumulator.accumulator import Accumulator
from splitfed.client.client import SplitClient
from splitfed.errors import SplitFedError
from splitfed.model.cut import split
from splitfed.protocol import messages
from splitfed.protocol.ids import BatchId
from splitfed.protocol.packing import pack, unpack
from splitfed.server.server import SplitServer
from splitfed.store.store import GradientStore

AT = "1:5"
METHODS = {
    "forward": (messages.ForwardRequest, messages.ForwardAnswer),
    "backward": (messages.BackwardRequest, messages.BackwardAnswer),
}
TRIES = 100
CONTEXT = multiprocessing.get_context("forkserver")
# The first optimizer of a process imports torch._dynamo: once, here, and not in every process. Modules of tests import
# pytest, which takes longer than all else that they bring.
CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "torch._dynamo",
        "splitfed.accumulator.accumulator",
        "splitfed.cli.command",
        "splitfed.client.client",
        "splitfed.server.server",
        "splitfed.service.http.app",
        "splitfed.service.http.client",
        "splitfed.service.http.serve",
    ]
)


def model() -> nn.Module:
    """A model whose body has parameters, running statistics and dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = [nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU()]
        return nn.Sequential(nn.Linear(6, 8), *body, nn.Linear(8, 3))


def new_accumulator(store: GradientStore, **settings: Any) -> Accumulator:
    """Adam with a schedule, clipped: a commit that counted twice, or in another order, shows in every later bit."""
    settings = {"lr_scheduler": halving, "clip_norm": 1.0, "keep_versions": 4_096, "lock_seconds": 0.0, **settings}
    return Accumulator(split(model(), AT)[1], store, adam, **settings)


class Owner:
    """A data owner in a loop: its half, optimizer, random numbers and data are functions of its name alone."""

    def __init__(self, name: str, server: Any) -> None:
        self.client = SplitClient(split(model(), AT)[0], server, name)
        self.steps = 0
        self._optimizer = torch.optim.SGD(self.client.parameters(), lr=0.05, momentum=0.9)
        self._seed = zlib.crc32(name.encode())
        with torch.random.fork_rng():
            torch.manual_seed(self._seed)
            self._random = torch.get_rng_state()

    def step(self) -> None:
        """Train on the next batch, under the owner's own generator."""
        generator = torch.Generator().manual_seed(self._seed + self.steps)
        x = torch.randn(5, 6, generator=generator)
        y = torch.randint(0, 3, (5,), generator=generator)
        self.steps += 1
        with torch.random.fork_rng():
            torch.set_rng_state(self._random)
            try:
                self._optimizer.zero_grad()
                nn.functional.cross_entropy(self.client(x), y).backward()
                self._optimizer.step()
            finally:
                self._random = torch.get_rng_state()

    def bits(self) -> dict[str, bytes]:
        """Its half, to compare."""
        return bits(self.client.state_dict())


class Noting(Wire):
    """Notes every batch that was acknowledged, and the version that its forward ran at."""

    def __init__(self, *servers: Any) -> None:
        super().__init__(*servers)
        self.acknowledged: dict[BatchId, int] = {}

    def send(self, method: str, request: Any) -> Any:
        """Pass it on; note what is sealed."""
        answer = self.deliver(method, request)
        if method == "backward" and request.seal is not None:
            self.acknowledged[BatchId(request.client_id, request.incarnation, request.seq)] = request.version
        return answer

    def deliver(self, method: str, request: Any) -> Any:
        """To a server in this process."""
        return super().send(method, request)


class Remote(Noting):
    """Asks replicas in turn, each request another one, and the next one when one dies under it."""

    turn = 0

    def deliver(self, method: str, request: Any) -> Any:
        """Over a socket, as often as it takes.

        Raises:
            SplitFedError: what the replica raised, by its class.
        """
        data = b"".join(pack(request))
        for _ in range(TRIES):
            self.turn += 1
            with suppress(EOFError, OSError):
                return self._ask(self.servers[self.turn % len(self.servers)], method, data)
        raise AssertionError(f"{TRIES} replicas in a row died under a {method}")

    def _ask(self, address: str, method: str, data: bytes) -> Any:
        with socket.socket(socket.AF_UNIX) as stream:
            stream.connect(address)
            with Connection(stream.detach()) as connection:
                connection.send_bytes(method.encode())
                connection.send_bytes(data)
                refused, answer = connection.recv_bytes(), connection.recv_bytes()
        if refused:
            raise RuntimeError(f"{refused.decode()}: {answer.decode()}")
        return unpack(METHODS[method][1], answer)


def opened(url: str) -> tuple[GradientStore, str]:
    """The store as a process of the run opens it, and what is on file of a batch: its recipes, if that is tested."""
    is_log = stages.install()
    return GradientStore(url, sync="process", keep_forwards=is_log), "log" if is_log else "gradient"


def serve(listener: socket.socket, url: str) -> None:
    """The main function of a replica: one request after the other, for ever."""
    torch.set_num_threads(1)
    store, durability = opened(url)
    server = SplitServer(split(model(), AT)[1], store, durability=durability)
    while True:
        stream, _ = listener.accept()
        with Connection(stream.detach()) as connection, suppress(EOFError, OSError):
            method = connection.recv_bytes().decode()
            request = unpack(METHODS[method][0], connection.recv_bytes())
            try:
                answer = "", b"".join(pack(getattr(server, method)(request)))
            except SplitFedError as error:
                answer = type(error).__name__, str(error).encode()
            connection.send_bytes(answer[0].encode())
            connection.send_bytes(answer[1])


def accumulate(url: str) -> None:
    """The main function of an accumulator."""
    torch.set_num_threads(1)
    store, durability = opened(url)
    least = 4 if durability == "log" else 1  # sums are of batches that wait together
    new_accumulator(store, durability=durability, min_batches=least).run(poll=0.002)


def own(name: str, steps: int, addresses: list[str], report: Connection, kills: int) -> None:
    """The main function of an owner: it reports each acknowledged batch, and at the end its half."""
    torch.set_num_threads(1)
    remote = Remote(*addresses)
    owner = Owner(name, remote)
    with report:
        for step in range(steps):
            stages.keep_pace(step, steps, kills)
            owner.step()
            report.send((remote.acknowledged, None))
            remote.acknowledged = {}
        report.send(({}, owner.bits()))


@dataclass
class Outcome:
    """What a run leaves besides its store."""

    acknowledged: dict[BatchId, int] = field(default_factory=dict)
    """The version that the forward of each acknowledged batch ran at."""
    halves: dict[str, dict[str, bytes]] = field(default_factory=dict)
    kills: list[str] = field(default_factory=list)
    seconds: float = 0.0


def under(environment: Mapping[str, str], main: Callable[..., None], *args: Any) -> None:
    """The main function of a role whose process needs to know more than its arguments: the server forks too early."""
    os.environ.update(environment)
    main(*args)


class Company:
    """Processes by role, which start anew when they are killed."""

    def __init__(self, environment: Mapping[str, str] = MappingProxyType({})) -> None:
        self._environment = dict(environment)
        self._roles: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {}
        self._running: dict[str, Any] = {}

    def start(self, role: str, main: Callable[..., None], *args: Any) -> None:
        """Begin a role."""
        self._roles[role] = main, args
        self._running[role] = CONTEXT.Process(target=under, args=(self._environment, main, *args), daemon=True)
        self._running[role].start()

    def kill(self, role: str, *, anew: bool = True) -> None:
        """SIGKILL its process; another one takes over."""
        process = self._running.pop(role)
        assert process.is_alive(), f"{role} had ended by itself with exit code {process.exitcode}"
        process.kill()
        process.join()
        assert process.exitcode == -9
        process.close()
        if anew:
            self.start(role, self._roles[role][0], *self._roles[role][1])

    def ended(self, role: str, limit: float) -> int | None:
        """Wait until its process ends by itself, for so many seconds: the exit code."""
        process = self._running[role]
        process.join(limit)
        assert not process.is_alive(), f"{role} didn't end in {limit} seconds"
        code: int | None = self._running.pop(role).exitcode
        process.close()
        return code

    def disband(self) -> None:
        """Kill what still runs."""
        for role in [*self._running]:
            with suppress(AssertionError):
                self.kill(role, anew=False)


@contextmanager
def staffed(url: str, environment: Mapping[str, str]) -> Iterator[tuple[Company, list[str]]]:
    """Two replicas and two accumulators; yields their company and the addresses of the replicas."""
    company, folder = Company(environment), tempfile.mkdtemp(prefix="sf")
    listeners: list[socket.socket] = []
    try:
        addresses = [f"{folder}/{replica}" for replica in range(2)]
        for replica, address in enumerate(addresses):
            listeners.append(socket.socket(socket.AF_UNIX))
            listeners[-1].bind(address)
            listeners[-1].listen(64)
            company.start(f"server {replica}", serve, listeners[-1], url)
            company.start(f"accumulator {replica}", accumulate, url)
        yield company, addresses
    finally:
        company.disband()
        for listener in listeners:
            listener.close()
        shutil.rmtree(folder)


def kill_at(company: Company, folder: Path, stage: str) -> str:
    """SIGKILL whoever comes to a stage first: its role and the stage, or '' for the stage if nobody comes."""
    number = stages.caught(folder, stage, 10.0)
    role = next((role for role, process in company._running.items() if process.pid == number), "")
    company.kill(role or "server 0")
    return f"{role or 'server 0'} {stage if role else 'elsewhere'}"


def hear(outcome: Outcome, reports: dict[Any, str], seconds: float, note: Callable[[Any], object]) -> None:
    """Wait for what owners report; who has ended leaves the reports.

    Args:
        outcome: Takes their halves.
        reports: The owners that are still at work, by what they report through.
        seconds: How long something must come.
        note: Called with the batches that were acknowledged, and their versions.
    """
    ready = wait(list(reports), timeout=max(0.0, seconds))
    assert ready, f"nothing happened any more: {len(outcome.acknowledged)} batches, killed {outcome.kills}"
    for reading in ready:
        try:
            acknowledged, half = reading.recv()
        except EOFError:
            raise AssertionError(f"{reports[reading]} died: its traceback is on stderr") from None
        note(acknowledged)
        if half is not None:
            outcome.halves[reports.pop(reading)] = half
            reading.close()


def train(
    url: str,
    *,
    owners: int,
    steps: int,
    kills: int,
    seed: int,
    limit: float,
    environment: Mapping[str, str] = MappingProxyType({}),
    folder: Path | None = None,
) -> Outcome:
    """Let owners train through two replicas and two accumulators; at each of `kills` random moments one is killed.

    Args:
        url: The store.
        owners: How many there are.
        steps: Batches of each.
        kills: How many SIGKILLs.
        seed: Seeds who is killed and when.
        limit: Fail when it takes longer, in seconds.
        environment: Variables of all processes, such as the credentials of an object store.
        folder: Where processes say that they have come to a stage (`stages`). The run is a log then, and somebody is
            killed at each stage in turn.
    """
    chance, outcome, began = random.Random(seed), Outcome(), time.monotonic()
    moments = sorted(chance.sample(range(1, owners * steps), kills))
    if folder is not None:
        environment = {**environment, stages.FOLDER: str(folder)}
        # Even, as owners keep pace with the kills: at a later moment they wait, and nobody comes to a stage any more.
        # And some batches are left for stages that nobody comes to at once.
        moments = [number * owners * steps * 4 // (5 * kills) for number in range(kills)]
    with staffed(url, environment) as (company, addresses):
        victims = ["server 0", "server 1", "accumulator 0", "accumulator 1"]
        reports: dict[Any, str] = {}
        for name in [f"owner-{number}" for number in range(owners)]:
            reading, writing = CONTEXT.Pipe(duplex=False)
            company.start(name, own, name, steps, addresses, writing, kills)
            writing.close()
            reports[reading] = name
        while reports:
            hear(outcome, reports, limit - (time.monotonic() - began), outcome.acknowledged.update)
            while moments and len(outcome.acknowledged) >= moments[0]:
                moments.pop(0)
                if folder is not None:
                    stage = stages.STAGES[len(outcome.kills) % len(stages.STAGES)]
                    outcome.kills.append(kill_at(company, folder, stage))
                    stages.release(folder, len(outcome.kills))
                    continue
                time.sleep(chance.uniform(0, 0.01))  # anywhere within a request or commit, not just behind one
                outcome.kills.append(chance.choice(victims))
                company.kill(outcome.kills[-1])
    outcome.seconds = time.monotonic() - began
    return outcome


def versions(store: GradientStore) -> dict[BatchId, int]:
    """The version that the forward of each folded batch ran at, as the commit records have it."""
    found: dict[BatchId, int] = {}
    for commit in commits(store):
        found |= dict.fromkeys(commit.folded, commit.version - 1)
        for version, batches in commit.older.items():
            found |= dict.fromkeys(batches, version)
    return found


def replay(store: GradientStore, url: str) -> tuple[GradientStore, dict[str, Owner]]:
    """Run the schedule that a store has on record once more, serially, in this process.

    Every batch runs at the version that it ran at, and every commit folds the batches that it folded.

    Args:
        store: Whose commit records are the schedule.
        url: Where to replay.

    Returns:
        The store of the replay, and its owners.
    """
    allowed: set[tuple[str, int]] = set()

    def gate(operation: str, key: str, perform: Callable[[], Any]) -> Any:
        answer = perform()
        if operation == "list" and key == "body/grad":
            found = [(again.lineage().keys.parse_gradient(name), name) for name in answer]
            return [name for batch, name in found if batch is not None and (batch.client_id, batch.seq) in allowed]
        return answer

    again = hooked(url, gate)
    # A first request whose reply was lost may have opened another process, so ids are compared without its number.
    ran_at = {(batch.client_id, batch.seq): version for batch, version in versions(store).items()}
    server, accumulator = SplitServer(split(model(), AT)[1], again), new_accumulator(again)
    owners = {name: Owner(name, server) for name in sorted({name for name, _ in ran_at})}
    for commit in commits(store)[1:]:
        for name, owner in owners.items():
            while ran_at.get((name, owner.steps)) == commit.version - 1:
                owner.step()
        allowed |= {(batch.client_id, batch.seq) for batch in commit.folded}
        (made,) = drain(accumulator)
        assert {(batch.client_id, batch.seq) for batch in made.folded} == {(b.client_id, b.seq) for b in commit.folded}
    return again, owners
