"""Wrong variants of real functions: what somebody might well write, and what the protocol doesn't stand.

Each is installed in place of the real one for a run, and some seed has to show that something is wrong. A mutant that
no seed catches is a hole in the simulator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from tests.faults.simulator import wrong_commits, wrong_servers
from tests.faults.simulator.table import MUTANTS, RARE

__all__ = ["MUTANTS", "RARE", "WAITING", "installed", "wrong_commits", "wrong_servers"]

WAITING = {
    "a base that isn't an ancestor": (
        "today the accumulator folds gradients of a branch that a rollback has abandoned; once it closes them as "
        "stale, set ledger.BASES_ARE_ANCESTORS and let the mutant fold them again"
    ),
    "a checksum that nobody reads": (
        "files have no checksum of their own yet; once they have, storage needs a fault that flips a bit, and the "
        "mutant leaves the comparison out"
    ),
}
"""What can't be tried before the library has it, and why."""


@contextmanager
def installed(name: str) -> Iterator[None]:
    """The library with one thing wrong."""
    with ExitStack() as stack:
        for owner, attribute, wrong in (MUTANTS | RARE)[name]():
            stack.enter_context(mock.patch.object(owner, attribute, wrong))
        yield
