"""`splitfed gc`: delete what nobody can need any more."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict
from typing import Any

from splitfed.checks import at_least
from splitfed.cli.options import add_store, open_store
from splitfed.cli.tables import table
from splitfed.quantities import size

_DESCRIPTION = """\
Delete what no process of a run can need any more: files of attempts that no record names, calls of
superseded processes and of versions that are gone, gradients that are counted already, what was
kept for a replay of batches that weren't folded. Commits sweep up what leaves the retention window
by themselves; this is for the rest. Accumulators must be stopped; servers may go on."""


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Describe the verb and its arguments."""
    parser = verbs.add_parser(
        "gc",
        help="delete what nobody can need any more",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_store(parser)
    parser.add_argument("--dry-run", action="store_true", help="list only, delete nothing")
    parser.add_argument(
        "--keep-versions",
        type=int,
        metavar="N",
        help="also what is older than the newest N versions: as many as the accumulators keep, "
        "or more (default: nothing that is whole)",
    )
    parser.add_argument("--aside", action="store_true", help="also what `repair` has set aside")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Collect, and print what was deleted, by reason.

    Raises:
        InputError: fewer than two versions to keep.
        MissingError: no run is there.
        BusyError: an accumulator is at work.
    """
    from splitfed.diagnostics.garbage import collect

    if arguments.keep_versions is not None:
        at_least("--keep-versions", arguments.keep_versions, 2)
    found = collect(
        open_store(arguments),
        keep_versions=arguments.keep_versions,
        aside=arguments.aside,
        dry_run=arguments.dry_run,
    )
    if arguments.json:
        print(json.dumps({"dry_run": arguments.dry_run, "files": [asdict(one) for one in found]}))
        return 0
    if arguments.dry_run:
        for one in found:
            print(one.key)
    numbers = Counter(one.why for one in found)
    total = {why: sum(one.num_bytes for one in found if one.why == why) for why in numbers}
    rows = [(f"{number} files", size(total[why]), why) for why, number in numbers.items()]
    if rows:
        print(table(rows))
    verb = "would be deleted" if arguments.dry_run else "deleted"
    print(f"{len(found)} files, {size(sum(total.values()))}, {verb}")
    return 0
