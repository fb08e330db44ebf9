"""Adding a version: one winner, everything that it names written before, and nothing left of the losers."""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import replace
from typing import Any

import harness_store as h
import pytest
import torch
from harness_store import Nth, Point, again, batch, bits, commits, hooked, record, sgd
from torch import nn

from splitfed.accumulator.accumulator import Accumulator
from splitfed.errors import ArchitectureError, ExpiredError, InputError, StoreError
from splitfed.model.skeleton import Template
from splitfed.protocol import parallel
from splitfed.server.server import SplitServer
from splitfed.store.batchset import BatchSet, Verdict
from splitfed.store.commit import Commit
from splitfed.store.lineage import Lineage
from splitfed.store.store import GradientStore


@pytest.fixture
def store(store_url: str) -> GradientStore:
    """A store whose version 0 is a `Point` at the origin."""
    store = GradientStore(store_url, sync="process")
    Accumulator(Point(), store, sgd())
    return store


def publish(lineage: Lineage, version: int, value: float) -> Commit | None:
    """Try to make a version by hand."""
    state = {"w": torch.full((2,), value)}
    verdict = Verdict(BatchSet([batch(version)]))
    return lineage.publish(Commit(version, "fold", "", {}, verdict=verdict), state, {"lr": value})


def files(store: GradientStore) -> set[tuple[int, str]]:
    """(version, nonce) of all that lies there besides records."""
    keys = [key for kind in ("weights", "optimizer", "applied") for key in store.blobs.list(f"body/{kind}")]
    return {found for found in map(store.lineage().keys.parse_versioned, keys) if found is not None}


def begin(store: GradientStore, module: nn.Module) -> None:
    """Begin a lineage, or find that it was begun."""
    template = Template(module)
    store.lineage().initialise(template.fingerprint(), template.state(module))


def test_the_first_writer_of_version_0_wins(store_url: str) -> None:
    """The second brings the same architecture with other weights: the first one's stay, and nothing of his is left."""
    first, second = (GradientStore(store_url, sync="process") for _ in range(2))
    begin(first, h.net(seed=1))
    begin(second, h.net(seed=2))
    assert bits(second.load_weights()) == bits(h.net(seed=1).state_dict())
    assert len(files(first)) == 1


def test_a_loser_of_version_0_leaves_no_frozen_file(store_url: str) -> None:
    """His frozen parameters are others' than the store's: nobody will ever read them."""
    one, two = Point(frozen=torch.ones(2)), Point(frozen=torch.zeros(2))
    first = GradientStore(store_url, sync="process")
    hook = Nth(0, h.meanwhile(lambda: begin(first, one)), at="create body/frozen-")
    second = hooked(store_url, hook)
    with hook.armed():
        begin(second, two)
    assert bits(second.load_weights()) == bits(one.state_dict())
    assert len([key for key in first.blobs.list("body") if "frozen-" in key]) == 1


FIRST, *REST = h.net()
OTHERS = {
    "shape": (nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)), r"0.weight.*\(4, 3\).*\(5, 3\)"),
    "dtype": (h.net().double(), "0.weight.*float32.*float64"),
    "missing": (h.net()[:2], "2.weight.*got nothing"),
    "more": (nn.Sequential(*h.net(), nn.Linear(2, 2)), "3.weight.*the store has nothing"),
    "frozen": (nn.Sequential(FIRST.requires_grad_(False), *REST), "0.weight.*trainable.*got frozen"),
}


@pytest.mark.parametrize(("other", "tensors"), OTHERS.values(), ids=OTHERS)
def test_another_architecture_is_refused_by_the_names_of_its_tensors(
    store_url: str, other: nn.Module, tensors: str
) -> None:
    """The error says which tensors differ and how; the store is as it was."""
    store = GradientStore(store_url, sync="process")
    begin(store, h.net())
    with pytest.raises(ArchitectureError, match=tensors):
        Accumulator(other, again(store), sgd())
    assert bits(again(store).load_weights()) == bits(h.net().state_dict())


def test_what_a_commit_names_is_written_before_it(store_url: str) -> None:
    """The record is created after its files and before the hint: a reader of the record finds all of it."""
    hook = Nth()
    store = hooked(store_url, hook)
    Accumulator(Point(), store, sgd())
    with hook.armed():
        publish(store.lineage(), 1, 1.0)
    written = [re.sub("-.*", "", key) for operation, key in hook.log if operation in ("create", "put")]
    assert written == [
        "body/weights/0000000001",
        "body/optimizer/0000000001",
        "body/commit/0000000001.json",
        "body/head",
    ]


def test_large_files_are_written_at_the_same_time(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each create waits for the other here; the record comes after both, and holds the hashes of what is on file."""
    monkeypatch.setattr(parallel, "is_worth_it", lambda _: True)
    both = threading.Barrier(2, timeout=30)

    def meet(operation: str, key: str, perform: h.Perform) -> object:
        if operation == "create" and key.split("/")[1] in ("weights", "optimizer"):
            both.wait()
        return perform()

    store = GradientStore(store_url, sync="process")
    Accumulator(Point(), store, sgd())
    store = hooked(store_url, meet)
    made = publish(store.lineage(), 1, 1.0)
    assert made is not None
    for kind, digest in made.files.items():
        data = again(store).blobs.get(f"body/{kind}/0000000001-{made.nonce}.safetensors")
        assert data is not None
        assert hashlib.sha256(data).hexdigest() == digest
    assert again(store).load_weights(1)["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("kind", ["weights", "optimizer"])
def test_no_version_comes_of_files_of_which_one_fails(
    store_url: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they are written at the same time: the error leaves `publish`, and no record is created."""
    monkeypatch.setattr(parallel, "is_worth_it", lambda _: True)
    hook = Nth(0, h.refuse, at=f"create body/{kind}")
    store = hooked(store_url, hook)
    Accumulator(Point(), store, sgd())
    with hook.armed(), pytest.raises(StoreError):
        publish(store.lineage(), 1, 1.0)
    assert again(store).latest_version() == 0
    assert publish(again(store).lineage(), 1, 2.0) is not None


def test_of_two_that_publish_one_version_the_first_wins(store: GradientStore) -> None:
    """The loser hears `None`, the winner's state stands, and the loser's files are gone."""
    mine, theirs = store.lineage(), again(store).lineage()
    won = publish(theirs, 1, 1.0)
    assert publish(mine, 1, 2.0) is None
    assert won is not None
    assert again(store).load_weights(1)["w"].tolist() == [1.0, 1.0]
    assert files(store) == {(0, commits(store)[0].nonce), (1, won.nonce)}


@pytest.mark.parametrize("fault", [h.deny, h.lose_reply])
def test_a_lost_reply_to_the_commit_is_recognised_by_its_nonce(store_url: str, fault: object) -> None:
    """The storage made it, and says "it exists" or nothing at all: the nonce in the record tells that one has won."""
    hook = Nth(0, fault, at="create body/commit")  # type: ignore[arg-type]
    store = hooked(store_url, hook)
    Accumulator(Point(), store, sgd())
    with hook.armed():
        made = publish(store.lineage(), 1, 1.0)
    assert hook.count == 1
    assert made is not None
    assert made.nonce == commits(store)[1].nonce
    assert again(store).load_weights(1)["w"].tolist() == [1.0, 1.0]
    assert files(store) >= {(1, made.nonce)}


def test_a_commit_that_was_refused_is_an_error_and_its_files_stay_for_the_next_sweep(store_url: str) -> None:
    """Whether it came about can't be told yet, so they may be those that the record will name: nobody touches them."""
    hook = Nth(0, h.refuse, at="create body/commit")
    store = hooked(store_url, hook)
    Accumulator(Point(), store, sgd())
    with hook.armed(), pytest.raises(StoreError):
        publish(store.lineage(), 1, 1.0)
    assert store.latest_version() == 0
    assert {version for version, _ in files(store)} == {0, 1}
    won = publish(again(store).lineage(), 1, 2.0)
    assert won is not None
    again(store).lineage().sweep(keep=16)
    assert files(store) == {(0, commits(store)[0].nonce), (1, won.nonce)}


def test_a_sweep_never_touches_what_lies_beyond_the_head(store_url: str) -> None:
    """Another accumulator's files for the next version may be named by its commit any moment."""
    hook = Nth(0, h.crash, at="create body/commit")
    slow = hooked(store_url, hook)
    Accumulator(Point(), slow, sgd())
    with hook.armed(), pytest.raises(h.Crash):
        publish(slow.lineage(), 1, 1.0)
    before = files(slow)
    again(slow).lineage().sweep(keep=1)
    assert files(slow) == before


def test_a_sweep_keeps_the_newest_versions_and_every_record(store: GradientStore) -> None:
    """Of ten versions the last three are readable; records are never deleted."""
    for version in range(1, 10):
        publish(store.lineage(), version, float(version))
    again(store).lineage().sweep(keep=3)
    assert {version for version, _ in files(store)} == {0, 7, 8, 9}, "version 0 has the table of closed batches"
    assert [commit.version for commit in commits(store)] == list(range(10))
    with pytest.raises(ExpiredError, match=r"weights of version 6.*retention window.*newest is 9"):
        again(store).load_weights(6)
    assert again(store).load_weights(7)["w"].tolist() == [7.0, 7.0]


def test_a_sweep_drops_forwards_and_parts_of_versions_that_left_and_counts_them(store: GradientStore) -> None:
    """They can't be replayed any more; those within the window stay."""
    for version in range(1, 4):
        publish(store.lineage(), version, 1.0)
    for version in range(4):
        store.pile().put_part(version, batch(0), 0, record(kind="part"))
        store.pile().put_part(version, batch(1), 0, record(kind="part"))
    assert store.lineage().sweep(keep=2) == 4
    assert [store.pile().part(version, batch(0), 0) is not None for version in range(4)] == [False, False, True, True]
    assert store.lineage().sweep(keep=2) == 0


def test_a_damaged_pin_of_one_client_stops_nobody(store: GradientStore) -> None:
    """The sweep of a commit takes it away; those that can be read and are within the window stay."""
    for version in range(1, 4):
        publish(store.lineage(), version, 1.0)
    for seq in range(3):
        store.pile().pin(batch(seq), seq + 1)
    keys = store.blobs.list("body/pin")
    for key, text in zip(keys[1:], (b'{"crc32":"00000000","version": 2}', b"not a pin"), strict=True):
        store.blobs.raw.put(key, [text])
    assert store.lineage().sweep(keep=4) == 0
    publish(store.lineage(), 4, 1.0)
    assert store.lineage().sweep(keep=4) == 2
    assert store.blobs.list("body/pin") == keys[:1]


def test_rollback_makes_a_new_version_of_an_old_state(store: GradientStore) -> None:
    """Weights and optimizer are those of version 1; what was folded since is listed as lost and doesn't count again."""
    accumulator = Accumulator(Point(), store, h.adam)
    for seq in range(3):
        store.pile().create(batch(seq), record(base_version=seq))
        accumulator.step()
    old = bits(store.load_weights(1))
    assert store.rollback(1) == ["a/1/1", "a/1/2"]
    assert store.latest_version() == 4
    assert bits(again(store).load_weights(4)) == old
    assert commits(store)[4].kind == "rollback"
    for seq in range(3):  # late duplicates
        store.pile().create(batch(seq), record(base_version=seq))
    assert h.drain(Accumulator(Point(), again(store), h.adam)) == []
    h.check_counted_once(store, [batch(0), batch(1), batch(2)])


def test_training_goes_on_after_a_rollback_as_it_would_have_at_that_version(store_url: str) -> None:
    """The optimizer's state is the old one too: the next commit has the bits of a run that never went further."""

    def run(url: str, detour: bool) -> dict[str, bytes]:
        store = GradientStore(url, sync="process")
        accumulator = Accumulator(Point(), store, h.adam)
        for seq in range(4):
            if seq == 2 and detour:
                store.pile().create(batch(99), record([7.0, -7.0]))
                accumulator.step()
                store.rollback(2)
            store.pile().create(batch(seq), record([1.0 + seq, -1.0]))
            accumulator.step()
        return bits(store.load_weights())

    assert run(store_url, detour=True) == run(store_url + "-straight", detour=False)


@pytest.mark.parametrize("version", [-1, 1, 2, 99])
def test_rollback_to_what_isnt_older_is_refused(store: GradientStore, version: int) -> None:
    """The head is version 1."""
    publish(store.lineage(), 1, 1.0)
    with pytest.raises(InputError, match="from 0 to 0"):
        store.rollback(version)


def test_a_second_rollback_doesnt_list_again_what_was_lost_before(store: GradientStore) -> None:
    """After 0, 1, 2 and back to 1, going back to 0 loses batch 0 only: batch 1 was lost already."""
    accumulator = Accumulator(Point(), store, sgd())
    for seq in range(2):
        store.pile().create(batch(seq), record(base_version=seq))
        accumulator.step()
    assert store.rollback(1) == ["a/1/1"]
    assert store.rollback(0) == ["a/1/0"]


def test_a_rollback_that_loses_the_race_says_try_again(store_url: str) -> None:
    """A commit came in between: nothing was rolled back, and the commit stands."""
    quick = GradientStore(store_url, sync="process")
    hook = Nth(0, lambda operation, key, perform: (other.step(), perform())[1], at="create body/weights")
    slow = hooked(store_url, hook)
    accumulator = Accumulator(Point(), slow, sgd())
    slow.pile().create(batch(0), record())
    accumulator.step()
    quick.pile().create(batch(1), record(base_version=1))
    other = Accumulator(Point(), quick, sgd())
    with hook.armed(), pytest.raises(StoreError, match="try the rollback again"):
        slow.rollback(0)
    assert [commit.kind for commit in commits(slow)] == ["initial", "fold", "fold"]


@pytest.mark.parametrize("kind", [Accumulator, SplitServer])
def test_weights_that_come_too_late_are_warned_of_once(kind: Any, store_url: str) -> None:
    """A checkpoint that is loaded into the body of a begun store isn't used; the first weights and the newest pass."""
    store = GradientStore(store_url, sync="process")
    settings = [sgd()] if kind is Accumulator else []
    kind(h.net(1), store, *settings)
    newest, template = h.net(2), Template(h.net(2))
    store.lineage().restate(replace(store.lineage().commit(0), version=1, kind="fold"), template.state(newest))
    for body in (h.net(1), newest):
        kind(body, store, *settings)
    with pytest.warns(UserWarning, match="neither those.*began with nor those of its newest version 1.*store's are"):
        kind(h.net(3), store, *settings)
    kind(h.net(4), store, *settings)
    assert bits(store.load_weights()) == bits(template.state(newest))
