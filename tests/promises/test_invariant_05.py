"""Invariant 5, Atomic: a reader sees a whole version or none, and of accumulators that race one wins."""

from __future__ import annotations

import threading
import uuid

import harness_store as h
import pytest
import torch
from harness_store import Hook, Nth, Point, again, batch, bits, check_counted_once, commits, drain, hooked, record, sgd
from torch import nn

from splitfed.accumulator.accumulator import Accumulator
from splitfed.client.client import SplitClient
from splitfed.errors import ExpiredError
from splitfed.model.cutpoint import CutPoint
from splitfed.model.skeleton import Template
from splitfed.server.server import SplitServer
from splitfed.store.batches import Sealer
from splitfed.store.store import GradientStore

BIG = 20_000
"""80 KB of float32, which a local store maps into memory instead of copying."""


def memory() -> str:
    """The URL of a new store."""
    return f"memory://{uuid.uuid4()}"


def whole(store: GradientStore) -> int:
    """Read everything of the newest version as a new process would; return it."""
    lineage = again(store).lineage()
    version = lineage.head()
    values = lineage.weights(version)["w"]
    assert (values == -float(version)).all(), f"version {version} is torn: {values.unique().tolist()}"
    assert list(lineage.applied(version)) == [batch(seq) for seq in range(version)]
    assert (lineage.optimizer(version) is None) == (version == 0)
    assert [lineage.commit(v).num_batches for v in range(1, version + 1)] == [1] * version
    return version


@pytest.mark.parametrize("size", [2, BIG], ids=["small", "mapped"])
def test_a_reader_at_any_moment_of_a_commit_sees_a_whole_version(store_url: str, size: int) -> None:
    """Before each operation of three commits all is of the old version, or all of the new; never less than seen."""
    seen: list[int] = []

    def look(operation: str, key: str, perform: h.Perform) -> object:
        seen.append(whole(GradientStore(store_url, sync="process")))
        return perform()

    store = GradientStore(store_url, sync="process")
    Accumulator(Point(size), store, sgd())
    accumulator = Accumulator(Point(size), hooked(store_url, look), sgd(), keep_versions=2)
    for seq in range(3):
        store.pile().create(batch(seq), record([1.0] * size, base_version=seq))
        assert accumulator.step() is not None
    assert seen == sorted(seen)
    assert set(seen) == {0, 1, 2, 3}, "the newest is visible before the clean-up ends"


def race(act: Hook) -> list[tuple[str, GradientStore, Accumulator]]:
    """A commit of two batches, disturbed at each of its operations in turn."""
    done = []
    for n in range(200):
        hook, url = Nth(n, act), memory()
        store = hooked(url, hook)
        mine = Accumulator(Point(), store, sgd(), lock_seconds=0)
        for seq in range(2):
            store.pile().create(batch(seq), record([1.0 + seq] * 2))
        rivals[url] = Accumulator(Point(), GradientStore(url), sgd(), lock_seconds=0)
        current[:] = [url]
        with hook.armed():
            mine.step()
        if hook.count <= n:
            break
        done.append((" ".join(hook.log[n]), store, mine))
    assert len(done) > 20
    return done


rivals: dict[str, Accumulator] = {}
current: list[str] = []


def test_a_rival_that_commits_at_any_moment_leaves_one_winner() -> None:
    """Whoever wins: one version, both batches in it, no file that it doesn't name; a loser counts a conflict."""
    conflicts = 0
    for where, store, mine in race(h.meanwhile(lambda: rivals[current[0]].step())):
        record_ = commits(store)
        assert [len(commit.folded) for commit in record_] == [0, 2], where
        assert again(store).load_weights()["w"].tolist() == [-1.5, -1.5], where
        assert mine.num_conflicts + rivals[store.url].num_conflicts <= 1, where
        conflicts += mine.num_conflicts
        Accumulator(Point(), again(store), sgd())._versions.sweep(16)
        for kind in ("weights", "optimizer", "applied"):
            named = [f"{commit.version:010d}-{commit.nonce}" for commit in record_ if kind in commit.files]
            assert [key.split("/")[-1].split(".")[0] for key in store.blobs.list(f"body/{kind}")] == named, where
    assert conflicts > 10, "the race was a race"


def test_a_rival_that_gets_another_batch_at_any_moment_loses_none() -> None:
    """A third batch comes in and the rival folds what it sees; afterwards all three count once, in any versions."""

    def rival() -> None:
        GradientStore(current[0]).pile().create(batch(2), record([3.0, 3.0]))
        rivals[current[0]].step()

    for where, store, _ in race(h.meanwhile(rival)):
        drain(Accumulator(Point(), again(store), sgd()))
        check_counted_once(store, [batch(0), batch(1), batch(2)])
        means = [sum(1.0 + id_.seq for id_ in commit.folded) / len(commit.folded) for commit in commits(store)[1:]]
        assert again(store).load_weights()["w"].tolist() == [-sum(means)] * 2, where


def test_two_accumulators_race_and_the_loser_continues(store_url: str) -> None:
    """The other commits between this one's look and its own create: a conflict is counted, then the rest is folded."""
    quick = GradientStore(store_url, sync="process")
    other = Accumulator(Point(), quick, sgd(), lock_seconds=0)

    def overtake() -> None:
        assert other.step() is not None
        quick.pile().create(batch(1), record([2.0, 2.0], base_version=0))

    hook = Nth(0, h.meanwhile(overtake), at="create body/commit")
    mine = Accumulator(Point(), hooked(store_url, hook), sgd(), lock_seconds=0)
    quick.pile().create(batch(0), record([1.0, 1.0]))
    with hook.armed():
        commit = mine.step()
    assert commit is not None
    assert (mine.num_conflicts, other.num_conflicts) == (1, 0)
    assert (commit.version, list(commit.folded), dict(commit.staleness)) == (2, [batch(1)], {1: 1})
    assert again(quick).load_weights()["w"].tolist() == [-3.0, -3.0]


def test_a_loser_that_finds_nothing_left_makes_no_version(store_url: str) -> None:
    """All that it had folded is counted: `None`, as if it had come later."""
    quick = GradientStore(store_url, sync="process")
    other = Accumulator(Point(), quick, sgd(), lock_seconds=0)
    hook = Nth(0, h.meanwhile(other.step), at="create body/commit")
    mine = Accumulator(Point(), hooked(store_url, hook), sgd(), lock_seconds=0)
    quick.pile().create(batch(0), record())
    with hook.armed():
        assert mine.step() is None
    assert mine.num_conflicts == 1
    assert quick.latest_version() == 1


def test_a_commit_that_was_made_is_returned_whatever_others_do_meanwhile(store_url: str) -> None:
    """Others make three more versions before this one has cleaned up: its commit came about, and is no conflict."""
    quick = GradientStore(store_url, sync="process")
    other = Accumulator(Point(), quick, sgd(), keep_versions=2, lock_seconds=0)

    def overtake() -> None:
        for seq in range(1, 4):
            quick.pile().create(batch(seq), record())
            assert other.step() is not None

    hook = Nth(0, h.meanwhile(overtake), at="delete body/grad")
    mine = Accumulator(Point(), hooked(store_url, hook), sgd(), keep_versions=2, lock_seconds=0)
    quick.pile().create(batch(0), record())
    with hook.armed():
        commit = mine.step()
    check_counted_once(quick, [batch(seq) for seq in range(4)])
    assert commit is not None
    assert mine.num_conflicts == 0


def overtaken(url: str, at: str) -> GradientStore:
    """A store whose first operation `at` is preceded by three commits of somebody else, who keeps two versions."""
    quick = GradientStore(url, sync="process")
    other = Accumulator(Point(), quick, sgd(), keep_versions=2)

    def overtake() -> None:
        for seq in range(3):
            quick.pile().create(batch(seq, "b"), record())
            assert other.step() is not None

    hook = Nth(0, h.meanwhile(overtake), at=at)
    store = hooked(url, hook)
    hook.arm()
    return store


def test_a_replica_that_is_overtaken_looks_again(store_url: str) -> None:
    """The head that it found has left the window when it reads on: it answers at the new one, and gives nothing up."""
    sealer_store = overtaken(f"{store_url}-backward", "get body/applied")
    sealer = Sealer(sealer_store.lineage(), sealer_store.pile(), "n")
    assert sealer.store(batch(0), record()) == "stored"
    assert overtaken(f"{store_url}-waiting", "get body/applied").waiting() == []
    server = SplitServer(Point(), overtaken(f"{store_url}-forward", "get body/weights"))
    with torch.no_grad():
        assert SplitClient(nn.Sequential(CutPoint()), server, "a")(torch.zeros(2)).tolist() == [-3.0, -3.0]


def test_eight_threads_begin_one_store(store_url: str) -> None:
    """Whoever wins, all read the same version 0, and it is one of theirs, whole; the losers' files are gone."""
    modules = [h.net(seed) for seed in range(8)]
    together = threading.Barrier(8)
    read = []

    def begin(module: nn.Module) -> None:
        store, template = GradientStore(store_url, sync="process"), Template(module)
        together.wait()
        store.lineage().initialise(template.fingerprint(), template.state(module))
        read.append(bits(store.load_weights(0)))

    threads = [threading.Thread(target=begin, args=(module,)) for module in modules]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read) == 8
    assert all(found == read[0] for found in read)
    assert read[0] in [bits(module.state_dict()) for module in modules]
    assert len(GradientStore(store_url).blobs.list("body/weights")) == 1


def test_a_storm_of_readers_sees_whole_versions(store_url: str) -> None:
    """Four threads share one store while commits go on: each sees one value in all places, the version's own."""
    store = GradientStore(store_url, sync="process")
    accumulator = Accumulator(Point(BIG), again(store), sgd(), keep_versions=2)
    done, wrong, together = threading.Event(), [], threading.Barrier(5)

    def read() -> None:
        together.wait()
        while not done.is_set():
            version = store.latest_version()
            try:
                values = store.load_weights(version)["w"]
            except ExpiredError:
                continue
            if not (values == -float(version)).all():
                wrong.append((version, values.unique().tolist()))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    together.wait()
    for seq in range(8):
        store.pile().create(batch(seq), record([1.0] * BIG, base_version=seq))
        assert accumulator.step() is not None
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []
