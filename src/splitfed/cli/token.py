"""`splitfed token`: make, list and revoke the tokens of a service's clients.

A token is shown once, when it is made; the file has its hash only. It goes to standard output
alone, so that a shell can take it: `export SPLITFED_TOKEN=$(splitfed token new hospital-a)`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from splitfed.errors import InputError

_DESCRIPTION = """\
Make, list and revoke the tokens that 'splitfed serve --tokens FILE' asks for. The file holds
hashes only; a running server sees a change at its next request."""


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Describe the verb and its arguments."""
    parser = verbs.add_parser(
        "token",
        help="make or revoke the tokens of clients",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True, dest="action")
    for name, run, about in (
        ("new", new, "make a token for a client, and print it"),
        ("revoke", revoke, "revoke all tokens of a client"),
        ("list", show, "print the clients that have a token"),
    ):
        description = f"{about[0].upper()}{about[1:]}."
        action = actions.add_parser(name, help=about, description=description)
        if name != "list":
            action.add_argument("client", metavar="CLIENT", help="the client_id that it is for")
        action.add_argument(
            "--tokens",
            type=Path,
            default=Path("tokens.txt"),
            metavar="FILE",
            help="the file (default: %(default)s)",
        )
        action.set_defaults(run=run)


def new(arguments: argparse.Namespace) -> int:
    """Make a token and print it."""
    from splitfed.service.http.auth import new_token

    print(new_token(arguments.tokens, arguments.client))
    print(
        f"splitfed: client {arguments.client!r} is in {arguments.tokens}; "
        "its token is shown this once",
        file=sys.stderr,
    )
    return 0


def revoke(arguments: argparse.Namespace) -> int:
    """Revoke a client's tokens.

    Raises:
        InputError: it has none.
    """
    from splitfed.service.http.auth import revoke as remove

    found = remove(arguments.tokens, arguments.client)
    if not found:
        raise InputError(f"client {arguments.client!r} has no token in {arguments.tokens}")
    print(f"splitfed: {found} of client {arguments.client!r} revoked", file=sys.stderr)
    return 0


def show(arguments: argparse.Namespace) -> int:
    """Print the clients that have a token."""
    from splitfed.service.http.auth import clients

    for client_id in clients(arguments.tokens):
        print(client_id)
    return 0
