"""The record of a commit: what goes in comes out, and what isn't one says so."""

from __future__ import annotations

import json
from typing import Any

import pytest
from harness_store import batch

from splitfed.errors import FormatError
from splitfed.store.batchset import BatchSet, Verdict
from splitfed.store.commit import Commit

LISTS = ("folded", "stale", "rejected", "skipped")
FULL = Commit(
    version=7,
    kind="fold",
    nonce="c0ffee",
    files={"weights": "ab", "optimizer": "cd", "applied": "ef"},
    frozen="12",
    num_samples=96.5,
    staleness={0: 3, 2: 1},
    verdict=Verdict(
        folded=BatchSet([batch(0), batch(1), batch(5), batch(0, "b", 2)]),
        stale=BatchSet([batch(2)]),
        rejected=BatchSet([batch(3), batch(4)]),
        skipped=BatchSet([batch(6), batch(7), batch(9)]),
    ),
    older={4: BatchSet([batch(5)])},
    num_duplicates=2,
    num_expired=4,
    num_foreign=1,
    time=1_700_000_000.25,
)


def plain(commit: Commit) -> dict[str, Any]:
    """All fields, comparable."""
    fields = {
        name: getattr(commit, name)
        for name in (*LISTS, *Commit.__dataclass_fields__)
        if name not in ("verdict", "digest")
    }
    fields["older"] = {version: list(batches) for version, batches in commit.older.items()}
    return {name: list(value) if isinstance(value, BatchSet) else value for name, value in fields.items()}


@pytest.mark.parametrize(
    "commit", [FULL, Commit(0, "initial", "ab", {"weights": "c0", "applied": "c1"})], ids=["full", "empty"]
)
def test_a_record_is_read_as_it_was_written(commit: Commit) -> None:
    """Every field survives, staleness with integers as keys."""
    assert plain(Commit.from_json(commit.to_json())) == plain(commit)
    assert plain(Commit.from_json(memoryview(commit.to_json()))) == plain(commit)


def test_the_numbers_are_those_of_the_lists() -> None:
    """Four folded, one stale, two rejected, three given up."""
    assert (FULL.num_batches, FULL.num_stale, FULL.num_rejected, FULL.num_skipped) == (4, 1, 2, 3)


def test_a_thousand_batches_in_a_row_take_a_few_bytes() -> None:
    """Ids are run-length coded: records are never deleted, so they must stay small."""
    many = Commit(1, "fold", "c0ffee", {}, verdict=Verdict(BatchSet(batch(seq) for seq in range(1_000))))
    assert len(many.to_json()) < 500


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        FULL.to_json()[:-1],
        FULL.to_json() + b"}",
        b'{"version": 1}',
    ],
)
def test_what_isnt_a_record_is_refused_with_our_own_error(data: bytes) -> None:
    """Truncated, foreign, nested beyond measure: FormatError."""
    with pytest.raises(FormatError):
        Commit.from_json(data)


@pytest.mark.parametrize("name", ["version", "files", "kind", "nonce"])
def test_a_field_that_is_missing_is_refused(name: str) -> None:
    """Nothing is made up for what a record ought to say."""
    fields = json.loads(FULL.to_json())
    del fields[name]
    with pytest.raises(FormatError):
        Commit.from_json(json.dumps(fields).encode())


@pytest.mark.parametrize("name", [*LISTS, "staleness", "older"])
@pytest.mark.parametrize("value", [None, 3, "a", [1], {"x": "y"}])
def test_a_field_of_another_kind_is_refused(name: str, value: object) -> None:
    """Lists of batches and counts by staleness are checked before anyone relies on them."""
    fields = {**json.loads(FULL.to_json()), name: value}
    with pytest.raises(FormatError):
        Commit.from_json(json.dumps(fields).encode())


def test_an_unknown_field_is_refused() -> None:
    """A record of a later format isn't half understood."""
    fields = {**json.loads(FULL.to_json()), "surprise": 1}
    with pytest.raises(FormatError, match="surprise"):
        Commit.from_json(json.dumps(fields).encode())
