"""A verdict tells a commit which ids to take up, and crosses JSON."""

from __future__ import annotations

import pytest
from harness_store import Point, batch, plant, record, sgd

from splitfed import Accumulator, FormatError, GradientStore
from splitfed.store.batchset import BatchSet, Outcome, Verdict

CHOSEN = Verdict(BatchSet([batch(0), batch(2)]), BatchSet([batch(3)]), BatchSet([batch(4)]))


def test_a_commit_takes_up_what_was_judged_and_leaves_the_rest_waiting(store_url: str) -> None:
    """Two are folded, one is closed as stale, one as refused; the fifth waits for another commit."""
    store = GradientStore(store_url, sync="process")
    accumulator = Accumulator(Point(), store, sgd())
    for seq in range(5):
        plant(store, batch(seq), record())
    commit = accumulator.step(only=CHOSEN)
    assert commit is not None
    assert list(commit.folded) == [batch(0), batch(2)]
    assert (list(commit.stale), list(commit.rejected)) == ([batch(3)], [batch(4)])
    assert store.waiting() == [batch(1)]
    assert accumulator.step(only=CHOSEN) is None, "once"
    assert accumulator.step() is not None


def test_a_verdict_crosses_json() -> None:
    """What comes back chooses the same."""
    again = Verdict.from_json(CHOSEN.to_json())
    assert again.to_json() == CHOSEN.to_json()
    assert [batch(seq) in again for seq in range(5)] == [True, False, True, True, True]
    assert [again.closes(batch(seq)) for seq in range(5)] == [False, False, False, True, True]


@pytest.mark.parametrize("data", [None, {}, {"fold": {}}, {"fold": 1, "stale": {}, "rejected": {}}, []])
def test_what_is_no_verdict_is_refused(data: object) -> None:
    """Our own error, whatever it is."""
    with pytest.raises(FormatError):
        Verdict.from_json(data)


def test_a_verdict_is_made_of_outcomes_and_tells_them() -> None:
    """Each batch once, by outcome and in canonical order within one; another stays pending."""
    outcomes = {
        batch(5): Outcome.FOLDED,
        batch(1): Outcome.REJECTED,
        batch(0): Outcome.FOLDED,
        batch(2): Outcome.SKIPPED,
        batch(3): Outcome.STALE,
    }
    verdict = Verdict.of(outcomes)
    assert dict(verdict.items()) == outcomes
    assert list(verdict) == [batch(0), batch(5), batch(3), batch(1), batch(2)]
    assert [verdict.outcome(batch(seq)) for seq in (4, 0)] == [None, Outcome.FOLDED]
    assert [verdict.closes(batch(seq)) for seq in range(6)] == [False, True, True, True, False, False]


def test_a_client_is_answered_by_outcome() -> None:
    """What is too old was stored as any other; what was given up counts as refused."""
    assert [outcome.status for outcome in Outcome] == ["stored", "stored", "rejected", "rejected"]


def test_a_batch_in_two_sets_is_not_folded() -> None:
    """A record from outside may say so; to fold what was also refused would count it."""
    ids = BatchSet([batch(0)])
    assert Verdict(folded=ids, rejected=ids).outcome(batch(0)) is Outcome.REJECTED
    assert Verdict(folded=ids, stale=ids).outcome(batch(0)) is Outcome.STALE
