"""The summary of a study: curves, how far they swing, and tables of accuracy and of what it cost."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mnist_study.baselines import Row

Curve = dict[str, Any]
Place = tuple[str, str, str]
"""Data, skew and method of a cell."""
SETTLED = 4
"""After so many rounds no mode should drop any more."""
SWINGING = 50
"""From this round on the swings of the study's rule are measured."""
NAMES = {
    "centralised": "all digits in one place",
    "grouped": "`grouped`",
    "round": "`round`",
    "buffered": "`buffered`",
    "sflv2": "`sflv2`",
    "sflv1": "`sflv1`",
    "synchronous": "`synchronous`",
    "fedavg": "FedAvg of the whole model",
    "local": "each owner alone (mean)",
}
SKEWS = {"iid": "IID", "one-class": "one class an owner"}


def curve(name: str, rows: Iterable[Row]) -> Curve:
    """Drain a training, with a line on the terminal per round; returns each figure as a list over rounds."""
    drained = []
    for row in rows:
        drained.append(row)
        right = f"accuracy {row['accuracy']:.4f}  loss {row['loss']:.4f}"
        print(f"{name:32} round {row['round']:3}  {right}  {row['seconds']:7.1f} s", flush=True)
    return {key: [row[key] for row in drained] for key in drained[-1] if key != "round"}


def swings(curve: Curve) -> dict[str, float]:
    """How far accuracy goes up and down from round 50 on: the range, and the largest drop from round to round."""
    tail = curve["accuracy"][SWINGING - 1 :]
    return {"lowest": min(tail), "highest": max(tail), "spread": max(tail) - min(tail), "largest_drop": drop(tail)}


def drop(accuracy: list[float]) -> float:
    """The largest drop from one round to the next; 0 if there is none."""
    return max([0.0, *(before - after for before, after in itertools.pairwise(accuracy))])


class Table:
    """The cells of a study as Markdown: rows are trainings, columns are skews.

    Args:
        curves: By place, the curve of each seed.
        rounds: How many rounds each has.
        target: The accuracy whose virtual time is told.
    """

    def __init__(self, curves: Mapping[Place, Mapping[int, Curve]], rounds: int, target: float = 0.85) -> None:
        self._curves = curves
        self._rounds = rounds
        self._target = target

    def text(self) -> str:
        """A table of accuracies for each data set, one of costs, and one of virtual time where there is any."""
        data = list(dict.fromkeys(place[0] for place in self._curves))
        timed = [place for place, seeds in self._curves.items() if "time" in next(iter(seeds.values()))]
        times = [self._times(timed)] if timed else []
        return "\n\n".join([*(self._accuracies(name) for name in data), self._costs(), *times])

    def _accuracies(self, data: str) -> str:
        """Mean accuracy, its spread, and in brackets the distance to all data in one place with the same seeds."""
        skews = [
            skew for skew in dict.fromkeys(place[1] for place in self._curves if place[0] == data) if skew != "any"
        ]
        title = f"Test accuracy after {self._rounds} passes, **{data}**"
        head = [title, *(SKEWS.get(skew, f"α = {skew}") for skew in skews)]
        lines = [_line(head), "|---" * len(head) + "|"]
        for method in self._methods():
            lines.append(_line([NAMES[method], *(self._accuracy((data, skew, method)) for skew in skews)]))
        return "\n".join(lines)

    def _accuracy(self, place: Place) -> str:
        data, _, method = place
        curves = self._curves.get((data, "any", method) if method == "centralised" else place, {})
        if not curves:
            return "–"
        last = {seed: curve["accuracy"][-1] for seed, curve in curves.items()}
        text = f"{statistics.mean(last.values()):.4f}"
        if len(last) > 1:
            text += f" ± {statistics.stdev(last.values()):.4f}"
        best = self._curves.get((data, "any", "centralised"), {})
        behind = [100 * (last[seed] - best[seed]["accuracy"][-1]) for seed in last if seed in best]
        if method == "centralised" or not behind:
            return text
        return f"{text} ({statistics.mean(behind):+.2f})".replace("(-", "(−")

    def _costs(self) -> str:
        """What a pass costs, as the range over all data, skews and seeds."""
        head = ["Of a pass", "MB", "round trips", "staleness", "at most", "commits", "seconds", "largest drop"]
        lines = [_line(head), "|---" * len(head) + "|"]
        for method in self._methods():
            curves = [one for place, seeds in self._curves.items() if place[2] == method for one in seeds.values()]
            lines.append(_line([NAMES[method], *_costs_of(curves, self._rounds)]))
        return "\n".join(lines)

    def _times(self, timed: Iterable[Place]) -> str:
        """Virtual seconds to the target, by the end of the pass that reached it, and of a pass; means over seeds."""
        head = ["Virtual seconds", f"until {self._target:g}", "of a pass", "batches too stale"]
        lines = [_line(head), "|---" * len(head) + "|"]
        for data, skew, method in timed:
            curves = self._curves[data, skew, method].values()
            first = [_reached(one, self._target) for one in curves]
            reached = [time for time in first if time is not None]
            until = f"{statistics.mean(reached):,.0f}" if len(reached) == len(first) else "never"
            of_pass = statistics.mean(one["time"][-1] / self._rounds for one in curves)
            dropped = statistics.mean(sum(one["dropped"]) for one in curves)
            name = f"{data}, {SKEWS.get(skew, f'α = {skew}')}: {NAMES[method]}"
            lines.append(_line([name, until, f"{of_pass:,.0f}", f"{dropped:,.0f}"]))
        return "\n".join(lines)

    def _methods(self) -> list[str]:
        trained = {place[2] for place in self._curves}
        return [method for method in NAMES if method in trained]


def _reached(curve: Curve, target: float) -> float | None:
    """The virtual time at which a curve was at the target first; `None` if it never was."""
    return next((time for time, right in zip(curve["time"], curve["accuracy"], strict=True) if right >= target), None)


def _costs_of(curves: list[Curve], rounds: int) -> list[str]:
    """The cells of a line of costs."""

    def span(figure: Callable[[Curve], float], digits: int = 0) -> str:
        values = [f"{figure(curve):,.{digits}f}" for curve in sorted(curves, key=figure)]
        return values[0] if values[0] == values[-1] else f"{values[0]} to {values[-1]}"

    traffic = [
        span(lambda curve: sum(curve["bytes_up"] + curve["bytes_down"]) / rounds / 1e6, 1),
        span(lambda curve: sum(curve["round_trips"]) / rounds),
    ]
    server = ["", "", ""]
    if "commits" in curves[0]:
        server = [
            span(lambda curve: statistics.mean(curve["staleness"]), 1),
            span(lambda curve: max(curve["staleness_most"])),
            span(lambda curve: curve["commits"][-1] / rounds),
        ]
    seconds = span(lambda curve: curve["seconds"][-1] / rounds, 1)
    settled = span(lambda curve: drop(curve["accuracy"][SETTLED - 1 :]), 4) if rounds > SETTLED else ""
    return [*traffic, *server, seconds, settled]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
