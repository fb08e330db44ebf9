"""The applied table: what is closed, what a late repeat is answered, and when it is written."""

from __future__ import annotations

import pytest
from harness_store import batch

from splitfed.errors import AlreadyAppliedError, FormatError
from splitfed.store.batchset import BatchSet, Outcome, Verdict
from splitfed.store.table import KEPT_REFUSED, LEAST_RECORDS, MOST_RECORDS, Table, is_due


def closing(**outcomes: list[int]) -> Verdict:
    """A verdict on batches of one client."""
    return Verdict.of({batch(seq): Outcome(name) for name, seqs in outcomes.items() for seq in seqs})


def test_a_late_repeat_is_answered_what_the_first_was() -> None:
    """Folded and stale ones were stored; those rejected or given up weren't, and are told apart."""
    table = Table().adding(closing(folded=[0, 1], stale=[2], rejected=[3], skipped=[4]))
    assert [table.outcome(batch(seq)).value for seq in range(5)] == ["folded"] * 3 + ["rejected", "skipped"]
    assert list(table.closed) == [batch(seq) for seq in range(5)]


def test_it_survives_its_file() -> None:
    """And one of format 1 is read, which knew what is closed and nothing more."""
    table = Table().adding(closing(folded=[0, 2], rejected=[1])).adding(closing(folded=[7]))
    again = Table.from_json(table.to_json())
    assert again.to_json() == table.to_json()
    old = Table.from_json(table.closed.to_json())
    assert (list(old.closed), list(old.rejected)) == (list(table.closed), [])


def test_refused_ones_are_no_list_without_end() -> None:
    """Of a client that is refused at every second batch the newest are known; of others it is said."""
    table = Table()
    for seq in range(0, 4 * KEPT_REFUSED, 2):
        table = table.adding(closing(rejected=[seq], folded=[seq + 1]))
    newest = 4 * KEPT_REFUSED - 2
    assert (table.outcome(batch(newest)), table.outcome(batch(newest + 1))) == (Outcome.REJECTED, Outcome.FOLDED)
    with pytest.raises(AlreadyAppliedError, match="isn't on record any more"):
        table.outcome(batch(0))
    assert len(str(table.to_json())) < 2_000
    other = table.adding(Verdict(folded=BatchSet([batch(0, "b")])))
    assert other.outcome(batch(0, "b")) is Outcome.FOLDED


@pytest.mark.parametrize(
    "data", [None, [], {"table": 2}, {"table": 3, "closed": {}, "rejected": {}, "skipped": {}}, {"a": 1}]
)
def test_what_isnt_a_table_is_refused(data: object) -> None:
    """With an error of ours."""
    with pytest.raises(FormatError):
        Table.from_json(data)


def test_it_is_written_once_the_records_pay_for_it() -> None:
    """A small one after 16 commits; one of a megabyte after a thousand: about 1 kB a commit."""
    assert not is_due(LEAST_RECORDS - 1, (0, 100))
    assert is_due(LEAST_RECORDS, (0, 100))
    assert not is_due(99, (0, 100 * 1024))
    assert is_due(100, (0, 100 * 1024))
    assert is_due(5 + MOST_RECORDS, (5, 2**40))
