"""Mutated requests, and valid ones in the wrong order: none harms the server, and each costs it little."""

from __future__ import annotations

import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import urllib3
from harness_http import BINARY, running
from harness_requests import ahead, body
from mutations import CLIENTS, Asked, Mutator
from processes import CONTEXT

from splitfed.accumulator.accumulator import Accumulator
from splitfed.protocol.packing import pack
from splitfed.server.server import SplitServer
from splitfed.service.http.app import make_app
from splitfed.service.http.auth import new_token
from splitfed.service.http.limits import Limits
from splitfed.store.store import GradientStore

FEW, MANY = 400, 50_000
WARM = 5_000
"""After so many requests the server has the memory that it needs."""
COMMIT_EVERY = 250
MOST_CPU = 0.020
MOST_GROWTH = 16.0
SLOW_TRIES = 3


def serve(folder: Path, told: Any) -> None:
    """The server's process."""
    torch.set_num_threads(1)
    store = GradientStore(folder / "store", sync="process")
    server = SplitServer(body(), store, loss_fn=lambda outputs, target: (outputs - target).sum())
    with running(make_app(server, limits=Limits(), tokens=folder / "tokens"), Limits()) as service:
        told.send(service.url)
        told.recv()


class Service:
    """A server in a process of its own, and what it has used.

    Args:
        url: Where it is.
        pid: Its process.
    """

    def __init__(self, url: str, pid: int) -> None:
        self._url = url
        self._pid = pid
        self._pool = urllib3.PoolManager(retries=False, timeout=60.0)

    def ask(self, asked: Asked) -> int:
        """Send one request; the status, which may be none of 5xx."""
        headers = {**(BINARY if asked.method == "POST" else {}), **dict(asked.headers)}
        answer = self._pool.request(
            asked.method, self._url + asked.path, body=asked.body, headers=headers, redirect=False
        )
        assert answer.status < 500, (asked, answer.status, answer.data)
        return int(answer.status)

    def cpu(self) -> float:
        """Seconds of CPU that all threads of the process have used."""
        return time.clock_gettime((~self._pid << 3) | 2)  # Linux's number of another process's clock

    def memory(self) -> float:
        """MiB that are resident."""
        pages = int(Path(f"/proc/{self._pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize() / (1 << 20)


@contextmanager
def served(folder: Path) -> Iterator[tuple[Service, dict[str, str]]]:
    """The service, and the tokens of its clients."""
    tokens = {client: new_token(folder / "tokens", client) for client in CLIENTS}
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=serve, args=(folder, there), daemon=True)
    process.start()
    try:
        assert here.poll(60)
        yield Service(here.recv(), process.pid or 0), tokens
        here.send("end")
        process.join(20)
        assert process.exitcode == 0
    finally:
        process.kill()


def attack(folder: Path, count: int, seed: int) -> dict[str, float]:
    """Send so many requests, with commits in between; what was found."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    statuses = Counter[str]()
    with served(folder) as (service, tokens):
        mutator = Mutator(chance, tokens)
        store = GradientStore(folder / "store", sync="process")
        accumulator = Accumulator(body(), store, lambda p: torch.optim.SGD(p, lr=1e-3), keep_versions=4)
        slow: list[tuple[float, Asked]] = []
        worst = first = 0.0
        before = service.memory()
        for number in range(count):
            asked = mutator.draw()
            begun = service.cpu()
            status = service.ask(asked)
            took = service.cpu() - begun
            first = max(first, took)
            if took > MOST_CPU:
                took = min([took, *(again(service, asked) for _ in range(SLOW_TRIES - 1))])
                slow.append((took, asked))
            worst = max(worst, took)
            statuses[f"{asked.kind} {status}"] += 1
            if number % COMMIT_EVERY == COMMIT_EVERY - 1:
                accumulator.step()
                mutator.head = store.latest_version()
            if number == min(WARM, count // 2):
                before = service.memory()
        growth = service.memory() - before
        healthy = Asked("", "/v1/forward", b"".join(pack(ahead(call=77, process="well"))), headers=_bearer(tokens["a"]))
        assert service.ask(healthy) == 200
    print(dict(sorted(statuses.items())))
    print(f"versions {mutator.head}, slow {[(round(took * 1e3, 1), asked.kind) for took, asked in slow]}")
    return {
        "requests": count,
        "status 5xx": 0,
        "worst CPU ms": worst * 1e3,
        "first tries above 20 ms": len(slow),
        "worst first try ms": first * 1e3,
        "growth MiB": growth,
    }


def again(service: Service, asked: Asked) -> float:
    """CPU of the same request once more: a pause of the collector or of the kernel isn't its own."""
    begun = service.cpu()
    service.ask(asked)
    return service.cpu() - begun


def _bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def test_a_few_mutated_requests(tmp_path: Path) -> None:
    """400 of each kind of change: no 5xx, and the service is well after."""
    attack(tmp_path, FEW, seed=0)


@pytest.mark.soak
def test_many_mutated_requests(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Row 9: 50,000, other ones in each run: no 5xx, 20 ms of CPU for the worst, 16 MiB of growth."""
    seed = random.SystemRandom().randrange(1 << 30)
    print("seed", seed)
    found = attack(tmp_path, MANY, seed)
    print(found)
    for name, value in found.items():
        record_property(name, round(value, 2))
    assert found["worst CPU ms"] <= MOST_CPU * 1e3
    assert found["growth MiB"] <= MOST_GROWTH
