"""`splitfed verify` and `splitfed repair`: whether a store is whole, and making it so again."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from splitfed.cli.options import add_store, open_store
from splitfed.cli.tables import table
from splitfed.errors import BusyError, MissingError, StoreError

_VERIFY = """\
Read every file of a store and compare it with its checksum; follow the commit records from the
first to the newest; compare the newest version with its record. Nothing is written, and the run
may go on. The exit status is 0 if all is well, 1 if something is damaged, and 2 if that can't be
told: no run is there, or the storage refuses to list or read it."""
_REPAIR = """\
Rebuild what is damaged or missing, as far as the store holds what it takes: commit records out of
the weights, the table of closed batches out of the records. A newest version whose weights are
lost is rolled back. What is damaged is copied to aside/ and never lost; the ids of batches that
count no more are listed. The exit status is 0 if the store is whole afterwards, else 1; and 2 if
nothing was tried: there is no run, or an accumulator is at work."""


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Describe the verbs and their arguments."""
    for name, run, words, said in (
        ("verify", run_verify, "whether every file of a store is what was written", _VERIFY),
        ("repair", run_repair, "rebuild what is damaged in a store", _REPAIR),
    ):
        parser = verbs.add_parser(
            name,
            help=words,
            description=said,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_store(parser, writes=name == "repair")
        parser.add_argument("--json", action="store_true", help="as JSON, for programs")
        parser.set_defaults(run=run)


def run_verify(arguments: argparse.Namespace) -> int:
    """Print what is wrong; 0 if nothing is, 1 if something is, 2 if that can't be told."""
    from splitfed.diagnostics.integrity import verify

    store = open_store(arguments)
    try:
        found = verify(store)
    except (MissingError, StoreError) as error:
        return _untold(error, arguments)
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


def run_repair(arguments: argparse.Namespace) -> int:
    """Repair, and print what was done; 0 if the store is whole then."""
    from splitfed.diagnostics.repair import repair

    store = open_store(arguments)
    try:
        done = repair(store)
    except (MissingError, BusyError) as error:
        return _untold(error, arguments)
    if arguments.json:
        print(json.dumps(asdict(done)))
    else:
        rows = [("done", text) for text in done.actions] or [("done", "nothing: it is whole")]
        rows += [("aside", place) for place in done.aside]
        rows += [("LOST", batch) for batch in done.lost]
        rows += [(damage.kind.upper(), f"{damage.key}: {damage.what}") for damage in done.left]
        print(table(rows))
    return 1 if done.left else 0


def _untold(error: Exception, arguments: argparse.Namespace) -> int:
    if arguments.json:
        print(json.dumps({"ok": None, "error": str(error)}))
    else:
        print(f"can't tell: {error}")
    return 2
