"""The records of rounds: found fast, checked, and never written twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from harness_store import Nth, hooked, meanwhile

from splitfed import FormatError, GradientStore, MissingError
from splitfed.store.batchset import Verdict
from splitfed.store.rounds import Ending, Plan, Rounds

PLAN = Plan(1, ("a", "b"), 0, 0, 1, 10.0, 70.0, "count", "keep", True, 1e9)
ENDING = Ending(1, "complete", 70.0, 1e9, Verdict(), Verdict(), ("a",), (), {"b": "why"}, {"a": 2.0})


def rounds(url: str) -> Rounds:
    """The rounds of a fresh view of a store."""
    return GradientStore(url, sync="process").rounds()


def key(kind: str) -> str:
    """Where a record of round 1 lies."""
    return f"rounds/0000000001/{kind}.json"


def test_records_come_back_as_they_were(store_url: str) -> None:
    """Plan, ending and report of a round, read by another process; the first of each holds."""
    one, other = rounds(store_url), rounds(store_url)
    assert (one.newest(), one.current(), one.ending(1), one.report(1)) == (0, None, None, None)
    assert one.begin(PLAN) == PLAN == other.begin(replace(PLAN, sampled=("c",))) == other.current()
    found = one.end(ENDING)
    assert other.end(replace(ENDING, status="deadline")).status == "complete"
    assert (found.heard, found.dropped, found.samples) == (("a",), {"b": "why"}, {"a": 2.0})
    assert one.close(1, {"kind": "round", "x": 1}) == {"kind": "round", "x": 1} == other.close(1, {"kind": "round"})
    assert one.newest() == other.newest() == 1
    with pytest.raises(MissingError, match="no round 2"):
        one.plan(2)


def test_the_newest_of_many_is_found_in_few_reads(store_url: str) -> None:
    """Of 100 rounds: by doubling, 14 reads the first time, one after that."""
    some = rounds(store_url)
    for number in range(1, 101):
        some.begin(replace(PLAN, number=number))
    hook = Nth()
    fresh = hooked(store_url, hook).rounds()
    with hook.armed():
        assert fresh.newest() == 100
    assert hook.count == 14
    with hook.armed():
        assert fresh.newest() == 100
    assert hook.count == 15


def test_threads_may_look_for_the_newest_together(store_url: str) -> None:
    """One that looks while another does finds the same, and no round that isn't there."""
    some = rounds(store_url)
    some.begin(PLAN)
    shared: list[Rounds] = []
    hook = Nth(0, meanwhile(lambda: shared[0].newest()), at="get rounds/0000000002/plan")
    shared.append(hooked(store_url, hook).rounds())
    with hook.armed():
        assert shared[0].newest() == 1
    assert shared[0].newest() == 1


def test_rounds_that_began_from_a_version(store_url: str) -> None:
    """Versions between two plans belong to the older one; after a round below quorum two begin from the same."""
    some = rounds(store_url)
    assert some.started_at("body", 0) == []
    for number, version in enumerate([0, 3, 3, 5], start=1):
        some.begin(replace(PLAN, number=number, body_version=version, client_version=number - 1))
    found = {base: [plan.number for plan in some.started_at("body", base)] for base in range(7)}
    assert found == {0: [1], 1: [1], 2: [1], 3: [3, 2], 4: [3], 5: [4], 6: [4]}
    assert [plan.number for plan in some.started_at("client", 2)] == [3]


def test_a_round_as_a_client_sees_it(store_url: str) -> None:
    """Sampled or not, arrived, closed, finished; without a barrier everybody is asked, whatever has come."""
    some = rounds(store_url)
    plan = some.begin(PLAN)
    info = some.info(plan, "a", has_update=True)
    assert (info.number, info.sampled, info.arrived, info.closed, info.finished) == (1, True, True, False, False)
    assert not some.info(plan, "z", has_update=False).sampled
    open_to_all = some.info(replace(PLAN, barrier=False), "z", has_update=True)
    assert (open_to_all.sampled, open_to_all.arrived) == (True, False)
    some.end(ENDING)
    assert some.info(plan, "a", has_update=False).closed
    assert not some.info(plan, "a", has_update=False).finished
    some.finish(1)
    assert some.info(plan, "a", has_update=False).finished


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("plan", b"not json"),
        ("plan", b"{}"),
        ("plan", b'{"number": 1}'),
        ("ending", b"[]"),
        ("ending", b'{"number": 1, "body": {}}'),
        ("report", b"\xff"),
    ],
)
def test_foreign_records_are_refused(kind: str, data: bytes, store_url: str) -> None:
    """Whatever lies there, the error is our own."""
    store = GradientStore(store_url, sync="process")
    store.blobs.create(key(kind), [data])
    with pytest.raises(FormatError):
        getattr(store.rounds(), kind)(1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"number": 2},
        {"sampled": ["../x"]},
        {"sampled": "ab"},
        {"body_version": -1},
        {"client_version": "0"},
        {"opened": "x"},
        {"more": 1},
    ],
)
def test_a_plan_with_a_wrong_field_is_refused(wrong: dict[str, Any], store_url: str) -> None:
    """Another round's, ids that may not become keys, versions that aren't."""
    store = GradientStore(store_url, sync="process")
    store.rounds()._create(1, "plan", {**{name: getattr(PLAN, name) for name in PLAN.__slots__}, **wrong})
    with pytest.raises(FormatError, match="plan of round 1"):
        store.rounds().plan(1)
