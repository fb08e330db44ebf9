"""The page: its head, its figures at a glance, its cards, and the style and script that go into the file itself.

Nothing is loaded from anywhere: the file can be mailed, archived, and opened without a network.
"""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from splitfed.errors import InputError
from splitfed.tracking.history import History
from splitfed.tracking.report import cards, reading
from splitfed.tracking.report.markup import plain, plural, size, span, tag, text
from splitfed.tracking.report.reading import Run


def render(history: History) -> str:
    """The report as HTML.

    Args:
        history: What to report; one in memory will do.

    Raises:
        MissingError: it has neither rounds nor commits.
    """
    return page(reading.read(history))


def write(history: History, path: str | os.PathLike[str]) -> None:
    """Write the report.

    Args:
        history: What to report.
        path: Where; the folder is made if need be, an older report is replaced.

    Raises:
        MissingError: the history has neither rounds nor commits.
        InputError: the file can't be written.
    """
    written = render(history)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(written, encoding="utf-8")
    except OSError as error:
        raise InputError(f"the report can't be written to {os.fspath(path)} ({error}): choose another place") from error


def page(run: Run) -> str:
    """The whole file."""
    name = str(run.about.get("name") or "split federated run")
    resources = files("splitfed.tracking.report")
    head = tag("title", text(f"{name} · splitfed report")) + tag(
        "style", resources.joinpath("page.css").read_text("utf-8")
    )
    drawn = [card(run) for card in (cards.learning, cards.who, cards.when, cards.what, cards.lost, cards.tables)]
    main = tag("main", _header(run, name), _tiles(run), *drawn)
    script = tag("script", resources.joinpath("page.js").read_text("utf-8"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'{head}</head><body>{main}<div id="tip" hidden></div>{script}</body></html>\n'
    )


def _header(run: Run, name: str) -> str:
    facts = [plural(len(run.clients), "client"), plural(len(run.rounds), "round")]
    facts += [f"mode {run.about['mode']}"] if run.about.get("mode") else []
    facts += [f"seed {run.about['seed']}"] if run.about.get("seed") is not None else []
    return tag("header", tag("h1", text(name)), tag("p", text(" · ".join(facts))))


def _tiles(run: Run) -> str:
    last = run.rounds[-1] if run.rounds else {}
    tiles = []
    accuracy, loss, best = reading.value(last, "accuracy"), reading.value(last, "loss"), reading.best(run)
    if accuracy is not None and best is not None:
        tiles.append(("accuracy", f"{100 * accuracy:.1f} %", f"best {100 * best[0]:.1f} % in round {best[1]}"))
    if loss is not None:
        tiles.append(("loss", plain(loss), f"at first {plain(first)}" if (first := _first(run, "loss")) else ""))
    if run.rounds:
        ended = sum(row.get("status", "complete") == "complete" for row in run.rounds)
        tiles.append(
            ("rounds", str(len(run.rounds)), "all complete" if ended == len(run.rounds) else f"{ended} complete")
        )
        folded, given = (
            reading.total(run, "gradients_folded"),
            sum(sum(reading.lost(row).values()) for row in run.rounds),
        )
        tiles.append(("gradients folded", f"{folded:,}", f"{given:,} discarded" if given else "none discarded"))
    if "version" in last:
        halves = f"client halves at version {last['client_version']}" if "client_version" in last else ""
        tiles.append(("body version", f"{last['version']:,}", halves))
    up, down = reading.total(run, "bytes_up"), reading.total(run, "bytes_down")
    if up or down:
        tiles.append(("bytes", size(up + down), f"{size(up)} up, {size(down)} down"))
    seconds, clock = reading.value(last, "seconds"), reading.value(last, "time")
    if seconds is not None:
        virtual = clock is not None and abs(clock - seconds) > 0.01 * max(clock, seconds)
        tiles.append(("time", span(seconds), f"{span(clock)} on the run's clock" if virtual and clock else ""))
    made = [
        tag("div", tag("dt", text(name)), tag("dd", text(figure), tag("small", text(more))))
        for name, figure, more in tiles
    ]
    return tag("dl", *made, class_="tiles")


def _first(run: Run, key: str) -> float | None:
    return next((found for row in run.rounds if (found := reading.value(row, key)) is not None), None)
