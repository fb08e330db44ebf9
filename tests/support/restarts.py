"""Owners that are killed and started again: each checkpoints itself in a file, and resumes from it.

They train through replicas, beside accumulators, as in `processes`; here everybody may be killed. Between an owner's
death and its next life each replica answers once more: what the dead one had sent has arrived by then or never will, so
that the version on record is the one that its successor meets.
"""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from harness_store import commits
from processes import CONTEXT, TRIES, Company, Noting, Outcome, Owner, Remote, hear, staffed
from stages import FOLDER

from splitfed.client.transports import open_transport
from splitfed.errors import UnreachableError
from splitfed.store.store import GradientStore

SAVES = 4
"""Steps from one checkpoint to the next."""
COMMIT = ["--clip-norm", "1.0", "--keep-versions", "4096", "--poll", "0.002"]
"""As `new_accumulator` of `processes` has it."""


class Restartable(Owner):
    """An owner that goes on from its file, if there is one.

    Args:
        name: Its id.
        server: Its transport.
        file: Where its checkpoints are.
    """

    def __init__(self, name: str, server: Any, file: Path) -> None:
        super().__init__(name, server)
        self._file = file
        if file.exists():
            saved = torch.load(file, weights_only=True)
            self.client.load_state_dict(saved["half"])
            self._optimizer.load_state_dict(saved["optimizer"])
            self.steps, self._random = saved["steps"], saved["random"]
            self.client.resume(saved["position"])
        else:
            self.save()  # before the first batch, which is repeated under its number too

    def save(self) -> None:
        """Write a checkpoint: whole, or not at all."""
        saved = {
            "half": self.client.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "steps": self.steps,
            "random": self._random,
            "position": self.client.position(),
        }
        torch.save(saved, self._file.with_suffix(".new"))
        os.replace(self._file.with_suffix(".new"), self._file)


class InTurn(Noting):
    """Asks services over HTTP in turn."""

    turn = 0

    def route(self, request: object) -> Any:
        """Whose turn it is."""
        self.turn += 1
        return self.servers[self.turn % len(self.servers)]

    def deliver(self, method: str, request: Any) -> Any:
        """To the next one, if none answers at the first contact: that may be a wrong URL, and isn't tried again."""
        for _ in range(TRIES):
            with suppress(UnreachableError):
                return super().deliver(method, request)
            time.sleep(0.1)  # a replica is being started, and there is nothing else to wait on
        raise AssertionError(f"{TRIES} replicas in a row didn't answer a {method}")


def own(name: str, steps: int, addresses: list[str], file: str, report: Connection) -> None:
    """The main function of an owner: it reports each acknowledged batch, and at the end its half."""
    torch.set_num_threads(1)
    wire: Any = Remote(*addresses)
    if addresses[0].startswith("http"):
        wire = InTurn(*(open_transport(url, client_id=name, patience=100.0) for url in addresses))
    owner = Restartable(name, wire, Path(file))
    with report:
        while owner.steps < steps:
            owner.step()
            report.send((wire.acknowledged, None))
            wire.acknowledged = {}
            if owner.steps % SAVES == 0:  # after the report: what is in a checkpoint isn't repeated
                owner.save()
        report.send(({}, owner.bits()))


@contextmanager
def by_sockets(url: str, environment: Mapping[str, str]) -> Iterator[tuple[Company, list[str], Callable[[], None]]]:
    """Two replicas and two accumulators, as functions; yields the company, addresses, and how to wait for quiet."""
    with staffed(url, environment) as (company, addresses):
        yield company, addresses, lambda: [_served(address) for address in addresses] and None


def _served(address: str) -> None:
    """Return once a replica has come to a connection of now, and so is done with all before it."""
    with socket.socket(socket.AF_UNIX) as stream, suppress(OSError):
        stream.connect(address)
        stream.shutdown(socket.SHUT_WR)
        stream.recv(1)


@contextmanager
def by_commands(url: str, environment: Mapping[str, str]) -> Iterator[tuple[Company, list[str], Callable[[], None]]]:
    """The same over HTTP, by the commands `serve` and `accumulate`: three replicas and one accumulator."""
    # Each process that begins here imports this module, and an owner needs nothing of that one.
    from service import OPTIMIZER, Service

    service = Service(url, environment, GradientStore(url, sync="process"))
    try:
        urls = service.serve()
        service.verb("accumulator", "accumulate", *OPTIMIZER, *COMMIT)
        yield service, urls, lambda: time.sleep(0.5)  # a request takes milliseconds, and dies with its replica
    finally:
        service.disband()


def train(
    url: str,
    files: Path,
    way: Any = by_sockets,
    *,
    owners: int,
    steps: int,
    kills: int,
    seed: int,
    limit: float,
    environment: Mapping[str, str] = MappingProxyType({}),
    durability: str = "gradient",
) -> Outcome:
    """Let owners train; at each of `kills` random moments somebody is killed: in half of the cases an owner.

    Args:
        url: The store.
        files: Where the owners' checkpoints are.
        way: How they are served.
        owners: How many there are.
        steps: Batches of each.
        kills: How many SIGKILLs.
        seed: Seeds who is killed and when.
        limit: Fail when it takes longer, in seconds.
        environment: Variables of all processes, such as the credentials of an object store.
        durability: What is on file of a batch; only where they are served by functions.
    """
    if durability == "log":
        environment = {**environment, FOLDER: str(files)}
    chance, outcome, began = random.Random(seed), Outcome(), time.monotonic()
    moments = sorted(chance.sample(range(1, owners * steps), kills))
    reports: dict[Any, str] = {}
    with way(url, environment) as (company, addresses, quiet):
        others = [*company._running]

        def begin(name: str) -> None:
            reading, writing = CONTEXT.Pipe(duplex=False)
            company.start(name, own, name, steps, addresses, str(files / f"{name}.pt"), writing)
            writing.close()
            reports[reading] = name

        for number in range(owners):
            begin(f"owner-{number}")
        while reports:
            hear(outcome, reports, limit - (time.monotonic() - began), partial(_note, outcome))
            while moments and len(outcome.acknowledged) >= moments[0]:
                moments.pop(0)
                time.sleep(chance.uniform(0, 0.02))  # anywhere within a request or checkpoint, not just behind one
                living = [*reports.values()]
                outcome.kills.append(chance.choice(living if living and chance.random() < 0.5 else others))
                if outcome.kills[-1] not in living:
                    company.kill(outcome.kills[-1])
                    continue
                reading = next(one for one, name in reports.items() if name == outcome.kills[-1])
                if _kill(company, outcome, reading, reports):
                    quiet()
                    begin(outcome.kills[-1])
    outcome.seconds = time.monotonic() - began
    return outcome


def _kill(company: Company, outcome: Outcome, reading: Any, reports: dict[Any, str]) -> bool:
    """SIGKILL an owner, and read what it had still to say; whether it has to be started again."""
    name = reports.pop(reading)
    process = company._running.pop(name)
    process.kill()
    process.join()
    process.close()
    ended = False
    with reading, suppress(EOFError):
        while True:
            acknowledged, half = reading.recv()
            _note(outcome, acknowledged)
            if half is not None:
                outcome.halves[name], ended = half, True
    return not ended


def _note(outcome: Outcome, acknowledged: Any) -> None:
    """Take note of acknowledged batches; one that is repeated runs at the version that it ran at."""
    for batch, version in acknowledged.items():
        assert outcome.acknowledged.setdefault(batch, version) == version, f"{batch} was repeated at another version"


def check_samples(url: str, batches: int) -> None:
    """Every example counts once: five of each batch."""
    store = GradientStore(url, sync="process")
    record = commits(store)
    assert sum(commit.num_samples for commit in record) == 5 * batches
    assert {(batch.incarnation) for commit in record for batch in commit.folded} == {1}, "nobody has begun anew"
