"""The page: its header, its metrics at a glance, its cards, its style and script.

Nothing is loaded from anywhere: the file can be mailed, archived, and opened without a network. One
of a run that goes on is read again by the browser itself, and replaced at once: a reader finds the
old page or the new one, never half of it.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias, cast

from splitfed.errors import InputError
from splitfed.quantities import plain, plural, size, span
from splitfed.store.store import GradientStore
from splitfed.tracking.history import History
from splitfed.tracking.report import cards, reading
from splitfed.tracking.report.comparison import comparison
from splitfed.tracking.report.markup import tag, text
from splitfed.tracking.report.participation import participants
from splitfed.tracking.report.reading import Run

_PACKAGE = "splitfed.tracking.report"
_CARDS = (
    cards.learning,
    participants,
    cards.updates,
    cards.by_client,
    cards.discarded,
    cards.tables,
)

# The name of a metric, its value, and a remark.
_Tile = tuple[str, str, str]

Place: TypeAlias = History | GradientStore | str | os.PathLike[str]
"""A run: its history, its store, or where `History.load` finds it."""
Runs: TypeAlias = Place | Iterable[Place] | Mapping[str, Place]
"""One run or several: a mapping has their names."""


def render(runs: Runs, *, refresh: float | None = None) -> str:
    """The report as HTML.

    Args:
        runs: The run to report, or several whose curves then share their axes: histories (one in
            memory will do), stores, or places as for `History.load`; in a mapping by name.
        refresh: The browser reads the page again after so many seconds.

    Raises:
        MissingError: one has neither rounds nor commits.
    """
    return page(_read(runs), refresh)


def write(runs: Runs, path: str | os.PathLike[str], *, refresh: float | None = None) -> None:
    """Write the report.

    Args:
        runs: The run to report, or several, as for `render`.
        path: The file. Its folder is made if need be; an older report is replaced, at once.
        refresh: The browser reads the page again after so many seconds.

    Raises:
        MissingError: a run has neither rounds nor commits.
        InputError: the file can't be written.
    """
    written = render(runs, refresh=refresh)
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}-{secrets.token_hex(8)}")
        try:
            with part.open("x", encoding="utf-8") as file:
                file.write(written)
            if target.exists():
                part.chmod(target.stat().st_mode & 0o777)
            part.replace(target)
        except OSError:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(
            f"the report can't be written to {os.fspath(path)} ({error}): choose another place"
        ) from error


def _read(runs: Runs) -> dict[str, Run]:
    """The runs by their names on the page, each of which is there once."""
    if isinstance(runs, Mapping):
        return {name: reading.read(_history(place)) for name, place in runs.items()}
    is_one = isinstance(runs, History | GradientStore | str | os.PathLike)
    places: list[Any] = [runs] if is_one else list(cast("Iterable[Place]", runs))
    if not places:
        raise InputError("there is no run to report: expected a history, or several")
    found: dict[str, Run] = {}
    for place in places:
        run = reading.read(_history(place))
        name, number = run.name, 2
        while name in found:
            name, number = f"{run.name} ({number})", number + 1
        found[name] = run
    return found


def _history(place: Place) -> History:
    return place if isinstance(place, History) else History.load(place)


def page(runs: Mapping[str, Run], refresh: float | None = None) -> str:
    """The whole file."""
    name = " · ".join(runs)
    resources = files(_PACKAGE)
    again = "" if refresh is None else f'<meta http-equiv="refresh" content="{refresh:g}">'
    title = tag("title", text(f"{name} · splitfed report"))
    style = tag("style", resources.joinpath("page.css").read_text("utf-8"))
    script = tag("script", resources.joinpath("page.js").read_text("utf-8"))
    main = tag("main", *_main(runs, refresh))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{again}'
        f'{title}{style}</head><body>{main}<div id="tip" hidden></div>{script}</body></html>\n'
    )


def _main(runs: Mapping[str, Run], refresh: float | None) -> Iterator[str]:
    watched = ""
    if refresh is not None:
        now = time.strftime("%H:%M:%S")
        watched = f"goes on: as it was at {now}, read again every {span(refresh)}"
    if len(runs) > 1:
        yield _header(f"{len(runs)} runs", [*runs, watched])
        yield comparison(runs)
        return
    ((name, run),) = runs.items()
    yield _header(name, [*_facts(run), watched])
    yield _tiles(run)
    for draw in _CARDS:
        yield draw(run)


def _facts(run: Run) -> Iterator[str]:
    yield plural(len(run.clients), "client")
    if run.rounds:
        yield plural(len(run.rounds), "round")
    else:
        yield plural(len(reading.dots(run)), "commit")
    if run.about.get("mode"):
        yield f"mode {run.about['mode']}"
    # A seed of 0 is one too.
    if run.about.get("seed") is not None:
        yield f"seed {run.about['seed']}"


def _header(name: str, facts: Iterable[str]) -> str:
    return tag("header", tag("h1", text(name)), tag("p", text(" · ".join(filter(None, facts)))))


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
    folded = reading.num_folded(run)
    discarded = sum(reading.num_discarded(run).values())
    remark = f"{discarded:,} discarded" if discarded else "none discarded"
    yield "gradients folded", f"{folded:,}", remark
    if "version" in last:
        remark = ""
        if "client_version" in last:
            remark = f"client halves at version {last['client_version']}"
        yield "body version", f"{last['version']:,}", remark
    elif reading.bodies(run):
        newest = max(reading.bodies(run), key=lambda row: row["time"])
        yield "body version", f"{newest['version']:,}", f"of lineage {newest.get('lineage')}"


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
    seconds = reading.seconds(run)
    clock = reading.value(run.last_round, "time")
    if seconds is not None:
        remark = ""
        # In virtual time the run's clock isn't ours; in real time they differ by a moment only.
        if clock and abs(clock - seconds) > 0.01 * max(clock, seconds):
            remark = f"{span(clock)} on the run's clock"
        yield "time", span(seconds), remark
