"""The page: its header, its metrics at a glance, its cards, its style and script.

Nothing is loaded from anywhere: the file can be mailed, archived, and opened without a network.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from splitfed.errors import InputError
from splitfed.tracking.history import History
from splitfed.tracking.report import cards, reading
from splitfed.tracking.report.markup import plain, plural, size, span, tag, text
from splitfed.tracking.report.reading import Run

_PACKAGE = "splitfed.tracking.report"
_CARDS = (
    cards.learning,
    cards.participants,
    cards.updates,
    cards.by_client,
    cards.discarded,
    cards.tables,
)

# The name of a metric, its value, and a remark.
_Tile = tuple[str, str, str]


def render(history: History) -> str:
    """The report as HTML.

    Args:
        history: The history to report; one in memory will do.

    Raises:
        MissingError: it has neither rounds nor commits.
    """
    return page(reading.read(history))


def write(history: History, path: str | os.PathLike[str]) -> None:
    """Write the report.

    Args:
        history: The history to report.
        path: The file. Its folder is made if need be; an older report is replaced.

    Raises:
        MissingError: the history has neither rounds nor commits.
        InputError: the file can't be written.
    """
    written = render(history)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(written, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"the report can't be written to {os.fspath(path)} ({error}): choose another place"
        ) from error


def page(run: Run) -> str:
    """The whole file."""
    name = str(run.about.get("name") or "split federated run")
    resources = files(_PACKAGE)
    title = tag("title", text(f"{name} · splitfed report"))
    style = tag("style", resources.joinpath("page.css").read_text("utf-8"))
    script = tag("script", resources.joinpath("page.js").read_text("utf-8"))
    main = tag("main", _header(run, name), _tiles(run), *(card(run) for card in _CARDS))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'{title}{style}</head><body>{main}<div id="tip" hidden></div>{script}</body></html>\n'
    )


def _header(run: Run, name: str) -> str:
    facts = [plural(len(run.clients), "client"), plural(len(run.rounds), "round")]
    if run.about.get("mode"):
        facts.append(f"mode {run.about['mode']}")
    # A seed of 0 is one too.
    if run.about.get("seed") is not None:
        facts.append(f"seed {run.about['seed']}")
    return tag("header", tag("h1", text(name)), tag("p", text(" · ".join(facts))))


def _tiles(run: Run) -> str:
    """The metrics at a glance: where the run ended, and what it took."""
    tiles = [*_quality(run), *_progress(run), *_cost(run)]
    made = [
        tag("div", tag("dt", text(name)), tag("dd", text(value), tag("small", text(remark))))
        for name, value, remark in tiles
    ]
    return tag("dl", *made, class_="tiles")


def _quality(run: Run) -> Iterator[_Tile]:
    accuracy = reading.value(run.last_round, "accuracy")
    best = reading.best(run)
    if accuracy is not None and best is not None:
        remark = f"best {100 * best[0]:.1f} % in round {best[1]}"
        yield "accuracy", f"{100 * accuracy:.1f} %", remark
    loss = reading.value(run.last_round, "loss")
    if loss is not None:
        first = reading.first_value(run, "loss")
        yield "loss", plain(loss), f"at first {plain(first)}" if first else ""


def _progress(run: Run) -> Iterator[_Tile]:
    last = run.last_round
    if run.rounds:
        complete = sum(row.get("status", "complete") == "complete" for row in run.rounds)
        remark = "all complete" if complete == len(run.rounds) else f"{complete} complete"
        yield "rounds", str(len(run.rounds)), remark
        folded = reading.total(run, "gradients_folded")
        discarded = sum(sum(reading.discarded(row).values()) for row in run.rounds)
        remark = f"{discarded:,} discarded" if discarded else "none discarded"
        yield "gradients folded", f"{folded:,}", remark
    if "version" in last:
        remark = ""
        if "client_version" in last:
            remark = f"client halves at version {last['client_version']}"
        yield "body version", f"{last['version']:,}", remark


def _cost(run: Run) -> Iterator[_Tile]:
    up = reading.total(run, "bytes_up")
    down = reading.total(run, "bytes_down")
    if up or down:
        yield "bytes", size(up + down), f"{size(up)} up, {size(down)} down"
    round_trips = reading.total(run, "round_trips")
    if round_trips:
        yield "round trips", f"{round_trips:,}", f"{round_trips / len(run.rounds):,.0f} a round"
    behind = reading.staleness(run)
    if behind is not None:
        yield "staleness", f"{behind[0]:.3g}", f"commits on average, at most {behind[1]}"
    seconds = reading.value(run.last_round, "seconds")
    clock = reading.value(run.last_round, "time")
    if seconds is not None:
        remark = ""
        # In virtual time the run's clock isn't ours; in real time they differ by a moment only.
        if clock and abs(clock - seconds) > 0.01 * max(clock, seconds):
            remark = f"{span(clock)} on the run's clock"
        yield "time", span(seconds), remark
