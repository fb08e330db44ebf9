"""`splitfed repair`: rebuild what is damaged in a store."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from splitfed.cli.options import add_store, open_store
from splitfed.cli.tables import table
from splitfed.cli.verify import untold
from splitfed.errors import BusyError, MissingError

_DESCRIPTION = """\
Rebuild what is damaged or missing, as far as the store holds what it takes: the newest commit
record out of the hint, the table of closed batches out of the records. A newest version whose
weights are lost is rolled back. What is damaged is copied to aside/ and never lost; the ids of
batches that count no more are listed. The exit status is 0 if the store is whole afterwards, else
1; and 2 if nothing was tried: there is no run, or an accumulator is at work."""


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Describe the verb and its arguments."""
    parser = verbs.add_parser(
        "repair",
        help="rebuild what is damaged in a store",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_store(parser)
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Repair, and print what was done; 0 if the store is whole then."""
    from splitfed.diagnostics.repair import repair

    store = open_store(arguments)
    try:
        done = repair(store)
    except (MissingError, BusyError) as error:
        return untold(error, arguments)
    if arguments.json:
        print(json.dumps(asdict(done)))
    else:
        rows = [("done", text) for text in done.actions] or [("done", "nothing: it is whole")]
        rows += [("aside", place) for place in done.aside]
        rows += [("LOST", batch) for batch in done.lost]
        rows += [(damage.kind.upper(), f"{damage.key}: {damage.what}") for damage in done.left]
        print(table(rows))
    return 1 if done.left else 0
