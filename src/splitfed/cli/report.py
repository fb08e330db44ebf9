"""`splitfed report`: one HTML file of a run or of several, from their histories or records."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from splitfed.errors import InputError, MissingError

_DESCRIPTION = """\
Draw a run: loss and accuracy of the whole and of each client, who took part when, when updates came
and how stale they were, bytes and classes by client, and what was discarded. A run that kept no
history is drawn from the records of its store, which every server, accumulator and worker leaves:
all but losses and bytes is there. Several runs share the axes of one page. The page is one file
that needs nothing from a network."""


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Describe the verb and its arguments."""
    parser = verbs.add_parser("report", help="draw runs as one HTML file", description=_DESCRIPTION)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run's folder, its store (a folder or URL) or a history.jsonl; several are compared",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=5.0,
        metavar="S",
        help="write the page again every so many seconds until Ctrl-C, while the run goes on; the "
        "browser follows by itself (default: 5)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the report, once or until a signal ends it.

    Raises:
        MissingError: there is no run, or it has no commit and no round as yet.
        FormatError: what is there isn't a run.
        InputError: the file can't be written.
    """
    from splitfed.tracking.history import Source
    from splitfed.tracking.report.page import write

    pause: float | None = arguments.watch
    if pause is None:
        write([Source(place).read() for place in arguments.runs], arguments.output)
        print(arguments.output)
        return 0
    if not 0 < pause < float("inf"):
        raise InputError(
            f"--watch {pause} isn't allowed: expected seconds above 0, such as --watch 5"
        )
    return _watch(arguments.runs, arguments.output, pause)


def _watch(places: list[str], output: Path, pause: float) -> int:
    from splitfed.cli.signals import Stopping
    from splitfed.tracking.history import Source
    from splitfed.tracking.report.page import write

    sources: dict[str, Source] = {}
    is_written = False
    said = ""
    with Stopping() as stopping:
        while not stopping.event.is_set():
            try:
                for place in places:
                    if place not in sources:
                        sources[place] = Source(place)
                write([sources[place].read() for place in places], output, refresh=pause)
                if not is_written:
                    print(output, flush=True)
                is_written = True
            except MissingError as error:
                # A run that will begin in a moment; what is missing is said once.
                if str(error) != said:
                    said = str(error)
                    print(f"splitfed: waiting: {said}", file=sys.stderr, flush=True)
            stopping.event.wait(pause)
    if is_written:
        # The browser stops to ask: nobody writes the page any more.
        write([sources[place].read() for place in places], output)
    return 0
