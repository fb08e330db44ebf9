"""The set of counted batches: it says what a plain set would say, and stays small where numbers are dense."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfed.errors import FormatError
from splitfed.protocol.ids import MAX_NUMBER, BatchId
from splitfed.store.batchset import MAX_GAPS, BatchSet

IDS = st.builds(BatchId, st.sampled_from(["a", "b", "hospital-c"]), st.integers(1, 3), st.integers(0, 40))
SETS = st.sets(IDS, max_size=60)


def of(*seqs: int, client: str = "a", incarnation: int = 1) -> BatchSet:
    """The batches of one process."""
    return BatchSet(BatchId(client, incarnation, seq) for seq in seqs)


@given(SETS, IDS)
def test_it_holds_what_it_was_given(ids: set[BatchId], other: BatchId) -> None:
    """Iteration, length and membership are those of the sorted plain set."""
    held = BatchSet(ids)
    assert list(held) == sorted(ids)
    assert len(held) == len(ids)
    assert (other in held) == (other in ids)
    assert all(batch in held for batch in ids)


@given(st.lists(IDS, max_size=60))
def test_order_and_repeats_dont_matter(ids: list[BatchId]) -> None:
    """The same batches make the same bytes, in whatever order and however often they come."""
    assert BatchSet(ids).to_json() == BatchSet([*reversed(ids), *ids]).to_json()


@given(SETS, SETS)
def test_union_is_the_union_of_plain_sets_and_changes_neither(a: set[BatchId], b: set[BatchId]) -> None:
    """The union holds both, equals the set made of both, and the old one is as it was."""
    before = BatchSet(a)
    kept = json.dumps(before.to_json())
    both = before.union(b)
    assert list(both) == sorted(a | b)
    assert both.to_json() == BatchSet(a | b).to_json()
    assert json.dumps(before.to_json()) == kept


@given(SETS, st.lists(SETS, max_size=5))
def test_union_step_by_step_equals_union_at_once(a: set[BatchId], more: list[set[BatchId]]) -> None:
    """A table that grew over many commits is the table of one."""
    grown = BatchSet(a)
    for ids in more:
        grown = grown.union(ids)
    assert grown.to_json() == BatchSet(a.union(*more)).to_json()


@given(SETS)
def test_json_round_trip(ids: set[BatchId]) -> None:
    """What was written is read back, through text."""
    read = BatchSet.from_json(json.loads(json.dumps(BatchSet(ids).to_json())))
    assert list(read) == sorted(ids)
    assert read.to_json() == BatchSet(ids).to_json()


@given(SETS, SETS)
def test_a_set_that_was_read_grows_like_one_that_was_made(a: set[BatchId], b: set[BatchId]) -> None:
    """A new process continues with the table that it finds."""
    assert BatchSet.from_json(BatchSet(a).to_json()).union(b).to_json() == BatchSet(a | b).to_json()


@given(SETS)
def test_runs_are_sorted_apart_and_as_few_as_possible(ids: set[BatchId]) -> None:
    """Between two runs of a process at least one number is missing."""
    for incarnations in BatchSet(ids).to_json().values():
        for runs in incarnations.values():
            assert all(low <= high for low, high in runs)
            assert all(one[1] + 1 < other[0] for one, other in pairwise(runs))


def test_ten_thousand_batches_in_a_row_are_one_interval() -> None:
    """The ordinary case costs two numbers, however long the run."""
    assert of(*range(10_000)).to_json() == {"a": {"1": [[0, 9_999]]}}
    assert of(*range(5_000)).union(of(*range(5_000, 10_000))).to_json() == {"a": {"1": [[0, 9_999]]}}


def test_a_batch_that_fills_a_hole_joins_its_neighbours() -> None:
    """0 to 2 and 4 to 6, with 3 in between, are 0 to 6."""
    assert of(0, 1, 2, 4, 5, 6).union(of(3)).to_json() == {"a": {"1": [[0, 6]]}}


def test_processes_of_one_client_are_kept_apart() -> None:
    """Number 3 of process 1 isn't number 3 of process 2, nor that of another client."""
    held = of(3, incarnation=1)
    assert BatchId("a", 1, 3) in held
    assert BatchId("a", 2, 3) not in held
    assert BatchId("b", 1, 3) not in held


def test_numbers_beside_an_interval_arent_in_it() -> None:
    """Both ends of an interval are in, their neighbours aren't: a slip by one would lose or double a batch."""
    held = of(4, 5, 6)
    assert [seq in (3, 4, 6, 7) and BatchId("a", 1, seq) in held for seq in (3, 4, 6, 7)] == [False, True, True, False]


def test_gaps_are_the_holes_between_applied_numbers() -> None:
    """What lies before the first and after the last number isn't a hole; holes of other clients don't count."""
    held = of(5, 7, 9, 10).union(of(0, 2, incarnation=2)).union(of(0, 2, 4, client="b"))
    assert held.gaps("a") == 3
    assert held.gaps("b") == 2
    assert held.gaps("nobody") == 0


def test_every_second_number_makes_as_many_gaps() -> None:
    """MAX_GAPS is met by a client that misses every second batch."""
    assert of(*range(0, 2 * MAX_GAPS + 2, 2)).gaps("a") == MAX_GAPS


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "a",
        {"a": None},
        {"a": []},
        {"a": {"1": None}},
        {"a": {"1": [0, 1]}},
        {"a": {"1": [[0]]}},
        {"a": {"1": [[0, 1, 2]]}},
        {"a": {"1": [[2, 1]]}},
        {"a": {"1": [[0, 1], [2, 3]]}},
        {"a": {"1": [[0, 5], [3, 8]]}},
        {"a": {"1": [[4, 5], [0, 1]]}},
        {"a": {"1": [[-1, 1]]}},
        {"a": {"1": [[0, 0.5]]}},
        {"a": {"1": [[0, True]]}},
        {"a": {"1": [["0", "1"]]}},
        {"a": {"1": [[0, MAX_NUMBER + 1]]}},
        {"a": {"x": [[0, 1]]}},
        {"a": {"-1": [[0, 1]]}},
        {"..": {"1": [[0, 1]]}},
        {"a/b": {"1": [[0, 1]]}},
        {"": {"1": [[0, 1]]}},
    ],
)
def test_foreign_json_is_refused_with_our_own_error(data: Any) -> None:
    """Whatever isn't a set of batch ids raises FormatError and nothing else."""
    with pytest.raises(FormatError):
        BatchSet.from_json(data)
