"""Commit records as rows: what a version folded, for whoever watches a run.

A row has what a reader of a history needs, by name, and nothing that only a replay needs.
"""

from __future__ import annotations

from splitfed.store.commit import Commit
from splitfed.store.rows import Row
from splitfed.store.store import GradientStore


def commit_row(commit: Commit, lineage: str, round_number: int | None = None) -> Row:
    """The row of kind 'commit' of one version.

    Args:
        commit: Its record.
        lineage: Which line it is of.
        round_number: The round in which it was made, if there was one.
    """
    row: Row = {
        "kind": "commit",
        "lineage": lineage,
        "version": commit.version,
        "time": commit.time,
        "num_batches": commit.num_batches,
        "num_samples": commit.num_samples,
        "staleness": {str(age): count for age, count in commit.staleness.items()},
        "num_stale": commit.num_stale,
        "num_rejected": commit.num_rejected,
        "num_skipped": commit.num_skipped,
        "delay": None,
    }
    if round_number is not None:
        row["round"] = round_number
    return row


def commit_rows(
    store: GradientStore, lineage: str, after: int, upto: int, round_number: int | None = None
) -> list[Row]:
    """The rows of kind 'commit' of some versions of a lineage.

    Args:
        store: The store.
        lineage: Which line.
        after: The version before the first.
        upto: The last version.
        round_number: The round in which they were made, if there was one.
    """
    line = store.lineage(lineage)
    versions = range(after + 1, upto + 1)
    return [commit_row(line.commit(version), lineage, round_number) for version in versions]
