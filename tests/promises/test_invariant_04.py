"""Invariant 4, Exactly once: a batch counts in at most one commit, and an acknowledged one in exactly one."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import harness_store as h
import pytest
import torch
from harness import Wire
from harness_store import Nth, again, batch, check_counted_once, commits, drain, hooked, net, noisy, record
from processes import AT, Noting, Owner, model, new_accumulator

from splitfed.accumulator.accumulator import Accumulator
from splitfed.errors import AlreadyAppliedError, DigestError, StoreError
from splitfed.model.cut import split
from splitfed.protocol.messages import BackwardRequest
from splitfed.server.server import SplitServer
from splitfed.store.store import GradientStore

CLIENTS = ("a", "b", "c")
ISSUED = [batch(seq, client) for seq in range(4) for client in CLIENTS] + [batch(9, "a"), batch(9, "b")]


def committing(store: GradientStore) -> Accumulator:
    """Adam, a schedule, clipping and a narrow window: whatever goes wrong shows in the bits or in the files."""
    return Accumulator(net(), store, h.adam, lr_scheduler=h.halving, clip_norm=1.0, keep_versions=2, lock_seconds=0)


def issue(store: GradientStore, seq: int) -> None:
    """A batch of each client, computed at version `seq`."""
    for client in CLIENTS:
        store.pile().create(batch(seq, client), noisy(net(), batch(seq, client), seq))


@pytest.fixture(scope="module")
def before() -> GradientStore:
    """Two commits made; for the third wait three batches, one given up, one rejected, and three counted already."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    accumulator = committing(store)
    for seq in range(2):
        issue(store, seq)
        assert accumulator.step() is not None
    issue(store, 1)
    issue(store, 2)
    store.pile().create(batch(9, "a"), record(kind="skip", gradients={}))
    store.pile().create(batch(9, "b"), record(kind="rejected", gradients={}, base_version=2))
    return store


def copied(store: GradientStore, url: str) -> str:
    """The same store at another place."""
    blobs = GradientStore(url, sync="process").blobs
    for key in store.blobs.list(""):
        blobs.create(key, [store.blobs.get(key) or b""])
    return url


def fourth(store: GradientStore) -> dict[str, str]:
    """Make what is left to do of the third commit, then the fourth; return the hashes of all of its files."""
    accumulator = committing(store)
    drain(accumulator)
    issue(store, 3)
    drain(accumulator)
    check_counted_once(store, ISSUED)
    record_ = commits(store)
    assert [len(commit.folded) for commit in record_] == [0, 3, 3, 3, 3]
    for kind in ("weights", "optimizer", "applied"):
        found = {store.lineage().keys.parse_versioned(key) for key in store.blobs.list(f"body/{kind}")}
        assert found <= {(commit.version, commit.nonce) for commit in record_}, f"{kind} that no commit names"
    assert store.pile().waiting() == []
    return dict(record_[4].files)


def disturbed(before: GradientStore, url: str, act: h.Hook) -> Iterator[tuple[str, GradientStore]]:
    """The third commit, disturbed at its first operation, at its second, and so on to the last."""
    for n in range(1_000):
        hook = Nth(n, act)
        store = hooked(copied(before, f"{url}-{n}"), hook)
        accumulator = committing(store)
        with hook.armed():
            try:
                accumulator.step()
            except h.Crash:
                store = again(store)
            except StoreError:
                drain(accumulator)  # the same accumulator goes on
        if hook.count <= n:
            assert n > 30, f"a commit takes more than {n} operations"
            return
        yield f"{hook.log[n][0]} {hook.log[n][1]}", store


@pytest.mark.parametrize("act", [h.crash, h.refuse, h.lose_reply, h.deny])
def test_a_fault_at_any_operation_of_a_commit_changes_no_bit(before: GradientStore, act: h.Hook) -> None:
    """Killed before it, refused, done but unanswered, created but said to exist: what follows is as in a calm run."""
    expected = fourth(GradientStore(copied(before, f"memory://{uuid.uuid4()}")))
    for where, store in disturbed(before, f"memory://{uuid.uuid4()}", act):
        assert fourth(store) == expected, where


def test_a_crash_at_any_operation_of_a_commit_to_files_changes_no_bit(before: GradientStore, tmp_path: Any) -> None:
    """The same on a local store."""
    expected = fourth(GradientStore(copied(before, f"memory://{uuid.uuid4()}")))
    for where, store in disturbed(before, (tmp_path / "store").as_uri(), h.crash):
        assert fourth(store) == expected, where


def test_a_retry_at_any_operation_of_a_commit_counts_once(before: GradientStore) -> None:
    """A duplicate of a batch that is being folded comes to another replica, which has just found it uncounted."""
    expected = fourth(GradientStore(copied(before, f"memory://{uuid.uuid4()}")))
    late: list[GradientStore] = []
    act = h.meanwhile(lambda: late[-1].pile().create(batch(2, "b"), noisy(net(), batch(2, "b"), 2)))
    for n in range(60):
        url = copied(before, f"memory://{uuid.uuid4()}")
        late.append(GradientStore(url))
        hook = Nth(n, act)
        store = hooked(url, hook)
        accumulator = committing(store)
        with hook.armed():
            accumulator.step()
        assert fourth(store) == expected, hook.log[min(n, hook.count - 1)]


class Doubled(Noting):
    """Sends every request twice, and hears the first or the second answer."""

    heard = 0

    def deliver(self, method: str, request: Any) -> Any:
        """Both to different replicas."""
        return [getattr(server, method)(request) for server in self.servers][self.heard]


class HearsFirst(Doubled):
    """The second delivery is a duplicate that the network made."""


class HearsSecond(Doubled):
    """The first answer was lost."""

    heard = 1


def trained(wire: type[Wire]) -> tuple[GradientStore, Wire, Owner]:
    """Six batches in three commits, over two replicas."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    body = split(model(), AT)[1]
    made = wire(*(SplitServer(body, again(store), keep_graphs=keep) for keep in (8, 0)))
    owner, accumulator = Owner("a", made), new_accumulator(store)
    for step in range(6):
        owner.step()
        if step % 2:
            assert accumulator.step() is not None
    assert accumulator.step() is None
    return store, made, owner


@pytest.mark.parametrize("wire", [HearsFirst, HearsSecond])
def test_every_request_sent_twice_changes_no_bit(wire: type[Wire]) -> None:
    """Whichever answer arrives, weights, optimizer and the client's own half are those of single requests."""
    (once, _, calm), (twice, made, owner) = trained(Noting), trained(wire)
    check_counted_once(twice, made.acknowledged)  # type: ignore[attr-defined]
    assert owner.bits() == calm.bits()
    for kind in ("weights", "optimizer"):
        assert commits(twice)[3].files[kind] == commits(once)[3].files[kind]


class Recording(Wire):
    """Keeps every request."""

    def __init__(self, *servers: Any) -> None:
        super().__init__(*servers)
        self.kept: list[tuple[str, Any]] = []

    def send(self, method: str, request: Any) -> Any:
        """Pass it on."""
        self.kept.append((method, request))
        return super().send(method, request)


def test_a_run_that_is_replayed_against_the_store_counts_nothing() -> None:
    """Every backward once more, when all is counted: an answer or an error, and no batch that waits."""
    store, made, _ = trained(Recording)
    assert isinstance(made, Recording)
    server = SplitServer(split(model(), AT)[1], again(store))
    said = []
    for request in [request for _, request in made.kept if isinstance(request, BackwardRequest)]:
        try:
            said.append(server.backward(request).status)
        except AlreadyAppliedError:
            said.append("applied")
    assert said == ["applied"] * 5 + ["stored"], "the last one hasn't been confirmed: it gets its answer again"
    assert store.waiting() == []
    assert new_accumulator(again(store)).step() is None


def test_the_same_number_with_other_gradients_is_refused_by_any_replica() -> None:
    """While the batch waits, a different request under its id is DigestError; what waits is the first."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    made = Recording(*(SplitServer(split(model(), AT)[1], again(store)) for _ in range(2)))
    Owner("a", made).step()
    request = made.kept[-1][1]
    other = BackwardRequest(
        **{name: getattr(request, name) for name in BackwardRequest.__slots__} | {"grad_outputs": (torch.ones(5, 8),)}
    )
    with pytest.raises(DigestError):
        made.servers[1].backward(other)
    assert made.servers[1].backward(request).status == "stored"
    check_counted_once(store, [batch(0)])
