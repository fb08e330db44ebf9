"""A service by real processes: replicas, workers and an accumulator by their commands, and owners that step when told.

The driver fixes the schedule: all owners take one step, their batches become one commit, and only then come the next
steps. So the bits of a run over any transport can be compared with those of the same schedule in one process. An
accumulator that stays makes the commits, or a command that the driver runs when all have stepped.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from harness import Wire
from harness_store import bits, commits
from processes import AT, CONTEXT, Company, Owner, model, new_accumulator
from servers import free_ports
from torch import nn

import splitfed
from splitfed.cli.command import main
from splitfed.client.transports import open_transport
from splitfed.model.cut import split
from splitfed.server.server import SplitServer
from splitfed.store import layout
from splitfed.store.store import GradientStore

OWNERS = [f"owner-{number}" for number in range(8)]
LIMIT = 200.0
CLIP_NORM = 0.1  # below the norms that come, so that a commit which doesn't clip shows
OPTIMIZER = ["--optimizer", "harness_store:adam", "--lr-scheduler", "harness_store:halving"]
EVERY_EIGHTH = [*OPTIMIZER, "--clip-norm", str(CLIP_NORM), "--min-batches", str(len(OWNERS))]
Halves = dict[str, dict[str, bytes]]


def body() -> nn.Module:
    """APP of the commands."""
    return split(model(), AT)[1]


class InTurn(Wire):
    """Each request goes to the next replica: a backward never to the one that ran its forward."""

    turn = 0

    def route(self, request: object) -> Any:
        """Whose turn it is."""
        self.turn += 1
        return self.servers[self.turn % len(self.servers)]


def command(environment: Mapping[str, str], *arguments: str) -> None:
    """The main function of a process that is one command."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    raise SystemExit(main(arguments))


def own(environment: Mapping[str, str], name: str, urls: list[str], told: Connection) -> None:
    """The main function of an owner: a step for each message that is true, then its half."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    transports = [open_transport(url, client_id=name) for url in urls]
    owner = Owner(name, InTurn(*transports) if len(urls) > 1 else urls[0])
    with told:
        while told.recv():
            owner.step()
            told.send(owner.steps)
        told.send(owner.bits())


class Service(Company):
    """Processes around one store.

    Args:
        url: The store.
        environment: Its credentials, for the processes.
        store: The same, opened here.
    """

    def __init__(self, url: str, environment: Mapping[str, str], store: GradientStore) -> None:
        super().__init__()
        self.url = url
        self.environment = dict(environment)
        self.store = store
        self.ports = free_ports(3)
        self.owners: dict[str, Connection] = {}

    def verb(self, role: str, name: str, *arguments: str) -> None:
        """Start a command on the store."""
        self.start(role, command, self.environment, *self.words(name, *arguments))

    def words(self, name: str, *arguments: str) -> list[str]:
        """A command on the store, without the name of the program."""
        return [name, "service:body", "--store", self.url, "--sync", "process", *arguments]

    def serve(self) -> list[str]:
        """Start three replicas; their URLs, once they answer."""
        for port in self.ports:
            self.verb(f"server {port}", "serve", "--port", str(port))
        urls = [f"http://127.0.0.1:{port}" for port in self.ports]
        for url in urls:
            answering(url)
        return urls

    def work(self, count: int) -> None:
        """Start workers that take over after a second."""
        for number in range(count):
            self.verb(f"worker {number}", "work", "--claim-seconds", "1", "--poll", "0.02")

    def accumulate(self) -> None:
        """Start the accumulator that stays: it commits every eighth batch."""
        self.verb("accumulator", "accumulate", *EVERY_EIGHTH, "--poll", "0.02")

    def commit(self, *, installed: bool) -> None:
        """Commit what waits, by an accumulator that lives for one commit; return when it has ended well.

        Args:
            installed: By the program, as a shell runs it; else forked where torch is imported: five seconds less.
        """
        words = self.words("accumulate", *EVERY_EIGHTH, "--once")
        if installed:
            found = [Path(splitfed.__file__).parents[1], Path(__file__).parent]
            environment = {**os.environ, **self.environment, "PYTHONPATH": os.pathsep.join(map(str, found))}
            program = [Path(sys.executable).with_name("splitfed"), *words]
            done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
            assert (done.returncode, done.stderr) == (0, "")
        else:
            self.start("committer", command, self.environment, *words)
            assert self.ended("committer", LIMIT) == 0, "its traceback is on stderr"

    def hire(self, urls: list[str]) -> None:
        """Start the owners."""
        for name in OWNERS:
            self.owners[name], there = CONTEXT.Pipe()
            self.start(name, own, self.environment, name, urls, there)
            there.close()

    def step(self, meanwhile: Callable[[], bool] = lambda: True) -> None:
        """One step of each owner: a batch of each.

        Args:
            meanwhile: Called again and again, until it returns true or all have stepped.
        """
        for owner in self.owners.values():
            owner.send(True)
        waiting, busy, until = list(self.owners.values()), True, time.monotonic() + LIMIT
        while waiting:
            busy = busy and not meanwhile()
            for owner in wait(waiting, timeout=0 if busy else until - time.monotonic()):
                owner.recv()
                waiting.remove(owner)
            assert time.monotonic() < until, f"{len(waiting)} owners had no answer for {LIMIT} seconds"

    def round(self, meanwhile: Callable[[], bool] = lambda: True) -> None:
        """One step of each owner, and the commit of their batches by the accumulator that stays.

        Args:
            meanwhile: As for `step`.
        """
        version = self.store.latest_version() if self.store.lineage().head() >= 0 else 0
        self.step(meanwhile)
        until = time.monotonic() + LIMIT
        while self.store.latest_version() == version:
            assert time.monotonic() < until, f"no commit came of {len(self.store.waiting())} batches"
            time.sleep(0.01)  # another process makes it: there is nothing to wait on but the store

    def halves(self) -> Halves:
        """Let the owners go, and take their halves."""
        for owner in self.owners.values():
            owner.send(False)
        return {name: owner.recv() for name, owner in self.owners.items()}

    def kill_who_has_claimed(self) -> bool:
        """SIGKILL a worker between its claim and its answer; whether one was caught there."""
        for key in self.store.blobs.list(layout.POST):
            parsed = layout.parse_post(key)
            if parsed is None or not parsed[2].startswith("claim-"):
                continue
            place = parsed[1]
            if self.store.blobs.get(f"{place}.answer") is not None:
                continue
            claim = self.store.blobs.get(key)
            pid = json.loads(bytes(claim))["pid"] if claim is not None else 0
            role = next((role for role, process in self._running.items() if process.pid == pid), None)
            if role is not None and self._stopped(pid, place):
                self.kill(role, anew=False)
                return True
        return False

    def _stopped(self, pid: int, place: str) -> bool:
        """Halt a worker; it goes on unless its claim is still unanswered and its request still there."""
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.05)  # what it had sent to a server on its way arrives
        found = [self.store.blobs.get(f"{place}.{end}") for end in ("request", "answer")]
        if found[0] is not None and found[1] is None:
            return True
        os.kill(pid, signal.SIGCONT)
        return False


@contextmanager
def company(url: str, environment: Mapping[str, str], store: GradientStore) -> Iterator[Service]:
    """A service whose processes end with the block."""
    service = Service(url, environment, store)
    try:
        yield service
    finally:
        service.disband()
        for owner in service.owners.values():
            owner.close()


def answering(url: str) -> None:
    """Return once a replica is ready."""
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        try:
            urllib.request.urlopen(f"{url}/readyz", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.02)  # nobody listens yet, and there is nothing else to wait on
    raise AssertionError(f"{url} didn't get ready")


def in_one_process(url: str, rounds: int) -> tuple[GradientStore, Halves]:
    """The same schedule with a server that is an object: its store, and its owners' halves."""
    store = GradientStore(url, sync="process")
    server = SplitServer(body(), store)
    accumulator = new_accumulator(store, min_batches=len(OWNERS), clip_norm=CLIP_NORM)
    owners = [Owner(name, server) for name in OWNERS]
    for _ in range(rounds):
        for owner in owners:
            owner.step()
        assert accumulator.step() is not None
    return store, {name: owner.bits() for name, owner in zip(OWNERS, owners, strict=True)}


def check_same(store: GradientStore, halves: Halves, rounds: int, url: str) -> None:
    """Weights, optimizer states, schedule and halves are those of the schedule in one process."""
    expected, expected_halves = in_one_process(url, rounds)
    assert store.waiting() == []
    assert bits(store.load_weights()) == bits(expected.load_weights())
    record = [store.lineage().commit(version) for version in range(store.latest_version() + 1)]
    for got, wanted in zip(record, commits(expected), strict=True):
        assert got.files == wanted.files, got.version
        assert [str(batch) for batch in got.folded] == [str(batch) for batch in wanted.folded]
    assert halves == expected_halves
