"""A custom storage backend: a run inside one SQLite file.

A backend needs few operations, and one is mandatory: an atomic create-if-absent. Here that is a single SQL statement,
`INSERT ... ON CONFLICT DO NOTHING`. The backend is an fsspec filesystem with four methods. If a package registers it as
an entry point of the group `fsspec.specs`, every command knows its URLs too.

Run the script to train on such a store; run pytest on it to test the backend with the suite at the bottom.
"""

from __future__ import annotations

import argparse
import shutil
import sqlite3
import tempfile
import weakref
from pathlib import Path
from typing import Any

import fsspec
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import splitfed
from splitfed.blobs import Blobs, BlobsSuite, open_blobs


class SqliteFileSystem(fsspec.AbstractFileSystem):
    """Objects in the one table of a database file: `sqlite://any/name`, with `database` as a storage option.

    splitfed opens one for each thread and process, so no connection is shared. They wait for each
    other's locks, but not in a switch to WAL mode: two at once, and one finds the database locked.
    """

    protocol = "sqlite"

    def __init__(self, database: str, **options: Any) -> None:
        super().__init__(**options)
        self._connection = sqlite3.connect(database, timeout=60.0, isolation_level=None, check_same_thread=False)
        weakref.finalize(self, self._connection.close)
        self._connection.execute("CREATE TABLE IF NOT EXISTS objects (path TEXT PRIMARY KEY, body BLOB) WITHOUT ROWID")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        """Store an object; with mode "create" only if it is absent, in one statement: no other writer comes between."""
        on_conflict = "DO NOTHING" if mode == "create" else "DO UPDATE SET body = excluded.body"
        query = f"INSERT INTO objects VALUES (?, ?) ON CONFLICT (path) {on_conflict}"  # noqa: S608 -- one of two words
        if self._connection.execute(query, (path, value)).rowcount == 0:
            raise FileExistsError(path)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        """Read an object."""
        row = self._connection.execute("SELECT body FROM objects WHERE path = ?", (path,)).fetchone()
        if row is None:
            raise FileNotFoundError(path)
        return bytes(row[0][start:end])

    def rm_file(self, path: str) -> None:
        """Delete an object."""
        self._connection.execute("DELETE FROM objects WHERE path = ?", (path,))

    def find(self, path: str, **options: Any) -> dict[str, Any]:
        """List all objects under a directory with one query, so that splitfed needn't walk."""
        query = "SELECT path, length(body) FROM objects WHERE path >= ? AND path < ?"
        rows = self._connection.execute(query, (f"{path}/", f"{path}0"))  # '0' comes right after '/'
        return {name: {"name": name, "size": size, "type": "file"} for name, size in rows}


fsspec.register_implementation("sqlite", SqliteFileSystem, clobber=True)


def main() -> None:
    """The user's own loop; only the store differs from any other example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, help="folder for the database (default: a temporary one)")
    arguments = parser.parse_args()
    folder = arguments.store or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    database = str(folder / "run.db")
    torch.manual_seed(arguments.seed)
    half, body = splitfed.split(nn.Sequential(nn.Linear(2, 32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)), "1:3")
    store = splitfed.GradientStore("sqlite://demo/run", database=database)
    client = splitfed.SplitClient(half, splitfed.SplitServer(body, store), client_id="site-a")
    accumulator = splitfed.Accumulator(body, store, lambda params: torch.optim.Adam(params, lr=1e-2))
    optimizer = torch.optim.Adam(client.parameters(), lr=1e-2)
    for _ in range(60):
        x = torch.randn(64, 2)
        y = (x.prod(1) > 0).long()  # the quadrants of a chessboard: no linear model finds them
        optimizer.zero_grad()
        cross_entropy(client(x), y).backward()
        optimizer.step()
        accumulator.step()
    x = torch.randn(1000, 2)
    whole = splitfed.join(client, store.load_weights()).eval()
    right = (whole(x).argmax(1) == (x.prod(1) > 0).long()).double().mean()
    print(f"version {store.latest_version()}, {len(store.blobs.list(''))} objects in {database}, accuracy: {right:.3f}")


class TestSqlite(BlobsSuite):
    """The conformance suite; it needs only a way to open the blobs."""

    def setup_method(self) -> None:
        """Make a database for each test."""
        super().setup_method()
        self.folder = tempfile.mkdtemp()

    def teardown_method(self) -> None:
        """Delete it after the test."""
        shutil.rmtree(self.folder)

    def open(self, place: str) -> Blobs:
        """Open the blobs at `place`."""
        return open_blobs(f"sqlite://tests/{place}", database=f"{self.folder}/tests.db")


if __name__ == "__main__":
    main()
