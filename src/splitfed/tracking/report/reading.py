"""What a history says, as the report shows it: series, states of clients, totals.

Sources differ in what they know. A figure that no row has is left out of the page, or its card says that it isn't
known; nothing is made up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from splitfed.errors import FormatError, MissingError
from splitfed.store.rows import Row
from splitfed.tracking.history import History
from splitfed.tracking.report.charts import Curve, Points
from splitfed.tracking.report.columns import Dot

STATES = ("took part", "late", "missing", "dropped")
_EPOCH = 1e8  # a time beyond is one since 1970, not since the start
_SHAPES = dict.fromkeys(("clients", "dropped", "settings"), dict) | dict.fromkeys(
    ("sampled", "participants", "late", "missing"), list
)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """The rows of one run, by kind."""

    about: Row
    """The newest `run` row; empty if there is none."""
    rounds: Sequence[Row]
    commits: Sequence[Row]
    clients: Mapping[str, Mapping[str, Any]]
    """What the run row says of each client; of one that it doesn't know, nothing."""


def read(history: History) -> Run:
    """Sort the rows of a history.

    Raises:
        MissingError: it has neither rounds nor commits.
        FormatError: a row isn't what its kind says.
    """
    rounds, commits, about = history.rounds(), history.commits(), history.run or {}
    if not rounds and not commits:
        raise MissingError("the history has no round and no commit as yet: expected one at least")
    for row in (about, *rounds, *commits):
        _check(row)
    clients = dict(about.get("clients", {}))
    for row in rounds:
        for name in [
            *row.get("clients", {}),
            *row.get("sampled", []),
            *row.get("participants", []),
            *row.get("late", []),
        ]:
            clients.setdefault(name, {})
    return Run(about, rounds, commits, dict(sorted(clients.items(), key=lambda item: natural(item[0]))))


def _check(row: Row) -> None:
    for name, shape in _SHAPES.items():
        if name in row and not isinstance(row[name], shape):
            raise FormatError(
                f"{name!r} of a row of kind {row['kind']!r} is {str(row[name])[:40]!r}: expected a {shape.__name__}"
            )
    if not all(isinstance(known, dict) for known in row.get("clients", {}).values()):
        raise FormatError(f"'clients' of a row of kind {row['kind']!r} holds what isn't a dict: expected one by client")


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts `client-10` after `client-9`."""
    parts, digits = [], ""
    for letter in f"{name}\0":
        if letter.isdecimal():
            digits += letter
            continue
        parts += [(0, int(digits), "")] if digits else []
        parts.append((1, 0, letter))
        digits = ""
    return parts


def at_rounds(run: Run) -> dict[str, dict[int, float]]:
    """Where each round lies on each axis: by number, by clock, by bytes so far."""
    axes: dict[str, dict[int, float]] = {"round": {}, "time": {}, "bytes": {}}
    total = 0.0
    for row in run.rounds:
        axes["round"][row["round"]] = row["round"]
        when = value(row, "time", "seconds")
        if when is not None:
            axes["time"][row["round"]] = when
        if "bytes_up" in row or "bytes_down" in row:
            total += (row.get("bytes_up") or 0) + (row.get("bytes_down") or 0)
            axes["bytes"][row["round"]] = total
    return {name: found for name, found in axes.items() if len(found) == len(run.rounds)}


def value(row: Mapping[str, Any], *names: str) -> float | None:
    """The first of the named figures that is a number."""
    found = (row.get(name) for name in names)
    return next((float(v) for v in found if isinstance(v, int | float) and not isinstance(v, bool)), None)


def series(run: Run, where: Mapping[int, float], shown: Mapping[str, str], client: Sequence[str]) -> list[Curve]:
    """Lines over the rounds: the run's own, then one for each client that has the figure.

    Args:
        run: What happened.
        where: Where each round lies.
        shown: The run's figures and what they are called; all but the first are dashed.
        client: The figure of a client; the first that it has.
    """
    lines = []
    for number, (key, name) in enumerate(shown.items()):
        points = _points((where[row["round"]], value(row, key)) for row in run.rounds)
        lines += [Curve(name, points, dashed=number > 0)] if points else []
    found: dict[str, list[tuple[float, float]]] = {}
    for row in run.rounds:
        for one, figures in row.get("clients", {}).items():
            y = value(figures, *client)
            if y is not None:
                found.setdefault(one, []).append((where[row["round"]], y))
    lines += [Curve(one, found[one], client=True) for one in run.clients if one in found]
    return lines


def _points(pairs: Iterator[tuple[float, float | None]]) -> Points:
    return [(x, y) for x, y in pairs if y is not None]


def states(row: Row) -> dict[str, str]:
    """What became of each client in a round: one of `STATES`, or 'sampled' while nothing is known."""
    found = dict.fromkeys(row.get("sampled", ()), "sampled")
    for name, key in (("missing", "missing"), ("took part", "participants"), ("late", "late"), ("dropped", "dropped")):
        found |= dict.fromkeys(row.get(key, ()), name)
    return found


def tally(row: Row) -> list[int]:
    """How many clients came to each of `STATES` in a round."""
    found = list(states(row).values())
    return [found.count(kind) for kind in STATES]


def lost(row: Row) -> dict[str, int]:
    """How many gradients of a round weren't folded, by reason; without those that only wait."""
    return {name: int(row.get(f"gradients_{name}") or 0) for name in ("stale", "rejected", "skipped")}


def traffic(run: Run) -> dict[str, tuple[float, float]]:
    """Bytes up and down of each client over all rounds, of those that are known."""
    found: dict[str, tuple[float, float]] = {}
    for row in run.rounds:
        for client, figures in row.get("clients", {}).items():
            if "bytes_up" in figures or "bytes_down" in figures:
                up, down = found.get(client, (0.0, 0.0))
                found[client] = (up + (figures.get("bytes_up") or 0), down + (figures.get("bytes_down") or 0))
    found = {client: found[client] for client in run.clients if client in found}
    return found


def dots(run: Run) -> list[Dot]:
    """The commits on the timeline; those that folded nothing, such as a lineage's first version, are left out."""
    rows = [row for row in run.commits if value(row, "time") is not None and row.get("num_batches")]
    start = min((row["time"] for row in rows if row["time"] > _EPOCH), default=0.0)
    return [
        Dot(
            time=row["time"] - (start if row["time"] > _EPOCH else 0.0),
            delay=value(row, "delay"),
            staleness=_mean(row.get("staleness") or {}),
            num_batches=row["num_batches"],
            lineage=str(row.get("lineage", "body")),
            versions=(row["version"], row["version"]),
        )
        for row in rows
    ]


def _mean(staleness: Mapping[str, int]) -> float:
    total = sum(staleness.values())
    return sum(int(age) * count for age, count in staleness.items()) / total if total else 0.0


def ages(run: Run) -> dict[str, int]:
    """How many of the body's folded gradients had which staleness: single ones up to 9, then by doubling."""
    found: dict[int, int] = {}
    for row in run.commits:
        if row.get("lineage") == "client":
            continue
        for age, count in (row.get("staleness") or {}).items():
            found[int(age)] = found.get(int(age), 0) + count
    if not found:
        return {}
    named: dict[str, int] = {str(age): found.get(age, 0) for age in range(min(max(found), 9) + 1)}
    low = 10
    while low <= max(found):
        named[f"{low}–{2 * low - 1}"] = sum(count for age, count in found.items() if low <= age < 2 * low)
        low *= 2
    return named


def total(run: Run, key: str) -> int:
    """The sum of a figure over all rounds."""
    return int(sum(value(row, key) or 0 for row in run.rounds))


def best(run: Run) -> tuple[float, int] | None:
    """The highest accuracy and its round."""
    found = [(row["accuracy"], row["round"]) for row in run.rounds if value(row, "accuracy") is not None]
    return max(found, key=lambda pair: (pair[0], -pair[1])) if found else None
