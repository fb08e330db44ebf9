"""`splitfed rollback`: make the state of an older version the newest one."""

from __future__ import annotations

import argparse
import json
from typing import Any

from splitfed.cli.options import add_store, open_store
from splitfed.errors import InputError

_DESCRIPTION = """\
Make the next version of a lineage from the state of an older one, whose weights are still kept.
Nothing is deleted and no batch counts again. The batches whose effect is undone are listed; what is
pending from the undone versions is closed as stale by the next commit."""


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Describe the verb and its arguments."""
    parser = verbs.add_parser(
        "rollback",
        help="go back to an older version",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_store(parser)
    parser.add_argument(
        "--to", type=int, required=True, metavar="VERSION", help="whose state comes back"
    )
    parser.add_argument(
        "--lineage", default="body", help="body (default), client or body@<client id>"
    )
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Roll back, and print the new version and the batches that are lost.

    Raises:
        InputError: the version isn't older than the newest.
        ExpiredError: its weights aren't kept any more.
        BusyError: an accumulator is at work.
    """
    store = open_store(arguments)
    store.latest_version(arguments.lineage)
    both = ["body", "client"] if store.together().is_begun() else []
    with store.alone([arguments.lineage, *both]):
        if arguments.to < 0:
            raise InputError(f"--to {arguments.to}: expected a version, 0 or more")
        commit, lost = store.roll_back(arguments.to, arguments.lineage)
    if arguments.json:
        print(json.dumps({"version": commit.version, "restored": arguments.to, "lost": lost}))
    else:
        print(f"version {commit.version} of {arguments.lineage} is version {arguments.to} again")
        print("\n".join(f"LOST  {batch}" for batch in lost) or "no batch is lost")
    return 0
