"""The store as a mailbox: a client posts requests as files, a worker answers them."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["Worker"]

if TYPE_CHECKING:
    from splitfed.service.mailbox.worker import Worker
else:
    from splitfed._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "Worker": "service.mailbox.worker",
        },
    )
