"""The store that a verb works on: its URL is an argument, its credentials never are.

Arguments are seen by everyone on the machine and end up in shell histories, so keys and endpoints of an object store
come from the environment, as its client library reads it, or fsspec: FSSPEC_<PROTOCOL>_<OPTION>.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from splitfed.errors import InputError

if TYPE_CHECKING:
    from splitfed.store.store import GradientStore

VARIABLE = "SPLITFED_STORE"


def add_store(parser: argparse.ArgumentParser, *, writes: bool = True) -> None:
    """Describe the arguments that say which store, and how durably the verb writes to it."""
    parser.add_argument(
        "--store",
        metavar="URL",
        default=os.environ.get(VARIABLE),
        help=f"where the run lies: a folder, or a URL such as s3://bucket/run (default: ${VARIABLE}); credentials "
        "are taken from the environment",
    )
    if not writes:
        parser.set_defaults(sync="power")
        return
    parser.add_argument(
        "--sync",
        choices=("power", "process"),
        default="power",
        help="what a batch that was answered survives: a power cut, or the death of processes only, which is faster "
        "(default: power)",
    )


def open_store(arguments: argparse.Namespace) -> GradientStore:
    """The store that the arguments name; nothing is read or written yet.

    Raises:
        InputError: none is named, or the URL isn't one.
    """
    if not arguments.store:
        raise InputError(f"which store? Give --store URL, such as --store runs/demo, or set {VARIABLE}")
    from splitfed.store.store import GradientStore

    return GradientStore(arguments.store, sync=arguments.sync)
