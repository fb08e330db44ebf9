"""Who is told of each row of a run as it comes: the history, a progress bar, TensorBoard, a CSV file, the user's own.

A callback is a function of one row, or an object with `on_row`; one that also has `close` is closed when the run ends,
however it ends. An error in a callback ends the run: whoever can't write its figures should hear of it.
"""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from splitfed.errors import InputError
from splitfed.store.rows import Row


class Callback(Protocol):
    """Is told of each row; see `splitfed.rows` for what is in them."""

    def on_row(self, row: Row, /) -> object:
        """Take note of a row."""
        ...


AnyCallback: TypeAlias = Callback | Callable[[Row], object]


class Callbacks:
    """Several callbacks as one, each told in turn.

    Args:
        callbacks: Objects with `on_row`, or functions of a row.

    Raises:
        InputError: one is neither.

    As a context manager it closes them all at the end, the last first.
    """

    def __init__(self, callbacks: Iterable[AnyCallback]) -> None:
        self._callbacks = list(callbacks)
        self._tell: list[Callable[[Row], object]] = []
        for one in self._callbacks:
            tell = getattr(one, "on_row", one)
            if not callable(tell):
                raise InputError(f"callback {one!r} can't be called: expected a function of a row, or one with on_row")
            self._tell.append(tell)

    def __enter__(self) -> Callbacks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def on_row(self, row: Row) -> None:
        """Tell each callback of a row."""
        for tell in self._tell:
            tell(row)

    def close(self) -> None:
        """Close each callback that can be closed; an error in one doesn't keep the others open."""
        with contextlib.ExitStack() as stack:
            for one in self._callbacks:
                close = getattr(one, "close", None)
                if callable(close):
                    stack.callback(close)


class CSV:
    """Writes the rounds' reports as lines of a CSV file, one column per figure.

    Args:
        path: Where to write; an older file there is replaced at the first row.

    Lists become counts. What a client did is left to the `History`: it would be a column per client.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._columns: list[str] = []

    def on_row(self, row: Row) -> None:
        """Add a line, if the row is a round's report."""
        if row.get("kind") != "round":
            return
        figures = {name: len(value) if isinstance(value, list) else value for name, value in row.items()}
        figures |= {"dropped": len(row.get("dropped", {}))}
        first = not self._columns
        self._columns = self._columns or [name for name in figures if name not in ("kind", "clients")]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("w" if first else "a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._columns, extrasaction="ignore")
            if first:
                writer.writeheader()
            writer.writerow(figures)


class TensorBoard:
    """Writes the figures of rounds and commits as scalars that TensorBoard shows.

    Args:
        folder: Where to write.

    Raises:
        InputError: at the first row, if TensorBoard isn't installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = os.fspath(folder)
        self._writer: Any = None

    def on_row(self, row: Row) -> None:
        """Add the row's figures: a round's at its number, a commit's at its version."""
        if row.get("kind") not in ("round", "commit"):
            return
        if self._writer is None:
            self._writer = self._open()
        step = row["round"] if row["kind"] == "round" else row["version"]
        for name, value in _scalars(row):
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left, and end the writer's thread."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self) -> Any:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            raise InputError("this callback needs TensorBoard: pip install 'splitfed[tensorboard]'") from None
        return SummaryWriter(self._folder)


def _scalars(row: Row) -> Iterator[tuple[str, float]]:
    """The finite numbers of a row by their names; those of a round's clients too, and the lengths of its lists."""
    group = "round" if row["kind"] == "round" else f"commit/{row.get('lineage', 'body')}"
    for name, value in row.items():
        number = len(value) if isinstance(value, list) else value
        if name not in ("round", "version") and isinstance(number, int | float) and not isinstance(number, bool):
            yield f"{group}/{name}", number
    for client, figures in row.get("clients", {}).items():
        for name in ("loss", "accuracy", "train_loss"):
            if isinstance(figures.get(name), int | float):
                yield f"client/{name}/{client}", figures[name]
