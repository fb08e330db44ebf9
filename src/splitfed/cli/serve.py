"""`splitfed serve`: a stateless replica over HTTP.

Who may use it is decided before it listens: only this machine, or clients with tokens, or everybody
if `--insecure` says so. The app is made here once even for several workers, each of which makes its
own: a mistake in APP is then reported in one line, instead of by workers that die and are started
again and again.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import logging
import sys
from typing import TYPE_CHECKING, Any

from splitfed.checks import install
from splitfed.cli.options import (
    LOG_FORMAT,
    add_server,
    add_size_limits,
    given,
    open_server,
    size_limits,
)
from splitfed.errors import InputError

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from splitfed.server.server import SplitServer
    from splitfed.service.http.limits import Limits
    from splitfed.service.http.serve import Place

_DESCRIPTION = """\
Serve a body from a store over HTTP. A replica keeps nothing: run as many as you like on one store,
behind any load balancer, and stop them when you like. SIGTERM lets requests under way end.

Without --tokens only this machine is listened to. Make tokens by 'splitfed token new CLIENT'."""
_NEEDED = ("starlette", "uvicorn", "httptools", "prometheus_client")


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Describe the verb and its arguments."""
    parser = verbs.add_parser(
        "serve",
        help="serve a body over HTTP: a stateless replica",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_server(parser)
    _add_place(parser.add_argument_group("where"))
    _add_access(parser.add_argument_group("for whom"))
    _add_limits(parser.add_argument_group("how much"))
    parser.set_defaults(run=run)


def _add_place(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: %(default)s)"
    )
    group.add_argument(
        "--port", type=int, default=8000, help="0 for any that is free (default: %(default)s)"
    )
    group.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes (default: %(default)s)"
    )
    group.add_argument(
        "--drain-seconds",
        type=int,
        default=30,
        metavar="S",
        help="how long requests under way may take to end after SIGTERM (default: %(default)s)",
    )


def _add_access(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--tokens",
        metavar="FILE",
        help="serve clients whose token is in this file (splitfed token)",
    )
    group.add_argument(
        "--insecure", action="store_true", help="listen beyond this machine without tokens"
    )
    group.add_argument("--tls-cert", metavar="FILE", help="certificate chain: serve HTTPS")
    group.add_argument("--tls-key", metavar="FILE", help="its private key")


def _add_limits(group: argparse._ArgumentGroup) -> None:
    add_size_limits(group)
    for option, unit, about in (
        ("--max-in-flight", "BYTES", "of all requests at once (default: 1 GiB)"),
        ("--max-requests", "N", "at once (default: 32)"),
        ("--max-client-requests", "N", "of one client at once, by its token (default: 8)"),
        ("--max-connections", "N", "open at once (default: 1024)"),
    ):
        group.add_argument(option, type=int, metavar=unit, help=about)
    group.add_argument(
        "--receive-seconds",
        type=float,
        metavar="S",
        help="for a request to arrive (default: 20)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends it.

    Raises:
        InputError: an argument doesn't fit, or something isn't installed.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"serve needs {' and '.join(missing)}: {install('http')}")
    from splitfed.service.http.serve import leave, serve

    _check_access(arguments)
    place = _place(arguments)
    # They cross to the processes of workers; `run` is this very function, and no setting.
    plain = {name: value for name, value in vars(arguments).items() if name != "run"}
    settings = argparse.Namespace(**plain)
    _check_settings(settings)
    _begin_log()
    server = open_server(settings)
    app = _app(server, settings)
    ready = functools.partial(make, settings) if arguments.workers > 1 else lambda: app
    listening = functools.partial(_announce, arguments, server.store.shown)
    if serve(ready, limits(arguments), place, listening):
        leave()
    return 0


def make(arguments: argparse.Namespace) -> Starlette:
    """The app of one process, and its log."""
    _begin_log()
    return _app(open_server(arguments), arguments)


def limits(arguments: argparse.Namespace) -> Limits:
    """The limits that the arguments name; the others by default.

    Raises:
        InputError: one isn't above 0.
    """
    from splitfed.service.http.limits import Limits

    options = {
        "in_flight": "max_in_flight",
        "requests": "max_requests",
        "client_requests": "max_client_requests",
        "connections": "max_connections",
        "receive_seconds": "receive_seconds",
    }
    return Limits(**size_limits(arguments), **given(arguments, options))


def _check_access(arguments: argparse.Namespace) -> None:
    from splitfed.service.http.serve import is_loopback

    if not (arguments.tokens or arguments.insecure or is_loopback(arguments.host)):
        raise InputError(
            f"--host {arguments.host} lets others than this machine in: "
            "give --tokens FILE (made by 'splitfed token new CLIENT --tokens FILE'), "
            "or say --insecure if something in front of it asks who they are"
        )


def _check_settings(arguments: argparse.Namespace) -> None:
    """Refuse before the store is begun what the app would refuse after it."""
    from splitfed.service.http.auth import Tokens

    limits(arguments)
    if arguments.tokens:
        Tokens(arguments.tokens)


def _place(arguments: argparse.Namespace) -> Place:
    from splitfed.service.http.serve import Place

    if arguments.workers < 1 or arguments.drain_seconds < 0:
        raise InputError("--workers takes 1 or more, --drain-seconds 0 or more")
    if arguments.workers > 1 and (arguments.store or "").lower().startswith("memory:"):
        raise InputError(
            f"--workers {arguments.workers}: each would have a {arguments.store} of its own; "
            "give a folder"
        )
    if arguments.tls_key and not arguments.tls_cert:
        raise InputError("--tls-key needs --tls-cert: the certificate that it belongs to")
    return Place(
        host=arguments.host,
        port=arguments.port,
        certificate=arguments.tls_cert,
        key=arguments.tls_key,
        workers=arguments.workers,
        drain_seconds=arguments.drain_seconds,
    )


def _begin_log() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=LOG_FORMAT)
    logging.captureWarnings(True)


def _app(server: SplitServer, arguments: argparse.Namespace) -> Starlette:
    from splitfed.service.http.app import make_app

    return make_app(server, limits=limits(arguments), tokens=arguments.tokens)


def _announce(arguments: argparse.Namespace, store: str, url: str) -> None:
    """Print the address once it is listened at: on standard output, where a script can read it."""
    users = "this machine only"
    if arguments.tokens:
        users = "clients with a token"
    elif arguments.insecure:
        users = "everybody"
    print(f"splitfed: serving on {url}", flush=True)
    print(f"splitfed: {arguments.app} from {store}, for {users}", file=sys.stderr, flush=True)
