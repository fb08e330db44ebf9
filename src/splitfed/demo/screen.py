"""Who watches a run: told when a phase begins, of each batch, and of the figures of each round."""

from __future__ import annotations

from typing import Any, Protocol

Row = dict[str, Any]


class Screen(Protocol):
    """A terminal, or whatever else shows how a run goes."""

    def begin(self, phase: str, num_batches: int) -> None:
        """Take note of a phase, `federated` or `centralised`, and of how many batches it has."""
        ...

    def batch(self) -> None:
        """Take note of a batch that is done."""
        ...

    def row(self, row: Row) -> None:
        """Take note of the figures of a round: its number, loss, accuracy and others."""
        ...
