"""Invariant 8, Reproducible: the schedule is on record, and run once more it ends in the same bits."""

from __future__ import annotations

import functools
import json
import random
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_store import (
    Point,
    adam,
    batch,
    check_counted_once,
    commits,
    drain,
    halving,
    net,
    noisy,
    record,
)
from processes import AT, CONTEXT, Noting, Owner, model, new_accumulator, replay, versions

from splitfed.accumulator.accumulator import Accumulator
from splitfed.accumulator.policies import inverse_sqrt
from splitfed.model.cut import split
from splitfed.server.server import SplitServer
from splitfed.store.store import GradientStore


def memory() -> str:
    """The URL of a new store."""
    return f"memory://{uuid.uuid4()}"


class Meanwhile(Noting):
    """Between a forward and its backward other owners train, and commits are made; by chance, over two replicas."""

    def __init__(self, url: str, seed: int) -> None:
        body = split(model(), AT)[1]
        super().__init__(*(SplitServer(body, GradientStore(url, sync="process"), keep_graphs=keep) for keep in (8, 0)))
        self.chance = random.Random(seed)
        self.idle = [Owner(name, self) for name in "abc"]
        self.accumulators = [new_accumulator(GradientStore(url, sync="process"), min_batches=k) for k in (1, 3)]

    def route(self, request: object) -> Any:
        """Either replica."""
        return self.chance.choice(self.servers)

    def deliver(self, method: str, request: Any) -> Any:
        """Answer, and let others act before the client can go on."""
        answer = super().deliver(method, request)
        while method == "forward" and self.chance.random() < 0.4:
            self.act()
        return answer

    def act(self) -> None:
        """One owner's batch, unless all are in the midst of one, and perhaps a commit."""
        if self.idle:
            owner = self.idle.pop(self.chance.randrange(len(self.idle)))
            owner.step()
            self.idle.append(owner)
        if self.chance.random() < 0.7:
            self.chance.choice(self.accumulators).step()


Runs = Callable[[int], tuple[GradientStore, Meanwhile]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Free-running training by seed, each once."""
    return functools.cache(lambda seed: free_running(tmp_path_factory.mktemp("run").as_uri(), seed))


def free_running(url: str, seed: int) -> tuple[GradientStore, Meanwhile]:
    """Some 50 batches; what is left is folded at the end."""
    wire = Meanwhile(url, seed)
    for _ in range(30):
        wire.act()
    drain(wire.accumulators[0])
    return GradientStore(url, sync="process"), wire


@pytest.mark.parametrize("seed", range(2))
def test_a_free_running_schedule_ends_in_the_same_bits_when_it_is_replayed(runs: Runs, seed: int) -> None:
    """Every version's weights, buffers and optimizer, and every owner's half; with batches up to some commits stale."""
    store, wire = runs(seed)
    check_counted_once(store, wire.acknowledged)
    record_ = commits(store)
    assert max(age for commit in record_ for age in commit.staleness) >= 2, "the schedule is worth replaying"
    assert versions(store) == wire.acknowledged
    replayed, twins = replay(store, memory())
    for commit, expected in zip(record_, commits(replayed), strict=True):
        assert (commit.files["weights"], commit.files.get("optimizer")) == (
            expected.files["weights"],
            expected.files.get("optimizer"),
        ), f"version {commit.version}"
    assert {name: owner.bits() for name, owner in twins.items()} == {o.client.client_id: o.bits() for o in wire.idle}


def test_another_schedule_ends_in_other_bits(runs: Runs) -> None:
    """Else the replay above would prove nothing."""
    one, two = (runs(seed)[0] for seed in (0, 1))
    assert commits(one)[-1].files["weights"] != commits(two)[-1].files["weights"]


def test_a_synchronous_run_is_the_same_each_time() -> None:
    """A schedule that is fixed by construction: two runs agree in every file's hash."""

    def run() -> list[dict[str, str]]:
        store = GradientStore(memory())
        server, accumulator = SplitServer(split(model(), AT)[1], store), new_accumulator(store, min_batches=3)
        owners = [Owner(name, server) for name in "abc"]
        for _ in range(4):
            for owner in owners:
                owner.step()
            assert accumulator.step() is not None
        return [dict(commit.files) for commit in commits(store)]

    assert run() == run()


def on_record(store: GradientStore) -> str:
    """All that the records say, apart from who said it, when, and what came of it."""
    fields = [json.loads(commit.to_json()) for commit in commits(store)]
    return json.dumps([{k: v for k, v in f.items() if k not in ("nonce", "time", "files")} for f in fields])


def test_the_version_of_each_forward_is_on_record() -> None:
    """a, say, at version 0 and b at 1, or the other way round: two schedules, so two records; counts don't tell."""

    def run(older: str, newer: str) -> str:
        store = GradientStore(memory())
        accumulator = Accumulator(Point(), store, adam, staleness_weight=inverse_sqrt)
        store.pile().create(batch(0, "c"), record())
        accumulator.step()
        store.pile().create(batch(0, older), record(base_version=0))
        store.pile().create(batch(0, newer), record(base_version=1))
        accumulator.step()
        return on_record(store)

    assert run("a", "b") != run("b", "a")


def test_the_version_of_a_stale_batch_is_on_record_too() -> None:
    """It moved its owner's half, if not the body: without its version the owner's later batches can't be replayed."""

    def run(base: int) -> str:
        store = GradientStore(memory())
        accumulator = Accumulator(Point(), store, adam, max_staleness=0)
        for seq in range(2):
            store.pile().create(batch(seq), record(base_version=seq))
            accumulator.step()
        store.pile().create(batch(0, "b"), record(base_version=base))
        store.pile().create(batch(2), record(base_version=2))
        accumulator.step()
        return on_record(store)

    assert run(0) != run(1)


def test_the_version_that_a_rollback_went_back_to_is_on_record() -> None:
    """Back to 0 and back to 1 are two schedules."""

    def run(version: int) -> str:
        store = GradientStore(memory())
        accumulator = Accumulator(Point(), store, adam)
        for seq in range(2):
            store.pile().create(batch(seq), record(base_version=seq))
            accumulator.step()
        store.rollback(version)
        return on_record(store)

    assert run(0) != run(1)


def settings(clip_norm: float | None = 0.5, scheduler: Any = halving) -> dict[str, Any]:
    """An accumulator with all kinds of state."""
    return {"optimizer": adam, "lr_scheduler": scheduler, "clip_norm": clip_norm}


def feed(store: GradientStore, seq: int) -> None:
    """A batch of each of two clients."""
    for client in "ab":
        store.pile().create(batch(seq, client), noisy(net(), batch(seq, client), seq))


def in_one_go(commits_: int, **given: Any) -> dict[str, str]:
    """All commits by one accumulator that keeps what it can in memory."""
    store = GradientStore(memory())
    accumulator = Accumulator(net(), store, **given)
    for seq in range(commits_):
        feed(store, seq)
        assert accumulator.step() is not None
    return dict(commits(store)[commits_].files)


@pytest.mark.filterwarnings("ignore:the weights of this body are neither")
@pytest.mark.parametrize(
    "given", [settings(), settings(None), settings(scheduler=None)], ids=["all", "no clip", "no schedule"]
)
def test_an_accumulator_made_anew_for_each_commit_gives_the_same_bits(store_url: str, given: dict[str, Any]) -> None:
    """Weights, buffers, optimizer and scheduler go on from the store alone, whatever weights the new body brings."""
    for seq in range(6):
        store = GradientStore(store_url, sync="process")
        accumulator = Accumulator(net(seed=seq and 9), store, **given)
        feed(store, seq)
        assert accumulator.step() is not None
    assert dict(commits(store)[6].files) == in_one_go(6, **given)


def one_commit(url: str, seq: int) -> None:
    """The main function of a process that makes one commit."""
    torch.set_num_threads(1)
    store = GradientStore(url, sync="process")
    accumulator = Accumulator(net(seed=seq and 9), store, **settings())
    feed(store, seq)
    assert accumulator.step() is not None


def test_another_process_for_each_commit_gives_the_same_bits(tmp_path: Path) -> None:
    """The same with real processes: nothing but the store lives on."""
    url = (tmp_path / "store").as_uri()
    for seq in range(3):
        process = CONTEXT.Process(target=one_commit, args=(url, seq))
        process.start()
        process.join()
        assert process.exitcode == 0
    assert dict(commits(GradientStore(url))[3].files) == in_one_go(3, **settings())


def test_arrival_and_listing_order_change_no_bit(store_url: str) -> None:
    """Twenty batches come in four orders; the version is a function of which they are."""
    found = set()
    for seed in range(4):
        store = GradientStore(f"{store_url}-{seed}", sync="process")
        accumulator = Accumulator(net(), store, adam)
        ids = [batch(seq, client) for seq in range(10) for client in "ab"]
        random.Random(seed).shuffle(ids)
        for id_ in ids:
            store.pile().create(id_, noisy(net(), id_, 0))
        assert accumulator.step() is not None
        found.add(tuple(commits(store)[1].files.values()))
    assert len(found) == 1
