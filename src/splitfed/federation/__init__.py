"""Rounds of federated training: who is sampled, which updates are admitted, what a round reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["Federation", "PerClient"]

if TYPE_CHECKING:
    from splitfed.federation.federation import Federation
    from splitfed.federation.per_client import PerClient
else:
    from splitfed._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "Federation": "federation.federation",
            "PerClient": "federation.per_client",
        },
    )
