"""The command `splitfed VERB`; each verb has a file of its own.

A verb's module has `add(verbs)`, which describes its arguments and sets `run`, a function from the
parsed arguments to the exit status. It imports what it needs in `run`, so that `--help` doesn't
wait for torch. A user's mistake is reported in one line, without a traceback, with exit status 2;
any other failure, by our own errors or by the system's, with 1. A reader of the output may leave
before its end, as `head` does: that is no failure to report.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from splitfed._version import __version__
from splitfed.cli import (
    accumulate,
    doctor,
    export,
    forget,
    gc,
    inspect,
    repair,
    replay,
    report,
    rollback,
    serve,
    status,
    token,
    verify,
    work,
)
from splitfed.cli.demo import verb as demo
from splitfed.errors import InputError, SplitFedError

_VERBS = (
    accumulate,
    demo,
    doctor,
    export,
    forget,
    gc,
    inspect,
    repair,
    replay,
    report,
    rollback,
    serve,
    status,
    token,
    verify,
    work,
)

# As shells have it: 128 and the number of the signal.
_INTERRUPTED = 130
_BROKEN_PIPE = 141


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print and exit with: every mistake is reported in one place."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see '{self.prog} --help')")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 2 for a user's mistake, 1 for a failure.

    130 is an interrupt, and 141 output that nobody reads any more.

    Args:
        argv: The arguments after the program's name; those of the process if not given.
    """
    try:
        arguments = _parser().parse_args(argv)
        status: int = arguments.run(arguments)
        # Here its failure is reported; at the end of the process it would be a traceback.
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("splitfed: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except SplitFedError as error:
        print(f"splitfed: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except OSError as error:
        _drop_output()
        if isinstance(error, BrokenPipeError):
            return _BROKEN_PIPE
        print(f"splitfed: error: {error}", file=sys.stderr)
        return 1


def _drop_output() -> None:
    """Drop what can't be written: Python would try once more at its end, and report that too."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    # Named here: for `python -m splitfed` argparse would take the name of `__main__.py`.
    parser = _Parser(prog="splitfed", description="Split federated learning for any PyTorch model.")
    parser.add_argument("--version", action="version", version=f"splitfed {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, dest="verb")
    for verb in _VERBS:
        verb.add(verbs)
    return parser
