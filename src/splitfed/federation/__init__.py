"""Rounds of federated training: who is sampled, which updates count, what a round reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["Federation", "PerClient", "as_body", "make_body"]

if TYPE_CHECKING:
    from splitfed.federation.federation import Federation, as_body
    from splitfed.federation.per_client import PerClient, make_body
else:
    from splitfed._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "Federation": "federation.federation",
            "PerClient": "federation.per_client",
            "as_body": "federation.federation",
            "make_body": "federation.per_client",
        },
    )
