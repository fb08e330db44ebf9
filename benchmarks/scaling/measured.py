"""Replicas as real processes on this machine: their throughput, alone and together, and what its parts take.

The requests are recorded ones: each client sends the same activations and the same gradients, under new numbers, so the
driver computes nothing. It says how much of a core it takes. What is to be compared is measured in turns, in one run.

Two cores may be two threads of one core. So the same is measured without splitfed: processes that only run the body
forward and backward. What they gain by being two is the most that two replicas can gain.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import splitfed
from benchmarks.balancer import balancing, hashed, in_turn, named
from benchmarks.models import tiny, transformer
from splitfed.protocol.messages import BackwardRequest, Chain, ForwardRequest, Housekeeping, Seal
from splitfed.service.http.client import HttpTransport

WARM = 2
"""Batches of each client that aren't timed."""


def medium() -> nn.Module:
    """A transformer of 3.2 million parameters without dropout: the body of the measurement."""
    torch.manual_seed(0)
    return splitfed.split(transformer(256, 4, 0.0), "1:5")[1]


def small() -> nn.Module:
    """The study's body."""
    torch.manual_seed(0)
    return splitfed.split(tiny(), "2")[1]


SHAPES = {"medium": (8, 32, 256), "small": (64, 64)}


@dataclass(frozen=True)
class Times:
    """What the parts of a run take, in seconds of a core: each replica is to have one."""

    client: float
    """A client's own work for a batch."""
    forward: float
    """A forward."""
    backward: float
    """A backward whose graph is kept."""
    commit: float
    """A commit of 8 batches."""
    load: float
    """What the first forward at a new version takes more."""
    start: float
    """From the start of a replica until it listens."""
    spread: float = 0.0
    """How much a request's time varies: the standard deviation of its logarithm."""
    poll: float = 0.1
    """Of the accumulator."""


# ------------------------------------------------------------------------------------- processes


def command(verb: str, body: str, store: Path, *more: str) -> list[str]:
    """A command of splitfed on a store."""
    program = [sys.executable, "-m", "splitfed", verb, f"benchmarks.scaling.measured:{body}"]
    return [*program, "--store", str(store), "--sync", "process", "--threads", "1", *more]


class Started:
    """A process and how to end it."""

    def __init__(self, words: Sequence[str], port: int | None = None) -> None:
        self.words, self.port = words, port
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        paths = [str(Path(__file__).parents[2]), str(Path(splitfed.__file__).parents[1])]
        environment["PYTHONPATH"] = os.pathsep.join([*paths, environment.get("PYTHONPATH", "")])
        quiet = subprocess.DEVNULL
        return subprocess.Popen(self.words, stdout=quiet, stderr=quiet, env=environment)

    def await_answer(self) -> float:
        """Seconds until it answers."""
        begun = time.monotonic()
        while time.monotonic() < begun + 120:
            if self.process.poll() is not None:
                raise RuntimeError(f"{' '.join(self.words)} ended with {self.process.returncode}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/healthz", timeout=5).close()
                return time.monotonic() - begun
            except OSError:
                time.sleep(0.02)
        raise RuntimeError(f"{' '.join(self.words)} doesn't answer")

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def again(self) -> None:
        """Start it once more."""
        self.process = self._start()

    def metrics(self) -> dict[str, float]:
        """Its metrics by name and label."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    def cpu(self) -> float:
        """Seconds of a core that it has taken."""
        found = 0
        for path in Path(f"/proc/{self.process.pid}/task").iterdir():
            with suppress(OSError):  # a thread that has ended meanwhile
                found += int((path / "schedstat").read_text().split()[0])
        return found / 1e9

    def resident(self) -> int:
        """Bytes of memory that are its own: files that are mapped don't count."""
        text = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        (found,) = re.findall(r"^Anonymous: +(\d+) kB", text, re.MULTILINE)
        return int(found) << 10


@contextmanager
def replicas(count: int, store: Path, body: str = "medium") -> Iterator[list[Started]]:
    """Replicas of one store while the block runs."""
    with ExitStack() as stack:
        found: list[Started] = []
        for port in ports(count):
            words = command("serve", body, store, "--port", str(port))
            found.append(Started(words, port))
            stack.callback(lambda each=found[-1]: each.kill())
            found[-1].await_answer()
        yield found


@contextmanager
def accumulating(store: Path, body: str = "medium") -> Iterator[None]:
    """An accumulator that commits every 8 batches while the block runs."""
    settings = ["--optimizer", "SGD", "--lr", "0.0001", "--momentum", "0.9", "--min-batches", "8", "--poll", "0.1"]
    started = Started(command("accumulate", body, store, *settings))
    try:
        yield
    finally:
        started.process.send_signal(signal.SIGTERM)
        started.process.wait()


def ports(count: int) -> list[int]:
    """Ports that are free at this moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


# ---------------------------------------------------------------------------------------- the load


class Client:
    """A client of recorded requests.

    Args:
        url: Of a replica, or a balancer.
        name: Its id.
        shape: Of its activations, and of their gradients.
        clock: What a request's time is taken by, in seconds.
    """

    def __init__(
        self, url: str, name: str, shape: Sequence[int], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._clock = clock
        generator = torch.Generator().manual_seed(0)
        self.transport = HttpTransport(url, patience=120.0)
        self.name = name
        self.seconds: dict[str, list[float]] = {"forward": [], "backward": []}
        self._x = torch.randn(*shape, generator=generator)
        self._gradient = torch.randn(*shape, generator=generator) * 1e-3
        self._incarnation: int | None = None
        self._number = 0
        self._seen = 0
        self._done: tuple[tuple[int, int], ...] = ()

    def batch(self) -> None:
        """A forward and its backward."""
        number, samples = self._number, float(self._x.shape[0])
        self._number += 1
        ahead = ForwardRequest(
            client_id=self.name,
            incarnation=self._incarnation,
            process=f"benchmark-{os.getpid()}",
            call=number,
            cut="",
            inputs=((self._x,), {}),
            requires_grad=(True,),
            training=True,
            grad=True,
            seed=7,
            autocast=None,
            version=None,
            seen=self._seen,
            previous=None,
            housekeeping=Housekeeping(released=self._done),
        )
        answer = self._timed("forward", ahead)
        self._incarnation, self._seen = answer.incarnation, answer.version
        seal = Seal((), samples, 1.0, (Chain(samples, 0),))
        gradients = (self._gradient,)
        back = BackwardRequest(self.name, self._incarnation, number, 0, answer.version, number, gradients, seal)
        self._timed("backward", back)
        self._done = ((answer.version, number),)

    def _timed(self, verb: str, request: Any) -> Any:
        begun = self._clock()
        answer = self.transport.send(verb, request)
        self.seconds[verb].append(self._clock() - begun)
        return answer

    def take(self) -> dict[str, float]:
        """The median seconds of each verb since the last take."""
        found = {verb: statistics.median(taken) for verb, taken in self.seconds.items() if taken}
        for taken in self.seconds.values():
            taken.clear()
        return found


def rate_of(clients: Sequence[Any], seconds: float) -> tuple[float, float]:
    """Batches a second of clients that each do one after another, and the share of a core that this process takes.

    The rate is the sum of those of the clients, each until the end of its own last batch: so a batch that the end of
    the window cuts off makes no difference.
    """
    rates = [0.0] * len(clients)
    errors: list[BaseException] = []

    def work(place: int) -> None:
        begun, done = time.perf_counter(), 0
        try:
            while time.perf_counter() - begun < seconds:
                clients[place].batch()
                done += 1
        except BaseException as error:  # noqa: BLE001 -- raised below, in the thread that waits
            errors.append(error)
        rates[place] = done / (time.perf_counter() - begun)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(clients))]
    wall, cpu = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    if errors:
        raise errors[0]
    return sum(rates), share


# --------------------------------------------------------------------- the same without splitfed


class Bare:
    """A process that runs the body forward and backward, and nothing else."""

    def __init__(self, shape: Sequence[int]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_run_body, args=(tuple(shape), there), daemon=True)
        self._process.start()
        self._pipe.recv()

    def batch(self) -> None:
        """One pass forward and backward."""
        self._pipe.send(True)
        self._pipe.recv()

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.join()


def _run_body(shape: tuple[int, ...], pipe: Any) -> None:
    torch.set_num_threads(1)
    body, gradient = medium(), torch.randn(*shape)
    parameters = list(body.parameters())
    pipe.send(True)
    while pipe.recv():
        x = torch.randn(*shape).requires_grad_()
        torch.autograd.grad(body(x), [x, *parameters], gradient)
        pipe.send(True)


# ------------------------------------------------------------------------------- what is measured


def in_turns(ways: dict[str, Callable[[], tuple[float, float]]], rounds: int) -> dict[str, dict[str, float]]:
    """Batches a second of each way, taken in turns; and the driver's share of a core."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, measure in ways.items():
            found[name].append(measure())
    return {
        name: {
            "rate": statistics.median(rate for rate, _ in taken),
            "best": max(rate for rate, _ in taken),
            "driver": statistics.median(share for _, share in taken),
        }
        for name, taken in found.items()
    }


def clients_of(urls: Sequence[str], prefix: str, body: str = "medium") -> list[Client]:
    """A client for each URL, past its first batches."""
    found = [Client(url, f"{prefix}{number}", SHAPES[body]) for number, url in enumerate(urls)]
    for client in found:
        for _ in range(WARM):
            client.batch()
        client.take()
    return found


def url_of(replica: Started) -> str:
    """Where it answers."""
    return f"http://127.0.0.1:{replica.port}"


def add_up(folder: Path, counts: Sequence[int], seconds: float, rounds: int) -> dict[str, Any]:
    """One replica and several, each with as many clients: directly, behind the balancer, and bare processes."""
    most = max(counts)
    with ExitStack() as stack:
        fleet = stack.enter_context(replicas(most, folder / "run"))
        places = [f"127.0.0.1:{replica.port}" for replica in fleet]
        ways: dict[str, Callable[[], tuple[float, float]]] = {}
        for count, port in zip(counts, ports(len(counts)), strict=True):
            written = named(f"127.0.0.1:{port}", places[:count])
            url = stack.enter_context(balancing(written, f"http://127.0.0.1:{port}", folder / f"nginx-{count}"))
            clients = clients_of([url] * count, f"balanced-{count}-")
            ways[f"balanced {count}"] = lambda clients=clients: rate_of(clients, seconds)
        for count in (1, 2):
            direct = clients_of([url_of(replica) for replica in fleet[:count]], f"direct-{count}-")
            ways[f"direct {count}"] = lambda direct=direct: rate_of(direct, seconds)
        bare = [Bare(SHAPES["medium"]) for _ in range(2)]
        for each in bare:
            stack.callback(each.end)
        for count in (1, 2):
            ways[f"bare {count}"] = lambda some=bare[:count]: rate_of(some, seconds)
        return in_turns(ways, rounds)


def during_commits(folder: Path, seconds: float, rounds: int) -> dict[str, Any]:
    """Two replicas without commits, and two others whose batches are committed by eight."""
    with ExitStack() as stack:
        plain = stack.enter_context(replicas(2, folder / "plain"))
        stack.enter_context(accumulating(folder / "committed"))
        committed = stack.enter_context(replicas(2, folder / "committed"))
        ways: dict[str, Callable[[], tuple[float, float]]] = {}
        for name, fleet in (("without", plain), ("one per 8 batches", committed)):
            clients = clients_of([url_of(replica) for replica in fleet], "c")
            ways[name] = lambda clients=clients: rate_of(clients, seconds)
        found = in_turns(ways, rounds)
        store = splitfed.GradientStore(folder / "committed", sync="process")
        return {**found, "commits": store.latest_version()}


def during_kills(folder: Path, seconds: float) -> dict[str, Any]:
    """Three replicas behind the balancer, for so long with no kill, then with one each 10 s."""
    with ExitStack() as stack:
        fleet = stack.enter_context(replicas(3, folder / "run"))
        places, (port,) = [f"127.0.0.1:{replica.port}" for replica in fleet], ports(1)
        written = named(f"127.0.0.1:{port}", places)
        url = stack.enter_context(balancing(written, f"http://127.0.0.1:{port}", folder / "nginx"))
        clients = clients_of([url] * 3, "c")
        calm, _ = rate_of(clients, seconds)
        over = threading.Event()
        starts: list[float] = []

        def hand() -> None:
            number = 0
            while not over.wait(10.0):
                victim = fleet[number % len(fleet)]
                victim.kill()
                victim.again()
                starts.append(victim.await_answer())
                number += 1

        killing = threading.Thread(target=hand)
        killing.start()
        under, _ = rate_of(clients, seconds)
        over.set()
        killing.join()
        store = splitfed.GradientStore(folder / "run", sync="process")
        sent = sum(client._number for client in clients)
        return {
            "rate without kills": calm,
            "rate with kills": under,
            "kills": len(starts),
            "seconds to start": statistics.median(starts),
            "batches sent": sent,
            "batches in the store": len(store.waiting()),
        }


def affinity(folder: Path, batches: int, clients: int = 6) -> dict[str, Any]:
    """The share of backwards that need no recompute, on three replicas behind three kinds of balancer."""
    found: dict[str, Any] = {}
    for name, write in (("named", named), ("hashed", hashed), ("in turn", in_turn)):
        with ExitStack() as stack:
            fleet = stack.enter_context(replicas(3, folder / name / "run", "small"))
            (port,) = ports(1)
            written = write(f"127.0.0.1:{port}", [f"127.0.0.1:{replica.port}" for replica in fleet])
            url = f"http://127.0.0.1:{port}"
            stack.enter_context(balancing(written, url, folder / name / "nginx"))
            some = [Client(url, f"c{number}", SHAPES["small"]) for number in range(clients)]
            threads = [threading.Thread(target=_batches, args=(each, batches)) for each in some]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            uses = [replica.metrics() for replica in fleet]
            kept = [use['splitfed_graphs_total{use="kept"}'] for use in uses]
            again = [use['splitfed_graphs_total{use="recomputed"}'] for use in uses]
            found[name] = {"kept": sum(kept) / (sum(kept) + sum(again)), "by replica": kept}
    return found


def _batches(client: Client, number: int) -> None:
    for _ in range(number):
        client.batch()


def memory(folder: Path, counts: Sequence[int]) -> dict[str, float]:
    """MiB of a replica's own memory while so many batches wait."""
    found = {}
    with replicas(1, folder / "run", "small") as (replica,):
        (client,) = clients_of([url_of(replica)], "a", "small")
        for count in counts:
            _batches(client, count - client._number)
            found[f"{count}"] = replica.resident() / (1 << 20)
    return found


def parts(folder: Path, batches: int) -> Times:
    """What the parts of a run take: one client at one replica, and commits between."""
    with replicas(1, folder / "run") as (replica,):
        replica.kill()
        replica.again()
        replica.await_answer()
        start = replica.cpu()
        client = Client(url_of(replica), "a", SHAPES["medium"], replica.cpu)
        _batches(client, WARM)
        client.take()
        own = time.process_time()
        _batches(client, batches)
        own = (time.process_time() - own) / batches
        quarters = [statistics.quantiles(taken, n=4) for taken in client.seconds.values()]
        usual = client.take()
        store = splitfed.GradientStore(folder / "run", sync="process")
        accumulator = splitfed.Accumulator(
            medium(), store, lambda params: torch.optim.SGD(params, lr=1e-4, momentum=0.9)
        )
        accumulator.step()
        commits, loads = [], []
        for _ in range(5):
            client.batch()
            loads.append(client.take()["forward"] - usual["forward"])
            _batches(client, 7)
            begun = time.process_time()
            accumulator.step()
            commits.append(time.process_time() - begun)
            client.take()
        return Times(
            client=own,
            forward=usual["forward"],
            backward=usual["backward"],
            commit=statistics.median(commits),
            load=max(0.0, statistics.mean(loads)),
            start=start,
            # Of a normal distribution the middle half is 1.349 standard deviations wide.
            spread=statistics.mean(math.log(high / low) / 1.349 for low, _, high in quarters),
        )


def run(seconds: float, rounds: int, counts: Sequence[int]) -> dict[str, Any]:
    """All of it.

    Args:
        seconds: Of each window.
        rounds: Windows of each way.
        counts: Of replicas.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {
            "parts": asdict(parts(folder / "parts", 20)),
            "replicas": add_up(folder / "add-up", counts, seconds, rounds),
            "commits": during_commits(folder / "commits", seconds, rounds),
            "kills": during_kills(folder / "kills", max(30.0, seconds)),
            "affinity": affinity(folder / "affinity", 100),
            "memory": memory(folder / "memory", (100, 1_000, 10_000)),
        }
