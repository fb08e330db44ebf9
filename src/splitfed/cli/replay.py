"""`splitfed replay`: compute every version of a run again, and compare the bits."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from splitfed.cli.accumulate import add_optimizer, optimizer_factory, scheduler_factory
from splitfed.cli.options import add_body, check_device, load_body, open_store, set_threads
from splitfed.cli.verify import untold
from splitfed.errors import MissingError, StoreError

if TYPE_CHECKING:
    from splitfed.diagnostics.replay import Replayed

_DESCRIPTION = """\
Compute every version of a run again from the record alone (commit records, the activations and
gradients at the cut that were kept, the weights of version 0), and compare weights and optimizer
state with the hashes on record. The run must have been begun with --keep-forwards. Nothing is
written. The exit status is 0 if every version has the same bits, 1 if one hasn't, and 2 if that
can't be told: no run is there, or it was begun without --keep-forwards."""


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Describe the verb and its arguments."""
    parser = verbs.add_parser(
        "replay",
        help="compute every version again, and compare the bits",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_body(parser, writes=False)
    parser.add_argument(
        "--lineage",
        default="body",
        metavar="NAME",
        help="body (default), body@<client id>, or client: APP is the half then",
    )
    add_optimizer(
        parser.add_argument_group("optimizer, if it isn't one of torch.optim"), required=False
    )
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Replay, and print each version; 0 if all have the bits on record.

    Raises:
        InputError: an argument doesn't fit.
    """
    set_threads(arguments)
    store = open_store(arguments)
    from splitfed.diagnostics.replay import replay

    def tell(version: Replayed) -> None:
        if not arguments.json:
            print(_line(version), flush=True)

    try:
        found = replay(
            load_body(arguments.app),
            store,
            lineage=arguments.lineage,
            optimizer=optimizer_factory(arguments) if arguments.optimizer else None,
            lr_scheduler=scheduler_factory(arguments),
            device=check_device(arguments.device) or "cpu",
            on_version=tell,
        )
    except (MissingError, StoreError) as error:
        return untold(error, arguments)
    if arguments.json:
        print(json.dumps({**asdict(found), "ok": found.ok}))
    else:
        same = sum(version.ok for version in found.versions)
        print(f"{same} of {len(found.versions)} versions have the bits on record")
    return 0 if found.ok else 1


def _line(version: Replayed) -> str:
    batches = f", {version.num_batches} batches" if version.kind == "fold" else ""
    verdict = "the same bits" if version.ok else f"{version.verdict.upper()}: {version.what}"
    return f"version {version.version} ({version.kind}{batches}): {verdict}"
