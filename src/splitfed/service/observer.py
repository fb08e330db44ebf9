"""Who counts what a service answers; a service needs nothing of how it is told to anybody."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """Counts answers; `metrics.RequestMetrics` is the one that the commands have."""

    def count(self, path: str, status: int, seconds: float, received: int, sent: int) -> None:
        """Count a request that was answered.

        Args:
            path: Its route, never what a client wrote.
            status: Status of the answer.
            seconds: From its headers to the last byte of the answer.
            received: Bytes of its body.
            sent: Bytes of the answer's body.
        """
        ...

    def error(self, name: str) -> None:
        """Count an error that a request was answered with, by its class."""
        ...
