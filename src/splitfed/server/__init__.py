"""The split server: forward and backward of the body, with no state between two requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["SplitServer"]

if TYPE_CHECKING:
    from splitfed.server.server import SplitServer
else:
    from splitfed._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "SplitServer": "server.server",
        },
    )
