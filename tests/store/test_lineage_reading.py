"""Reading versions: the newest is found, a whole one or none, and what was changed from outside is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness_store import Nth, Point, again, batch, bits, commits, drain, hooked, lose_reply, record, sgd, spoil
from torch import nn

from splitfed.accumulator.accumulator import Accumulator
from splitfed.errors import CorruptedError, ExpiredError, MissingError
from splitfed.server.server import SplitServer
from splitfed.store.store import GradientStore

BIG = 20_000  # float32: 80 KB, which a local store maps into memory


class Tied(nn.Module):
    """Two names for one parameter, a frozen one and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.two = nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.still = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("count", torch.tensor(3))


def trained(url: str, versions: int, size: int = 2, keep: int | None = None) -> GradientStore:
    """A store with `versions` commits, each moving a `Point` by −1."""
    store = GradientStore(url, sync="process")
    accumulator = Accumulator(Point(size), store, sgd(), keep_versions=keep)
    for seq in range(versions):
        store.pile().create(batch(seq), record([1.0] * size, base_version=seq))
        accumulator.step()
    return store


def key(store: GradientStore, version: int, kind: str) -> str:
    """Where a commit's file lies."""
    return store.lineage().keys.versioned(kind, version, commits(store)[version].nonce)


def test_the_head_is_found_with_and_without_the_hint(store_url: str) -> None:
    """The hint saves probes and decides nothing."""
    store = trained(store_url, 5)
    assert again(store).latest_version() == 5
    store.blobs.delete("body/head")
    assert again(store).latest_version() == 5


def test_a_reader_that_is_open_sees_new_versions(store_url: str) -> None:
    """Every request asks the store: what is cached is never the head."""
    reader = trained(store_url, 1)
    writer = again(reader)
    for seq in range(1, 4):
        writer.pile().create(batch(seq), record())
        assert Accumulator(Point(), writer, sgd()).step() is not None
        assert reader.latest_version() == seq + 1
        assert reader.load_weights()["w"].tolist() == [-seq - 1.0] * 2


def test_finding_the_head_costs_one_probe_and_no_listing(store_url: str) -> None:
    """One GET of the next commit, however many there are."""
    hook = Nth()
    store = hooked(trained(store_url, 5).url, hook)
    store.latest_version()
    with hook.armed():
        store.latest_version()
    assert hook.log == [("get", "body/commit/0000000006.json")]


def test_a_version_that_never_was_is_missing_and_one_that_left_has_expired(store_url: str) -> None:
    """Two errors, since two things are to be done; both say what the newest is."""
    store = trained(store_url, 5, keep=2)
    with pytest.raises(MissingError, match="no version 6: the newest is 5") as missing:
        store.load_weights(6)
    assert not isinstance(missing.value, ExpiredError)
    with pytest.raises(ExpiredError, match=r"weights of version 2 .* newest is 5.*raise keep_versions"):
        store.load_weights(2)
    assert store.load_weights(4)["w"].tolist() == [-4.0, -4.0]


def test_tied_names_come_with_one_value_and_in_the_modules_order(store_url: str) -> None:
    """`load_weights` has the keys of `state_dict()`, frozen parameters and tied names included."""
    store, module = GradientStore(store_url, sync="process"), Tied()
    Accumulator(module, store, sgd())
    loaded = again(store).load_weights()
    assert list(loaded) == list(module.state_dict())
    assert bits(loaded) == bits(module.state_dict())
    assert loaded["one.weight"] is loaded["two.weight"]
    module.load_state_dict(loaded)


def test_frozen_parameters_are_stored_once(store_url: str) -> None:
    """They never train, so no version has a copy of them."""
    store = GradientStore(store_url, sync="process")
    frozen = torch.arange(BIG, dtype=torch.float32)
    accumulator = Accumulator(Point(frozen=frozen), store, sgd())
    for seq in range(3):
        store.pile().create(batch(seq), record())
        accumulator.step()
    sizes = {name: len(store.blobs.get(name) or b"") for name in store.blobs.list("body")}
    assert [size > 4 * BIG for name, size in sizes.items() if "frozen-" in name] == [True]
    assert all(size < 10_000 for name, size in sizes.items() if "/weights/" in name)
    assert torch.equal(again(store).load_weights(3)["frozen"], frozen)


def _load(store: GradientStore) -> object:
    return store.load_weights(2)


def _step(store: GradientStore) -> object:
    store.pile().create(batch(50), record(base_version=2))
    return Accumulator(Point(), store, lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9)).step()


@pytest.mark.parametrize(
    ("kind", "act", "version"),
    [("weights", _load, 2), ("weights", _step, 2), ("optimizer", _step, 2), ("applied", _step, 0)],
)
def test_a_file_that_was_changed_is_named(
    store_url: str, kind: str, act: Callable[[GradientStore], object], version: int
) -> None:
    """One flipped bit: CorruptedError says which file of which version, and nothing is built upon it."""
    store = trained(store_url, 2)
    spoil(store, key(store, version, kind))
    with pytest.raises(CorruptedError, match=f"the {kind} of version {version} of lineage 'body'.*rollback"):
        act(again(store))
    assert again(store).latest_version() == 2


def test_frozen_parameters_that_were_changed_are_named(store_url: str) -> None:
    """Or are gone: either way no weights are handed out."""
    store = GradientStore(store_url, sync="process")
    Accumulator(Point(frozen=torch.ones(2)), store, sgd())
    (name,) = (name for name in store.blobs.list("body") if "frozen-" in name)
    spoil(store, name)
    with pytest.raises(CorruptedError, match="frozen parameters of lineage 'body'"):
        again(store).load_weights()
    store.blobs.delete(name)
    with pytest.raises(CorruptedError, match="frozen parameters"):
        again(store).load_weights()


@pytest.mark.parametrize("size", [2, BIG], ids=["copied", "mapped"])
def test_a_server_computes_nothing_on_a_file_that_was_changed(store_url: str, size: int) -> None:
    """It is compared with its checksum before its first use."""
    store = trained(store_url, 2, size)
    spoil(store, key(store, 2, "weights"))
    with pytest.raises(CorruptedError, match="weights of version 2"):
        again(store).lineage().state(2)


def test_a_weights_file_that_isnt_one_is_named(store_url: str) -> None:
    """Truncated, it doesn't even decode: the error is still that of a changed file."""
    store = trained(store_url, 2)
    name = key(store, 2, "weights")
    data = bytes(store.blobs.get(name) or b"")
    store.blobs.delete(name)
    store.blobs.create(name, [data[: len(data) // 2]])
    with pytest.raises(CorruptedError, match="weights of version 2"):
        again(store).lineage().state(2)


def test_a_corrupted_head_can_be_rolled_back_by_whoever_found_it(store_url: str) -> None:
    """The error says to roll back, so that must work, in the same process too; training then goes on."""
    store = trained(store_url, 2)
    spoil(store, key(store, 2, "weights"))
    with pytest.raises(CorruptedError, match="rollback"):
        store.load_weights(2)
    assert store.rollback(1) == ["a/1/1"]
    assert store.load_weights()["w"].tolist() == [-1.0, -1.0]
    store.pile().create(batch(2), record(base_version=3))
    assert drain(Accumulator(Point(), store, sgd()))[-1].version == 4


def test_a_file_restored_from_a_copy_is_read_again(store_url: str) -> None:
    """The error says to restore it, so that must mend it, in the same process too."""
    store = trained(store_url, 2)
    name = key(store, 2, "weights")
    copy = bytes(store.blobs.get(name) or b"")
    spoil(store, name)
    reader = again(store)
    with pytest.raises(CorruptedError, match="Restore it from a copy"):
        reader.load_weights(2)
    store.blobs.delete(name)
    store.blobs.create(name, [copy])
    assert reader.load_weights(2)["w"].tolist() == [-2.0, -2.0]


def test_a_head_whose_weights_were_deleted_is_an_error_and_no_endless_loop(store_url: str) -> None:
    """Nobody has won a race, so an accumulator doesn't begin again; what waits goes on waiting."""
    store = trained(store_url, 2)
    store.blobs.delete(key(store, 2, "weights"))
    store.pile().create(batch(2), record(base_version=2))
    accumulator = Accumulator(Point(), again(store), sgd())
    with pytest.raises(CorruptedError, match=r"weights of version 2 .* are missing.*repair"):
        accumulator.step()
    assert (accumulator.num_conflicts, store.waiting()) == (0, [batch(2)])


def test_changed_optimizer_state_doesnt_keep_readers_from_the_weights(store_url: str) -> None:
    """Each file stands for itself: a server needs no optimizer, whoever found that out in its process."""
    store = trained(store_url, 2)
    spoil(store, key(store, 2, "optimizer"))
    with pytest.raises(CorruptedError, match="the optimizer of version 2"):
        store.lineage().optimizer(2)
    assert store.load_weights(2)["w"].tolist() == [-2.0, -2.0]


def test_reads_that_fail_are_errors_and_leave_nothing_behind(store_url: str) -> None:
    """A reply that is lost is StoreError; the next try succeeds."""
    hook = Nth(0, lose_reply, at="get body/weights")
    store = hooked(trained(store_url, 1).url, hook)
    with hook.armed():
        with pytest.raises(OSError, match="lost"):
            store.load_weights()
        assert store.load_weights()["w"].tolist() == [-1.0, -1.0]


def test_states_are_read_once_and_shared(store_url: str) -> None:
    """A version's tensors can't change, so two requests use one copy."""
    hook = Nth(at="get body/weights")
    store = hooked(trained(store_url, 1).url, hook)
    with hook.armed():
        assert store.lineage().state(1)["w"] is store.lineage().state(1)["w"]
    assert hook.count == 1


@pytest.mark.parametrize("begun_anew", [False, True])
def test_a_run_that_was_deleted_under_its_processes_is_told_and_loses_no_batch(
    store_url: str, begun_anew: bool
) -> None:
    """The first batch of client a has the id that version 1 of the old run had counted: nobody takes it for that."""
    server = SplitServer(Point(), GradientStore(store_url, sync="process"))
    store = trained(store_url, 1)
    accumulator = Accumulator(Point(), store, sgd())
    assert accumulator.step() is None
    assert server.store.latest_version() == 1
    for top in ("body", "clients"):
        store.blobs.delete_tree(top)
    if begun_anew:
        Accumulator(Point(), again(store), sgd())
        store.pile().create(batch(0), record())
    for act in (accumulator.step, lambda: server.store.open_client("a"), server.store.lineage().checked_head):
        with pytest.raises(CorruptedError, match="deleted or begun anew while a server or accumulator used it"):
            act()
    assert again(store).waiting() == [batch(0)] * begun_anew
