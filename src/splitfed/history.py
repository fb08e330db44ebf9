"""What happened in a run: rows (see `rows`) as JSON lines that outlive whoever wrote them.

In a store an append is no primitive, so each one is a create-once file under the next free number. A killed writer
leaves whole rows, and two coordinators that race both get theirs in: the loser of a number takes the next. (A reply
that was lost makes "taken" mean "mine": the bytes are compared.) With one commit per batch that would be a file for
each batch, so rows of commits wait for the next row of another kind and are written together with it. Were they lost in
a kill, the store still has its own record of every commit.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from splitfed import layout
from splitfed.blobs import Blobs
from splitfed.errors import FormatError, InputError, MissingError
from splitfed.rows import Row, from_lines, plain, to_lines
from splitfed.store import GradientStore

FILE = "history.jsonl"
STORE = "store"
"""Where a run's folder has its store, if it isn't one itself."""
_MOST_HELD = 1000


class History:
    """The rows of one run.

    Args:
        where: A `GradientStore`, or the path of a local file, whose rows are continued if it has any; in memory if it
            isn't given.

    Opening one does no I/O. It is a callback, so `callbacks=[History(store)]` records a run.
    """

    def __init__(self, where: GradientStore | str | os.PathLike[str] | None = None) -> None:
        self._keeper = _keeper(where)
        self._rows: list[Row] | None = None
        self._held: list[Row] = []

    def __enter__(self) -> History:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @classmethod
    def load(cls, where: GradientStore | str | os.PathLike[str]) -> History:
        """The history that lies somewhere.

        Args:
            where: A store or its URL, a file of JSON lines, or a folder with a `store` or a `history.jsonl` in it.

        Raises:
            MissingError: there is none.
            FormatError: what is there isn't one.
        """
        found = cls(_locate(where))
        if not found.rows:
            raise MissingError(f"{where} holds no history: expected a run's store, its folder or its {FILE}")
        return found

    @property
    def rows(self) -> list[Row]:
        """All rows, oldest first; those that an earlier process wrote included."""
        if self._rows is None:
            self._rows = list(self._keeper.read())
        return self._rows

    @property
    def run(self) -> Row | None:
        """The newest row of kind `run`: who took part, with which settings."""
        return next((row for row in reversed(self.rows) if row.get("kind") == "run"), None)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row.

        Raises:
            InputError: it has no `kind`, or holds what JSON can't.
            StoreError: the storage failed.
        """
        entry = plain(row)
        self.rows.append(entry)
        self._held.append(entry)
        if entry["kind"] != "commit" or len(self._held) >= _MOST_HELD:
            self.close()

    def on_row(self, row: Row) -> None:
        """Add a row: what makes this a callback."""
        self.append(row)

    def close(self) -> None:
        """Write the rows that wait; more may follow."""
        if self._held:
            self._keeper.write(self._held)
            self._held = []

    def rounds(self) -> list[Row]:
        """The reports of the rounds by number; of a round that is on record twice, the last.

        Raises:
            FormatError: a row of kind `round` has no number.
        """
        last: dict[Any, Row] = {row.get("round"): row for row in self.rows if row.get("kind") == "round"}
        unknown = [number for number in last if type(number) is not int]
        if unknown:
            raise FormatError(f"a row of kind 'round' has the round {unknown[0]!r}: expected its number, an integer")
        return [last[number] for number in sorted(last)]

    def commits(self, lineage: str | None = None) -> list[Row]:
        """The commits, of all lineages or of one."""
        found = (row for row in self.rows if row.get("kind") == "commit")
        return [row for row in found if lineage in (None, row.get("lineage"))]

    def to_pandas(self, kind: str = "round") -> Any:
        """A pandas DataFrame of one kind of rows.

        Args:
            kind: `round`, `commit` or `run`: a line per row; `client`: a line per round and client in it.

        Raises:
            InputError: an unknown kind, or pandas isn't installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise InputError("to_pandas needs pandas: pip install 'splitfed[pandas]'") from None
        if kind == "client":
            return pd.DataFrame(
                {"round": row["round"], "client": client, **figures}
                for row in self.rounds()
                for client, figures in row.get("clients", {}).items()
            )
        if kind not in ("round", "commit", "run"):
            raise InputError(f"kind {kind!r} isn't known: expected 'round', 'commit', 'run' or 'client'")
        return pd.DataFrame(self.rounds() if kind == "round" else [row for row in self.rows if row.get("kind") == kind])


class _Keeper(Protocol):
    """Where rows are kept."""

    def read(self) -> Iterable[Row]: ...

    def write(self, rows: list[Row]) -> None: ...


class _Nowhere:
    """Rows in memory only."""

    def read(self) -> list[Row]:
        return []

    def write(self, rows: list[Row]) -> None:
        """Nothing to do: the history itself has them."""


class _InStore:
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
            if bytes(self._blobs.get(layout.history(self._next)) or b"") == data:
                break
            self._next += 1
        self._next += 1

    def _keys(self) -> list[str]:
        return [key for key in self._blobs.list(layout.HISTORY) if layout.parse_history(key)]


class _InFile:
    """Rows as the lines of a local file. A line that a kill or a full disk left torn is no row, and is cut off."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mended = False

    def read(self) -> Iterable[Row]:
        return from_lines(self._whole(), str(self._path))

    def write(self, rows: list[Row]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._mended and self._path.exists():
            size, whole = self._path.stat().st_size, len(self._whole())  # in this order: others may append meanwhile
            if whole < size:
                os.truncate(self._path, whole)
        self._mended = True
        with self._path.open("ab") as file:
            file.write(to_lines(rows))

    def _whole(self) -> bytes:
        """The lines that were written to their end."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return b""
        whole, tail = data[: data.rfind(b"\n") + 1], data[data.rfind(b"\n") + 1 :]
        if tail and not tail.startswith(b"{"):
            raise FormatError(f"{self._path} ends in what isn't a row of a history: expected JSON lines of a run")
        return whole


def _keeper(where: GradientStore | str | os.PathLike[str] | None) -> _Keeper:
    if where is None:
        return _Nowhere()
    if isinstance(where, GradientStore):
        return _InStore(where.blobs)
    if "://" in os.fspath(where):
        raise InputError(f"{where} is a URL: expected a GradientStore over it, or the path of a local file")
    return _InFile(Path(where))


def _locate(where: GradientStore | str | os.PathLike[str]) -> GradientStore | Path:
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
    return path if path.is_file() else path / FILE
