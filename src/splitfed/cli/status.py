"""`splitfed status`: the state of a run, from its store. It only reads, so the run may go on."""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from splitfed.cli.options import add_store, open_store
from splitfed.cli.tables import table
from splitfed.errors import InputError
from splitfed.quantities import age, counts, size

if TYPE_CHECKING:
    from splitfed.store.status import LineageStatus, StoreStatus

_DESCRIPTION = """\
Show the versions of a run, the gradients that wait, their clients and staleness, the bytes stored,
and what is wrong, if anything is: the exit status is 1 then. Nothing is written, so any number may
watch a live store."""
# Codes of a terminal: the cursor to the top left, and everything erased.
_CLEAR = "\x1b[H\x1b[2J"
_LINEAGE_HEADS = ("lineage", "version", "kept", "waiting", "waiting by staleness", "last commit")


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
    pause = arguments.watch
    if pause is not None and not 0 < pause <= threading.TIMEOUT_MAX:
        raise InputError(
            f"--watch {pause} isn't allowed: expected seconds above 0, such as --watch 5"
        )
    from splitfed.store.status import read_status

    store = open_store(arguments)
    while True:
        found = read_status(store)
        _show(found, arguments)
        if pause is None:
            return 1 if found.problems else 0
        try:
            threading.Event().wait(pause)
        except KeyboardInterrupt:
            # The one way to end a watch, so no failure.
            return 0


def _show(found: StoreStatus, arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps(found.to_json()), flush=True)
    elif arguments.watch and sys.stdout.isatty():
        print(f"{_CLEAR}{_page(found)}", flush=True)
    else:
        print(_page(found), flush=True)


def _page(found: StoreStatus) -> str:
    lineages = [_LINEAGE_HEADS, *(_lineage_row(lineage) for lineage in found.lineages)]
    stored = [("bytes", ""), *((kind, size(count)) for kind, count in found.bytes.items())]
    parts = [table(_store_rows(found)), table(lineages), *_clients(found), table(stored)]
    return "\n\n".join(parts)


def _store_rows(found: StoreStatus) -> list[tuple[str, str]]:
    held = f"{found.num_objects} objects, {size(sum(found.bytes.values()))}"
    rows = [
        ("store", f"{found.url}, format {found.format}, numerics {found.numerics}"),
        ("holds", f"{held}, looked through in {found.seconds:.2f} s"),
    ]
    logs = [lineage.name for lineage in found.lineages if lineage.durability == "log"]
    if logs:
        rows.append(
            ("log", f"{', '.join(logs)}: a batch is kept as what its gradient follows from")
        )
    rows += [("compressed", told) for told in map(_compressed, found.lineages) if told]
    if found.num_requests:
        rows.append(("requests", f"{found.num_requests} wait for a worker"))
    rows += [("PROBLEM", problem) for problem in found.problems]
    if not found.problems:
        rows.append(("health", "good"))
    return rows


def _compressed(lineage: LineageStatus) -> str:
    """What compression did, as clients told with the updates of the newest commit that says so."""
    for commit in lineage.commits:
        told = [
            f"{name} {flow.ratio:.0%} of the bytes, changed by {flow.relative_error:.2%}"
            for name, flow in commit.flows.items()
            if flow.coded
        ]
        if told:
            return f"{', '.join(told)} (version {commit.version} of {lineage.name})"
    return ""


def _lineage_row(lineage: LineageStatus) -> tuple[str, str, str, str, str, str]:
    staleness = counts(lineage.staleness)
    if lineage.num_unread:
        staleness += f" (and {lineage.num_unread} not read)"
    return (
        lineage.name,
        str(lineage.version),
        f"{lineage.oldest} to {lineage.version}",
        str(lineage.num_waiting),
        staleness,
        _last_commit(lineage),
    )


def _last_commit(lineage: LineageStatus) -> str:
    if not lineage.commits:
        return "-"
    commit = lineage.commits[0]
    ago = f"{age(time.time() - commit.time)} ago"
    # A first version or a rollback folds no batches: its kind says what it is.
    if commit.kind != "fold":
        return f"{commit.kind}, {ago}"
    parts = [f"{commit.num_batches} batches", f"{commit.num_samples:g} samples"]
    if commit.num_stale:
        parts.append(f"{commit.num_stale} stale")
    if commit.num_rejected:
        parts.append(f"{commit.num_rejected} rejected")
    return ", ".join([*parts, ago])


def _clients(found: StoreStatus) -> list[str]:
    """The table of clients, if there are any: the pending and the closed batches per lineage."""
    names = set(found.clients)
    for lineage in found.lineages:
        names.update(lineage.waiting, lineage.closed)
    if not names:
        return []
    heads = [f"{lineage.name}: waiting, closed" for lineage in found.lineages]
    rows = [("client", "process", *heads)]
    for name in sorted(names):
        batches = [
            f"{lineage.waiting.get(name, 0)}, {lineage.closed.get(name, 0)}"
            for lineage in found.lineages
        ]
        rows.append((name, str(found.clients.get(name, "-")), *batches))
    return [table(rows)]
