"""The rows of a run that kept no history, read off the records that its store has in any case.

Every commit has its record and every round its report, whoever made them: servers, accumulators,
workers or a coordinator in processes that know nothing of each other. What only the program of a
simulation knows, losses and bytes, isn't there, and is left out.

The trap is a long run: each record is an object, so reading all of a million commits would take
hours from a bucket. The newest are read, and the run's row says from which version on it tells.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from splitfed.errors import CorruptedError, FormatError, MissingError
from splitfed.store.commit import Commit
from splitfed.store.records import commit_row
from splitfed.store.rows import Row, plain
from splitfed.store.store import GradientStore

MOST = 5000
"""So many commits of a lineage are read at most, and so many rounds."""
STORE = "store"
"""The name of the store in a run's folder, where the folder isn't a store itself."""
_READERS = 16
"""Reads at a time from a storage where each takes milliseconds."""


class Records:
    """A store's records as rows; asked again, only what came since is read.

    Args:
        store: The store.
        most: So many commits of a lineage are read, and so many rounds: the newest.
    """

    def __init__(self, store: GradientStore, most: int = MOST) -> None:
        self._store = store
        self._most = most
        self._commits: dict[str, list[Row]] = {}
        """The rows of each lineage, oldest first, without gaps."""
        self._rounds: dict[int, Row] = {}

    def rows(self) -> list[Row]:
        """The run, its commits and its rounds; empty if nobody has begun it.

        Raises:
            StoreError: the storage failed.
        """
        if self._store.header() is None:
            return []
        for lineage in self._store.lineages():
            self._read_commits(lineage)
        self._read_rounds()
        begun = self._began()
        commits = [
            {**row, "time": row["time"] - begun} for rows in self._commits.values() for row in rows
        ]
        return [
            plain(self._run()),
            *map(plain, sorted(commits, key=lambda row: row["time"])),
            *map(plain, (self._rounds[number] for number in sorted(self._rounds))),
        ]

    def _run(self) -> Row:
        """The row of the run: what the store knows of it."""
        first = {name: rows[0]["version"] for name, rows in self._commits.items() if rows}
        return {
            "kind": "run",
            "name": name_of(self._store),
            "clients": {client: {} for client in self._store.clients()},
            "settings": {"store": self._store.shown},
            "first_versions": {name: version for name, version in first.items() if version > 1},
            "first_round": min(self._rounds, default=1),
        }

    def _began(self) -> float:
        """When the first round began, in seconds since 1970; 0 if there was none.

        Without rounds nobody knows when the run began, and times stay as they are on record.
        """
        if not self._rounds:
            return 0.0
        return self._store.rounds().plan(1).started

    def _read_commits(self, lineage: str) -> None:
        line = self._store.lineage(lineage)
        known = self._commits.setdefault(lineage, [])
        head = line.head()
        last = known[-1]["version"] if known else 0  # version 0 folds nothing
        versions = range(max(last + 1, head - self._most + 1), head + 1)
        if versions.start > last + 1:
            known.clear()

        def read(version: int) -> Row | None:
            try:
                return row_of(line.commit(version), lineage)
            except (CorruptedError, FormatError, MissingError):
                return None  # it was deleted or damaged: `status` and `repair` say so

        found: list[Row | None]
        if self._store.blobs.is_near or len(versions) < 2:
            found = [read(version) for version in versions]
        else:
            with ThreadPoolExecutor(_READERS) as pool:
                found = list(pool.map(read, versions))
        for row in found:
            if row is None:
                known.clear()  # what is told has no gaps: it begins after the last one
            else:
                known.append(row)
        del known[: -self._most]

    def _read_rounds(self) -> None:
        rounds = self._store.rounds()
        newest = rounds.newest()
        for number in range(max(1, newest - self._most + 1), newest + 1):
            if number not in self._rounds:
                report = rounds.report(number)
                if report is not None:
                    self._rounds[number] = report


def name_of(store: GradientStore) -> str:
    """What a run is called after its store: the last part of the place that isn't just 'store'."""
    path = store.shown.rpartition("://")[2]
    parts = [part for part in path.split("/") if part]
    if len(parts) > 1 and parts[-1] == STORE:
        parts.pop()
    return parts[-1] if parts else "run"


def row_of(commit: Commit, lineage: str) -> Row:
    """The row of a commit, with how many batches of each client it folded."""
    folded = Counter(batch.client_id for batch in commit.folded)
    return {**commit_row(commit, lineage), "folded": dict(sorted(folded.items()))}
