"""`splitfed report`: one HTML file of a run, from its history."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
Draw a run from its history: loss and accuracy of the whole and of each client, who took part in
which round, when updates came and how stale they were, bytes and classes by client, and what was
discarded. The page is one file that needs nothing from a network."""


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Describe the verb and its arguments."""
    parser = verbs.add_parser(
        "report", help="draw a run as one HTML file", description=_DESCRIPTION
    )
    parser.add_argument(
        "run_at",
        metavar="RUN",
        help="a run's folder, its store (a folder or URL) or a history.jsonl",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="default: %(default)s",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the report.

    Raises:
        MissingError: there is no history, or it has no round as yet.
        FormatError: the file there isn't a history.
        InputError: the file can't be written.
    """
    from splitfed.tracking.history import History
    from splitfed.tracking.report.page import write

    write(History.load(arguments.run_at), arguments.output)
    print(arguments.output)
    return 0
