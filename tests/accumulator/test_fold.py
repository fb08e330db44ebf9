"""Folding: every batch that waits ends in one list, and whatever lies in the pile never blocks the others."""

from __future__ import annotations

import math
import pickle
import uuid
import warnings
from pathlib import Path
from typing import Any

import pytest
from harness_store import (
    Point,
    adam,
    again,
    batch,
    bits,
    check_counted_once,
    commits,
    drain,
    plant,
    record,
    sgd,
)

from splitfed.accumulator.accumulator import Accumulator
from splitfed.accumulator.fold import fold, sort_batches
from splitfed.accumulator.policies import inverse_sqrt
from splitfed.accumulator.settings import CommitSettings
from splitfed.errors import FormatError, InputError, MissingError
from splitfed.protocol.packing import pack
from splitfed.store.batchset import BatchSet, Verdict
from splitfed.store.commit import Commit
from splitfed.store.store import GradientStore


def opened(optimizer: Any = None, **settings: Any) -> tuple[GradientStore, Accumulator]:
    """A new store in memory, begun with a `Point`."""
    store = GradientStore(f"memory://{uuid.uuid4()}")
    return store, Accumulator(Point(), store, optimizer or sgd(), **settings)


def header(kind: str = "gradient", base: object = 5) -> dict[str, Any]:
    """What a batch says of itself."""
    return {"kind": kind, "base_version": base}


def test_batches_are_told_apart_by_their_headers() -> None:
    """At head 5 with staleness up to 2: bases 5, 4 and 3 are ready, 2 is stale, the others are what they say."""
    headers = {
        batch(0): header(base=5),
        batch(1): header(base=3),
        batch(2): header(base=2),
        batch(3): header("rejected"),
        batch(4): header("skip", 0),
        batch(5): header(base=4),
    }
    found, _ = sort_batches(sorted(headers), headers.__getitem__, 5, CommitSettings(max_staleness=2))
    assert list(found.folded) == [batch(0), batch(1), batch(5)]
    assert [*map(list, (found.stale, found.rejected, found.skipped))] == [[batch(2)], [batch(3)], [batch(4)]]
    assert sorted(found) == sorted(headers)


def test_without_a_limit_nothing_is_stale() -> None:
    """A base of 5,000 commits ago counts."""
    found, _ = sort_batches([batch(0)], lambda _: header(base=0), 5_000, CommitSettings(max_staleness=None))
    assert list(found.folded) == [batch(0)]


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (header("part"), "kind is 'part'"),
        (header(""), "kind is ''"),
        (header(base=6), "base version 6 of 5"),
        (header(base=None), "unreadable"),
        (header(base="x"), "unreadable"),
        (header(base=math.nan), "unreadable"),
        (header(base=math.inf), "inf"),
        (header(base=2.5), "2.5"),
    ],
)
def test_a_header_that_makes_no_sense_is_rejected_with_a_warning(found: dict[str, Any], why: str) -> None:
    """The warning names the batch and why."""
    with pytest.warns(UserWarning, match=f"batch a/1/0 is rejected.*{why}"):
        sorted_, _ = sort_batches(
            [batch(0), batch(1)], lambda id_: found if id_ == batch(0) else header(), 5, CommitSettings()
        )
    assert (list(sorted_.rejected), list(sorted_.folded)) == ([batch(0)], [batch(1)])


def test_bytes_that_arent_a_batch_are_rejected_with_a_warning() -> None:
    """The reason is the codec's."""

    def unreadable(_: object) -> dict[str, Any]:
        raise FormatError("the header is beyond the body")

    with pytest.warns(UserWarning, match="unreadable.*beyond the body"):
        found, _ = sort_batches([batch(0)], unreadable, 5, CommitSettings())
    assert list(found.rejected) == [batch(0)]


def test_staleness_weights_damp_by_hand_worked_numbers() -> None:
    """(2·1·4 + 2·½·4)/(2 + 2) = 3: bases 3 and 0 at head 3, s(3) = 1/√4."""
    store, _ = opened()
    store.pile().create(batch(0), record([4.0, 4.0], num_samples=2, base_version=3))
    store.pile().create(batch(1), record([4.0, 4.0], num_samples=2, base_version=0))
    found = Verdict(folded=BatchSet([batch(0), batch(1)]))
    settings = CommitSettings(staleness_weight=inverse_sqrt)
    folded = fold(found, store.pile().read, store.lineage().fingerprint(), 3, settings, "by hand")
    assert folded.mean["w"].tolist() == [3.0, 3.0]
    assert folded.num_samples == 4
    assert dict(folded.staleness) == {0: 1, 3: 1}
    assert folded.num_foreign == 0


@pytest.mark.parametrize("value", [None, "x", -0.5, math.nan, math.inf])
def test_a_weight_that_is_none_rejects_no_batch(value: Any) -> None:
    """The function is wrong and not the batch: an error says so, and the batch waits for one that is right."""
    store, _ = opened()
    store.pile().create(batch(0), record([4.0, 4.0]))
    found = Verdict(folded=BatchSet([batch(0)]))
    settings = CommitSettings(staleness_weight=lambda _: value)
    with pytest.raises(InputError, match=r"staleness_weight\(0\) is .*: expected a finite number of 0 or more"):
        fold(found, store.pile().read, store.lineage().fingerprint(), 0, settings, "by hand")
    assert (list(found.folded), list(found.rejected)) == ([batch(0)], [])


def test_batches_of_another_numerics_class_are_counted() -> None:
    """They are folded all the same."""
    store, _ = opened()
    for seq, numerics in enumerate(["ours", "theirs", "theirs"]):
        store.pile().create(batch(seq), record(numerics=numerics))
    found = Verdict(folded=BatchSet([batch(0), batch(1), batch(2)]))
    folded = fold(found, store.pile().read, store.lineage().fingerprint(), 0, CommitSettings(), "ours")
    assert (folded.num_foreign, len(folded.verdict.folded)) == (2, 3)


def test_a_batch_that_vanished_is_missing_not_rejected() -> None:
    """Another accumulator has counted it: this attempt is over, and nothing may be closed as rejected."""
    store, _ = opened()
    found = Verdict(folded=BatchSet([batch(0)]))
    with pytest.raises(MissingError, match="a/1/0 is gone"):
        fold(found, store.pile().read, store.lineage().fingerprint(), 0, CommitSettings(), "")
    assert list(found.rejected) == []


def test_rejected_batches_alone_make_no_commit_and_are_counted_in_the_next() -> None:
    """There is no step to take without a gradient; what was found is reported with the first that comes."""
    store, accumulator = opened()
    store.pile().create(batch(0, "m"), record(kind="rejected", gradients={}))
    store.pile().create(batch(1, "m"), record(kind="skip", gradients={}))
    assert accumulator.step() is None
    store.pile().create(batch(0), record())
    (commit,) = drain(accumulator)
    assert (commit.num_batches, commit.num_rejected, commit.num_skipped) == (1, 1, 1)
    assert store.pile().waiting() == []
    assert [len(commit.folded) for commit in commits(store)] == [0, 1]


@pytest.mark.parametrize("content", [record([1.0, 1.0, 1.0]), b"PK"], ids=["tensors", "bytes"])
def test_a_batch_that_proves_unfit_is_closed_though_nothing_else_waits(content: Any) -> None:
    """Warned of once; the commit has no batch in it, and the weights and optimizer of before."""
    store, accumulator = opened(adam)
    plant(store, batch(0, "m"), content)
    with pytest.warns(UserWarning, match="m/1/0 is rejected") as told:
        commit = accumulator.step()
    assert len(told) == 1
    assert commit is not None
    assert (commit.version, commit.num_batches, commit.num_samples, list(commit.rejected)) == (1, 0, 0, [batch(0, "m")])
    assert store.waiting() == store.pile().waiting() == []
    assert bits(again(store).load_weights(1)) == bits(again(store).load_weights(0))
    assert accumulator.step() is None
    store.pile().create(batch(0), record())
    other, alone = opened(adam)
    other.pile().create(batch(0), record())
    assert drain(accumulator)
    assert drain(alone)
    assert bits(again(store).load_weights()) == bits(again(other).load_weights())


def test_an_unfit_batch_is_warned_of_once_while_it_waits_for_others() -> None:
    """Too few wait for a commit, however often it is asked for."""
    store, accumulator = opened(min_batches=3)
    plant(store, batch(0, "m"), b"PK")
    for seq in range(2):
        store.pile().create(batch(seq), record())
    with pytest.warns(UserWarning, match="m/1/0 is rejected") as told:
        assert [accumulator.step() for _ in range(3)] == [None] * 3
    assert len(told) == 1
    store.pile().create(batch(2), record())
    commit = accumulator.step()
    assert commit is not None
    assert (commit.num_batches, commit.num_rejected) == (3, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_a_gradient_that_isnt_finite_is_left_out_with_the_bits_of_a_commit_without_it(
    value: float, scheme: str, tmp_path: Path
) -> None:
    """It shows in the mean, and only then each gradient is looked at; the others count as if it weren't there."""

    def committed(name: str, bad: float | None) -> tuple[GradientStore, Commit]:
        store = GradientStore(f"memory://{uuid.uuid4()}" if scheme == "memory" else str(tmp_path / name))
        accumulator = Accumulator(Point(), store, adam)
        for seq in range(5):
            if seq == 2 and bad is not None:
                plant(store, batch(2), record([0.5, bad]))
            elif seq != 2:
                plant(store, batch(seq), record([0.1 * seq, 0.7 + seq], num_samples=1.0 + seq / 3))
        (commit,) = drain(accumulator)
        return store, commit

    with pytest.warns(UserWarning, match="batch a/1/2 is rejected.*isn't finite") as told:
        store, commit = committed("bad", value)
    assert len(told) == 1
    other, without = committed("good", None)
    assert (list(commit.folded), list(commit.rejected)) == (list(without.folded), [batch(2)])
    assert commit.num_samples == without.num_samples
    assert bits(again(store).load_weights()) == bits(again(other).load_weights())


GOOD = b"".join(pack(record()))


@pytest.mark.parametrize(
    "data",
    [
        GOOD[:-1],
        GOOD[: len(GOOD) // 2],
        GOOD[:7],
        GOOD + b"\0",
        b"\xff" * 8 + GOOD[8:],
        b"\0" * 8,
        b"PK\x03\x04" + b"\0" * 60,
        pickle.dumps([1.0, 1.0]),
    ],
    ids=["a byte short", "half", "7 bytes", "a byte more", "a huge header", "zeros", "a zip", "a pickle"],
)
def test_truncated_and_foreign_gradients_are_rejected_and_block_nobody(data: bytes) -> None:
    """Warned of, on record, and gone from the pile with the commit."""
    store, accumulator = opened()
    store.pile().create(batch(0), record())
    key = plant(store, batch(0, "m"), data)
    with pytest.warns(UserWarning, match="batch m/1/0 is rejected"):
        commit = accumulator.step()
    assert commit is not None
    assert (list(commit.folded), list(commit.rejected)) == ([batch(0)], [batch(0, "m")])
    assert store.blobs.get(key) is None
    check_counted_once(store, [batch(0), batch(0, "m")])


@pytest.mark.parametrize("name", ["a@b/00000001-0000000000", "a/000000001-0000000000", "a/00000001-00000000000"])
def test_a_file_whose_name_isnt_a_batchs_is_left_alone(name: str) -> None:
    """An id that isn't allowed, or batch a/1/0 spelled otherwise: neither may count, block, or spoil the record."""
    store, accumulator = opened()
    store.pile().create(batch(0), record([1.0, 2.0]))
    store.blobs.create(f"body/grad/{name}", pack(record([100.0, 100.0])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (commit,) = drain(accumulator)
    assert (list(commit.folded), list(commit.rejected)) == ([batch(0)], [])
    assert again(store).load_weights()["w"].tolist() == [-1.0, -2.0]
