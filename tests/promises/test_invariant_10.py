"""Invariant 10, Loud: nothing is dropped silently; what becomes of each batch is counted and reported."""

from __future__ import annotations

import uuid
import warnings
from typing import Any

import harness_store as h
import pytest
import torch
from harness_store import Nth, Point, again, batch, check_counted_once, commits, drain, hooked, record, sgd
from processes import AT, Noting, Owner, model, new_accumulator

from splitfed.accumulator.accumulator import Accumulator
from splitfed.client.client import SplitClient
from splitfed.errors import ExpiredError, StoreError
from splitfed.model.cut import split
from splitfed.protocol.messages import BackwardRequest
from splitfed.server.server import SplitServer
from splitfed.store.store import GradientStore


def memory() -> str:
    """The URL of a new store."""
    return f"memory://{uuid.uuid4()}"


class Failing(Noting):
    """Fails on demand before or after the server has answered a backward."""

    before = after = False

    def deliver(self, method: str, request: Any) -> Any:
        """Answer, or not."""
        if method == "backward" and self.before:
            raise StoreError("the request was lost")
        answer = super().deliver(method, request)
        if method == "backward" and self.after:
            raise StoreError("the answer was lost")
        return answer


def trained(client: SplitClient, factor: float = 1.0) -> None:
    """A batch whose gradient is scaled."""
    (client(torch.ones(4, 6)) * factor).sum().backward()


def test_batches_issued_are_folded_stale_rejected_skipped_or_waiting() -> None:
    """A run with one of each trouble: the sums are right, by number and by id."""
    store = GradientStore(memory())
    wire = Failing(SplitServer(split(model(), AT)[1], store))
    client = SplitClient(split(model(), AT)[0], wire, "a")
    accumulator = new_accumulator(store, max_staleness=1)

    held = client(torch.ones(4, 6)).sum()  # its backward comes late
    for _ in range(3):  # 0, 1, 2: in order
        trained(client)
        accumulator.step()
    with pytest.warns(UserWarning, match="client 'a' isn't finite"):
        trained(client, float("nan"))  # 3: rejected
    held.backward()  # 4: computed at version 0, stale at head 3
    wire.before = True
    with pytest.raises(StoreError, match="request was lost"):
        trained(client)  # 5: never arrived, given up
    wire.before, wire.after = False, True
    with pytest.raises(StoreError, match="answer was lost"):
        trained(client)  # 6: arrived, though the client doesn't know
    wire.after = False
    trained(client)  # 7
    h.plant(store, batch(0, "m"), b"something else altogether")
    with pytest.warns(UserWarning, match="batch m/1/0 is rejected"):
        assert accumulator.step() is not None
    trained(client)  # 8: waits

    record_ = commits(store)
    counted = {
        name: sorted(str(id_) for commit in record_ for id_ in getattr(commit, name))
        for name in ("folded", "stale", "rejected", "skipped")
    }
    assert counted == {
        "folded": ["a/1/0", "a/1/1", "a/1/2", "a/1/6", "a/1/7"],
        "stale": ["a/1/4"],
        "rejected": ["a/1/3", "m/1/0"],
        "skipped": ["a/1/5"],
    }
    assert [str(id_) for id_ in store.waiting()] == ["a/1/8"]
    check_counted_once(store, [*(batch(seq) for seq in range(9)), batch(0, "m")])
    totals = [(c.num_batches, c.num_stale, c.num_rejected, c.num_skipped) for c in record_]
    assert totals == [(0, 0, 0, 0), (1, 0, 0, 0), (1, 0, 0, 0), (1, 0, 0, 0), (2, 1, 2, 1)]


def test_a_client_is_warned_once_of_gradients_that_arent_finite() -> None:
    """The first says so, and that later ones are only counted; they are counted."""
    store = GradientStore(memory())
    client = SplitClient(split(model(), AT)[0], SplitServer(split(model(), AT)[1], store), "a")
    accumulator = new_accumulator(store)
    with pytest.warns(UserWarning, match="later ones are only counted"):
        trained(client, float("inf"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            trained(client, float("inf"))
    trained(client)
    commit = accumulator.step()
    assert commit is not None
    assert (commit.num_rejected, commit.num_batches) == (4, 1)


def test_a_retry_of_a_rejected_batch_is_never_told_that_it_was_stored() -> None:
    """While it waits and after it was closed, any replica says 'rejected'."""
    store = GradientStore(memory())
    kept: list[BackwardRequest] = []

    class Keeping(Noting):
        def deliver(self, method: str, request: Any) -> Any:
            kept.extend([request] if method == "backward" else [])
            return super().deliver(method, request)

    server = SplitServer(split(model(), AT)[1], store)
    client = SplitClient(split(model(), AT)[0], Keeping(server), "a")
    with pytest.warns(UserWarning, match="isn't finite"):
        trained(client, float("nan"))
    other = SplitServer(split(model(), AT)[1], again(store))
    assert other.backward(kept[0]).status == "rejected"
    Owner("b", Noting(server)).step()
    commit = new_accumulator(store).step()
    assert commit is not None
    assert commit.num_rejected == 1
    assert other.backward(kept[0]).status == "rejected"


def test_a_batch_whose_version_left_raises_from_the_users_backward() -> None:
    """ExpiredError says that it counts nowhere; the number is closed, and the loop goes on."""
    store = GradientStore(memory())
    server = SplitServer(split(model(), AT)[1], store, keep_graphs=0)
    client = SplitClient(split(model(), AT)[0], server, "a")
    accumulator = new_accumulator(store, keep_versions=2, keep_bytes=0)
    held = client(torch.ones(4, 6)).sum()
    for seq in range(5):
        Owner(f"b{seq}", Noting(server)).step()
        accumulator.step()
    with pytest.raises(ExpiredError, match="counts nowhere"):
        held.backward()
    trained(client)
    drain(accumulator)
    last = commits(store)[-1]
    assert ([str(id_) for id_ in last.folded], [str(id_) for id_ in last.skipped]) == (["a/1/1"], ["a/1/0"])


def test_orphaned_forwards_and_parts_are_counted_when_they_expire() -> None:
    """Three forwards whose backward never came: the commit that drops them says so."""
    store = GradientStore(memory())
    server = SplitServer(split(model(), AT)[1], store)
    client = SplitClient(split(model(), AT)[0], server, "a")
    accumulator = new_accumulator(store, keep_versions=2, keep_bytes=0)
    graphs = [client(torch.ones(4, 6)) for _ in range(3)]
    for seq in range(4):
        Owner(f"b{seq}", Noting(server)).step()
        accumulator.step()
    assert sum(commit.num_expired for commit in commits(store)) == 3 + 2, "three of a's, two that nobody confirmed"
    assert len(graphs) == 3


def test_one_trip_calls_that_nobody_confirmed_are_counted_when_they_expire(store_url: str) -> None:
    """The version that such a batch is pinned to is forgotten with that version, and not before."""
    store = GradientStore(store_url, sync="process")
    accumulator = Accumulator(Point(), store, sgd(), keep_versions=2, keep_bytes=0)
    expired = []
    for seq in range(4):
        assert store.pile().pin(batch(seq), seq) == (seq, True)
        store.pile().create(batch(seq), record(base_version=seq))
        expired.append([commit.num_expired for commit in drain(accumulator)])
    assert expired == [[0], [0], [1], [1]]
    assert len(store.blobs.list("body/pin")) == 2


def test_what_a_loser_dropped_is_counted_by_whoever_commits(store_url: str) -> None:
    """It sweeps, loses the race, and goes on: the parts that it dropped are in a record all the same."""
    quick = GradientStore(store_url, sync="process")
    other = Accumulator(Point(), quick, sgd(), keep_versions=2, keep_bytes=0, lock_seconds=0)
    hook = Nth(0, h.meanwhile(other.step), at="create body/commit")
    mine = Accumulator(Point(), hooked(store_url, hook), sgd(), keep_versions=2, keep_bytes=0, lock_seconds=0)
    for seq in range(2):
        quick.pile().create(batch(seq), record())
        other.step()
    quick.pile().put_part(0, batch(99), 0, record(kind="part"))
    quick.pile().create(batch(2), record())
    with hook.armed():
        mine.step()
    quick.pile().create(batch(3), record())
    mine.step()
    assert mine.num_conflicts == 1
    assert quick.blobs.list("body/part") == []
    assert sum(commit.num_expired for commit in commits(quick)) == 1


@pytest.mark.parametrize("quiet", [False, True], ids=["with others", "alone"])
def test_duplicates_are_reported_in_the_next_commit(store_url: str, quiet: bool) -> None:
    """Two counted batches that wait again are dropped and told of, though a step in between had nothing to commit."""
    store = GradientStore(store_url, sync="process")
    accumulator = Accumulator(Point(), store, sgd())
    for _ in range(2):
        for seq in range(2):
            store.pile().create(batch(seq), record())
        if not quiet or store.latest_version() == 0:
            store.pile().create(batch(2 + store.latest_version()), record())
        accumulator.step()
    assert store.pile().waiting() == []
    store.pile().create(batch(9), record())
    accumulator.step()
    assert sum(commit.num_duplicates for commit in commits(store)) == 2


@pytest.mark.parametrize(
    "operation", ["list body/grad", "get body/grad", "create body/weights", "create body/optimizer"]
)
def test_storage_that_fails_is_loud_and_a_later_step_continues(store_url: str, operation: str) -> None:
    """StoreError, nothing lost, nothing counted twice."""
    hook = Nth(0, h.refuse, at=operation)
    store = hooked(store_url, hook)
    accumulator = Accumulator(Point(), store, sgd())
    store.pile().create(batch(0), record())
    with hook.armed():
        with pytest.raises(StoreError, match="refused"):
            accumulator.step()
        assert accumulator.step() is not None
    check_counted_once(store, [batch(0)])


def test_a_replica_on_another_store_says_so_instead_of_answering() -> None:
    """It is at version 0 where the client has seen 1: StoreError, not an answer at an old version."""
    stores = GradientStore(memory()), GradientStore(memory())
    servers = [SplitServer(split(model(), AT)[1], store) for store in stores]
    wire = Noting(servers[0])
    owner = Owner("a", wire)
    owner.step()
    assert new_accumulator(stores[0]).step() is not None
    owner.step()
    wire.servers = (servers[1],)
    with pytest.raises(StoreError, match="at version 0, the client has seen 1"):
        owner.step()
