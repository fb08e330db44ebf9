"""Several runs on one page: their curves on the same axes, and a table of where each ended.

A run without rounds, as that of a server and its accumulator, has no accuracy or loss: it is in the
table and in the chart of its batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from splitfed.quantities import percent, plain, size, span
from splitfed.tracking.report import reading
from splitfed.tracking.report.cards import AXES, axis_switch, over_axes
from splitfed.tracking.report.charts import Curve, curves, run_class
from splitfed.tracking.report.markup import card, cards, legend, table, tag
from splitfed.tracking.report.reading import Run

_Value = Callable[[Run], float | None]
_METRICS: dict[str, tuple[_Value, Callable[[float], str]]] = {
    "accuracy": (lambda run: reading.value(run.last_round, "accuracy"), percent),
    "best accuracy": (lambda run: (reading.best(run) or (None,))[0], percent),
    "loss": (lambda run: reading.value(run.last_round, "loss", "train_loss"), plain),
    "clients": (lambda run: len(run.clients), plain),
    "rounds": (lambda run: len(run.rounds) or None, plain),
    "commits": (lambda run: len(reading.dots(run)) or None, plain),
    "batches folded": (reading.num_folded, plain),
    "discarded": (lambda run: sum(reading.num_discarded(run).values()), plain),
    "fresh": (reading.fresh, percent),
    "mean staleness": (lambda run: (reading.staleness(run) or (None,))[0], plain),
    "bytes": (lambda run: reading.num_bytes(run) or None, size),
    "time": (reading.seconds, span),
}


def comparison(runs: Mapping[str, Run]) -> str:
    """The cards of several runs.

    Args:
        runs: The runs, by the names that they have on the page.
    """
    return _table(runs) + _learning(runs) + _progress(runs)


def _key(runs: Mapping[str, Run]) -> str:
    """The colour of each run."""
    return legend([(f"k-run {run_class(number)}", name) for number, name in enumerate(runs)])


def _table(runs: Mapping[str, Run]) -> str:
    lines = []
    known = [
        name
        for name, (read, _) in _METRICS.items()
        if any(read(run) is not None for run in runs.values())
    ]
    for name, run in runs.items():
        line = [name]
        for metric in known:
            read, write = _METRICS[metric]
            found = read(run)
            line.append("" if found is None else write(found))
        lines.append(line)
    return cards(card("Where they ended", table(["run", *known], lines), wide=True))


def _learning(runs: Mapping[str, Run]) -> str:
    accuracies = _by_axis(runs, ("accuracy",))
    losses = _by_axis(runs, ("loss",)) or _by_axis(runs, ("train_loss",))
    if not accuracies and not losses:
        return ""
    top = tag("div", _key(runs), axis_switch({**accuracies, **losses}), class_="bar-top")
    accuracy = over_axes("Accuracy by round", accuracies, percent, ceiling=1.0)
    loss = over_axes("Loss by round", losses, plain)
    parts = []
    if accuracy:
        parts.append(card("Accuracy", accuracy))
    if loss:
        parts.append(card("Loss", loss))
    return tag("div", top, *parts, class_="cards learning")


def _by_axis(runs: Mapping[str, Run], metrics: Sequence[str]) -> dict[str, list[Curve]]:
    """The curves of a metric over each axis that all runs with the metric have."""
    found: dict[str, list[Curve]] = {}
    having = {
        name: run
        for name, run in runs.items()
        if any(reading.value(row, *metrics) is not None for row in run.rounds)
    }
    places = {name: reading.at_rounds(run) for name, run in having.items()}
    for axis in AXES:
        if having and all(axis in axes for axes in places.values()):
            found[axis] = []
            for number, (name, run) in enumerate(runs.items()):
                if name in having:
                    shown = dict.fromkeys(metrics, name)
                    (line,) = reading.series(run, places[name][axis], shown, ())
                    found[axis].append(replace(line, run=number))
    return found


def _progress(runs: Mapping[str, Run]) -> str:
    """How the batches and the commits of each added up over time."""
    batches: list[Curve] = []
    commits: list[Curve] = []
    for number, (name, run) in enumerate(runs.items()):
        times = sorted(dot.time for dot in reading.dots(run) if dot.lineage != "client")
        made = [(time, float(count)) for count, time in enumerate(times, 1)]
        for lines, points in ((batches, reading.progress(run)), (commits, made)):
            if points:
                lines.append(Curve(name, points, run=number))
    parts = []
    for title, lines, about in (
        ("Batches over time", batches, "How many gradients of batches were folded so far."),
        ("Commits over time", commits, "How many versions of the body were made so far."),
    ):
        if lines:
            drawing = curves(title, lines, AXES["time"], plain)
            parts.append(card(title, _key(runs) + drawing, about))
    return cards(*parts)
