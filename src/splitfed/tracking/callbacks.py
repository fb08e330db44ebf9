"""Receivers of a run's rows: the user's own functions, a CSV file, TensorBoard.

A callback is a function of one row, or an object with `on_row`; one that also has `close` is closed
when the run ends, however it ends. `History` and `Progress` are callbacks too. An error in a
callback ends the run: a user whose metrics can't be written should learn of it at once.
"""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

from splitfed.checks import install
from splitfed.errors import InputError
from splitfed.store.rows import Row


class Callback(Protocol):
    """An object that receives each row of a run."""

    def on_row(self, row: Row, /) -> object:
        """Receive a row."""
        ...


AnyCallback: TypeAlias = Callback | Callable[[Row], object]


def several(callbacks: AnyCallback | Iterable[AnyCallback]) -> list[AnyCallback]:
    """Callbacks as a list, whether one was given or several.

    Raises:
        InputError: it is neither.
    """
    if callable(callbacks) or hasattr(callbacks, "on_row"):
        return [cast("AnyCallback", callbacks)]
    if not isinstance(callbacks, Iterable) or isinstance(callbacks, str):
        raise InputError(
            f"callbacks is {callbacks!r}: "
            "expected a function of a row, one with on_row, or several of these"
        )
    return list(callbacks)


class Callbacks:
    """Several callbacks as one: each receives every row, in the order in which they were given.

    Args:
        callbacks: Objects with `on_row`, or functions of a row.

    Raises:
        InputError: one is neither.

    As a context manager it closes them all at the end, the last first.
    """

    def __init__(self, callbacks: Iterable[AnyCallback]) -> None:
        self._callbacks = list(callbacks)
        self._receivers: list[Callable[[Row], object]] = []
        for callback in self._callbacks:
            receiver = getattr(callback, "on_row", callback)
            if not callable(receiver):
                raise InputError(
                    f"callback {callback!r} can't be called: "
                    "expected a function of a row, or one with on_row"
                )
            self._receivers.append(receiver)

    def __enter__(self) -> Callbacks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def on_row(self, row: Row) -> None:
        """Pass a row to each callback."""
        for receive in self._receivers:
            receive(row)

    def close(self) -> None:
        """Close each callback that can be closed; an error in one doesn't keep the others open."""
        with contextlib.ExitStack() as stack:
            for callback in self._callbacks:
                close = getattr(callback, "close", None)
                if callable(close):
                    stack.callback(close)


class CSV:
    """Writes the reports of rounds as lines of a CSV file, one column per metric.

    Args:
        path: The file; an older one there is replaced at the first row.

    Lists become counts. The clients' own metrics are left out, as they would need columns for each
    client: the `History` has them.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._columns: list[str] = []

    def on_row(self, row: Row) -> None:
        """Add a line, if the row is a round's report."""
        if row.get("kind") != "round":
            return
        metrics = {name: _count(value) for name, value in row.items()}
        metrics["dropped"] = len(row.get("dropped", {}))
        first = not self._columns
        if first:
            # The first round decides on the columns: a line that is written can't get more of them.
            self._columns = [name for name in metrics if name not in ("kind", "clients")]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("w" if first else "a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._columns, extrasaction="ignore")
            if first:
                writer.writeheader()
            writer.writerow(metrics)


class TensorBoard:
    """Writes the metrics of rounds and commits as scalars that TensorBoard shows.

    Args:
        folder: The folder that TensorBoard reads.

    Raises:
        InputError: at the first row, if TensorBoard isn't installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = os.fspath(folder)
        self._writer: Any = None

    def on_row(self, row: Row) -> None:
        """Add the row's metrics: a round's at its number, a commit's at its version."""
        if row.get("kind") not in ("round", "commit"):
            return
        if self._writer is None:
            self._writer = self._open()
        step = row["round"] if row["kind"] == "round" else row["version"]
        for name, value in _scalars(row):
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is buffered, and end the writer's thread."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self) -> Any:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            raise InputError(f"this callback needs TensorBoard: {install('tensorboard')}") from None
        return SummaryWriter(self._folder)


def _count(value: Any) -> Any:
    """The length of a list; anything else as it is."""
    return len(value) if isinstance(value, list) else value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _scalars(row: Row) -> Iterator[tuple[str, float]]:
    """The numbers of a row by their names, the lengths of its lists, and its clients' metrics."""
    group = "round" if row["kind"] == "round" else f"commit/{row.get('lineage', 'body')}"
    for name, value in row.items():
        number = _count(value)
        if name not in ("round", "version") and _is_number(number):
            yield f"{group}/{name}", number
    for client, metrics in row.get("clients", {}).items():
        for name in ("loss", "accuracy", "train_loss"):
            if isinstance(metrics.get(name), int | float):
                yield f"client/{name}/{client}", metrics[name]
