"""The history of a run: rows as JSON lines, which outlive the process that wrote them.

A store has no append, so each append is a create-once file under the next free number. A killed
writer leaves whole rows, and of two coordinators that race both get theirs in: the loser of a
number takes the next one. The reply to a create may be lost, and "taken" then means "mine": the
bytes are compared.

With one commit per batch that would be a file for each batch. So rows of commits are held back
until a row of another kind comes, and are written together with it. If a kill loses them, the store
still has its own record of every commit.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from splitfed.blobs.contract import Blobs
from splitfed.checks import install
from splitfed.errors import FormatError, InputError, MissingError
from splitfed.store import layout
from splitfed.store.rows import Row, from_lines, is_file_of, plain, to_lines
from splitfed.store.store import GradientStore
from splitfed.tracking.records import MOST, STORE, Records, name_of, row_of

FILE = "history.jsonl"
_MOST_UNWRITTEN = 1000


class History:
    """The rows of one run.

    Args:
        where: A `GradientStore`, or the path of a local file; rows that are there already are kept.
            Without it the history is in memory only.

    Opening one does no I/O. It is a callback, so `callbacks=[History(store)]` records a run.
    """

    def __init__(self, where: GradientStore | str | os.PathLike[str] | None = None) -> None:
        self._journal = _journal(where)
        self._shown = "in memory" if where is None else repr(_shown(where))
        self._rows: list[Row] | None = None
        self._unwritten: list[Row] = []

    def __repr__(self) -> str:
        if self._rows is None:
            return f"History({self._shown})"
        kinds = Counter(str(row.get("kind")) for row in self._rows)
        counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "no rows"
        return f"History({self._shown}: {counted})"

    def __enter__(self) -> History:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @classmethod
    def load(cls, where: GradientStore | str | os.PathLike[str]) -> History:
        """The history of a run, an earlier one or one that goes on.

        Commits and rounds that nobody kept a history of are read off the store's own records, so
        any store has one; what they don't know, such as losses, is absent.

        Args:
            where: A store or its URL, a file of JSON lines, or a folder with a `store` or a
                `history.jsonl` in it.

        Raises:
            MissingError: there is no run.
            FormatError: the file there isn't a history.
        """
        return Source(where).read()

    @property
    def rows(self) -> list[Row]:
        """All rows, oldest first; those that an earlier process wrote included."""
        if self._rows is None:
            self._rows = list(self._journal.read())
        return self._rows

    @property
    def run(self) -> Row | None:
        """The newest row of kind `run`: the clients and the settings."""
        return next((row for row in reversed(self.rows) if row.get("kind") == "run"), None)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row.

        Raises:
            InputError: it has no `kind`, or holds what JSON can't.
            StoreError: the storage failed.
        """
        entry = plain(row)
        self.rows.append(entry)
        self._unwritten.append(entry)
        if entry["kind"] != "commit" or len(self._unwritten) >= _MOST_UNWRITTEN:
            self.close()

    def on_row(self, row: Row) -> None:
        """Add a row: `append` under the name that callbacks have."""
        self.append(row)

    def close(self) -> None:
        """Write the rows that were held back; more may follow."""
        if self._unwritten:
            self._journal.write(self._unwritten)
            self._unwritten = []

    def rounds(self) -> list[Row]:
        """The reports of the rounds by number; of a round that was reported twice, the last.

        Raises:
            FormatError: a row of kind `round` has no number.
        """
        last: dict[Any, Row] = {row.get("round"): row for row in self._of_kind("round")}
        unknown = [number for number in last if type(number) is not int]
        if unknown:
            raise FormatError(
                f"a row of kind 'round' has the round {unknown[0]!r}: "
                "expected its number, an integer"
            )
        return [last[number] for number in sorted(last)]

    def commits(self, lineage: str | None = None) -> list[Row]:
        """The commits, of all lineages or of one."""
        found = self._of_kind("commit")
        return [row for row in found if lineage in (None, row.get("lineage"))]

    def _of_kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row.get("kind") == kind]

    def to_pandas(self, kind: str = "round") -> Any:
        """A pandas DataFrame of one kind of rows.

        Args:
            kind: `round`, `commit` or `run` for a line per row; `client` for a line per round and
                client in it.

        Raises:
            InputError: an unknown kind, or pandas isn't installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise InputError(f"to_pandas needs pandas: {install('pandas')}") from None
        if kind == "client":
            return pd.DataFrame(self._client_lines())
        if kind not in ("round", "commit", "run"):
            raise InputError(
                f"kind {kind!r} isn't known: expected 'round', 'commit', 'run' or 'client'"
            )
        return pd.DataFrame(self.rounds() if kind == "round" else self._of_kind(kind))

    def _client_lines(self) -> list[Row]:
        return [
            {"round": row["round"], "client": client, **metrics}
            for row in self.rounds()
            for client, metrics in row.get("clients", {}).items()
        ]


class Follower:
    """Keeps in a local file what commits add to a store, whoever makes them.

    Killed and started again it goes on after the last commit that the file has, so that none is
    missing in it.

    Args:
        store: The store that is followed.
        path: The file of JSON lines; rows that are there already are kept.
        lineages: Which lines of versions.

    Raises:
        InputError: the file is of another run: it has versions that this store hasn't.
    """

    def __init__(
        self, store: GradientStore, path: str | os.PathLike[str], lineages: Iterable[str]
    ) -> None:
        self._store = store
        self._history = History(path)
        self._reported: dict[str, int] = {}
        for lineage in lineages:
            head = store.lineage(lineage).head()
            last = max((row["version"] for row in self._history.commits(lineage)), default=0)
            if last > max(head, 0):
                raise InputError(
                    f"{os.fspath(path)} has version {last} of lineage {lineage!r}, and "
                    f"{store.shown} has {head}: it is the history of another run; "
                    "expected a new file, or that of this run"
                )
            self._reported[lineage] = max(last, head - MOST)
        if self._history.run is None:
            settings = {"store": store.shown}
            self._history.append({"kind": "run", "name": name_of(store), "settings": settings})

    def catch_up(self) -> None:
        """Write the rows of the commits that were made since the last call."""
        for lineage, after in self._reported.items():
            line = self._store.lineage(lineage)
            upto = line.head()
            for version in range(after + 1, upto + 1):
                self._history.append(row_of(line.commit(version), lineage))
            self._reported[lineage] = max(after, upto)
        self._history.close()


class Source:
    """The place of a run's history, to be read again and again while the run goes on.

    Args:
        where: As for `History.load`.

    Raises:
        MissingError: there is nothing.
    """

    def __init__(self, where: GradientStore | str | os.PathLike[str]) -> None:
        self._where = where
        self._found = _locate(where)
        store = self._found if isinstance(self._found, GradientStore) else None
        self._records = None if store is None else Records(store)

    def read(self) -> History:
        """The history as it is now.

        Raises:
            MissingError: there is no run as yet.
            FormatError: what is there isn't a history.
        """
        history = History(self._found)
        rows = history.rows
        kinds = {row.get("kind") for row in rows}
        if self._records is not None and not kinds >= {"commit", "round"}:
            rows += [row for row in self._records.rows() if row["kind"] not in kinds]
        if not rows:
            raise MissingError(
                f"{_shown(self._where)} holds no run: "
                f"expected a run's store, its folder or its {FILE}"
            )
        return history


def _shown(where: GradientStore | str | os.PathLike[str]) -> str:
    return where.shown if isinstance(where, GradientStore) else str(where)


class _Journal(Protocol):
    """The storage of rows."""

    def read(self) -> Iterable[Row]: ...

    def write(self, rows: list[Row]) -> None: ...


class _MemoryJournal:
    """No storage: the history itself has the rows."""

    def read(self) -> list[Row]:
        return []

    def write(self, rows: list[Row]) -> None:
        """Nothing to do."""


class _StoreJournal:
    """Rows as create-once files of a store."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._next: int | None = None

    def read(self) -> Iterable[Row]:
        for key in self._keys():
            yield from from_lines(bytes(self._blobs.get(key) or b""), key)

    def write(self, rows: list[Row]) -> None:
        data = to_lines(rows)
        if self._next is None:
            self._next = max((layout.parse_history(key) for key in self._keys()), default=0) + 1
        while not self._blobs.create(layout.history(self._next), [data]):
            # The number is taken: by another writer, or by us when the reply was lost.
            if is_file_of(self._blobs.get(layout.history(self._next)), data):
                break
            self._next += 1
        self._next += 1

    def _keys(self) -> list[str]:
        return [key for key in self._blobs.list(layout.HISTORY) if layout.parse_history(key)]


class _FileJournal:
    """Rows as the lines of a local file.

    A line without its end was torn by a kill or a full disk: it is no row, and is cut off before
    the next one is written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._torn_line_cut = False

    def read(self) -> Iterable[Row]:
        return from_lines(self._whole_lines(), str(self._path))

    def write(self, rows: list[Row]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Once only: the whole file is read for it, and the lines of this process have their ends.
        if not self._torn_line_cut and self._path.exists():
            # In this order: another process may append in between, and its lines must stay.
            size = self._path.stat().st_size
            whole = len(self._whole_lines())
            if whole < size:
                os.truncate(self._path, whole)
        self._torn_line_cut = True
        with self._path.open("ab") as file:
            file.write(to_lines(rows))

    def _whole_lines(self) -> bytes:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return b""
        end = data.rfind(b"\n") + 1
        torn = data[end:]
        # A user's file of another kind must not be cut: a torn row is the start of a JSON object.
        if torn and not torn.startswith(b"{"):
            raise FormatError(
                f"{self._path} ends in what isn't a row of a history: expected JSON lines of a run"
            )
        return data[:end]


def _journal(where: GradientStore | str | os.PathLike[str] | None) -> _Journal:
    if where is None:
        return _MemoryJournal()
    if isinstance(where, GradientStore):
        return _StoreJournal(where.blobs)
    if "://" in os.fspath(where):
        raise InputError(
            f"{where} is a URL: expected a GradientStore over it, or the path of a local file"
        )
    return _FileJournal(Path(where))


def _locate(where: GradientStore | str | os.PathLike[str]) -> GradientStore | Path:
    """The store or the file in which the history of a run is."""
    if isinstance(where, GradientStore):
        return where
    if "://" in os.fspath(where):
        return GradientStore(where)
    path = Path(where)
    if not path.exists():
        raise MissingError(f"{path} isn't there: expected a run's store, its folder or its {FILE}")
    for folder in (path, path / STORE):
        if (folder / layout.HISTORY).is_dir():
            return GradientStore(folder)
    if path.is_file() or (path / FILE).is_file():
        return path if path.is_file() else path / FILE
    for folder in (path, path / STORE):
        if (folder / layout.FORMAT).is_file():
            return GradientStore(folder)
    return path / FILE
