"""The body that a verb serves, and how: what `serve` and `work` have in common.

The number of threads is part of the numerics class, and torch reads it before it computes, so it is set first.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from splitfed.cli.apps import load_body, load_object
from splitfed.cli.stores import add_store, open_store
from splitfed.errors import InputError

if TYPE_CHECKING:
    from splitfed.server.server import SplitServer


def add_body(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments that every computing verb has: the body, the store, and what computes."""
    parser.add_argument(
        "app",
        metavar="APP",
        help="the body as module:attribute: an nn.Module, or a function that returns it, such as my_model:body",
    )
    add_store(parser)
    parser.add_argument("--device", metavar="D", help="where to compute, such as cuda:0 (default: the body's own)")
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads of torch; all processes of a run need the same number for the same bits (default: torch's)",
    )


def add_server(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of a `SplitServer`."""
    add_body(parser)
    parser.add_argument(
        "--loss",
        metavar="MODULE:ATTRIBUTE",
        help="for client.loss(x, y): a function of outputs and target, such as torch.nn.functional:cross_entropy",
    )
    parser.add_argument(
        "--keep-graphs",
        type=int,
        default=8,
        metavar="N",
        help="forwards whose graph stays in memory, which saves their recompute; 0 for none (default: %(default)s)",
    )


def set_threads(arguments: argparse.Namespace) -> None:
    """Let torch compute with as many threads as the arguments say.

    Raises:
        InputError: fewer than one, or more than torch can count.
    """
    if arguments.threads is None:
        return
    if not 1 <= arguments.threads <= 4096:
        raise InputError(f"--threads is {arguments.threads}: expected 1 to 4096, as many as there are cores at most")
    import torch

    torch.set_num_threads(arguments.threads)


def open_server(arguments: argparse.Namespace) -> SplitServer:
    """The server that the arguments describe; it begins the store if nobody has.

    Raises:
        InputError: an argument doesn't fit.
    """
    set_threads(arguments)
    if arguments.keep_graphs < 0:
        raise InputError(f"--keep-graphs is {arguments.keep_graphs}: expected 0 or more")
    store = open_store(arguments)
    from splitfed.server.server import SplitServer

    loss = None if arguments.loss is None else load_object(arguments.loss, "--loss")
    if loss is not None and not callable(loss):
        raise InputError(f"--loss {arguments.loss!r} is a {type(loss).__name__}: expected a function")
    return SplitServer(
        load_body(arguments.app),
        store,
        device=check_device(arguments.device),
        loss_fn=loss,
        keep_graphs=arguments.keep_graphs,
    )


def check_device(name: str | None) -> str | None:
    """The name of a device, if torch knows it and has it here.

    Raises:
        InputError: it doesn't.
    """
    if name is None:
        return None
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        told = str(error).splitlines()[0]
        raise InputError(f"--device {name!r} can't be used: {told}") from error
    return name
