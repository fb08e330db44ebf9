"""The numbers of a process, as a server knows them: runs, holes, and numbers that were given up."""

from __future__ import annotations

import random

from harness_store import batch

from splitfed.store.batchset import BatchSet
from splitfed.store.numbers import MAX_SKIPS, SKIPS_PER_SECOND, Numbers, Skips


def test_runs_that_touch_or_overlap_are_one() -> None:
    """0–3, 5 and 7–9: two holes."""
    numbers = Numbers([[7, 8], [0, 2], [2, 3], [9, 9], [5, 5]])
    assert numbers.holes == 2
    assert [seq for seq in range(12) if seq in numbers] == [0, 1, 2, 3, 5, 7, 8, 9]


def test_only_a_number_beside_no_run_makes_a_hole_more() -> None:
    """Of 0, 3 and 9: 6 and 20 split, all that touch a run don't; the first of all never does."""
    numbers = Numbers([[0, 0], [3, 3], [9, 9]])
    assert [seq for seq in range(21) if numbers.splits(seq)] == [5, 6, 7, *range(11, 21)]
    assert not Numbers().splits(7)


def test_any_order_ends_in_the_same_runs() -> None:
    """A hundred numbers, shuffled: no hole is left, and on the way as many as their set has."""
    numbers, seen = Numbers(), set[int]()
    order = list(range(100))
    random.Random(0).shuffle(order)
    for seq in order:
        more = numbers.splits(seq)
        before = numbers.holes
        numbers.add(seq)
        numbers.add(seq)
        seen.add(seq)
        runs = sum(number - 1 not in seen for number in seen)
        assert numbers.holes == runs - 1
        assert (numbers.holes > before) == more or before == numbers.holes == 0
    assert numbers.holes == 0


def test_with_too_many_holes_only_what_lies_in_one_is_let_in() -> None:
    """Beyond the last number, or in the middle of a hole, nothing is."""
    numbers = Numbers([[0, 0], [10, 10], [20, 20]])
    assert numbers.has_room(99, most=2)
    assert [seq for seq in range(30) if numbers.has_room(seq, most=1)] == [0, 1, 9, 10, 11, 19, 20]


def test_a_client_gives_up_so_many_at_once_and_then_so_many_a_second() -> None:
    """1,024; two seconds later 128 more, but only once a commit has closed what waited."""
    seconds = [0.0]
    skips = Skips(lambda: seconds[0])
    given: list[int] = []

    def give_up(applied: BatchSet) -> int:
        before = len(given)
        while skips.may_add(applied):
            given.append(len(given))
            skips.add(batch(given[-1]))
        return len(given) - before

    assert give_up(BatchSet()) == MAX_SKIPS
    seconds[0] = 2.0
    assert give_up(BatchSet()) == 0
    assert give_up(BatchSet(map(batch, given))) == 2 * SKIPS_PER_SECOND
    assert batch(given[-1]) in skips
