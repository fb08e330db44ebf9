"""What the store has of a batch that a restarted process is about to repeat.

An owner that goes on from a checkpoint repeats what it did after it, under the same numbers. Where
the store has such a batch, the repeated one counts nowhere; but the owner needs its answers, and
they have the same bits only at the version that the batch ran at.

That version is in the gradient's file while the batch is pending, and in the record of the commit
that has closed it afterwards. Which commit that was, the applied tables tell: a batch is in all
from its commit on, so the first is found by halving. They leave the retention window together with
the weights, and beyond it the version couldn't be run anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

from splitfed.errors import ExpiredError
from splitfed.protocol.ids import BatchId
from splitfed.store.batches import Pile
from splitfed.store.lineage import Lineage


@dataclass(frozen=True, slots=True)
class Earlier:
    """A batch as an earlier process left it."""

    is_known: bool
    """Whether it is pending or closed."""
    version: int | None = None
    """The version that it ran at, the oldest of its calls; `None` if that can't be found."""


def find_earlier(lineage: Lineage, pile: Pile, batch: BatchId) -> Earlier:
    """What is known of a batch."""
    header = pile.peek(batch)
    if header is not None:
        # A number that was given up has run nowhere.
        base = None if header["kind"] == "skip" else header["base_version"]
        return Earlier(is_known=True, version=base if isinstance(base, int) else None)
    if batch not in lineage.counted():
        return Earlier(is_known=False)
    return Earlier(is_known=True, version=_closed_at(lineage, batch))


def _closed_at(lineage: Lineage, batch: BatchId) -> int | None:
    """The version that a closed batch ran at, by the record of its commit."""
    high = lineage.head()  # has the batch; `low` hasn't, or nobody can say
    low, reach = high - 1, 1
    while low > 0 and _has(lineage, low, batch):
        high, reach = low, reach * 2
        low = max(0, high - reach)
    while high - low > 1:
        middle = (low + high) // 2
        if _has(lineage, middle, batch):
            high = middle
        else:
            low = middle
    commit = lineage.commit(high)
    if batch not in commit.verdict or batch in commit.skipped:
        return None
    return commit.base_of(batch)


def _has(lineage: Lineage, version: int, batch: BatchId) -> bool:
    """Whether a batch was closed by a version whose table is still there."""
    try:
        return batch in lineage.applied(version)
    except ExpiredError:
        return False
