"""What client and server share: ids, messages, pytrees, their bytes, transport and retries.

Nothing in this package reads a file or opens a connection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["BatchId", "Transport", "register_container"]

if TYPE_CHECKING:
    from splitfed.protocol.ids import BatchId
    from splitfed.protocol.pytree import register_container
    from splitfed.protocol.transport import Transport
else:
    from splitfed._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "BatchId": "protocol.ids",
            "Transport": "protocol.transport",
            "register_container": "protocol.pytree",
        },
    )
