"""What the store has of a batch that a restarted process is about to repeat.

An owner that goes on from a checkpoint repeats what it did after it, under the same numbers. Where
the store has such a batch, the repeated one counts nowhere; but the owner needs its answers, and
they have the same bits only at the version that the batch ran at.

That version is in the gradient's file while the batch is pending, and in the record of the commit
that has closed it afterwards. Which commit that was, the applied tables tell: a batch is in all
from its commit on, so the first is found by halving. They leave the retention window together with
the weights, and beyond it the version couldn't be run anyway.

The trap: a version at the edge of the window may leave it between the forward and its backward, and
an owner that repeats its batches at its old pace stays near the edge for long. So a version counts
as there only while some that are older are, too.
"""

from __future__ import annotations

from dataclasses import dataclass

from splitfed.errors import ExpiredError
from splitfed.protocol.ids import BatchId
from splitfed.store.batches import Pile
from splitfed.store.batchset import BatchSet
from splitfed.store.lineage import Lineage


@dataclass(frozen=True, slots=True)
class Earlier:
    """A batch as an earlier process left it."""

    is_known: bool
    """Whether it is pending or closed."""
    version: int | None = None
    """The version that it ran at, the oldest of its calls; `None` if it isn't known or leaves."""


def find_earlier(lineage: Lineage, pile: Pile, batch: BatchId) -> Earlier:
    """What is known of a batch."""
    header = pile.peek(batch)
    if header is not None:
        # A number that was given up has run nowhere.
        base = None if header["kind"] == "skip" else header["base_version"]
    elif batch in lineage.counted():
        base = _base_of_closed(lineage, batch)
    else:
        return Earlier(is_known=False)
    if isinstance(base, int) and _stays(lineage, base):
        return Earlier(is_known=True, version=base)
    return Earlier(is_known=True)


def _stays(lineage: Lineage, version: int) -> bool:
    """Whether a version is there, is no abandoned one, and isn't about to leave the window."""
    head = lineage.head()
    spare = 1 + (head - version) // 4
    if lineage.commit(head).is_abandoned(version):
        return False
    return max(0, version - spare) in lineage.kept()


def _base_of_closed(lineage: Lineage, batch: BatchId) -> int | None:
    """The version that a closed batch ran at, by the record of its commit."""
    high = lineage.head()  # has the batch; `low` hasn't, or nobody can say
    low, reach = high - 1, 1
    while low > 0 and batch in (_table(lineage, low) or ()):
        high, reach = low, reach * 2
        low = max(0, high - reach)
    while high - low > 1:
        middle = (low + high) // 2
        if batch in (_table(lineage, middle) or ()):
            high = middle
        else:
            low = middle
    commit = lineage.commit(high)
    if batch not in commit.verdict or batch in commit.skipped:
        return None
    return commit.base_of(batch)


def _table(lineage: Lineage, version: int) -> BatchSet | None:
    """The batches that were closed up to a version, if it is in the retention window."""
    try:
        return lineage.applied(version)
    except ExpiredError:
        return None
