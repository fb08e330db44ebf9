"""`splitfed work`: answer the requests of clients that reach only the store."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import TYPE_CHECKING, Any

from splitfed.cli.options import (
    LOG_FORMAT,
    add_metrics,
    add_server,
    add_size_limits,
    check_metrics,
    check_poll,
    metrics_at,
    open_server,
    size_limits,
)
from splitfed.cli.signals import Stopping, keep_going

if TYPE_CHECKING:
    from splitfed.server.server import SplitServer
    from splitfed.service.metrics import RequestMetrics

_DESCRIPTION = """\
Answer the requests that clients post in a store: for sites whose only way out is an object store.
A client is given the store's URL in place of a server's. Any number of workers may run on one
store, and any may be killed at any moment: another takes its request over. SIGTERM ends it after
the request under way."""


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Describe the verb and its arguments."""
    parser = verbs.add_parser(
        "work",
        help="answer clients that reach only the store",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_server(parser)
    parser.add_argument(
        "--claim-seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="take over what another worker has claimed and not answered for so long; "
        "longer than any call takes to compute (default: %(default)s)",
    )
    parser.add_argument(
        "--poll",
        type=float,
        default=0.5,
        metavar="S",
        help="most seconds between two looks while no request is pending (default: %(default)s)",
    )
    parser.add_argument(
        "--once", action="store_true", help="answer the pending requests, once, and exit"
    )
    add_size_limits(parser.add_argument_group("how much"))
    add_metrics(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Work until a signal ends it, or once.

    Raises:
        InputError: an argument doesn't fit.
    """
    check_poll(arguments)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format=LOG_FORMAT)
    from splitfed.service.limits import MessageLimits
    from splitfed.service.mailbox.worker import Worker

    limits = MessageLimits(**size_limits(arguments))
    is_told = check_metrics(arguments)
    server = open_server(arguments)
    metrics = _metrics(server) if is_told else None
    worker = Worker(
        server,
        server.store,
        claim_seconds=arguments.claim_seconds,
        limits=limits,
        observer=metrics,
    )
    if arguments.once:
        print(f"splitfed: {worker.step()} answered", flush=True)
        server.hand_over()
        return 0
    with Stopping() as stopping, metrics_at(arguments, metrics):
        print(f"splitfed: working in {server.store.shown}", flush=True)
        keep_going(lambda: worker.run(stopping.event, poll=arguments.poll), stopping.event)
    server.hand_over()
    return 0


def _metrics(server: SplitServer) -> RequestMetrics:
    from splitfed.service.metrics import RequestMetrics

    return RequestMetrics(server.uses.counts)
