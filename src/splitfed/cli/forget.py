"""`splitfed forget CLIENT`: delete what a store holds of one client."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from splitfed.cli.options import add_store, open_store

_DESCRIPTION = """\
Delete what a store holds of one client: recorded activations, pending gradients, what was kept for
a replay, its mail; a body of its own begins again from the average. Its processes are superseded,
so nothing that they still send counts; a new one may join again. Ids and numbers in commit records,
rounds and history stay, and so does what the body has learned. Accumulators must be stopped; if
servers go on, run it once more for what was under way."""


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Describe the verb and its arguments."""
    parser = verbs.add_parser(
        "forget",
        help="delete what a store holds of one client",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("client", metavar="CLIENT", help="its id, as `splitfed status` lists it")
    add_store(parser)
    parser.add_argument("--dry-run", action="store_true", help="list only, delete nothing")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Forget, and print what is gone and what stays.

    Raises:
        MissingError: there is no such client.
        BusyError: an accumulator is at work.
    """
    from splitfed.diagnostics.forgetting import forget

    done = forget(open_store(arguments), arguments.client, dry_run=arguments.dry_run)
    if arguments.json:
        print(json.dumps({"dry_run": arguments.dry_run, **asdict(done)}))
        return 0
    verb = "would be" if arguments.dry_run else "are"
    if arguments.dry_run:
        print("\n".join(done.keys))
    print(f"{len(done.keys)} files of client {done.client_id!r} {verb} gone")
    for batch in done.closed:
        print(f"CLOSED  {batch}: it waited, and counts nowhere")
    for name in done.restarted:
        print(f"{name} begins again from the average")
    print(f"stays on record: ids and numbers of samples of {done.num_folded} closed batches")
    return 0
