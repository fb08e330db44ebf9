"""The metrics of a history as the report shows them: series, states of clients, totals.

Sources differ in what they record. A metric that no row has is left out of the page, or its card
says that it isn't known; nothing is made up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from splitfed.errors import FormatError, MissingError
from splitfed.store.rows import Row
from splitfed.tracking.history import History
from splitfed.tracking.report.charts import Curve, Dot

STATES = ("took part", "late", "missing", "dropped")
"""What may become of a sampled client in a round."""
DISCARDED = ("stale", "rejected", "skipped")
"""Why a gradient isn't folded: each is counted as `gradients_REASON` in the row of a round."""

# Times of commits are seconds since the start, or since 1970 where nobody knew the start: no run
# lasts for three years, and no clock is behind 1973.
_EPOCH = 1e8
_SHAPES = {
    "clients": dict,
    "compression": dict,
    "dropped": dict,
    "first_versions": dict,
    "folded": dict,
    "settings": dict,
    "sampled": list,
    "participants": list,
    "late": list,
    "missing": list,
}


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """The rows of one run, by kind."""

    about: Row
    """The newest `run` row; empty if there is none."""
    rounds: Sequence[Row]
    commits: Sequence[Row]
    clients: Mapping[str, Mapping[str, Any]]
    """The run row's entry of each client; an empty one for clients that only rounds name."""

    @property
    def name(self) -> str:
        """What the run is called."""
        return str(self.about.get("name") or "split federated run")

    @property
    def first_versions(self) -> Mapping[str, int]:
        """Of each lineage whose early commits aren't told, the first version that is."""
        return self.about.get("first_versions") or {}

    @property
    def last_round(self) -> Row:
        """The newest round; empty if there is none."""
        return self.rounds[-1] if self.rounds else {}


def read(history: History) -> Run:
    """The rows of a history by kind, once each is known to have the shape that the report needs.

    Raises:
        MissingError: it has neither rounds nor commits.
        FormatError: a row isn't what its kind says.
    """
    rounds = history.rounds()
    commits = history.commits()
    about = history.run or {}
    if not rounds and not commits:
        raise MissingError("the run has no round and no commit as yet: expected one at least")
    for row in (about, *rounds, *commits):
        _check(row)
    clients = dict(about.get("clients", {}))
    for row in rounds:
        for key in ("clients", "sampled", "participants", "late"):
            for name in row.get(key, ()):
                clients.setdefault(name, {})
    for row in commits:
        for name in row.get("folded", ()):
            clients.setdefault(name, {})
    in_order = dict(sorted(clients.items(), key=lambda item: natural(item[0])))
    return Run(about, rounds, commits, in_order)


def _check(row: Row) -> None:
    kind = row.get("kind")
    for name, shape in _SHAPES.items():
        if name in row and not isinstance(row[name], shape):
            raise FormatError(
                f"{name!r} of a row of kind {kind!r} is {str(row[name])[:40]!r}: "
                f"expected a {shape.__name__}"
            )
    for name, key in (("clients", "client"), ("compression", "flow")):
        if not all(isinstance(known, dict) for known in row.get(name, {}).values()):
            raise FormatError(
                f"{name!r} of a row of kind {kind!r} holds what isn't a dict: expected one by {key}"
            )


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sorting key that puts `client-10` after `client-9`: digits count as the number they are."""
    parts: list[tuple[int, int, str]] = []
    digits = ""
    # The sentinel ends a number at the end of the name.
    for letter in f"{name}\0":
        if letter.isdecimal():
            digits += letter
            continue
        if digits:
            parts.append((0, int(digits), ""))
            digits = ""
        parts.append((1, 0, letter))
    return parts


def value(row: Mapping[str, Any], *names: str) -> float | None:
    """The first of the named metrics that is a number."""
    for name in names:
        found = row.get(name)
        if isinstance(found, int | float) and not isinstance(found, bool):
            return float(found)
    return None


def first_value(run: Run, name: str) -> float | None:
    """A metric in the first round that has it."""
    for row in run.rounds:
        found = value(row, name)
        if found is not None:
            return found
    return None


def total(run: Run, name: str) -> int:
    """The sum of a metric over all rounds."""
    return int(sum(value(row, name) or 0 for row in run.rounds))


def best(run: Run) -> tuple[float, int] | None:
    """The highest accuracy and the first round that reached it."""
    known = [row for row in run.rounds if value(row, "accuracy") is not None]
    found = [(row["accuracy"], row["round"]) for row in known]
    return max(found, key=lambda pair: (pair[0], -pair[1])) if found else None


# ---------------------------------------------------------------------------------------- curves


def at_rounds(run: Run) -> dict[str, dict[int, float]]:
    """The place of each round on each axis: `round`, `time` and `bytes` so far.

    An axis on which a round has no place is left out: its curves would have gaps there.
    """
    axes: dict[str, dict[int, float]] = {"round": {}, "time": {}, "bytes": {}}
    crossed = 0.0
    for row in run.rounds:
        number = row["round"]
        axes["round"][number] = number
        time = value(row, "time", "seconds")
        if time is not None:
            axes["time"][number] = time
        if "bytes_up" in row or "bytes_down" in row:
            crossed += _bytes_up(row) + _bytes_down(row)
            axes["bytes"][number] = crossed
    return {name: places for name, places in axes.items() if len(places) == len(run.rounds) > 0}


def series(
    run: Run, places: Mapping[int, float], shown: Mapping[str, str], client: Sequence[str]
) -> list[Curve]:
    """Lines over the rounds: the run's own, then one for each client that has the metric.

    Args:
        run: The run.
        places: The place of each round on the axis.
        shown: The run's metrics and their names in the chart; all but the first are dashed.
        client: The metric of a client; the first of these that it has.
    """
    lines = []
    for number, (key, name) in enumerate(shown.items()):
        values = [(places[row["round"]], value(row, key)) for row in run.rounds]
        points = [(x, y) for x, y in values if y is not None]
        if points:
            lines.append(Curve(name, points, dashed=number > 0))
    return lines + _client_series(run, places, client)


def _client_series(run: Run, places: Mapping[int, float], names: Sequence[str]) -> list[Curve]:
    found: dict[str, list[tuple[float, float]]] = {}
    for row in run.rounds:
        for client, metrics in row.get("clients", {}).items():
            y = value(metrics, *names)
            if y is not None:
                found.setdefault(client, []).append((places[row["round"]], y))
    return [Curve(client, found[client], client=True) for client in run.clients if client in found]


def has_client_evaluations(run: Run) -> bool:
    """Whether clients report metrics of an evaluation, or only those of their training."""
    for row in run.rounds:
        for metrics in row.get("clients", {}).values():
            if "accuracy" in metrics or "loss" in metrics:
                return True
    return False


# --------------------------------------------------------------------------------------- clients


def states(row: Row) -> dict[str, str]:
    """The state of each client in a round: one of `STATES`, or 'sampled' while nothing is known."""
    found = dict.fromkeys(row.get("sampled", ()), "sampled")
    # A client may be in several lists: the last word on it is that its update was dropped.
    found |= dict.fromkeys(row.get("missing", ()), "missing")
    found |= dict.fromkeys(row.get("participants", ()), "took part")
    found |= dict.fromkeys(row.get("late", ()), "late")
    found |= dict.fromkeys(row.get("dropped", ()), "dropped")
    return found


def rounds_say_who(run: Run) -> bool:
    """Whether any round names the clients that took part."""
    return any(states(row) for row in run.rounds)


def tally(row: Row) -> list[int]:
    """The number of clients in each of `STATES` in a round."""
    found = list(states(row).values())
    return [found.count(state) for state in STATES]


def discarded(row: Row) -> dict[str, int]:
    """The number of a round's gradients that weren't folded, by reason; without pending ones."""
    return {reason: int(row.get(f"gradients_{reason}") or 0) for reason in DISCARDED}


def dropped(run: Run) -> list[tuple[int, str, object]]:
    """The updates of clients that were dropped: the round, the client, and why."""
    return [
        (row["round"], client, reason)
        for row in run.rounds
        for client, reason in row.get("dropped", {}).items()
    ]


def traffic(run: Run) -> dict[str, tuple[float, float]]:
    """Bytes up and down of each client over all rounds, of those that are known."""
    found: dict[str, tuple[float, float]] = {}
    for row in run.rounds:
        for client, metrics in row.get("clients", {}).items():
            if "bytes_up" in metrics or "bytes_down" in metrics:
                up, down = found.get(client, (0.0, 0.0))
                found[client] = (up + _bytes_up(metrics), down + _bytes_down(metrics))
    return {client: found[client] for client in run.clients if client in found}


def num_bytes(run: Run) -> int:
    """Bytes that crossed the cuts over all rounds, both ways; 0 if they weren't counted."""
    return total(run, "bytes_up") + total(run, "bytes_down")


def seconds(run: Run) -> float | None:
    """How long the run took: by its last round or, without rounds, from first to last commit."""
    found = value(run.last_round, "seconds", "time")
    times = [dot.time for dot in dots(run)]
    return found if found is not None or not times else max(times) - min(times)


def compression(run: Run) -> dict[str, tuple[int, int, float | None]]:
    """Of each flow: its bytes over all rounds, exact and as sent, and the error in the newest."""
    found: dict[str, tuple[int, int, float | None]] = {}
    for row in run.rounds:
        for flow, told in (row.get("compression") or {}).items():
            exact, sent, _ = found.get(flow, (0, 0, None))
            exact += int(value(told, "exact_bytes") or 0)
            sent += int(value(told, "sent_bytes") or 0)
            found[flow] = (exact, sent, value(told, "error"))
    return found


def _bytes_up(metrics: Mapping[str, Any]) -> float:
    return metrics.get("bytes_up") or 0


def _bytes_down(metrics: Mapping[str, Any]) -> float:
    return metrics.get("bytes_down") or 0


def batches_by_client(run: Run) -> dict[str, int]:
    """How many batches of each client were folded, of those with any; updates of halves aside."""
    found = Counter[str]()
    for row in bodies(run):
        found.update(row.get("folded") or {})
    if not found:
        for row in run.rounds:
            for client, metrics in row.get("clients", {}).items():
                found[client] += int(value(metrics, "batches") or 0)
    return {client: found[client] for client in run.clients if found[client]}


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """A stretch of time, and how many batches of each client commits folded in it."""

    start: float
    """In seconds since the run's first commit that is known."""
    end: float
    folded: Mapping[str, int]


def stretches(run: Run, most: int) -> list[Stretch]:
    """The time of the commits in equal stretches, for a run without rounds.

    Args:
        run: The run.
        most: How many stretches there may be; no more than there are commits.
    """
    rows = [row for row in bodies(run) if row.get("folded") and value(row, "time") is not None]
    if not rows:
        return []
    start = min(row["time"] for row in rows)
    length = max(row["time"] for row in rows) - start
    count = min(most, len(rows))
    folded = [Counter[str]() for _ in range(count)]
    for row in rows:
        place = int(count * (row["time"] - start) / length) if length else 0
        folded[min(place, count - 1)].update(row["folded"])
    width = length / count
    return [Stretch(width * n, width * (n + 1), held) for n, held in enumerate(folded)]


# --------------------------------------------------------------------------------------- commits


def bodies(run: Run) -> list[Row]:
    """The commits of bodies, the one that all share or those of clients: not of client halves."""
    return [row for row in run.commits if row.get("lineage") != "client"]


def progress(run: Run) -> list[tuple[float, float]]:
    """How many batches were folded so far, over seconds since the run began."""
    found = sorted((dot for dot in dots(run) if dot.lineage != "client"), key=lambda dot: dot.time)
    points = []
    folded = 0.0
    for dot in found:
        folded += dot.num_batches
        points.append((dot.time, folded))
    return points or _progress_of_rounds(run)


def _progress_of_rounds(run: Run) -> list[tuple[float, float]]:
    points = []
    folded = 0.0
    for row in run.rounds:
        time = value(row, "time", "seconds")
        count = value(row, "gradients_folded", "batches")
        if time is not None and count is not None:
            folded += count
            points.append((time, folded))
    return points


def num_folded(run: Run) -> int:
    """How many batches were folded, by the rounds or, without any, by the commits."""
    if run.rounds:
        return total(run, "gradients_folded")
    return sum(int(row.get("num_batches") or 0) for row in bodies(run))


def num_discarded(run: Run) -> dict[str, int]:
    """How many gradients weren't folded, by reason; by the rounds or, without any, the commits."""
    if run.rounds:
        return {reason: sum(discarded(row)[reason] for row in run.rounds) for reason in DISCARDED}
    return {
        reason: sum(int(row.get(f"num_{reason}") or 0) for row in bodies(run))
        for reason in DISCARDED
    }


def dots(run: Run) -> list[Dot]:
    """The commits as marks of the timeline.

    Those that folded nothing, such as a lineage's first version, are left out.
    """
    rows = [row for row in run.commits if value(row, "time") is not None and row.get("num_batches")]
    start = min((row["time"] for row in rows if row["time"] > _EPOCH), default=0.0)
    return [_dot(row, start) for row in rows]


def _dot(row: Row, start: float) -> Dot:
    return Dot(
        time=row["time"] - start if row["time"] > _EPOCH else row["time"],
        delay=value(row, "delay"),
        staleness=_mean(row.get("staleness") or {}),
        num_batches=row["num_batches"],
        lineage=str(row.get("lineage", "body")),
        versions=(row["version"], row["version"]),
    )


def _mean(staleness: Mapping[str, int]) -> float:
    """The mean of the ages, each as often as it is counted."""
    count = sum(staleness.values())
    if not count:
        return 0.0
    return sum(int(age) * number for age, number in staleness.items()) / count


def ages(run: Run) -> dict[str, int]:
    """The number of the body's folded gradients by staleness.

    Ages up to 9 stand alone; beyond, each class is twice as wide as the one before.
    """
    found = _body_ages(run)
    if not found:
        return {}
    oldest = max(found)
    named = {str(age): found.get(age, 0) for age in range(min(oldest, 9) + 1)}
    low = 10
    while low <= oldest:
        counts = [count for age, count in found.items() if low <= age < 2 * low]
        named[f"{low}–{2 * low - 1}"] = sum(counts)
        low *= 2
    return named


def staleness(run: Run) -> tuple[float, int] | None:
    """How many commits the body's folded gradients were behind: on average, and at most."""
    found = _body_ages(run)
    if not found:
        return None
    return sum(age * count for age, count in found.items()) / sum(found.values()), max(found)


def fresh(run: Run) -> float | None:
    """The share of the body's folded gradients that were no commit behind."""
    found = _body_ages(run)
    return found.get(0, 0) / sum(found.values()) if found else None


def _body_ages(run: Run) -> dict[int, int]:
    """The number of the body's folded gradients by the commits that they were behind."""
    found: dict[int, int] = {}
    for row in bodies(run):
        for age, count in (row.get("staleness") or {}).items():
            found[int(age)] = found.get(int(age), 0) + count
    return {age: count for age, count in found.items() if count}
