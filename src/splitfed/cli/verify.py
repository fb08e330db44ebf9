"""`splitfed verify`: whether every file of a store is what was written."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from splitfed.cli.options import add_store, open_store
from splitfed.cli.tables import table
from splitfed.errors import MissingError, StoreError

_DESCRIPTION = """\
Read every file of a store and compare it with its checksum; follow the commit records from the
first to the newest; compare the newest version with its record. Nothing is written, and the run
may go on. The exit status is 0 if all is well, 1 if something is damaged, and 2 if that can't be
told: no run is there, or the storage refuses to list or read it."""


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Describe the verb and its arguments."""
    parser = verbs.add_parser(
        "verify",
        help="whether every file of a store is what was written",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_store(parser, writes=False)
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what is wrong; 0 if nothing is, 1 if something is, 2 if that can't be told."""
    from splitfed.diagnostics.integrity import verify

    store = open_store(arguments)
    try:
        found = verify(store)
    except (MissingError, StoreError) as error:
        return untold(error, arguments)
    if arguments.json:
        print(json.dumps({**asdict(found), "ok": found.ok}))
    else:
        rows = [("store", f"{found.url}: {found.num_files} files, {found.seconds:.2f} s")]
        rows += [(damage.kind.upper(), f"{damage.key}: {damage.what}") for damage in found.damages]
        if found.ok:
            rows.append(("health", "good"))
        else:
            rows.append(("then", "restore these from a copy, or run splitfed repair"))
        print(table(rows))
    return 0 if found.ok else 1


def untold(error: Exception, arguments: argparse.Namespace) -> int:
    """Print why it can't be told how a store is, and return the exit status of that."""
    if arguments.json:
        print(json.dumps({"ok": None, "error": str(error)}))
    else:
        print(f"can't tell: {error}")
    return 2
