"""The pile: a batch lies there once, under its id, and a retry finds it."""

from __future__ import annotations

import threading

import pytest
import torch
from harness_store import Hooked, Point, again, batch, lose_reply, plant, record, sgd
from hypothesis import given
from hypothesis import strategies as st

from splitfed.accumulator.accumulator import Accumulator
from splitfed.blobs.url import open_blobs
from splitfed.errors import BusyError, DigestError, FormatError, StoreError
from splitfed.protocol.ids import BatchId
from splitfed.protocol.messages import ForwardRecord
from splitfed.store.batches import Pile, Sealer
from splitfed.store.batchset import MAX_GAPS, BatchSet, Verdict
from splitfed.store.checked import Checked
from splitfed.store.layout import Keys
from splitfed.store.store import GradientStore

FORWARD = ForwardRecord("", ((torch.ones(2),), {}), (True,), True, 7, None, None, (((2,), "float32", True),), (5,), "n")


@pytest.fixture
def pile(store_url: str) -> Pile:
    """An empty pile."""
    return Pile(Checked(open_blobs(store_url, fsync=False)), Keys("body"))


def test_a_batch_is_read_as_it_was_created(pile: Pile) -> None:
    """Its numbers and its tensors, from the file alone."""
    assert pile.create(batch(0), record([1.5, -2.0], num_samples=3, base_version=4, loss_scale=8.0)) == (
        "gradient",
        True,
    )
    found = pile.read(batch(0))
    assert found is not None
    assert (found.num_samples, found.base_version, found.loss_scale) == (3, 4, 8.0)
    assert found.gradients["w"].tolist() == [1.5, -2.0]


def test_what_a_batch_says_of_itself_is_read_without_its_tensors(pile: Pile) -> None:
    """Sorting a pile reads headers only."""
    pile.create(batch(0), record(num_samples=3, base_version=4, loss_scale=8.0))
    assert pile.peek(batch(0)) == {
        "kind": "gradient",
        "base_version": 4,
        "num_samples": 3,
        "loss_scale": 8.0,
        "digest": "by hand",
        "numerics": "by hand",
        "holder": None,
        "upto": None,
        "flows": None,
    }


def test_what_isnt_there_is_none(pile: Pile) -> None:
    """Absence is an answer, not an error; dropping it is fine."""
    assert pile.read(batch(0)) is None
    assert pile.peek(batch(0)) is None
    assert pile.forward(0, "a", 1, 0) is None
    assert pile.part(0, batch(0), 0) is None
    assert pile.waiting() == []
    pile.drop([batch(0)])
    pile.drop_forward(0, "a", 1, 0)
    pile.drop_part(0, batch(0), 0)
    pile.drop_pin(batch(0))


def test_a_retry_finds_the_batch_and_changes_nothing(pile: Pile) -> None:
    """The same digest is a success, and the first bytes stay."""
    pile.create(batch(0), record([1.0, 1.0]))
    assert pile.create(batch(0), record([9.0, 9.0])) == ("gradient", False)
    found = pile.read(batch(0))
    assert found is not None
    assert found.gradients["w"].tolist() == [1.0, 1.0]


def test_the_same_number_with_other_content_is_refused(pile: Pile) -> None:
    """Another digest under a used id is DigestError, which names both; what lies there stays."""
    pile.create(batch(0), record(digest="first"))
    with pytest.raises(DigestError, match=r"a/1/0.*expected second, got first"):
        pile.create(batch(0), record(digest="second"))
    assert pile.waiting() == [batch(0)]


def test_a_gradient_of_rounding_alone_may_differ(pile: Pile) -> None:
    """A bias before a BatchNorm has none but rounding, of which nothing agrees on another replica: it's the same batch.

    Of what is large beside it, all but rounding must.
    """
    weight = torch.tensor([3.0, -4.0])
    pile.create(batch(0), record(gradients={"weight": weight, "bias": torch.tensor([1e-7])}))
    again = record(gradients={"weight": weight * (1 + 1e-6), "bias": torch.tensor([-2e-7])})
    assert pile.create(batch(0), again, exactly=True)[0] == "gradient"
    for other in (weight * 1.01, weight.flip(0)):
        with pytest.raises(DigestError, match="other inputs"):
            pile.create(batch(0), record(gradients={"weight": other, "bias": torch.tensor([1e-7])}), exactly=True)
    with pytest.raises(DigestError, match="other inputs"):
        pile.create(batch(0), record(gradients={"other": weight}), exactly=True)


def test_a_batch_that_was_given_up_cant_come_late(pile: Pile) -> None:
    """A skip record closes the id against a request that was under way."""
    assert pile.create(batch(0), record(kind="skip", digest="", gradients={})) == ("skip", True)
    with pytest.raises(DigestError, match="given up"):
        pile.create(batch(0), record())


def test_a_rejected_batch_stays_rejected(pile: Pile) -> None:
    """A retry hears what became of the first try."""
    pile.create(batch(0), record(kind="rejected", gradients={}))
    assert pile.create(batch(0), record()) == ("rejected", False)


def test_a_retry_after_the_batch_was_counted_and_dropped_is_a_success(store_url: str) -> None:
    """Between "it exists" and the look at it, a commit may fold and drop it: then it was there, and counts."""
    blobs = Checked(open_blobs(store_url, fsync=False))
    pile = Pile(blobs, Keys("body"))
    pile.create(batch(0), record())
    late = Pile(
        Hooked(blobs, lambda operation, key, perform: None if operation == "get" else perform()),  # type: ignore[arg-type]
        Keys("body"),
    )
    assert late.create(batch(0), record()) == ("gradient", False)


def test_a_lost_reply_leaves_a_batch_that_the_retry_finds(store_url: str) -> None:
    """The storage kept it and said so to nobody: the error is loud, the retry succeeds, and there is one batch."""
    blobs = Checked(open_blobs(store_url, fsync=False))
    pile, deaf = Pile(blobs, Keys("body")), Pile(Hooked(blobs, lose_reply), Keys("body"))  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="lost"):
        deaf.create(batch(0), record())
    assert pile.create(batch(0), record()) == ("gradient", False)
    assert pile.waiting() == [batch(0)]


@given(st.sets(st.builds(batch, st.integers(0, 2_000), st.sampled_from(["a", "b"]), st.integers(1, 12)), max_size=12))
def test_what_waits_comes_in_canonical_order(ids: set) -> None:
    """The order is a function of the ids: client, incarnation, number, and never of arrival."""
    pile = GradientStore(f"memory://{id(ids)}").pile()
    for id_ in sorted(ids, key=hash):
        pile.create(id_, record())
    assert pile.waiting() == sorted(ids)
    pile.drop(ids)
    assert pile.waiting() == []


def test_foreign_names_in_the_pile_are_ignored(store_url: str) -> None:
    """A listing can hold anything; what isn't the key of a batch is left alone, and isn't deleted."""
    store = GradientStore(store_url, sync="process")
    plant(store, batch(1), record())
    foreign = ["body/grad/a/notes.txt", "body/grad/readme", "body/grad/a/b/00000001-0000000000", "body/grad/a/1-1"]
    for key in foreign:
        store.blobs.create(key, [b"x"])
    assert store.pile().waiting() == [batch(1)]
    store.pile().drop([batch(1)])
    assert store.blobs.list("body/grad") == sorted(foreign)


@pytest.mark.parametrize("data", [b"x", b"\0" * 8, b"\xff" * 64, b"{}"])
def test_foreign_bytes_in_the_pile_raise_our_own_error(store_url: str, data: bytes) -> None:
    """Reading, peeking and retrying all say FormatError."""
    store = GradientStore(store_url, sync="process")
    plant(store, batch(0), data)
    for act in (store.pile().read, store.pile().peek, lambda id_: store.pile().create(id_, record())):
        with pytest.raises(FormatError):
            act(batch(0))


def test_forwards_and_parts_come_back_until_they_are_dropped(pile: Pile) -> None:
    """They are kept under version, client, process and number, apart from each other."""
    pile.put_forward(3, "a", 1, 0, FORWARD)
    pile.put_part(3, batch(0), 1, record(kind="part"))
    kept, part = pile.forward(3, "a", 1, 0), pile.part(3, batch(0), 1)
    assert kept is not None
    assert (kept.seed, kept.crcs, kept.requires_grad) == (7, (5,), (True,))
    assert part is not None
    assert part.kind == "part"
    for other in (
        pile.forward(2, "a", 1, 0),
        pile.forward(3, "a", 2, 0),
        pile.part(3, batch(0), 0),
        pile.part(2, batch(0), 1),
    ):
        assert other is None
    assert pile.waiting() == [], "neither waits to be folded"
    pile.drop_forward(3, "a", 1, 0)
    pile.drop_part(3, batch(0), 1)
    assert pile.forward(3, "a", 1, 0) is None
    assert pile.part(3, batch(0), 1) is None


def test_a_part_sent_with_other_content_is_refused(pile: Pile) -> None:
    """Parts have digests as batches have."""
    pile.put_part(0, batch(0), 0, record(kind="part", digest="first"))
    pile.put_part(0, batch(0), 0, record(kind="part", digest="first"))
    with pytest.raises(DigestError, match="part 0 of batch a/1/0"):
        pile.put_part(0, batch(0), 0, record(kind="part", digest="second"))


def test_a_one_trip_batch_keeps_the_version_of_its_first_try(pile: Pile) -> None:
    """A retry at a newer head runs at the old version, so that it gives the same bits; once dropped it is forgotten."""
    assert pile.pin(batch(0), 4) == (4, True)
    assert pile.pin(batch(0), 9) == (4, False)
    assert pile.pin(batch(1), 9) == (9, True)
    pile.drop_pin(batch(0))
    assert pile.pin(batch(0), 10) == (10, True)


def test_sixteen_threads_create_one_batch_once(pile: Pile) -> None:
    """Whoever comes second finds the first one's bytes: one batch, one winner's content, no error."""
    together, answers = threading.Barrier(16), []

    def create(number: int) -> None:
        together.wait()
        answers.append(pile.create(batch(0), record([float(number)] * 2)))

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [("gradient", False)] * 15 + [("gradient", True)]
    found = pile.read(batch(0))
    assert found is not None
    assert found.gradients["w"][0] == found.gradients["w"][1]


def holes(store: GradientStore, count: int) -> Sealer:
    """A client whose numbers 0, 2, 4 ... are counted, as a server meets it."""
    lineage = store.lineage()
    head, commit = lineage.head(), lineage.commit(lineage.head())
    kept = BatchSet(batch(seq) for seq in range(0, 2 * count + 1, 2))
    made = type(commit)(head + 1, "fold", "", {}, verdict=Verdict(kept))
    assert lineage.publish(made, lineage.state(head), None) is not None
    return Sealer(again(store).lineage(), store.pile(), "n")


def test_a_client_with_too_many_holes_is_told_to_wait_and_others_arent(store_url: str) -> None:
    """The table stays small: more than 1,024 holes are BusyError; exactly as many are fine."""
    store = GradientStore(store_url, sync="process")
    Accumulator(Point(), store, sgd())
    assert holes(store, MAX_GAPS).store(batch(5_000), record()) == "stored"
    sealer = holes(store, MAX_GAPS + 1)
    with pytest.raises(BusyError, match="client 'a' has more than 1024 holes"):
        sealer.store(batch(5_001), record())
    assert sealer.store(BatchId("b", 1, 0), record()) == "stored"


def test_a_batch_that_fills_a_hole_is_taken_however_many_there_are(store_url: str) -> None:
    """Else they could never close, and the client would be told to wait for ever."""
    store = GradientStore(store_url, sync="process")
    Accumulator(Point(), store, sgd())
    assert holes(store, MAX_GAPS + 1).store(batch(1), record()) == "stored"
