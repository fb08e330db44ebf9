"""Wrong variants of real functions: what somebody might well write, and what the protocol doesn't stand.

Each is installed in place of the real one for a run, and some seed has to show that something is wrong. A mutant that
no seed catches is a hole in the simulator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from tests.faults.simulator import wrong_commits, wrong_logs, wrong_servers
from tests.faults.simulator.table import MUTANTS, RARE

__all__ = ["MUTANTS", "RARE", "installed", "wrong_commits", "wrong_logs", "wrong_servers"]


@contextmanager
def installed(name: str) -> Iterator[None]:
    """The library with one thing wrong."""
    with ExitStack() as stack:
        for owner, attribute, wrong in (MUTANTS | RARE)[name]():
            stack.enter_context(mock.patch.object(owner, attribute, wrong))
        yield
