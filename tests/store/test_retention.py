"""The versions that open calls need stay, below a bound in bytes; and whoever opens calls can't make a store grow."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_store import Hooked, Nth, Point, again, batch, commits, record, sgd

from splitfed.accumulator.accumulator import Accumulator
from splitfed.client.client import SplitClient
from splitfed.errors import ExpiredError
from splitfed.model.cutpoint import CutPoint
from splitfed.protocol.messages import ForwardRecord, GradientRecord
from splitfed.server.server import SplitServer
from splitfed.store.lineage import Lineage
from splitfed.store.retention import BYTES_A_CALL, CALLS_A_CLIENT
from splitfed.store.store import GradientStore

WEIGHTS = 1 << 20
"""Bytes of a version's weights in tests of the bound."""


def commit_some(store: GradientStore, accumulator: Accumulator, count: int, client: str = "z") -> None:
    """So many commits of one batch each."""
    for _ in range(count):
        head = store.latest_version()
        store.pile().create(batch(head, client), record(base_version=head))
        assert accumulator.step() is not None


def client_of(server: SplitServer, name: str = "a") -> SplitClient:
    """A client half before the body."""
    return SplitClient(torch.nn.Sequential(torch.nn.Linear(2, 2), CutPoint()), server, client_id=name)


def kept(store: GradientStore) -> list[int]:
    """The versions whose weights are on file."""
    return sorted(again(store).lineage().kept())


def open_call(store: GradientStore, version: int, client: str, call: int = 0, incarnation: int = 1) -> None:
    """A forward on file, as any server would record one."""
    store.pile().put_forward(version, client, incarnation, call, forward_record())


def large(version: int) -> GradientRecord:
    """A gradient as large as the weights."""
    return record(gradients={"w": torch.ones(WEIGHTS // 4)}, base_version=version)


def forward_record() -> ForwardRecord:
    """What a small forward ran on, taken from a server."""
    store = GradientStore(f"memory://{uuid.uuid4()}", sync="process")
    outputs = client_of(SplitServer(Point(), store))(torch.ones(1, 2))
    found = store.pile().forward(0, "a", 1, 0)
    assert found is not None
    assert outputs.requires_grad
    return found


def test_a_backward_comes_however_many_commits_later(store_url: str) -> None:
    """On another replica than its forward, with a window of two versions; the same bits as at once."""
    store = GradientStore(store_url, sync="process")
    server = SplitServer(Point(), store, keep_graphs=0)
    client, other = client_of(server), client_of(server, "b")
    other.load_state_dict(client.state_dict())
    accumulator = Accumulator(Point(), again(store), sgd(), keep_versions=2)
    late, at_once = client(torch.ones(3, 2)).pow(2).sum(), other(torch.ones(3, 2)).pow(2).sum()
    at_once.backward()
    commit_some(store, accumulator, 100)
    late.backward()
    assert [p.grad.tolist() for p in client.parameters()] == [p.grad.tolist() for p in other.parameters()]
    assert kept(store) == [0, 98, 99, 100]
    commit = accumulator.step()
    assert commit is not None
    assert list(commit.folded) == [batch(0)]
    assert commit.base_of(batch(0)) == 0
    client(torch.ones(3, 2)).sum().backward()  # confirms the answer: nothing needs version 0 any more
    other(torch.ones(3, 2)).sum().backward()
    commit_some(store, accumulator, 3)
    assert 0 not in kept(store)


def test_how_stale_a_batch_may_be_is_still_the_policys(store_url: str) -> None:
    """The backward is answered, and its batch closed as stale: counted, and loud."""
    store = GradientStore(store_url, sync="process")
    client = client_of(SplitServer(Point(), store))
    accumulator = Accumulator(Point(), again(store), sgd(), keep_versions=4, max_staleness=2)
    late = client(torch.ones(3, 2)).sum()
    commit_some(store, accumulator, 8)
    late.backward()
    commit_some(store, accumulator, 1)
    assert list(commits(store)[-1].stale) == [batch(0)]


def test_a_one_trip_batch_is_repeated_at_its_version_however_late(store_url: str) -> None:
    """What a pin names stays as what a forward names."""
    store = GradientStore(store_url, sync="process")
    accumulator = Accumulator(Point(), store, sgd(), keep_versions=2)
    assert store.pile().pin(batch(0), 0) == (0, True)
    commit_some(store, accumulator, 20)
    assert store.pile().pin(batch(0), 20) == (0, False)
    assert kept(store) == [0, 18, 19, 20]


def test_above_the_bound_the_oldest_go_first(store_url: str) -> None:
    """Here there is room for two versions' weights and two calls, and no more."""
    store = GradientStore(store_url, sync="process")
    accumulator = Accumulator(Point(WEIGHTS // 4), store, sgd(), keep_versions=2, keep_bytes=int(2.2 * WEIGHTS))
    for version in range(6):
        open_call(store, version, f"c{version}")
        store.pile().create(batch(version), large(version))
        assert accumulator.step() is not None
    # At the last sweep the newest was 5, and the window 4 and 5.
    assert kept(store) == [2, 3, 4, 5, 6]
    assert [key.split("/")[2] for key in store.blobs.list("body/forward")] == ["c2", "c3", "c4", "c5"]
    assert sum(commit.num_expired for commit in commits(store)) == 2


def test_by_default_four_versions_weights_fit(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the body is."""
    monkeypatch.setattr("splitfed.store.retention.LEAST_BYTES", WEIGHTS)
    store = GradientStore(store_url, sync="process")
    accumulator = Accumulator(Point(WEIGHTS // 4), store, sgd(), keep_versions=2)
    for version in range(8):
        open_call(store, version, f"c{version}")
        store.pile().create(batch(version), large(version))
        assert accumulator.step() is not None
    assert kept(store)[-3:] == [6, 7, 8]
    assert len(kept(store)) in (6, 7)


def test_a_superseded_process_holds_nothing(store_url: str) -> None:
    """Its backward would be refused: whoever restarts often leaves nothing behind."""
    store = GradientStore(store_url, sync="process")
    accumulator = Accumulator(Point(), store, sgd(), keep_versions=2)
    for incarnation in range(1, 6):
        open_call(store, store.latest_version(), "a", incarnation=incarnation)
        commit_some(store, accumulator, 4)
    assert len(store.blobs.list("body/forward")) == 1
    assert kept(store) == [16, 18, 19, 20]


def test_a_client_holds_no_more_than_its_share(store_url: str) -> None:
    """A thousand open calls of one leave the room of the others, and their newest stay."""
    store = GradientStore(store_url, sync="process")
    accumulator = Accumulator(Point(), store, sgd(), keep_versions=2, keep_bytes=100 * BYTES_A_CALL)
    content = forward_record()
    for name in "bcd":
        store.pile().put_forward(0, name, 1, 0, content)
    for version in range(10):
        for call in range(100):
            store.pile().put_forward(version, "a", 1, 100 * version + call, content)
        commit_some(store, accumulator, 1)
    commit_some(store, accumulator, 10)
    found = store.blobs.list("body/forward")
    others = [key for key in found if "/a/" not in key]
    assert others == [f"body/forward/{name}/0000000000-00000001-0000000000" for name in "bcd"]
    assert len(found) == CALLS_A_CLIENT + 3
    assert all("/0000000009-" in key for key in found if "/a/" in key)


def test_many_held_calls_are_listed_seldom(store_url: str) -> None:
    """The more a sweep finds, the more commits the next one waits: a commit's share stays the same."""
    store = GradientStore(store_url, sync="process")
    begun = Accumulator(Point(), store, sgd(), keep_versions=2)
    content = forward_record()
    for number in range(640):
        store.pile().put_forward(0, f"c{number}", 1, 0, content)
    commit_some(store, begun, 4)
    count = Nth(at="list body/forward")
    counted = again(store)
    counted.blobs = Hooked(counted.blobs, count)  # type: ignore[assignment]
    accumulator = Accumulator(Point(), counted, sgd(), keep_versions=2)
    with count.armed():
        commit_some(store, accumulator, 100)
    assert 9 <= count.count <= 11
    assert len(store.blobs.list("body/forward")) == 640
    assert len(kept(store)) <= 3 + 25


def test_what_was_computed_for_too_long_runs_again(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version left the window before its call was on record: the client gets an answer at a newer one."""
    store = GradientStore(store_url, sync="process")
    server = SplitServer(Point(), again(store), keep_graphs=0)
    accumulator = Accumulator(Point(), store, sgd(), keep_versions=2)
    client = client_of(server)
    state = Lineage.state
    slow = iter([5, 5])

    def computing(self: Lineage, version: int) -> Any:
        found = state(self, version)
        if self is server.store.lineage():
            commit_some(store, accumulator, next(slow, 0))
        return found

    monkeypatch.setattr(Lineage, "state", computing)
    loss = client(torch.ones(1, 2)).sum()
    monkeypatch.undo()
    commit_some(store, accumulator, 5)
    loss.backward()
    assert [key.split("/")[2] for key in store.blobs.list("body/grad")] == ["a"]
    assert store.blobs.list("body/forward") == ["body/forward/a/0000000010-00000001-0000000000"]


def test_none_is_held_where_that_is_wanted(store_url: str) -> None:
    """keep_bytes=0: the window alone."""
    store = GradientStore(store_url, sync="process")
    client = client_of(SplitServer(Point(), store, keep_graphs=0))
    accumulator = Accumulator(Point(), store, sgd(), keep_versions=2, keep_bytes=0)
    late = client(torch.ones(1, 2)).sum()
    commit_some(store, accumulator, 4)
    with pytest.raises(ExpiredError, match="keep_bytes"):
        late.backward()


def test_a_part_holds_itself_and_no_weights(tmp_path: Path) -> None:
    """Its call was answered; what is missing is the seal."""
    store = GradientStore(tmp_path / "store", sync="process")
    accumulator = Accumulator(Point(), store, sgd(), keep_versions=2)
    store.pile().put_part(0, batch(7), 0, record(kind="part"))
    commit_some(store, accumulator, 6)
    assert len(store.blobs.list("body/part")) == 1
    assert kept(store) == [4, 5, 6] or kept(store) == [5, 6]
