"""Receivers of a run's rows: the user's own functions, a CSV file, TensorBoard, trackers.

A callback is a function of one row, or an object with `on_row`; one that also has `close` is closed
when the run ends, however it ends. `History` and `Progress` are callbacks too. An error in a
callback ends the run: a user whose metrics can't be written should learn of it at once.
"""

from __future__ import annotations

import contextlib
import csv
import math
import os
import re
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
        clients: Whether metrics of single clients are written too.

    Raises:
        InputError: at the first row, if TensorBoard isn't installed.
    """

    def __init__(self, folder: str | os.PathLike[str], *, clients: bool = True) -> None:
        self._folder = os.fspath(folder)
        self._clients = clients
        self._writer: Any = None

    def on_row(self, row: Row) -> None:
        """Add the row's metrics: a round's at its number, a commit's at its version."""
        metrics = scalars(row, clients=self._clients)
        if not metrics:
            return
        if self._writer is None:
            self._writer = self._open()
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, _step(row))

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


class Log:
    """Hands the metrics of rounds and commits to a tracker's `log(metrics, step=)`.

    Weights & Biases, Trackio and SwanLab have it. A tracker with another verb of this form, such as
    Aim's `track`, is given as that function: `Log(run.track)`.

    Args:
        run: The tracker's run, or a function `log(metrics, step=number)`. It stays open: who has
            begun it ends it.
        clients: Whether metrics of single clients are logged too.

    Raises:
        InputError: it is neither.

    The trap: rounds and versions are numbers of their own, and Weights & Biases drops what comes at
    a step below the last. So a step is one row; the metrics `round` and `version/LINEAGE` are there
    to be an axis, and are made one where the run has `define_metric`.
    """

    def __init__(self, run: Any, *, clients: bool = True) -> None:
        log = getattr(run, "log", run)
        if not callable(log):
            raise InputError(
                f"run is a {type(run).__name__}: expected a tracker's run with log(metrics, step=),"
                " such as wandb.init(), or a function of this form"
            )
        self._log: Callable[..., object] = log
        self._define: Any = getattr(run, "define_metric", None)
        self._clients = clients
        # A run that is resumed goes on from its step.
        begun = getattr(run, "step", 0)
        self._next = begun if isinstance(begun, int) else 0
        self._axes: set[str] = set()

    def on_row(self, row: Row) -> None:
        """Log the row's metrics."""
        metrics = scalars(row, clients=self._clients)
        if not metrics:
            return
        axis = "round" if row["kind"] == "round" else f"version/{row.get('lineage', 'body')}"
        self._define_axes(axis, metrics)
        self._log({**metrics, axis: _step(row)}, step=self._next)
        self._next += 1

    def _define_axes(self, axis: str, metrics: Iterable[str]) -> None:
        if not callable(self._define):
            return
        for name in (axis, *metrics):
            group = name if name == axis else f"{name.rpartition('/')[0]}/*"
            if group not in self._axes:
                self._axes.add(group)
                self._define(group, **({} if group == axis else {"step_metric": axis}))


class MLflow:
    """Logs the metrics of rounds and commits to MLflow, and the run's settings as its parameters.

    Args:
        run_id: The run that they are logged to; by default the active one or, without any, one that
            is begun at the first row and ended when the run of splitfed ends. Where runs are kept
            is MLflow's own setting: `mlflow.set_tracking_uri`, `mlflow.set_experiment`.
        clients: Whether metrics of single clients are logged too.

    Raises:
        InputError: at the first row, if MLflow isn't installed.

    A round's metrics have its number as their step, a commit's its version.
    """

    def __init__(self, run_id: str | None = None, *, clients: bool = True) -> None:
        self._run_id = run_id
        self._clients = clients
        self._module: Any = None
        self._is_own = False

    def on_row(self, row: Row) -> None:
        """Log the row's metrics, or its settings."""
        if row.get("kind") not in ("run", "round", "commit"):
            return
        if self._module is None:
            self._open(row)
        if row["kind"] == "run":
            self._log_params(row)
            return
        metrics = {
            _mlflow_name(name): value for name, value in scalars(row, clients=self._clients).items()
        }
        # Of more in one request MLflow's server takes none.
        names = list(metrics)
        for first in range(0, len(names), _MLFLOW_METRICS):
            some = {name: metrics[name] for name in names[first : first + _MLFLOW_METRICS]}
            self._module.log_metrics(some, step=_step(row), run_id=self._run_id)

    def close(self) -> None:
        """End the run that was begun here."""
        if self._is_own:
            self._module.end_run()
            self._is_own = False
            self._run_id = None
        self._module = None

    def _open(self, row: Row) -> None:
        try:
            import mlflow
        except ImportError:
            raise InputError(
                "this callback needs MLflow: pip install mlflow, or mlflow-skinny"
            ) from None
        if self._run_id is None:
            active = mlflow.active_run()
            self._is_own = active is None
            found = active or mlflow.start_run(run_name=row.get("name"))
            self._run_id = found.info.run_id
        self._module = mlflow

    def _log_params(self, row: Row) -> None:
        """The settings, once: MLflow refuses to change a parameter, and a run may be continued."""
        client = self._module.MlflowClient()
        known = client.get_run(self._run_id).data.params
        given = {**row.get("settings", {}), "mode": row.get("mode"), "seed": row.get("seed")}
        for name, value in given.items():
            if value is not None and name not in known:
                text = str(value)
                if len(text) > _MLFLOW_PARAM:
                    text = f"{text[: _MLFLOW_PARAM - 4]} ..."
                client.log_param(self._run_id, _mlflow_name(name), text)


_MLFLOW_METRICS = 1000
_MLFLOW_PARAM = 6000
"""Characters of a parameter that MLflow takes: those of a thousand clients are more."""


def _mlflow_name(name: str) -> str:
    """The name with no sign that MLflow refuses, such as the one of `body@site`."""
    return re.sub(r"[^\w\-. /]", "_", name)


# --------------------------------------------------------------------------------------- metrics


def scalars(row: Row, *, clients: bool = True) -> dict[str, float]:
    """The metrics of a row as flat numbers by name, as trackers take them.

    `round/loss`, `commit/body/num_batches`, `client/accuracy/site-1`: numbers as they are, of lists
    and of what was dropped the count, of the staleness of a commit's batches mean and maximum. What
    isn't known or isn't finite is left out. A row of kind `run` has none.

    Args:
        row: A row of a run, such as a callback receives.
        clients: Whether metrics of single clients are among them.
    """
    if row.get("kind") not in ("round", "commit"):
        return {}
    group = "round" if row["kind"] == "round" else f"commit/{row.get('lineage', 'body')}"
    found: dict[str, float] = {}
    for name, value in row.items():
        if name not in ("round", "version"):
            for part, number in _numbers(name, value):
                found[f"{group}/{part}"] = number
    if row["kind"] == "round" and "version" in row and _is_number(row["version"]):
        found[f"{group}/version"] = row["version"]
    if clients:
        for client, metrics in row.get("clients", {}).items():
            for name, value in metrics.items():
                if _is_number(value):
                    found[f"client/{name}/{client}"] = value
    return found


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """What a value of a row comes to, by name."""
    if _is_number(value):
        yield name, value
    elif isinstance(value, list):
        yield name, len(value)
    elif not isinstance(value, dict):
        return
    elif name in ("dropped", "folded"):
        yield ("num_clients" if name == "folded" else name), len(value)
    elif name == "staleness" and value:
        count = sum(value.values())
        yield name, sum(int(age) * number for age, number in value.items()) / (count or 1)
        yield f"{name}_max", max(map(int, value))
    elif name == "compression":
        for flow, told in value.items():
            yield from ((f"{name}/{flow}/{key}", it) for key, it in told.items() if _is_number(it))


def _step(row: Row) -> int:
    """The number of a round, or the version of a commit."""
    return int(row["round"] if row["kind"] == "round" else row["version"])


def _count(value: Any) -> Any:
    """The length of a list; anything else as it is."""
    return len(value) if isinstance(value, list) else value


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)
