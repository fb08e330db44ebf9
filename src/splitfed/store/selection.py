"""Which of the batches that wait a commit takes up, chosen by their ids.

Whoever ends a round has judged each batch before, and has put the judgement on record. A commit that is given it folds
exactly those ids, whoever makes it and whatever has arrived since: that is how a round ends once, in the same bits,
though the one who ended it was killed and two others finish it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from splitfed.errors import FormatError
from splitfed.protocol.ids import BatchId
from splitfed.store.batchset import BatchSet


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Judged batches; one that is in none of the sets goes on waiting."""

    fold: BatchSet = field(default_factory=BatchSet)
    """To be folded, if they are fit for it."""
    stale: BatchSet = field(default_factory=BatchSet)
    """To be closed as too old."""
    rejected: BatchSet = field(default_factory=BatchSet)
    """To be closed as refused."""

    def __contains__(self, batch: BatchId) -> bool:
        return batch in self.fold or self.closes(batch)

    def closes(self, batch: BatchId) -> bool:
        """Whether a batch is to be closed and not folded."""
        return batch in self.stale or batch in self.rejected

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"fold": self.fold.to_json(), "stale": self.stale.to_json(), "rejected": self.rejected.to_json()}

    @classmethod
    def from_json(cls, data: Any) -> Selection:
        """The selection that `to_json` wrote.

        Raises:
            FormatError: it isn't one.
        """
        if not isinstance(data, dict) or set(data) != {"fold", "stale", "rejected"}:
            raise FormatError(f"this isn't a selection of batches: {str(data)[:80]}")
        return cls(**{name: BatchSet.from_json(ids) for name, ids in data.items()})
