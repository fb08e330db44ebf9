"""What a run costs at its 20,000th version: as much as at its hundredth, in time, files, memory and reads."""

from __future__ import annotations

import math
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from harness_store import Hooked, Nth, Point, again, batch, folder, record, sgd

from splitfed.accumulator.accumulator import Accumulator
from splitfed.client.client import SplitClient
from splitfed.model.cutpoint import CutPoint
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import ForwardRecord
from splitfed.server.server import SplitServer
from splitfed.store.status import read_status
from splitfed.store.store import GradientStore

pytestmark = pytest.mark.soak

VERSIONS = 20_000
MEASURED = 200


class Run:
    """A run of small batches, a commit for each: with a forward that comes and goes."""

    def __init__(self, url: str) -> None:
        self.store = GradientStore(url, sync="process")
        self.server = SplitServer(Point(), self.store)
        self.accumulator = Accumulator(Point(), self.store, sgd())
        self.forward = self._forward()
        self.seconds: list[float] = []

    def _forward(self) -> ForwardRecord:
        client = SplitClient(torch.nn.Sequential(torch.nn.Linear(2, 2), CutPoint()), self.server, client_id="first")
        client(torch.ones(1, 2)).sum().backward()
        found = self.store.pile().forward(0, "first", 1, 0)
        assert found is not None
        self.store.pile().drop_forward(0, "first", 1, 0)
        return found

    def commit(self, client: str = "a") -> None:
        """One batch and its commit, whose CPU time is noted."""
        head = self.store.latest_version()
        pile = self.store.pile()
        pile.put_forward(head, client, 1, head, self.forward)
        pile.create(batch(head, client), record(base_version=head))
        began = time.process_time()
        assert self.accumulator.step() is not None
        self.seconds.append(time.process_time() - began)
        pile.drop_forward(head, client, 1, head)

    def grow(self, versions: int) -> None:
        """Commit up to a version."""
        while self.store.latest_version() < versions:
            self.commit()

    def things(self) -> int:
        """Files and folders, but for the records of commits, which are for ever."""
        if hasattr(self.store.blobs, "root"):
            names: Any = (path.relative_to(folder(self.store)).as_posix() for path in folder(self.store).rglob("*"))
        else:
            names = self.store.blobs.list("")
        return len([name for name in names if "/commit/" not in name])


def counted(store: GradientStore, act: Any) -> int:
    """How many reads and listings something takes of a store that nobody has opened yet."""
    count = Nth()
    fresh = again(store)
    fresh.blobs = Hooked(fresh.blobs, count)  # type: ignore[assignment]
    with count.armed():
        act(fresh)
    return count.count


def test_the_twenty_thousandth_version_costs_as_the_hundredth(store_url: str, record_property: Any) -> None:
    """Median CPU of 200 commits, in turns with a fresh run; as many files; reads by the logarithm."""
    old, young = Run(store_url), Run(f"{store_url}-young")
    old.grow(VERSIONS)
    young.grow(100)
    for run in (old, young):
        run.seconds.clear()
    for _ in range(MEASURED):
        old.commit()
        young.commit()
    ratio = median(old.seconds) / median(young.seconds)
    assert old.things() == young.things()
    keys = old.store.lineage().keys
    records = [len(old.store.blobs.get(keys.commit(v)) or b"") for v in range(VERSIONS, VERSIONS + MEASURED)]
    newest = old.store.latest_version()
    with_hint = counted(old.store, lambda store: store.latest_version())
    reads = counted(old.store, read_status)
    late = again(old.store).lineage()
    late.counted()
    late_reads = Nth()
    late.blobs = Hooked(late.blobs, late_reads)  # type: ignore[assignment]
    with late_reads.armed():
        assert late.outcome(batch(3)).status == "stored"
    old.store.blobs.delete(keys.head)
    without = counted(old.store, lambda store: store.latest_version())
    for kept in sorted(again(old.store).lineage().kept()):  # nor any weights to find it by
        for key in old.store.blobs.list("body/weights"):
            if keys.parse_versioned(key) == (kept, old.store.lineage().commit(kept).nonce):
                old.store.blobs.delete(key)
    by_halves = counted(old.store, lambda store: store.latest_version())
    figures = {
        "cpu_ms_old": 1e3 * median(old.seconds),
        "cpu_ms_young": 1e3 * median(young.seconds),
        "record_bytes": max(records),
        "things": old.things(),
        "reads_with_hint": with_hint,
        "reads_without_hint": without,
        "reads_by_halves": by_halves,
        "reads_late": late_reads.count,
        "reads_status": reads,
    }
    for name, value in figures.items():
        record_property(f"{name}_{store_url.split(':')[0]}", value)
    print(figures, "ratio", ratio)
    assert ratio <= 1.2
    assert max(records) <= 800
    assert max(with_hint, without, by_halves) <= 4 * math.log2(newest)
    assert late_reads.count <= 2
    assert reads <= 50


def test_a_thousand_clients_cost_as_ten(store_url: str, record_property: Any) -> None:
    """Median CPU of a commit of one batch, in turns; and the bytes of tables that it writes on average."""
    runs = {}
    for count in (10, 1_000):
        run = Run(f"{store_url}-{count}")
        for number in range(count):
            run.store.join_client(f"c{number}")
            run.store.open_client(f"c{number}")
            run.store.pile().create(BatchId(f"c{number}", 1, 0), record())
        assert run.accumulator.step() is not None
        runs[count] = run
        run.written = 0  # type: ignore[attr-defined]
        create = run.store.blobs.raw.create

        def note(key: str, parts: Any, run: Any = run, create: Any = create, **options: Any) -> bool:
            run.written += sum(len(part) for part in parts) if "/applied/" in key else 0
            return bool(create(key, parts, **options))

        run.store.blobs.raw.create = note  # type: ignore[method-assign]
        run.seconds.clear()
    for number in range(2 * MEASURED):
        for count, run in runs.items():
            run.commit(f"c{number % count}")
    few, many = (median(run.seconds) for run in runs.values())
    written = runs[1_000].written / (2 * MEASURED)  # type: ignore[attr-defined]
    figures = {"cpu_ms_10": 1e3 * few, "cpu_ms_1000": 1e3 * many, "applied_bytes": written}
    for name, value in figures.items():
        record_property(f"{name}_{store_url.split(':')[0]}", value)
    print(figures, "ratio", many / few)
    assert many <= 2 * few
    assert written <= 4_096


def resident() -> int:
    """The memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is read from /proc")
def test_a_hundred_thousand_batches_take_no_more_memory(tmp_path: Path, record_property: Any) -> None:
    """Ten a commit, on files: between the ten thousandth and the last the process grows by 5 MiB at most."""
    run = Run((tmp_path / "store").as_uri())
    pile = run.store.pile()
    sizes = []
    for seq in range(100_000):
        pile.create(batch(seq), record(base_version=seq // 10))
        if seq % 10 == 9:
            assert run.accumulator.step() is not None
        if seq % 10_000 == 9_999:
            sizes.append(resident())
    record_property("batches", 100_000)
    record_property("grown_bytes", sizes[-1] - sizes[0])
    print("resident MiB", [size >> 20 for size in sizes])
    assert sizes[-1] - sizes[0] <= 5 << 20
