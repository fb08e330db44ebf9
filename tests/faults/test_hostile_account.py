"""One hostile account among healthy ones: what a thousand of its requests cost the others, the server and the disk."""

from __future__ import annotations

import gc
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_http import Service, running
from harness_requests import ahead, back, body
from processes import CONTEXT
from torch import nn

import splitfed
from splitfed.accumulator.accumulator import Accumulator
from splitfed.protocol.messages import ForwardRequest, Housekeeping, LossRequest
from splitfed.protocol.packing import pack
from splitfed.server.server import SplitServer
from splitfed.service.http.app import make_app
from splitfed.service.http.auth import new_token
from splitfed.service.http.limits import Limits
from splitfed.store.quota import Quota
from splitfed.store.store import GradientStore

MIB = 1 << 20
ASKED = 1000
"""Requests of the hostile account, of each kind."""
THREADS = 12
Make = Callable[[int], tuple[str, Any]]


def skips(number: int) -> tuple[str, Any]:
    """4,096 numbers given up with each request, with holes between them."""
    begin = number * 8192
    notes = Housekeeping(abandoned=tuple(range(begin, begin + 8192, 2)))
    return "forward", hostile(incarnation=1, call=number, housekeeping=notes)


def dense_skips(number: int) -> tuple[str, Any]:
    """The same without holes: each looks like passes that failed."""
    notes = Housekeeping(abandoned=tuple(range(number * 4096, (number + 1) * 4096)))
    return "forward", hostile(incarnation=1, call=number, housekeeping=notes)


def foreign_skips(number: int) -> tuple[str, Any]:
    """Numbers of processes that nobody has opened."""
    return "forward", hostile(incarnation=number + 5000, call=0, housekeeping=Housekeeping(abandoned=(1, 3, 5)))


def processes(number: int) -> tuple[str, Any]:
    """A new process with each request."""
    return "forward", hostile(process=f"p{number}")


def expanded(number: int) -> tuple[str, Any]:
    """Two numbers, said to be 24 million rows of two."""
    return "forward", hostile(call=number, inputs=((torch.ones(1, 2).expand(24_000_000, 2),), {}), grad=number % 2 == 0)


def open_calls(number: int) -> tuple[str, Any]:
    """Forwards that no backward follows."""
    return "forward", hostile(call=number, inputs=((torch.ones(64, 2),), {}))


def gaps(number: int) -> tuple[str, Any]:
    """Batches under every second number."""
    forward = hostile(incarnation=1, call=number)
    return "loss", LossRequest(forward, 2 * number, torch.ones(2, 2), 2.0)


def releases(number: int) -> tuple[str, Any]:
    """4,096 calls confirmed that never were."""
    notes = Housekeeping(released=tuple((0, call) for call in range(4096)))
    return "forward", hostile(incarnation=1, call=number, grad=False, housekeeping=notes)


def parts(number: int) -> tuple[str, Any]:
    """Shares of batches that are never sealed."""
    return "backward", back(client_id="hostile", seq=number, part=number, seal=None)


KINDS: list[Make] = [gaps, skips, dense_skips, foreign_skips, expanded, open_calls, releases, parts, processes]


def hostile(**changes: Any) -> ForwardRequest:
    """A forward of the hostile account."""
    return ahead(client_id="hostile", **changes)


class Scene:
    """A service with tokens, an accumulator, a healthy owner, and a hostile account.

    Args:
        folder: Where the store and the tokens lie.
        service: Its address.
        store: Its store.
        tokens: The token of each.
    """

    def __init__(self, folder: Path, service: Service, store: GradientStore, tokens: dict[str, str]) -> None:
        self.folder = folder
        self.service = service
        self.store = store
        self.tokens = tokens
        self.accumulator = Accumulator(body(), store, lambda p: torch.optim.SGD(p, lr=0.01))
        half = nn.Sequential(nn.Linear(2, 2), splitfed.CutPoint())
        self.owner = splitfed.SplitClient(half, service.url, client_id="healthy", token=tokens["healthy"])

    def step(self) -> float:
        """One batch of the healthy owner; its seconds."""
        begun = time.perf_counter()
        self.owner(torch.ones(4, 2)).sum().backward()
        return time.perf_counter() - begun

    def commit(self) -> float:
        """A commit of one batch of the healthy owner; its seconds of CPU."""
        self.step()
        begun = time.thread_time()
        assert self.accumulator.step() is not None
        return time.thread_time() - begun

    def ask(self, verb: str, message: Any) -> int:
        """Send one request of the hostile account; the status."""
        return self.service.send(verb, message, authorization=f"Bearer {self.tokens['hostile']}")[0]

    def attack(self, make: Make, count: int) -> Counter[int]:
        """Send so many requests of one kind from several threads; how often each status came."""
        return from_threads(range(count), lambda number: self.ask(*make(number)))

    def disk(self) -> int:
        """Bytes of all files of the store."""
        return sum(path.stat().st_size for path in (self.folder / "store").rglob("*") if path.is_file())

    def files(self) -> int:
        """The number of its files but for what commits leave."""
        return sum(not key.startswith("body/commit") for key in self.store.blobs.list(""))


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """A service whose clients may have 64 calls on record."""
    yield from scenes(tmp_path, Quota(calls=64, disk=MIB))


def scenes(folder: Path, quota: Quota) -> Iterator[Scene]:
    """The scene, while it is served."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)  # as `splitfed serve` does
    tokens = {name: new_token(folder / "tokens", name) for name in ("healthy", "hostile")}
    store = GradientStore(folder / "store", sync="process")
    server = SplitServer(body(), store, loss_fn=lambda outputs, target: (outputs - target).sum(), quota=quota)
    limits = Limits()
    with running(make_app(server, limits=limits, tokens=folder / "tokens"), limits) as service:
        yield Scene(folder, service, store, tokens)
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_what_a_client_leaves_in_the_store_is_bounded(scene: Scene, make: Make) -> None:
    """Sixty requests of each kind: no 5xx, few files, and the healthy owner's batches still count."""
    scene.commit()
    assert scene.ask("forward", hostile()) == 200
    found = scene.attack(make, 60)
    assert all(status in (200, 404, 409, 410, 413, 422, 429) for status in found), found
    # 1,024 numbers may be given up at once and wait, 64 calls be on record; all else is a file or two a request.
    assert scene.files() < 1024 + 64 + 3 * 60 + 40, found
    scene.step()
    scene.accumulator.step(1)
    assert "healthy" in {batch.client_id for batch in scene.store.lineage().commit(scene.store.latest_version()).folded}


def test_expanded_tensors_are_refused_before_they_are_computed(scene: Scene) -> None:
    """Twelve at once of what would be 192 MB each: all are refused, and the process doesn't grow by one of them."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert set(scene.attack(expanded, 24)) <= {413, 429}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 * 1024
    assert scene.step() < 5


@pytest.mark.soak
def test_a_hostile_account_of_a_thousand_requests_of_each_kind(tmp_path: Path) -> None:
    """Row 3: p99 of healthy requests, CPU of commits after, memory, disk; printed, and within their limits.

    The hostile account has a process of its own; commits are compared with those of a store that it never saw.
    """
    quota = Quota(calls=4096, disk=64 * MIB)
    (tmp_path / "fresh").mkdir()
    (tmp_path / "hostile").mkdir()
    for fresh, scene in zip(scenes(tmp_path / "fresh", quota), scenes(tmp_path / "hostile", quota), strict=True):
        compare(fresh, scene, 50)
        memory, disk = resident(), scene.disk()
        scene.ask("forward", hostile())
        rows = []
        for make in KINDS:
            alone = sorted(scene.step() for _ in range(200))
            scene.accumulator.step(1)
            here, there = CONTEXT.Pipe()
            arguments = (scene.service.url, scene.tokens["hostile"], make, ASKED, there)
            attacker = CONTEXT.Process(target=attack, args=arguments)
            attacker.start()
            assert here.recv() == "ready"
            steps = list[float]()
            here.send("go")
            while not here.poll():
                steps.append(scene.step())
            found = here.recv()
            attacker.join()
            scene.accumulator.step(1)
            row = {
                "kind": make.__name__,
                "statuses": dict(found),
                "alone p50, p99 ms": [round(at(alone, share) * 1e3, 1) for share in (0.5, 0.99)],
                "p50": at(sorted(steps), 0.5) / at(alone, 0.5),
                "p99": at(sorted(steps), 0.99) / at(alone, 0.99),
                "steps": len(steps),
                "commits": compare(fresh, scene, 100),
                "memory MiB": (resident() - memory) / MIB,
                "disk MiB": (scene.disk() - disk) / MIB,
            }
            print({name: round(value, 2) if isinstance(value, float) else value for name, value in row.items()})
            rows.append(row)
        assert max(row["memory MiB"] for row in rows) <= 256
        assert max(row["disk MiB"] for row in rows) <= quota.disk / MIB
        # 1.1 where the machine is quiet; but a table with a thousand holes is rewritten whole with each commit.
        assert max(row["commits"] for row in rows if row["kind"] != "gaps") <= 1.3
        assert not any(status >= 500 for row in rows for status in row["statuses"])


def attack(url: str, token: str, make: Make, count: int, told: Any) -> None:
    """The hostile account's process: so many requests of a kind, then how often each status came."""
    service = Service(url, ("", 0))
    requests = [make(number) for number in range(count)]
    packed = [(f"/v1/{verb}", b"".join(pack(message))) for verb, message in requests]
    told.send("ready")
    told.recv()
    authorization = f"Bearer {token}"
    found = from_threads(packed, lambda asked: service.ask(*asked, authorization=authorization)[0])
    told.send(found)


def from_threads(asked: Iterable[Any], ask: Callable[[Any], int]) -> Counter[int]:
    """Ask from several threads at once, each for what is next; how often each status came."""
    left, found, lock = iter(asked), Counter[int](), threading.Lock()

    def send() -> None:
        while True:
            with lock:
                one = next(left, None)
            if one is None:
                return
            status = ask(one)
            with lock:
                found[status] += 1

    threads = [threading.Thread(target=send) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def compare(fresh: Scene, scene: Scene, count: int) -> float:
    """The CPU of a commit, as a multiple of that in a store without a hostile account: medians, interleaved."""
    gc.collect()
    gc.disable()  # whose turn it falls into is chance, and both scenes' objects are in one heap
    try:
        pairs = [(fresh.commit(), scene.commit()) for _ in range(count)]
    finally:
        gc.enable()
    return at(sorted(pair[1] for pair in pairs), 0.5) / at(sorted(pair[0] for pair in pairs), 0.5)


def at(values: list[float], share: float) -> float:
    """The value below which that share of sorted values lies."""
    return values[min(len(values) - 1, int(share * len(values)))]


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
