"""Everybody at once: 8 threads here and 4 processes create batches, commit and read on one store."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import torch
from harness_store import Point, adam, again, batch, bits, check_counted_once, commits, drain, record
from processes import CONTEXT

from splitfed.accumulator.accumulator import Accumulator
from splitfed.accumulator.mean import StreamingMean
from splitfed.errors import ExpiredError
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import GradientRecord
from splitfed.store.store import GradientStore

SIZE = 20_000
"""80 KB of weights: a local store maps them into memory, and a torn file would have room for two versions."""
BATCHES = 105
"""Of each of ten writers; each is created twice."""
COMMITS = 200
WRITERS = [f"thread-{number}" for number in range(6)] + [f"process-{number}" for number in range(4)]


def gradient(id_: BatchId) -> GradientRecord:
    """A gradient that is a function of the id: one number, everywhere, so that a torn or doubled one shows."""
    value = (id_.seq * 31 + len(id_.client_id) * 7 + ord(id_.client_id[-1])) % 257 / 256 - 0.5
    everywhere = torch.tensor(value).expand(SIZE)
    return record(gradients={"w": everywhere}, num_samples=1.0 + id_.seq % 3, digest=str(id_))


def body() -> Point:
    """80 KB that are equal everywhere, at all times."""
    return Point(SIZE)


def write_and_commit(url: str, name: str, deadline: float) -> tuple[int, int]:
    """Create batches, each twice, and commit now and then without waiting for a lock; return (creates, conflicts)."""
    store = GradientStore(url, sync="process")
    accumulator = Accumulator(body(), store, adam, lock_seconds=0, keep_versions=32)
    creates = 0
    for seq in range(BATCHES):
        for _ in range(2):
            store.pile().create(batch(seq, name), gradient(batch(seq, name)))
            creates += 1
        if seq % 2:
            accumulator.step()
        assert time.monotonic() < deadline, f"{name} is at batch {seq} of {BATCHES}"
    return creates, accumulator.num_conflicts


def process(url: str, name: str, deadline: float, report: Any) -> None:
    """The main function of a process."""
    torch.set_num_threads(1)
    with report:
        report.send(write_and_commit(url, name, deadline))


def read(url: str, done: threading.Event, seen: list[int]) -> None:
    """Read the newest version, over and over: it must be whole, and belong to its record."""
    store = GradientStore(url, sync="process")
    while not done.is_set():
        version = store.latest_version()
        if version == (seen or [-1])[-1]:
            done.wait(0.001)
            continue
        assert version > (seen or [-1])[-1], "versions never go back"
        try:
            values = store.load_weights(version)["w"]
            counted = store.lineage().applied(version)
        except ExpiredError:
            assert store.latest_version() > version + 30, "only what has left the window is gone"
            continue
        assert (values == values[0]).all(), f"version {version} is torn: {values.unique().tolist()}"
        assert all(id_ in counted for id_ in store.lineage().commit(version).folded)
        seen.append(version)


def test_eight_threads_and_four_processes_on_one_store(tmp_path: Path) -> None:
    """Each batch counts once, no read is torn, and the bits are those of the recorded schedule; with conflicts."""
    url, deadline = (tmp_path / "store").as_uri(), time.monotonic() + 120
    store = GradientStore(url, sync="process")
    Accumulator(body(), store, adam)
    done, seen, results, errors = threading.Event(), ([], []), [], []

    def guarded(act: Any, *args: Any) -> None:
        try:
            results.append(act(*args))
        except BaseException as error:
            errors.append(error)
            raise

    pipes = []
    for name in WRITERS[6:]:
        reading, writing = CONTEXT.Pipe(duplex=False)
        child = CONTEXT.Process(target=process, args=(url, name, deadline, writing), daemon=True)
        child.start()
        writing.close()
        pipes.append((child, reading))
    readers = [threading.Thread(target=guarded, args=(read, url, done, found)) for found in seen]
    writers = [threading.Thread(target=guarded, args=(write_and_commit, url, n, deadline)) for n in WRITERS[:6]]
    for thread in [*readers, *writers]:
        thread.start()
    for thread in writers:
        thread.join()
    for child, reading in pipes:
        with reading:
            results.append(reading.recv())
        child.join()
    done.set()
    for thread in readers:
        thread.join()
    assert errors == []

    drain(Accumulator(body(), store, adam))
    record_ = commits(store)
    figures = [found for found in results if found is not None]
    creates, conflicts = sum(found[0] for found in figures), sum(found[1] for found in figures)
    print(f"{creates} creates, {len(record_) - 1} commits, {conflicts} conflicts, {sum(map(len, seen))} reads")
    assert creates >= 2_000
    assert len(record_) - 1 >= COMMITS
    assert conflicts > 0
    assert all(len(found) > 10 for found in seen)
    check_counted_once(store, [batch(seq, name) for name in WRITERS for seq in range(BATCHES)])
    assert bits(again(store).load_weights()) == serially(record_)


def serially(record_: list[Any]) -> dict[str, bytes]:
    """The same commits, one after another, by plain torch and the streaming mean."""
    module = body()
    optimizer = adam(module.parameters())
    for commit in record_[1:]:
        mean = StreamingMean()
        for id_ in commit.folded:
            found = gradient(id_)
            mean.add(id_, found.gradients, num_samples=found.num_samples)
        module.w.grad = mean.mean()["w"]
        optimizer.step()
    return bits(module.state_dict())
