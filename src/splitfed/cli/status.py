"""`splitfed status`: what a run looks like from outside. It only reads, so it may be pointed at a live store."""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from splitfed.cli.stores import add_store, open_store
from splitfed.cli.tables import age, counts, size, table
from splitfed.errors import InputError

if TYPE_CHECKING:
    from splitfed.store.status import LineageStatus, StoreStatus

_DESCRIPTION = """\
Show the versions of a run, the gradients that wait, their clients and staleness, the bytes stored, and what is wrong,
if anything is: the exit status is 1 then. Nothing is written, so any number may watch a live store."""
_CLEAR = "\x1b[H\x1b[2J"


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Describe the verb and its arguments."""
    parser = verbs.add_parser(
        "status",
        help="versions, waiting gradients, clients, bytes and health of a store",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_store(parser, writes=False)
    parser.add_argument("--json", action="store_true", help="one JSON object a line, for programs")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=2.0,
        metavar="SECONDS",
        help="look again and again until Ctrl-C (every 2 seconds)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the status once, or until Ctrl-C; 1 if something is wrong.

    Raises:
        InputError: the pause between two looks is no time.
        MissingError: there is no run in the store.
        StoreError: the storage failed.
    """
    if arguments.watch is not None and not 0 < arguments.watch <= threading.TIMEOUT_MAX:
        raise InputError(f"--watch {arguments.watch} isn't allowed: expected seconds above 0, such as --watch 5")
    from splitfed.store.status import read_status

    store = open_store(arguments)
    while True:
        found = read_status(store)
        if arguments.json:
            print(json.dumps(found.to_json()), flush=True)
        else:
            print(f"{_CLEAR if arguments.watch and sys.stdout.isatty() else ''}{_page(found)}", flush=True)
        if arguments.watch is None:
            return 1 if found.problems else 0
        try:
            threading.Event().wait(arguments.watch)
        except KeyboardInterrupt:
            return 0


def _page(found: StoreStatus) -> str:
    seconds = f"{found.seconds:.2f} s"
    head = [
        ("store", f"{found.url}, format {found.format}, numerics {found.numerics}"),
        ("holds", f"{found.num_objects} objects, {size(sum(found.bytes.values()))}, looked through in {seconds}"),
        *([("requests", f"{found.num_requests} wait for a worker")] if found.num_requests else []),
        *(("PROBLEM", problem) for problem in found.problems),
        *([] if found.problems else [("health", "good")]),
    ]
    lineages = [("lineage", "version", "kept", "waiting", "waiting by staleness", "last commit")]
    lineages += [_row(lineage) for lineage in found.lineages]
    stored = [("bytes", ""), *((kind, size(count)) for kind, count in found.bytes.items())]
    return "\n\n".join([table(head), table(lineages), *_clients(found), table(stored)])


def _row(lineage: LineageStatus) -> tuple[str, str, str, str, str, str]:
    commit = lineage.commits[0] if lineage.commits else None
    last = "-"
    if commit is not None:
        refused = [f"{n} {what}" for n, what in ((commit.num_stale, "stale"), (commit.num_rejected, "rejected")) if n]
        parts = [f"{commit.num_batches} batches", f"{commit.num_samples:g} samples", *refused]
        done = ", ".join(parts) if commit.kind == "fold" else commit.kind
        last = f"{done}, {age(time.time() - commit.time)} ago"
    ages = counts(lineage.staleness) + (f" (and {lineage.num_unread} not read)" if lineage.num_unread else "")
    kept = f"{lineage.oldest} to {lineage.version}"
    return lineage.name, str(lineage.version), kept, str(lineage.num_waiting), ages, last


def _clients(found: StoreStatus) -> list[str]:
    """The table of clients, if there are any: per lineage what waits and what was closed."""
    names = sorted({*found.clients, *(name for one in found.lineages for name in (*one.waiting, *one.closed))})
    if not names:
        return []
    rows = [("client", "process", *(f"{lineage.name}: waiting, closed" for lineage in found.lineages))]
    for name in names:
        figures = (f"{one.waiting.get(name, 0)}, {one.closed.get(name, 0)}" for one in found.lineages)
        rows.append((name, str(found.clients.get(name, "-")), *figures))
    return [table(rows)]
