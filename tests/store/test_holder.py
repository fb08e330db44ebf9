"""What a server holds of a log: sums change speed and never results, and may be lost at any moment."""

from __future__ import annotations

import os
import threading
import time
import uuid
import warnings
from typing import Any

import pytest
import torch
from harness_store import again, batch, bits, sgd, spoil
from torch import Tensor, nn

import splitfed.accumulator.gather
from splitfed.accumulator.accumulator import Accumulator
from splitfed.accumulator.derive import Deriver
from splitfed.client.client import SplitClient
from splitfed.diagnostics.forgetting import forget
from splitfed.diagnostics.garbage import collect
from splitfed.diagnostics.integrity import verify
from splitfed.diagnostics.replay import replay
from splitfed.errors import StoreError
from splitfed.model.cut import split
from splitfed.server.server import SplitServer
from splitfed.store import holder as holders
from splitfed.store.batchset import BatchSet, Verdict
from splitfed.store.store import GradientStore

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))


class Body(nn.Module):
    """Draws, counts, normalises; has what doesn't train, what isn't always reached, and complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.turn = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.other = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Three features."""
        found = nn.functional.dropout(self.norm(x), 0.3, self.training) * self.frozen * self.scale
        if x.shape[0] % 2:
            found = self.other(found)
        return (found * self.turn).abs()


def parts() -> tuple[nn.Module, nn.Module]:
    """Half and body, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return split(nn.Sequential(nn.Linear(3, 3), Body()), "1")


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is held as it is but the last gradient; nobody is waited for long."""
    monkeypatch.setattr(holders, "LEAST", 1)
    monkeypatch.setattr(holders, "BYTES", 0)
    monkeypatch.setattr(holders, "NEAR", 0.002)


@pytest.fixture
def derived(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The records whose gradients were computed again."""
    found: list[Any] = []
    function = Deriver.gradient

    def noted(self: Deriver, record: Any) -> Any:
        found.append(record)
        return function(self, record)

    monkeypatch.setattr(Deriver, "gradient", noted)
    return found


def train(store: GradientStore, durability: str, *, commits: int = 3, apart: bool = True, lose: bool = False) -> None:
    """Two clients on two replicas, eight batches a commit; the accumulator has a store of its own if apart."""
    body = parts()[1]
    stores = [store, again(store)] if durability == "log" else [store, store]
    servers = [SplitServer(body, one, durability=durability) for one in stores]
    torch.manual_seed(5)
    clients = [SplitClient(parts()[0], server, name) for name, server in zip("ab", servers, strict=True)]
    accumulator = Accumulator(body, again(store) if apart else store, torch.optim.Adam)
    for step in range(commits):
        for number in range(8):
            client = clients[number % 2]
            client(X[: 2 + (number + step) % 3] + number).square().mean().backward()
        if lose:
            for one in stores:
                one.holder().collect()
        assert accumulator.step() is not None


@pytest.fixture
def reference() -> GradientStore:
    """The same schedule where gradients are on file."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    train(store, "gradient")
    return store


@pytest.mark.parametrize("apart", [True, False])
def test_sums_give_the_bits_of_gradients_on_file(reference: GradientStore, derived: list[Any], apart: bool) -> None:
    """Two replicas, whole numbers of samples, one loss scale; nothing is computed again, and the record is replayed."""
    store = GradientStore(f"memory://{uuid.uuid4()}", keep_forwards=True)
    train(store, "log", apart=apart)
    assert derived == []
    newest, other = store.lineage().commit(3), reference.lineage().commit(3)
    assert sorted(map(len, newest.groups)) == ([4, 4] if apart else [3, 4])
    assert bits(store.load_weights()) == bits(reference.load_weights())
    assert newest.files == other.files
    assert [store.blobs.list(f"body/{kind}") for kind in ("sum", "ask", "grad")] == [[], [], []]
    assert replay(parts()[1], store).ok
    assert verify(store).ok


def test_gradients_that_are_added_at_once_give_the_bits_of_one_by_one(
    reference: GradientStore, derived: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three in a pass over the sum, in the order in which they came."""
    monkeypatch.setattr(holders, "LEAST", 3)
    store = GradientStore(f"memory://{uuid.uuid4()}")
    train(store, "log")
    assert derived == []
    assert sorted(map(len, store.lineage().commit(3).groups)) == [4, 4]
    assert bits(store.load_weights()) == bits(reference.load_weights())


@pytest.mark.parametrize("apart", [True, False])
def test_a_sum_gets_the_memory_of_one_that_was_used(apart: bool) -> None:
    """The accumulator takes the sum; or it is of another process, and its commit counts the batches."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    server = held(store)
    holder = store.holder()
    (first,) = holder._held.sums
    places = {name: value.data_ptr() for name, value in first.total.items()}
    assert Accumulator(parts()[1], again(store) if apart else store, sgd()).step() is not None
    SplitClient(parts()[0], server, "a")(X).sum().backward()
    for _ in range(2):
        SplitClient(parts()[0], server, "b")(X).sum().backward()
    assert {name: value.data_ptr() for name, value in holder._held.sums[-1].total.items()} == places
    assert holder._held.sums[-1] is not first


def test_memory_for_the_next_sum_isnt_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has nothing to do gives it back."""
    monkeypatch.setattr(holders, "_IDLE", 0.2)
    store = GradientStore(f"memory://{uuid.uuid4()}")
    server = held(store)
    assert Accumulator(parts()[1], store, sgd()).step() is not None
    holder = store.holder()
    assert holder._spare
    until = time.monotonic() + 30
    while holder._spare and time.monotonic() < until:
        time.sleep(0.01)
    assert not holder._spare
    del server


def test_a_block_is_no_larger_than_what_a_sum_may_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """By batches, and by the tensors of changed buffers."""
    monkeypatch.setattr(holders, "BYTES", 1 << 30)
    monkeypatch.setattr(holders, "MOST_ALONE", 8)
    for limit, value in (("MOST_BATCHES", 3), ("MOST_TENSORS", 12)):
        with monkeypatch.context() as patch:
            patch.setattr(holders, limit, value)
            store = GradientStore(f"memory://{uuid.uuid4()}")
            server = held(store, 9)
            found = store.holder()._held
            assert ([len(one.batches) for one in found.sums], len(found.gradients)) == ([3], 6)
            del server


def test_a_sum_that_was_read_when_its_commit_failed_isnt_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that was interrupted may still read it."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    server = held(store)
    (first,) = store.holder()._held.sums
    accumulator = Accumulator(parts()[1], store, sgd())
    monkeypatch.setattr(accumulator, "_publish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        accumulator.step()
    for _ in range(3):
        SplitClient(parts()[0], server, "b")(X).sum().backward()
    used = {value.data_ptr() for value in first.total.values()}
    assert used.isdisjoint(value.data_ptr() for one in store.holder()._held.sums for value in one.total.values())


def test_all_sums_may_be_lost(reference: GradientStore, derived: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the holders had is computed again, with the same bits; who doesn't answer is waited for once."""
    monkeypatch.setattr(splitfed.accumulator.gather, "WAIT", 0.05)
    store = GradientStore(f"memory://{uuid.uuid4()}")
    train(store, "log", lose=True)
    assert len(derived) == 24
    assert bits(store.load_weights()) == bits(reference.load_weights())


def held(store: GradientStore, count: int = 4) -> SplitServer:
    """A server that holds the gradients of some batches of client 'a'."""
    server = SplitServer(parts()[1], store, durability="log")
    torch.manual_seed(5)
    client = SplitClient(parts()[0], server, "a")
    for _ in range(count):
        client(X).sum().backward()
    return server


def accumulator_of(store: GradientStore) -> Accumulator:
    """One in another process, as far as the store can tell."""
    return Accumulator(parts()[1], again(store), sgd())


def test_a_sum_with_a_batch_that_isnt_folded_isnt_used(derived: list[Any]) -> None:
    """A round that folds some: these are computed again, and the others stay."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    server = held(store)
    accumulator = accumulator_of(store)
    commit = accumulator.step(1, only=Verdict(folded=BatchSet([batch(0), batch(2)])))
    assert commit is not None
    assert (commit.num_batches, commit.groups) == (2, ())
    assert len(derived) == 2
    commit = accumulator.step()
    assert commit is not None
    assert list(commit.folded) == [batch(1), batch(3)]
    assert store.blobs.list("body/sum") == []
    del server


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "nan"])
def test_a_damaged_sum_is_computed_again(derived: list[Any], damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is in its file: it is a cache."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    server = held(store)
    holder = store.holder()
    if damage == "nan":
        holder.write()  # the rest joins the sum
        holder._held.sums[0].total["scale"].fill_(torch.nan)
        holder._held.sums[0].num_written = 0
    if damage == "foreign":
        holder._held.sums[0].total["scale"] = torch.zeros(7, dtype=torch.float64)
    holder.write()
    (key,) = store.blobs.list("body/sum")
    data = bytearray(store.blobs.raw.get(key) or b"")
    if damage == "cut":
        store.blobs.raw.put(key, [bytes(data[:-9])], durable=False)
    if damage == "flipped":
        data[-1] ^= 4
        store.blobs.raw.put(key, [bytes(data)], durable=False)
    holder.collect()
    monkeypatch.setattr(splitfed.accumulator.gather, "WAIT", 0.01)
    commit = accumulator_of(store).step()
    assert commit is not None
    assert (commit.num_batches, commit.groups, len(derived)) == (4, (), 4)
    del server


def test_a_sum_that_goes_on_replaces_its_file() -> None:
    """Each file names all batches of those before; a gradient that was alone joins the sum."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    server = held(store, 1)
    client = SplitClient(parts()[0], server, "b")
    holder = store.holder()
    for count in range(1, 5):
        holder.write()
        holder.write()
        keys = store.blobs.list("body/sum")
        assert len(keys) == 1, (count, keys)
        client(X).sum().backward()
    commit = accumulator_of(store).step()
    assert commit is not None
    assert [len(group) for group in commit.groups] == [5]


def late(durability: str, dtype: torch.dtype, *, apart: bool) -> GradientStore:
    """One batch that began a version before the two that it is committed with."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    torch.manual_seed(0)
    body = nn.Linear(3, 2).to(dtype)
    halves = [split(nn.Sequential(nn.Identity(), body), "1") for _ in "ab"]
    body = halves[0][1]
    server = SplitServer(body, store, durability=durability)
    client, other = (SplitClient(half, server, name) for (half, _), name in zip(halves, "ab", strict=True))
    accumulator = Accumulator(body, again(store) if apart else store, torch.optim.Adam)
    x = X.to(dtype)
    begun = client(x[:3])
    other(x).square().sum().backward()
    accumulator.step()
    begun.square().sum().backward()
    for number in range(2):
        other(x + number).square().sum().backward()
    commit = accumulator.step()
    assert commit is not None
    assert (commit.num_batches, commit.num_samples) == (3, 11)
    return store


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_of_one_batch_is_its_gradient(dtype: torch.dtype, apart: bool) -> None:
    """There is no other of its version, and n·g isn't g."""
    log, gradient = (late(durability, dtype, apart=apart) for durability in ("log", "gradient"))
    assert bits(log.load_weights()) == bits(gradient.load_weights())


def test_an_addition_that_was_interrupted_leaves_no_wrong_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a gradient is in it: it is dropped, and what it held is computed again."""

    def interrupt(self: holders.Sum, block: Any) -> None:
        self.total["scale"].add_(1.0)
        raise KeyboardInterrupt

    store = GradientStore(f"memory://{uuid.uuid4()}")
    server = held(store, 3)
    client = SplitClient(parts()[0], server, "b")
    assert store.holder()._held.sums
    monkeypatch.setattr(holders.Sum, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        client(X).sum().backward()
    assert not store.holder()._held.sums


def test_storage_that_fails_while_sums_are_written_loses_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What couldn't be written is held on to, and the question stays until it was answered."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    server = SplitServer(parts()[1], store, durability="log")
    holder = store.holder()
    monkeypatch.setattr(holder, "_attend", lambda: None)  # nobody looks but this test
    client = SplitClient(parts()[0], server, "b")
    key = store.lineage().keys.ask(holder.name)
    store.blobs.put(key, [b"{}"])

    def refuse(*given: Any, **named: Any) -> None:
        raise StoreError("the storage is away")

    for _ in range(3):
        client(X).sum().backward()
        with monkeypatch.context() as patch:
            patch.setattr(store.blobs.raw, "put", refuse)
            with pytest.raises(StoreError):
                holder.write()
        assert store.blobs.list("body/ask") == [key]
    holder.write()
    assert store.blobs.list("body/ask") == []
    commit = accumulator_of(store).step()
    assert commit is not None
    assert [len(group) for group in commit.groups] == [3]


def test_a_thread_that_failed_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What isn't the storage's fault ends it; the next gradient has another one look for questions."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    server = SplitServer(parts()[1], store, durability="log")
    client = SplitClient(parts()[0], server, "a")
    holder = store.holder()
    failed = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda args: failed.set())

    def fail(self: holders.Holder) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(holders.Holder, "write", fail)
        client(X).sum().backward()
        store.blobs.put(store.lineage().keys.ask(holder.name), [b"{}"])
        assert failed.wait(10)
    client(X).sum().backward()
    commit = accumulator_of(store).step()
    assert commit is not None
    assert [len(group) for group in commit.groups] == [2]


def test_memory_is_bounded_by_the_body() -> None:
    """However many batches wait, one gradient and two sums are held; what is counted is dropped."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    server = held(store, 20)
    client = SplitClient(parts()[0], server, "b")
    holder = store.holder()
    assert (len(holder._held.gradients), len(holder._held.sums)) == (1, 1)
    assert len(holder._held.sums[0].batches) == 19
    accumulator_of(store).step()
    client(X).sum().backward()
    assert list(holder._held.gradients) == [batch(0, "b")]
    assert holder._held.sums == []


@pytest.mark.parametrize("apart", [True, False])
def test_sums_that_make_room_for_others_are_written(
    monkeypatch: pytest.MonkeyPatch, derived: list[Any], apart: bool
) -> None:
    """However many batches wait, none of them is computed again; a sum of few isn't worth a file."""
    monkeypatch.setattr(holders, "MOST_BATCHES", 3)
    monkeypatch.setattr(holders, "WORTH_WRITING", 3)
    store = GradientStore(f"memory://{uuid.uuid4()}")
    server = held(store, 20)
    assert len(store.blobs.list("body/sum")) == 5
    accumulator = Accumulator(parts()[1], again(store) if apart else store, sgd())
    commit = accumulator.step()
    assert commit is not None
    assert sorted(map(len, commit.groups), reverse=True) == [3] * 6 + [2] * apart
    assert derived == []
    assert store.blobs.list("body/sum") == []
    del server


def test_many_small_gradients_and_many_buffers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By number, as what is known of a batch may be larger than its gradient; and by their buffers."""
    monkeypatch.setattr(holders, "BYTES", 1 << 30)
    monkeypatch.setattr(holders, "MOST_ALONE", 4)
    monkeypatch.setattr(holders, "MOST_TENSORS", 20)
    store = GradientStore(f"memory://{uuid.uuid4()}")
    server = held(store, 9)
    holder = store.holder()
    assert len(holder._held.gradients) == 1  # the newest, and at most four
    assert [len(one.batches) for one in holder._held.sums] == [4, 4]  # of six tensors each
    del server


def test_a_gradient_that_isnt_finite_any_more_in_its_file_is_computed_again(derived: list[Any]) -> None:
    """It was, when it was acknowledged: the batch isn't rejected for the sake of a cache."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    server = held(store, 1)
    holder = store.holder()
    holder._held.gradients[batch(0)].gradients["scale"].fill_(torch.nan)
    commit = accumulator_of(store).step()
    assert commit is not None
    assert (list(commit.folded), len(derived)) == ([batch(0)], 1)
    del server


def test_what_is_forgotten_isnt_committed_from_memory() -> None:
    """A server still holds it; the sums that it writes have it, and aren't used."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    server = held(store, 2)
    SplitClient(parts()[0], server, "b")(X).sum().backward()
    forget(again(store), "a")
    commit = accumulator_of(store).step()
    assert commit is not None
    assert (list(commit.folded), list(commit.skipped)) == ([batch(0, "b")], [batch(0), batch(1)])
    assert store.blobs.list("body/sum") == []


@pytest.mark.parametrize("is_held", [True, False])
def test_a_damaged_recipe_is_no_dead_end(is_held: bool) -> None:
    """A sum that has the batch is used; else it is rejected. What is kept for a replay of it is gone."""
    store = GradientStore(f"memory://{uuid.uuid4()}", keep_forwards=True)
    server = held(store)
    spoil(store, store.lineage().keys.gradient(batch(1)))
    if not is_held:
        store.holder().collect()
    accumulator = accumulator_of(store)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        commit = accumulator.step()
    assert commit is not None
    assert (commit.num_batches, commit.num_rejected, len(told)) == ((4, 0, 0) if is_held else (3, 1, 1))
    SplitClient(parts()[0], server, "b")(X).sum().backward()
    commit = accumulator.step()
    assert commit is not None
    assert list(commit.folded) == [batch(0, "b")]
    assert store.waiting() == []


def twice(durability: str, monkeypatch: pytest.MonkeyPatch) -> GradientStore:
    """Four batches, committed at the second try: the storage was away when the first wrote its weights."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    server = SplitServer(parts()[1], store, durability=durability)
    torch.manual_seed(5)
    clients = [SplitClient(parts()[0], server, name) for name in "ab"]
    for number in range(5):
        clients[number % 2](X[:2]).square().sum().backward()
    accumulator = Accumulator(parts()[1], store, sgd())
    create = store.blobs.raw.create

    def fail(key: str, *given: Any, **named: Any) -> bool:
        if key.startswith("body/weights/"):
            raise StoreError("the storage is away")
        return create(key, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(store.blobs.raw, "create", fail)
        with pytest.raises(StoreError):
            accumulator.step()
    assert accumulator.step() is not None
    return store


def test_a_sum_that_was_used_isnt_used_again(monkeypatch: pytest.MonkeyPatch, derived: list[Any]) -> None:
    """A commit that failed has made its mean of it, so it is none any more: its batches are computed again."""
    log, gradient = (twice(durability, monkeypatch) for durability in ("log", "gradient"))
    assert len(derived) >= 4
    assert bits(log.load_weights()) == bits(gradient.load_weights())


def test_a_batch_that_was_on_file_isnt_held() -> None:
    """A repeated backward that finds its record may have other bits than that says."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    server = held(store, 1)
    found = store.pile().read(batch(0))
    assert found is not None
    assert found.holder == store.holder().name
    store.holder().collect()
    outcome = server._lines.of("a").sealer.store(batch(0), found)
    assert outcome == "stored"
    assert not store.holder().collect().gradients


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_a_fork_the_child_holds_nothing() -> None:
    """Both would answer for the same batches under one name."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    server = held(store)
    name = store.holder().name
    child = os.fork()
    if child == 0:
        is_empty = not store.holder().collect().sums and store.holder().name != name
        os._exit(0 if is_empty else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert store.holder().name == name
    assert store.holder().collect().sums
    del server


def test_a_holder_that_is_gone_is_waited_for_no_longer_than_said(
    monkeypatch: pytest.MonkeyPatch, derived: list[Any]
) -> None:
    """No question is left behind, and all is computed again."""
    monkeypatch.setattr(splitfed.accumulator.gather, "WAIT", 0.2)
    store = GradientStore(f"memory://{uuid.uuid4()}")
    held(store)
    store.holder().collect()
    began = time.monotonic()
    commit = accumulator_of(store).step()
    assert time.monotonic() - began >= 0.2
    assert commit is not None
    assert (commit.num_batches, len(derived)) == (4, 4)
    assert store.blobs.list("body/ask") == []


def test_a_server_that_ends_hands_its_sums_over(derived: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is asked who has written all that it held."""
    monkeypatch.setattr(splitfed.accumulator.gather, "WAIT", 30.0)
    store = GradientStore(f"memory://{uuid.uuid4()}")
    held(store).hand_over()
    store.holder().collect()
    commit = accumulator_of(store).step()
    assert commit is not None
    assert ([len(group) for group in commit.groups], derived) == ([4], [])


def test_sums_are_written_unasked_where_nobody_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a kill leaves little to compute again; an accumulator of the same process takes them from memory."""
    monkeypatch.setattr(holders, "_UNASKED", 0.0)
    monkeypatch.setattr(holders, "_PAUSE", 0)
    monkeypatch.setattr(holders.Holder, "_attend", lambda self: None)
    for is_taken in (False, True):
        store = GradientStore(f"memory://{uuid.uuid4()}")
        server = held(store, 0)
        if is_taken:
            store.holder().collect()
        SplitClient(parts()[0], server, "a")(X).sum().backward()
        assert store.holder().poll() is not None
        assert len(store.blobs.list("body/sum")) == (0 if is_taken else 1)


def test_collecting_garbage_takes_sums_that_no_commit_can_use() -> None:
    """One of whose batches is counted; and all questions."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    server = held(store)
    store.holder().write()
    (key,) = store.blobs.list("body/sum")
    data = bytes(store.blobs.raw.get(key) or b"")
    accumulator_of(store).step()
    store.blobs.raw.put(key, [data], durable=False)
    store.blobs.put(store.lineage().keys.ask("0" * 16), [b"{}"])
    assert {garbage.key for garbage in collect(store)} == {key, "body/ask/" + "0" * 16}
    del server
